"""The reference cases of Qwen3-VL-MoE, from the video file to the gradients, through the path that training takes.

Their numbers were computed by other software (see the README beside them). Files and weights are as released.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.patches import decode
from tests.helpers.tiny import CPU, Media, batch_of, every_logit, load_model, load_prepared, loss_and_gradients, talk
from tests.parity.test_reference_cases import Case, assert_logits, assert_loss_and_gradients, read_case
from vft.adapters.targets import choose_trainable
from vft.config.data import DataConfig
from vft.data.chat import ChatEncoder
from vft.data.media.patches import load_patches
from vft.models.base import VideoLanguageModel
from vft.models.experts import Router, routing_loss

MEDIA_CASES = ["one_video", "image_video_turns"]
CASES = ["text_only", *MEDIA_CASES]


@pytest.fixture(scope="module")
def base(reference_today: Path) -> Path:
    return reference_today / "qwen3_vl_moe_tiny"


@pytest.fixture(scope="module")
def trained(base: Path) -> VideoLanguageModel:
    """The base with everything trained, in float32."""
    components = ("language_model", "projector", "vision_encoder")
    return load_prepared(base, lambda it: choose_trainable(it, None, components))[0]


@pytest.fixture(scope="module")
def encoder(base: Path) -> ChatEncoder:
    return load_model(str(base), None, torch.float32, CPU).encoder(DataConfig())


@pytest.fixture(scope="module")
def load_case(
    reference_today: Path, videos: Path, encoder: ChatEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    folder = tmp_path_factory.mktemp("records")
    return cache(lambda name: read_case(reference_today / "cases_qwen3_vl_moe" / name, videos, encoder, folder))


@pytest.mark.parametrize("name", CASES)
def test_frames_and_tokens(name: str, load_case: Callable[[str], Case]) -> None:
    case = load_case(name)
    for plan, medium in zip(case.batch.documents[0].media, case.facts["media"], strict=True):
        assert plan.ref.kind == medium["kind"]
        assert (plan.height, plan.width) == (medium["resized_height"], medium["resized_width"])
        assert list(plan.grid_thw) == medium["grid_thw"]
        assert plan.num_tokens == medium["num_tokens"]
        assert list(plan.frame_indices) == medium.get("frame_indices", [0])
        assert decode(plan).shape[0] == len(plan.frame_indices)
    assert torch.equal(case.batch.input_ids_T, case.tensors["input_ids"])
    assert torch.equal(case.batch.labels_T, case.tensors["labels"])
    assert torch.equal(case.batch.positions_3T, case.tensors["position_ids"])
    assert torch.equal(case.batch.target_index_N, case.tensors["predicting_positions"])


@pytest.mark.parametrize("name", MEDIA_CASES)
def test_pixels_and_vision_tower(name: str, load_case: Callable[[str], Case], trained: VideoLanguageModel) -> None:
    """Embeddings and what DeepStack adds later; pixels of pictures and of videos are stored apart."""
    case = load_case(name)
    pixels_PD = trained.normalise(case.batch.pixels_PD)
    counts = [t * h * w for t, h, w in case.batch.grids]
    for kind, stored in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        parts = zip(pixels_PD.split(counts), case.batch.documents[0].media, strict=True)
        found = [part for part, plan in parts if plan.ref.kind == kind]
        assert bool(found) == (stored in case.tensors)
        if found:
            assert float((torch.cat(found) - case.tensors[stored]).abs().max()) <= 1e-5
    with torch.no_grad():
        embeddings = trained.encode_media(pixels_PD, case.batch.layout)
    names = ["vision_embeds", *(f"deepstack.{number}" for number in range(3))]
    for found_ME, name in zip(embeddings, names, strict=True):
        assert float((found_ME - case.tensors[name]).abs().max()) <= 1e-4, name


@pytest.mark.parametrize("name", CASES)
def test_every_row_goes_to_its_experts(
    name: str, load_case: Callable[[str], Case], trained: VideoLanguageModel
) -> None:
    case = load_case(name)
    routed: list[tuple[Tensor, Tensor, Tensor]] = []
    routers = [module for module in trained.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(lambda *call: routed.append(call[2])) for router in routers]
    with torch.no_grad():
        every_logit(trained, case.batch)
    for hook in hooks:
        hook.remove()
    assert len(routed) == 4
    for layer, (numbers, shares, _) in enumerate(routed):
        assert torch.equal(numbers, case.tensors[f"router.{layer}.experts"].long()), layer
        assert float((shares - case.tensors[f"router.{layer}.weights"]).abs().max()) <= 1e-5, layer


@pytest.mark.parametrize("name", CASES)
def test_routing_loss(
    name: str, load_case: Callable[[str], Case], trained: VideoLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case(name)
    monkeypatch.setattr(trained.decoder, "routing_weight", 1.0)
    with torch.no_grad():
        trained(case.batch)
    assert len(trained.decoder.routed) == 4
    found = float(routing_loss(torch.stack(trained.decoder.routed)))
    assert found == pytest.approx(case.facts["router_aux_loss"], rel=1e-5)
    for layer, (rows_G, _) in enumerate(trained.decoder.routed):
        wanted = case.tensors[f"router.{layer}.experts"].long().flatten().bincount(minlength=8)
        assert rows_G.tolist() == wanted.tolist()


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, load_case: Callable[[str], Case], trained: VideoLanguageModel) -> None:
    assert_logits(trained, load_case(name))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name: str, load_case: Callable[[str], Case], trained: VideoLanguageModel) -> None:
    """Full fine-tuning of everything, routers and experts among it."""
    assert_loss_and_gradients(trained, load_case(name), lambda name: name)


def test_two_conversations_behind_one_video(
    load_case: Callable[[str], Case], trained: VideoLanguageModel, encoder: ChatEncoder
) -> None:
    """As branches of one trunk: the summed loss of both, and its gradients."""
    case = load_case("one_video")
    plans, trunk = case.batch.documents[0].media, case.facts["trunk"]
    talks = []
    for asked, answered in (case.facts["messages"], trunk["messages"]):
        talks.append(talk(("user", [plans[0].ref, asked["content"][1]["text"]]), ("assistant", answered["content"])))
    media = Media(plans, tuple(load_patches(plan, encoder.processor) for plan in plans))
    batch = batch_of(encoder, (talks, media))
    assert batch.documents[0].prefix_length == trunk["trunk_tokens"] - 1  # both questions have the same first word
    loss, gradients = loss_and_gradients(trained, batch)
    assert float(loss) == pytest.approx(trunk["loss_sums_both"], rel=1e-5)
    total = trunk["both_grad_norm_total"]
    assert gradients.keys() >= trunk["both_grad_norms"].keys()
    for name, gradient in gradients.items():
        wanted = trunk["both_grad_norms"].get(name, 0.0)
        assert float(gradient.norm()) == pytest.approx(wanted, rel=1e-4, abs=1e-7 * total), name
