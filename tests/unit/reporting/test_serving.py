"""What is exported has the form that vLLM reads: its rules, restated from the files of its repository named here."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torchcodec.encoders import VideoEncoder
from transformers import GenerationConfig

from tests.helpers.adapters import adapted
from tests.helpers.tiny import Tiny
from vft.adapters.peft_format import export_adapter
from vft.cli.merge_lora import merge
from vft.common.errors import UserError
from vft.common.types import MediaRef
from vft.config.data import DataConfig
from vft.config.run import LoraConfig
from vft.data.budget import limits_of
from vft.data.media.video import scan
from vft.inference.generate import Sampling, choose
from vft.reporting import serve_command
from vft.reporting.serving import MAX_RANKS, processor_files, vllm_serve

LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}) | {
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "shared_expert_gate")  # models/qwen3_5.py
}
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
    "qwen3_vl_moe": Served("Qwen3VLMoeForConditionalGeneration", QWEN_3),  # models/qwen3_vl_moe.py
    "qwen3_5": Served("Qwen3_5ForConditionalGeneration", QWEN_3),  # models/qwen3_5.py
    "qwen3_5_moe": Served("Qwen3_5MoeForConditionalGeneration", QWEN_3),  # models/qwen3_5.py
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
    model, _ = adapted(each_tiny, lora)
    export_adapter(model, tmp_path / "adapter", lora, str(each_tiny.path), {}, True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int | float)
    assert isinstance(config["target_modules"], str | list) and config["target_modules"]
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    kind_of = json.loads((each_tiny.path / "config.json").read_text())["model_type"]
    asked = shlex.split(vllm_serve(str(each_tiny.path), kind_of, {"frames": 4}, {}, 0, "adapter", lora.model_dump()))
    assert config["r"] <= int(asked[asked.index("--max-lora-rank") + 1]) in MAX_RANKS

    halves: dict[str, dict[str, list[int]]] = {}
    for name, shape in tensors_of(tmp_path / "adapter" / "adapter_model.safetensors").items():
        bare = mapped(name.removeprefix("base_model.model."), SERVED[family].prefixes)
        module, half, leaf = bare.rsplit(".", 2)
        assert name.startswith("base_model.model.") and half in ("lora_A", "lora_B") and leaf == "weight", name
        assert module.startswith("language_model.model.layers.") and module.rsplit(".", 1)[1] in LINEARS, module
        halves.setdefault(module, {})[half] = shape
    layers = {int(module.split(".")[3]) for module in halves}
    assert layers == set(range(model.config.num_hidden_layers)) and len(halves) == each_tiny.family.linears
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


QWEN3_VLS = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
FIXED = {"video_backend": "qwen3_vl", "num_frames": 8, "min_frames": 8, "max_frames": 8}
RATE = {"video_backend": "qwen2_vl", "fps": 2.0, "min_frames": 6, "max_frames": 64}


@pytest.mark.parametrize(
    ("model_type", "video", "frames"),
    [
        ("qwen2_5_vl", {"frames": 8, "max_frames": 32}, FIXED),
        ("qwen2_5_vl", {"fps": 2.0, "min_frames": 5, "max_frames": 65}, RATE),
        ("qwen3_vl", {"frames": 8}, FIXED),
        ("llava_next_video", {"frames": 8}, {"num_frames": 8}),
        ("llava_next_video", {"fps": 2.0, "max_frames": 64}, {"fps": 2.0, "num_frames": 64}),
        ("qwen2_5_vl", {}, None),
    ],
)
def test_the_frames_of_training(model_type: str, video: dict[str, Any], frames: dict[str, Any] | None) -> None:
    """`--media-io-kwargs` as the loaders of vllm/multimodal/video.py take it."""
    words = shlex.split(vllm_serve("runs/base", model_type, video, {}))
    assert words[:3] == ["vllm", "serve", "runs/base"] and option(words, "--served-model-name") == "base"
    told = json.loads(option(words, "--media-io-kwargs")) if "--media-io-kwargs" in words else None
    assert told == (None if frames is None else {"video": frames})


@pytest.mark.parametrize("video", [{"frames": 8}, {"fps": 2.0, "max_frames": 64}])
def test_families_of_one_processor_have_its_frames_and_pixels(video: dict[str, Any]) -> None:
    first, *others = ((vllm_serve("base", kind, video, {}), processor_files(kind, {}, video, {})) for kind in QWEN3_VLS)
    assert others == [first] * (len(QWEN3_VLS) - 1)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_one_command_for_sampling_pixels_and_gpus() -> None:
    video, image = {"frames": 8, "min_pixels": 4000, "max_pixels": 100352}, {"max_pixels": 50176}
    words = shlex.split(vllm_serve("base", "qwen2_5_vl", video, image, weight_bytes=145 * 10**9))
    assert option(words, "--tensor-parallel-size") == "4" and option(words, "--generation-config") == "vllm"
    assert json.loads(option(words, "--override-generation-config")) == {"temperature": 0.0}
    assert json.loads(option(words, "--mm-processor-kwargs")) == {
        "images_kwargs": {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
        "videos_kwargs": {"size": {"shortest_edge": 4000, "longest_edge": 100352}, "do_sample_frames": False},
    }
    assert option(shlex.split(vllm_serve("base", "qwen2_5_vl", {}, {}, 17 * 10**9)), "--tensor-parallel-size") == "1"
    lora = LoraConfig(rank=4, alpha=8, ranks={"language_model.q_proj": 20}, targets=("language_model.*", "projector.*"))
    words = shlex.split(vllm_serve("base", "qwen2_5_vl", video, image, 0, "a", lora.model_dump()))
    assert option(words, "--max-lora-rank") == "32" and "--enable-tower-connector-lora" in words


# ----------------------------------------------------------------------------------------- the files of a whole model


def merged(tiny: Tiny, folder: Path, about: dict[str, Any], generation: str = "greedy") -> Path:
    lora = LoraConfig(rank=4, alpha=8)
    model, _ = adapted(tiny, lora)
    export_adapter(model, folder / "adapter", lora, "base", about, True)
    merge(str(tiny.path), folder / "adapter", folder / "merged", generation)
    return folder / "merged"


def test_a_merged_model_answers_greedily(tiny: Tiny, tmp_path: Path) -> None:
    """By transformers' own class, whatever the release has; `base` keeps the release's file."""
    base = Tiny(shutil.copytree(tiny.path, tmp_path / "base"), tiny.family)
    release = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05}
    content = json.dumps({**release, "max_new_tokens": 9, "eos_token_id": [7, 8], "pad_token_id": 3})
    (base.path / "generation_config.json").write_text(content)
    folder = merged(base, tmp_path / "greedy", {})
    found = GenerationConfig.from_pretrained(folder)
    assert found.get_generation_mode() == "greedy_search" and found.max_new_tokens is None
    assert found.repetition_penalty == 1.0 and found.pad_token_id == 3
    assert {7, 8, tiny.encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")} <= set(found.eos_token_id)
    # What vLLM reads of it (vllm/config/model.py).
    written = json.loads((folder / "generation_config.json").read_text())
    read = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "max_new_tokens")
    assert {key: written[key] for key in read if key in written} == {"temperature": 0.0, "top_k": 1}
    kept = merged(base, tmp_path / "base_kept", {}, "base")
    assert (kept / "generation_config.json").read_text() == content


def test_of_equal_logits_the_first_is_taken(tiny: Tiny, tmp_path: Path) -> None:
    """As evaluation does, by transformers' `generate` without arguments; `top_k` = 1 alone draws among them."""
    folder = merged(tiny, tmp_path, {})
    model = tiny.load(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight")):
                parameter.fill_(0.0)  # all logits are zero
    asked = torch.ones(1, 3, dtype=torch.long)
    assert model.generate(asked, max_new_tokens=8)[0, 3:].tolist() == [0] * 8
    assert len(set(model.generate(asked, max_new_tokens=8, do_sample=True, temperature=1.0)[0, 3:].tolist())) > 1
    assert choose(torch.zeros(1, 9), Sampling(), torch.zeros(1, dtype=torch.float64)).item() == 0


def test_a_merged_model_has_the_frames_and_pixels_of_training(tiny: Tiny, tmp_path: Path) -> None:
    """Of both kinds of files in which transformers looks for them; nothing is changed where nothing is known."""
    base = Tiny(shutil.copytree(tiny.path, tmp_path / "base"), tiny.family)
    release = {"image_processor": {"do_resize": True}, "video_processor": {"fps": 2.0, "max_frames": 768}}
    (base.path / "processor_config.json").write_text(json.dumps(release))
    (base.path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Q", "max_pixels": 9}))
    (base.path / "video_preprocessor_config.json").write_text(json.dumps({"fps": 2.0, "max_frames": 768}))
    video = {"frames": 8, "min_pixels": 4000, "max_pixels": 100352}
    folder = merged(base, tmp_path / "one", {"video": video, "image": {"max_pixels": 50176}})
    whole = json.loads((folder / "processor_config.json").read_text())
    for films in (json.loads((folder / "video_preprocessor_config.json").read_text()), whole["video_processor"]):
        assert films["size"] == {"shortest_edge": 4000, "longest_edge": 100352}
        assert films["do_sample_frames"] and films["num_frames"] == 8 and films["fps"] is None
        assert "max_frames" not in films and "image_processor_type" not in films
    for pictures in (json.loads((folder / "preprocessor_config.json").read_text()), whole["image_processor"]):
        assert pictures["size"] == {"shortest_edge": 3136, "longest_edge": 50176}
        assert pictures["max_pixels"] == 50176
    foreign = merged(base, tmp_path / "foreign", {})
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        assert (foreign / name).read_text() == (base.path / name).read_text()
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] == "Q"
    with pytest.raises(UserError, match=r"vft\.json"):
        merged(base, tmp_path / "odd", {"video": {"frames": -1}})


# --------------------------------------------------------------------------------------------- vLLM's own classes


@pytest.mark.parametrize("video", [{"frames": 8, "max_pixels": 100352}, {"fps": 2.0, "max_frames": 16}])
def test_vllms_classes_see_what_was_trained(tiny: Tiny, tmp_path: Path, video: dict[str, Any]) -> None:
    """The printed command through the loader and processor of vLLM itself, without an engine: frames, size, tokens and
    seconds are those of the plan of training, and the default sampling is greedy.

    VFT_VLLM_PYTHON names an interpreter that can import vllm (`tests/helpers/vllm_classes.py` says which).
    """
    interpreter = os.environ.get("VFT_VLLM_PYTHON")
    if not interpreter:
        pytest.skip("VFT_VLLM_PYTHON names no interpreter with vllm")
    clips = [(600, 1080, 1920), (50, 240, 320), (65, 240, 320)]
    for frames, height, width in clips:
        write_film(tmp_path / f"{frames}.mp4", frames, height, width)
    folder = merged(tiny, tmp_path, {"video": video})
    command = serve_command(folder)
    files = [str(tmp_path / f"{frames}.mp4") for frames, _, _ in clips]
    script = Path(__file__).parents[2] / "helpers" / "vllm_classes.py"
    done = subprocess.run([interpreter, script, command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["command"]["temperature"] == 0.0 and found["folder"] == {
        "repetition_penalty": 1.0,
        "temperature": 0.0,
        "top_k": 1,
    }
    config = DataConfig.model_validate({"video": video})
    for file, seen in zip(files, found["clips"], strict=True):
        ref = MediaRef("video", Path(file))
        plan = tiny.encoder.processor.plan(ref, scan(ref), limits_of(ref, config))
        assert seen["grid"] == list(plan.grid_thw) and seen["tokens"] == plan.num_tokens, file
        assert len(seen["frames"]) == len(plan.frame_indices)
        if "frames" in video:
            assert tuple(seen["frames"]) == plan.frame_indices
            assert seen["seconds_per_grid"] == pytest.approx(plan.seconds_per_grid, rel=1e-3)
        else:  # vLLM's frame is the first of its interval, training's are spread to the last frame
            apart = [ours - theirs for ours, theirs in zip(plan.frame_indices, seen["frames"], strict=True)]
            assert min(apart) >= 0 and max(apart) <= scan(ref).num_frames / len(apart)


def write_film(path: Path, frames: int, height: int, width: int) -> None:
    """Ten frames a second that grow lighter."""
    shades = torch.linspace(0, 255, frames).to(torch.uint8)
    VideoEncoder(shades[:, None, None, None].expand(frames, 3, height, width), frame_rate=10).to_file(path)
