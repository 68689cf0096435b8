"""The reference cases, from the video file to the gradients, through the path that training takes.

Their numbers were computed by other software (see the README beside them): torchcodec, transformers, PEFT.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.patches import decode
from tests.helpers.tiny import CPU, every_logit, load_model, load_prepared
from vft.adapters.lora import is_adapter
from vft.adapters.targets import choose_trainable
from vft.cli.merge_lora import merge
from vft.common.types import Batch, Conversation
from vft.config.data import DataConfig, SourceConfig
from vft.data.chat import ChatEncoder
from vft.data.dataset import load_dataset
from vft.data.media.patches import load_patches
from vft.data.packing import collate
from vft.models.base import VideoLanguageModel
from vft.models.qwen2_5_vl.model import Qwen2_5_VL
from vft.recipes.caption import Caption
from vft.training.losses import cross_entropy

BASE_CASES = ["video_uniform", "two_videos", "images_multiturn", "text_only", "clip_late_video"]
CASES = [*BASE_CASES, "lora_video"]


@dataclass(frozen=True)
class Case:
    """What is expected (`facts`, `tensors`), and what this project made of the same files."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    batch: Batch
    conversation: Conversation

    @property
    def pixels(self) -> Tensor:
        """Expected pixel values; no case has both kinds."""
        return self.tensors["pixel_values_videos" if "pixel_values_videos" in self.tensors else "pixel_values"]


def record(facts: dict[str, Any]) -> dict[str, Any]:
    """The case's messages as a user would write them, each medium with the options that the case was made with."""
    media = iter(facts["media"])
    messages = []
    for message in facts["messages"]:
        content = message["content"]
        if isinstance(content, list):
            content = [part if part["type"] == "text" else {**part, **options(next(media))} for part in content]
        messages.append({"role": message["role"], "content": content})
    return {"id": facts["case"], "messages": messages}


def options(medium: dict[str, Any]) -> dict[str, Any]:
    """Keys of one medium in the record."""
    chosen = {"min_pixels": medium["min_pixels"], "max_pixels": medium["max_pixels"]}
    if medium["kind"] == "video":
        chosen["nframes"] = len(medium["frame_indices"])
        if medium["first_frame"] > 0 or medium["last_frame"] < medium["total_frames"] - 1:
            # Between two frames, so that rounding of the container's rate can't matter.
            chosen["video_start"] = (medium["first_frame"] - 0.5) / medium["fps"]
            chosen["video_end"] = (medium["last_frame"] + 0.5) / medium["fps"]
    return chosen


@pytest.fixture(scope="module")
def base(reference: Path) -> str:
    return str(reference / "qwen2_5_vl_tiny")


@pytest.fixture(scope="module")
def trained(base: str) -> VideoLanguageModel:
    """The base with everything trained, in float32, built as `vft.training.trainer` builds it."""
    components = ("language_model", "projector", "vision_encoder")
    return load_prepared(Path(base), lambda it: choose_trainable(it, None, components))[0]


@pytest.fixture(scope="module")
def encoder(base: str) -> ChatEncoder:
    return load_model(base, None, torch.float32, CPU).encoder(DataConfig())


