"""What is exported has the form that vLLM reads: its rules, restated from the files of its repository named here."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.adapters import adapted
from tests.helpers import Tiny
from vft.adapter_files import export_adapter
from vft.config import LoraConfig
from vft.serving import MAX_RANKS, not_served, vllm_serve

LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""Last parts of the decoder's layers that take adapters (`packed_modules_mapping` and what is beside it)."""


@dataclass(frozen=True)
class Served:
    """What vLLM has of a family."""

    architecture: str
    """A key of `_MULTIMODAL_MODELS` (vllm/model_executor/models/registry.py)."""
    prefixes: dict[str, str]
    """`hf_to_vllm_mapper` of the model's file: the first prefix that fits is replaced."""


QWEN_2_5 = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
QWEN_3 = {key: QWEN_2_5[key] for key in ("model.visual.", "lm_head.", "model.language_model.")}
LLAVA = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
SERVED = {
    "qwen2_5_vl": Served("Qwen2_5_VLForConditionalGeneration", QWEN_2_5),  # models/qwen2_5_vl.py
    "qwen3_vl": Served("Qwen3VLForConditionalGeneration", QWEN_3),  # models/qwen3_vl.py
    "llava_next_video": Served("LlavaNextVideoForConditionalGeneration", LLAVA),  # models/llava_next_video.py
    "llava_next_video_mistral": Served("LlavaNextVideoForConditionalGeneration", LLAVA),
}
TOPS = ("language_model.model.", "language_model.lm_head.", "visual.", "vision_tower.", "multi_modal_projector.")
"""Of vLLM's modules, with `image_newline`, a bare parameter."""


def mapped(name: str, prefixes: dict[str, str]) -> str:
    """As `WeightsMapper._map_name` does with prefixes (vllm/model_executor/models/utils.py)."""
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            name = name.replace(theirs, ours, 1)
    return name


def tensors_of(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as reader:
        return {name: reader.get_slice(name).get_shape() for name in reader.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", ["kaiming", "pissa"])
def test_an_adapter(each_tiny: Tiny, family: str, tmp_path: Path, kind: str) -> None:
    """vllm/lora/peft_helper.py (fields), lora/lora_model.py and lora/utils.py (files, names of tensors)."""
    lora = LoraConfig.model_validate({"rank": 4, "alpha": 8, "init": kind})
    skeleton, _ = adapted(each_tiny, lora)
    export_adapter(skeleton.model, tmp_path / "adapter", lora, str(each_tiny.path), skeleton.peft_prefixes, {}, True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int | float)
    assert isinstance(config["target_modules"], str | list) and config["target_modules"]
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    # Of one scale for all layers, alpha / r, nothing may be told by patterns, which aren't read.
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not_served(lora.model_dump()) == ""
    asked = shlex.split(vllm_serve(str(each_tiny.path), {"frames": 4}, str(tmp_path / "adapter"), config["r"]))
    assert config["r"] <= int(asked[asked.index("--max-lora-rank") + 1]) in MAX_RANKS

    halves: dict[str, dict[str, list[int]]] = {}
    for name, shape in tensors_of(tmp_path / "adapter" / "adapter_model.safetensors").items():
        bare = mapped(name.removeprefix("base_model.model."), SERVED[family].prefixes)
        module, half, leaf = bare.rsplit(".", 2)
        assert name.startswith("base_model.model.") and half in ("lora_A", "lora_B") and leaf == "weight", name
        assert module.startswith("language_model.model.layers.") and module.rsplit(".", 1)[1] in LINEARS, module
        halves.setdefault(module, {})[half] = shape
    layers = {int(module.split(".")[3]) for module in halves}
    assert layers == set(range(skeleton.model.config.layers)) and len(halves) == len(LINEARS) * len(layers)
    for module, pair in halves.items():
        assert pair["lora_A"][0] == pair["lora_B"][1] == config["r"], module


def test_a_whole_model(each_tiny: Tiny, family: str) -> None:
    """A merged or fully tuned model has its base's files and tensor names (`tests/runs/test_tools.py`): those are
    vLLM's too."""
    config = json.loads((each_tiny.path / "config.json").read_text())
    assert config["architectures"] == [SERVED[family].architecture]
    names = [name for file in each_tiny.path.glob("*.safetensors") for name in tensors_of(file)]
    assert names
    for name in names:
        bare = mapped(name, SERVED[family].prefixes)
        # LLaVA's released names are vLLM's own already.
        assert bare.startswith(TOPS) or bare == "image_newline", (name, bare)


@pytest.mark.parametrize(
    ("video", "frames"),
    [
        ({"frames": 8, "max_frames": 32}, {"num_frames": 8}),
        ({"fps": 2.0, "max_frames": 64}, {"fps": 2.0, "num_frames": 64}),
        ({}, None),
    ],
)
def test_the_frames_of_training(video: dict[str, Any], frames: dict[str, float] | None) -> None:
    """`--media-io-kwargs` as vllm/multimodal/video.py takes it: a rate, and the most frames."""
    words = shlex.split(vllm_serve("base", video))
    assert words[:3] == ["vllm", "serve", "base"]
    told = json.loads(words[words.index("--media-io-kwargs") + 1]) if "--media-io-kwargs" in words else None
    assert told == (None if frames is None else {"video": frames})


@pytest.mark.parametrize(
    ("settings", "served"),
    [
        ({}, True),
        ({"rslora": True}, True),
        ({"dora": True}, False),
        ({"ranks": {"language_model.q_proj": 2}}, False),
        ({"alphas": {"language_model.q_proj": 2.0}}, False),
        ({"targets": ("language_model.*", "vision_tower.*")}, False),
    ],
)
def test_what_is_not_served(settings: dict[str, Any], served: bool) -> None:
    lora = LoraConfig(rank=4, alpha=8, **settings)
    assert (not_served(lora.model_dump()) == "") == served