@pytest.fixture(scope="module")
def load_case(
    reference: Path, videos: Path, encoder: ChatEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    """Cases by name, each read through the `messages` source, the index, the decoder and the collator."""
    folder = tmp_path_factory.mktemp("records")
    return cache(lambda name: read_case(reference / "cases" / name, videos, encoder, folder))


def read_case(path: Path, videos: Path, encoder: ChatEncoder, folder: Path) -> Case:
    """The case whose files are `path` with their suffixes; `folder` is for records and the cache."""
    facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    file = folder / f"{path.name}.jsonl"
    file.write_text(json.dumps(record(facts), ensure_ascii=False) + "\n", encoding="utf-8")
    config = DataConfig(root=videos, workers=0, cache_dir=str(folder / "cache"), max_bad_fraction=0.0)
    source = SourceConfig(format="messages", path=str(file))
    documents = load_dataset(config, [source], Caption().conversations, encoder, seed=0)
    document = documents.build(0)
    assert documents.lengths == (document.num_tokens,)
    patches = [load_patches(plan, encoder.processor) for plan in document.media]
    batch, (conversation,) = collate([(document, patches)], encoder.processor), documents.documents[0].conversations
    return Case(facts, load_file(path.with_suffix(".safetensors")), batch, conversation)


# ------------------------------------------------------------------------------------------------------ frames, text


@pytest.mark.parametrize("name", CASES)
def test_frames(name: str, load_case: Callable[[str], Case]) -> None:
    case = load_case(name)
    plans = case.batch.documents[0].media
    assert len(plans) == len(case.facts["media"])
    for plan, medium in zip(plans, case.facts["media"], strict=True):
        assert plan.ref.kind == medium["kind"]
        assert (plan.info.height, plan.info.width) == (medium["height"], medium["width"])
        assert (plan.height, plan.width) == (medium["resized_height"], medium["resized_width"])
        assert list(plan.grid_thw) == medium["grid_thw"]
        assert plan.num_tokens == medium["num_tokens"]
        if plan.ref.kind == "image":
            continue
        assert plan.info.num_frames == medium["total_frames"]
        assert plan.info.fps == pytest.approx(medium["fps"], rel=1e-12)
        assert plan.info.stream_index == medium["stream_index"]
        assert list(plan.frame_indices) == medium["frame_indices"]
        assert plan.seconds_per_grid == pytest.approx(medium["second_per_grid"], rel=1e-12)
        clip = decode(plan)
        assert plan.frame_times_s == pytest.approx(medium["timestamps"], abs=1e-3)
        frames_THWC = clip.permute(0, 2, 3, 1).contiguous()
        hashes = [hashlib.sha256(frame.numpy().tobytes()).hexdigest() for frame in frames_THWC]
        assert hashes == medium["frames_sha256"]


@pytest.mark.parametrize("name", CASES)
def test_tokens(name: str, load_case: Callable[[str], Case]) -> None:
    case = load_case(name)
    assert torch.equal(case.batch.input_ids_T, case.tensors["input_ids"])
    assert torch.equal(case.batch.labels_T, case.tensors["labels"])
    assert torch.equal(case.batch.positions_3T, case.tensors["position_ids"])
    assert torch.equal(case.batch.target_index_N, case.tensors["predicting_positions"])


@pytest.mark.parametrize("name", [name for name in CASES if name != "text_only"])
def test_pixels_and_vision_tower(name: str, load_case: Callable[[str], Case], trained: VideoLanguageModel) -> None:
    case, model = load_case(name), trained
    pixels_PD = model.normalise(case.batch.pixels_PD)
    assert pixels_PD.shape == case.pixels.shape
    assert float((pixels_PD - case.pixels).abs().max()) <= 1e-5
    with torch.no_grad():
        (embeds_ME,) = model.visual(pixels_PD, case.batch.layout)
    assert float((embeds_ME - case.tensors["vision_embeds"]).abs().max()) <= 1e-4


# ------------------------------------------------------------------------------------------------ logits, gradients


def assert_logits(model: Any, case: Case, prefix: str = "", within: float = 1e-4) -> None:
    """The stored columns of the logits that predict supervised tokens, and their normaliser over all columns."""
    with torch.no_grad():
        logits_NV = model.logits(case.batch)
    columns = case.tensors["logits_vocab_ids"]
    assert float((logits_NV[:, columns] - case.tensors[f"{prefix}logits"]).abs().max()) <= within
    assert float((logits_NV.logsumexp(-1) - case.tensors[f"{prefix}logsumexp"]).abs().max()) <= within
    if not prefix:
        assert float((logits_NV[:1] - case.tensors["logits_first_full"]).abs().max()) <= within
        nll = F.cross_entropy(logits_NV, case.batch.target_ids_N, reduction="none")
        assert float((nll - case.tensors["token_nll"]).abs().max()) <= within


def assert_loss_and_gradients(model: Any, case: Case, stored_name: Callable[[str], str]) -> None:
    """Summed loss and the 2-norm of every gradient; a few whole gradients."""
    model.zero_grad()
    loss = cross_entropy(model, case.batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(case.facts["loss_sum"], rel=1e-5)
    gradients = {stored_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    norms = case.facts["grad_norms"]
    total = case.facts["grad_norm_total"]
    for name, gradient in gradients.items():
        assert float(gradient.norm()) == pytest.approx(norms.get(name, 0.0), rel=1e-4, abs=1e-7 * total), name
    assert norms.keys() <= gradients.keys()
    assert float(torch.stack([g.norm() for g in gradients.values()]).norm()) == pytest.approx(total, rel=1e-4)
    whole = {name.removeprefix("grad."): g for name, g in case.tensors.items() if name.startswith("grad.")}
    assert whole or case.facts.get("lora")
    for name, gradient in whole.items():
        assert float((gradients[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


@pytest.mark.parametrize("name", BASE_CASES)
def test_logits(name: str, load_case: Callable[[str], Case], trained: VideoLanguageModel) -> None:
    assert_logits(trained, load_case(name))


@pytest.mark.parametrize("name", BASE_CASES)
def test_loss_and_gradients(name: str, load_case: Callable[[str], Case], trained: VideoLanguageModel) -> None:
    """Full fine-tuning of everything. Without media the encoder's gradients are there, and zero."""
    assert_loss_and_gradients(trained, load_case(name), lambda name: name)


def test_all_cases_in_one_pack(
    load_case: Callable[[str], Case], trained: VideoLanguageModel, encoder: ChatEncoder, videos: Path
) -> None:
    """Documents of different media beside one another in a row give the logits that each gives alone."""
    cases = [load_case(name) for name in BASE_CASES]
    members = []
    for case in cases:
        document = case.batch.documents[0]
        members.append((document, [load_patches(plan, encoder.processor) for plan in document.media]))
    with torch.no_grad():
        logits_TV = every_logit(trained, collate(members, encoder.processor))
    start = 0
    for case in cases:
        rows = case.tensors["predicting_positions"] + start
        found = logits_TV[rows][:, case.tensors["logits_vocab_ids"]]
        assert float((found - case.tensors["logits"]).abs().max()) <= 1e-4, case.facts["case"]
        start += case.batch.num_tokens


# ------------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def adapted(reference: Path, base: str) -> Any:
    """The base with PEFT's adapter, as prediction and evaluation load it."""
    return load_model(base, reference / "cases" / "lora_video_adapter", torch.float32, CPU).model


def test_adapter(adapted: Any, load_case: Callable[[str], Case]) -> None:
    assert_logits(adapted, load_case("lora_video"))


def test_base_of_adapter(trained: VideoLanguageModel, load_case: Callable[[str], Case]) -> None:
    assert_logits(trained, load_case("lora_video"), prefix="base_")


def test_gradients_of_adapter(adapted: Any, load_case: Callable[[str], Case]) -> None:
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(is_adapter(name))

    def peft_name(name: str) -> str:
        prefix = next(prefix for prefix in Qwen2_5_VL.spellings if name.startswith(prefix))
        return f"base_model.model.{Qwen2_5_VL.spellings[prefix][0]}{name.removeprefix(prefix)}"

    case = load_case("lora_video")
    assert_loss_and_gradients(adapted, case, peft_name)
    assert len(case.facts["grad_norms"]) == 42


def test_merged_adapter(reference: Path, base: str, load_case: Callable[[str], Case], tmp_path: Path) -> None:
    """tools/merge_lora.py on a float32 copy of the base (in bfloat16 the merge rounds) gives PEFT's merged logits."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy, copy_function=shutil.copyfile)
    for file in copy.glob("*.safetensors"):
        save_file({name: x.float() for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
    assert merge(str(copy), reference / "cases" / "lora_video_adapter", tmp_path / "merged") == 21
    model = load_model(str(tmp_path / "merged"), None, torch.float32, CPU).model
    assert_logits(model, load_case("lora_video"), prefix="merged_")
