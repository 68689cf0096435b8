"""Qwen3-VL's own rules beside transformers': DeepStack, times as text, positions, preprocessing, released sizes.

What all families have in common is tested with them all (`tests/helpers/families.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize

from tests.helpers.families import QWEN3_TEMPLATE
from tests.helpers.patches import patches_of
from tests.helpers.rows import PICTURE, PICTURE_INFO, ROWS, SHORT, SHORT_INFO, kinds_of, row
from tests.helpers.tiny import LIMITS, Media, Tiny, document, every_logit, loss_and_gradients, medium, talk
from tests.unit.parallel import test_compiled as compiled
from vft.adapters.targets import choose_trainable
from vft.common.errors import UserError
from vft.common.types import MediaPlan
from vft.config.run import LoraConfig
from vft.data.chat import ChatEncoder
from vft.models import processor as rules
from vft.models.flops import FlopCounter
from vft.models.qwen3_vl import model as qwen3_vl
from vft.models.qwen3_vl.processor import Qwen3Processor
from vft.models.released import RELEASED
from vft.parallel.parallelize import checkpoint_activations


@pytest.fixture(scope="module")
def tiny(make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    """A small random Qwen3-VL with a tied head."""
    return make_tiny("qwen3_vl", "tied")


# ---------------------------------------------------------------------------------------------------------- network


def test_what_each_part_adds(tiny: Tiny) -> None:
    """DeepStack and the learned positions move the logits far more than the tests above forgive."""
    batch, ours = row(tiny, "mixed"), tiny.ours()
    with torch.no_grad():
        whole = every_logit(ours, batch)
        for name in (
            "pos_embed.weight",
            "deepstack_merger_list.0.linear_fc2.weight",
            "deepstack_merger_list.1.norm.bias",
        ):
            parameter = ours.get_parameter(f"model.visual.{name}")
            kept = parameter.clone()
            parameter.zero_()
            assert float((every_logit(ours, batch) - whole).abs().max()) > 0.05, name
            parameter.copy_(kept)


@pytest.mark.parametrize("mode", ["mlp", "selective", "full"])
def test_recomputing_changes_nothing(tiny: Tiny, mode: str) -> None:
    batch = row(tiny, "mixed")
    loss, wanted = loss_and_gradients(tiny.ours(), batch)
    ours = tiny.ours()
    checkpoint_activations(ours, mode)
    again, found = loss_and_gradients(ours, batch)
    assert torch.equal(loss, again) and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("fresh_compiler")
def test_deepstack_leaves_one_graph_for_all_layers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Nothing that depends on the layer stands in a layer."""
    compiled.test_compiled_once_for_all_layers_and_rows(tiny, monkeypatch, None, mode)


def test_a_step_reads_nothing_back(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.test_a_step_reads_nothing_back(tiny, monkeypatch, compiled.ROWS[2])


def test_too_few_layers_for_deepstack(tmp_path: Path) -> None:
    config = Qwen3VLConfig(
        text_config={"num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        vision_config={"deepstack_visual_indexes": [0, 1, 2]},
    )
    with pytest.raises(UserError, match=r"\[0, 1, 2\].*num_hidden_layers = 3"):
        qwen3_vl.build(config, {}, torch.float32)


# ------------------------------------------------------------------------------------------- tokens and positions


def published_video(plan: MediaPlan, merge: int = 2) -> str:
    """transformers' text for a video, from its frames."""
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    processor.video_processor = SimpleNamespace(merge_size=merge, temporal_patch_size=2)
    processor.video_token, processor.vision_start_token, processor.vision_end_token = (
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    metadata = SimpleNamespace(fps=plan.info.fps, frames_indices=list(plan.frame_indices))
    found = {"video_grid_thw": torch.tensor([plan.grid_thw]), "video_metadata": [metadata]}
    return processor.replace_video_token(found, 0)


def published_ids(tokenizer: Any, text: str, media: tuple[MediaPlan, ...]) -> list[int]:
    """The released processor's rule (transformers 4.57): pads become as many as there are embeddings, and a video's pad
    goes with vision_start and vision_end around it."""
    for plan in media:
        if plan.ref.kind == "video":
            text = text.replace(
                "<|vision_start|><|video_pad|><|vision_end|>", published_video(plan).replace("video_pad", "*"), 1
            )
        else:
            text = text.replace("<|image_pad|>", "<|*image_pad|>" * plan.num_tokens, 1)
    text = text.replace("<|*|>", "<|video_pad|>").replace("<|*image_pad|>", "<|image_pad|>")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def released(reference: Path) -> ChatEncoder:
    """The released tokenizer, whose merges join a colon or a space to what follows."""
    tokenizer = AutoTokenizer.from_pretrained(reference / "qwen2_5_vl_tiny")
    tokenizer.chat_template = QWEN3_TEMPLATE
    return ChatEncoder(tokenizer, Qwen3Processor(image_token=151655, video_token=151656, table_side=48))


@pytest.mark.parametrize("before", ["", "Watch: ", "Watch:", "A <b> ", "Line.\n", "("])
def test_tokens_are_those_of_the_released_processor(released: ChatEncoder, before: str) -> None:
    """Times of a video stand in the text, so they are tokenised with what stands before."""
    long, info = medium("video", 400, 64, 96, fps=25.0)
    asked = talk(("user", [before, long, "and", PICTURE, SHORT, "What?"]), ("assistant", "A dog."))
    limits = replace(LIMITS, frames=None, fps=2.0)
    plans = (
        released.processor.plan(long, info, limits),
        released.processor.plan(PICTURE, PICTURE_INFO, LIMITS),
        released.processor.plan(SHORT, SHORT_INFO, replace(LIMITS, frames=5)),
    )
    made = document(released, [asked], Media(plans, ()))
    parts = (before, ("video",), "and", ("image",), ("video",), "What?")
    text = released.template.apply((("user", parts), ("assistant", ("A dog.",))), answer_next=False)
    assert made.ids_T.tolist() == published_ids(released.tokenizer, text, plans)
    pads = (made.ids_T == 151655) | (made.ids_T == 151656)
    assert torch.equal(made.media_mask_T, pads) and int(pads.sum()) == sum(plan.num_tokens for plan in plans)
    said = released.tokenizer.decode(made.ids_T)
    assert f"{before}<0.3 seconds><|vision_start|>" in said and said.count(" seconds>") == 16 + 3
    assert "<0.1 seconds>" in said and "<0.2 seconds>" in said and "<0.4 seconds>" in said


def test_times_of_a_variable_rate_and_of_one_frame(released: ChatEncoder) -> None:
    ref, info = medium("video", 4, 64, 64, fps=2.0)
    uneven = replace(info, times_s=(0.0, 0.34, 5.0, 11.5))
    pieces = released.processor.expand(released.processor.plan(ref, uneven, replace(LIMITS, frames=4)))
    assert pieces[1::2] == ["<|vision_end|><8.2 seconds><|vision_start|>"]
    one = released.processor.plan(ref, replace(info, num_frames=1), replace(LIMITS, frames=1))
    assert (released.processor.lead(one), released.processor.expand(one)) == ("<0.0 seconds>", [4])


@pytest.mark.parametrize("name", ROWS)
def test_positions(tiny: Tiny, name: str) -> None:
    batch = row(tiny, name)
    grids = {
        f"{kind}_grid_thw": torch.tensor([p.grid_thw for p in batch.documents[0].media if p.ref.kind == kind])
        for kind in ("image", "video")
        if any(p.ref.kind == kind for p in batch.documents[0].media)
    }
    wanted, _ = tiny.theirs.model.get_rope_index(batch.input_ids_T[None], kinds_of(batch), **grids)
    assert torch.equal(batch.positions_3T, wanted[:, 0])


# ----------------------------------------------------------------------------------------------------- preprocessing

PUBLISHED = replace(
    LIMITS,
    **{"frames": None, "fps": 2.0, "min_frames": 4, "max_frames": 768, "min_pixels": 4096},
    max_pixels=768 * 32 * 32,
    total_pixels=25165824 // 2,
)
"""The released `video_preprocessor_config.json`: 25,165,824 pixels over all frames, of which two are one token's; a
frame has 768 tokens at most."""


@pytest.fixture(scope="module")
def processor() -> Qwen3Processor:
    return Qwen3Processor(image_token=0, video_token=1, table_side=48)


@pytest.mark.parametrize("fps", [10.0, 24.0, 25.0, 29.97, 60.0])
@pytest.mark.parametrize("seconds", [1, 2, 7, 16, 61, 500])
def test_frames_and_grid_of_a_video(processor: Qwen3Processor, fps: float, seconds: int) -> None:
    """transformers' sampling where it takes an even number of frames (qwen-vl-utils, which the model's card uses, makes
    it even), and its grid with the cap that qwen-vl-utils has."""
    total = int(seconds * fps)
    theirs = SimpleNamespace(
        **{"fps": 2, "num_frames": None, "min_frames": 4, "max_frames": 768, "patch_size": 16, "merge_size": 2},
        **{"temporal_patch_size": 2, "cap_pixels_per_frame": True, "max_video_tokens": 768},
        size={"shortest_edge": 4096, "longest_edge": 25165824},
    )
    metadata = SimpleNamespace(total_num_frames=total, fps=fps)
    frames = Qwen3VLVideoProcessor.sample_frames(theirs, metadata).tolist()
    for height, width in ((720, 1280), (360, 640), (1080, 1920), (480, 640), (333, 777), (100, 64)):
        ref, info = medium("video", total, height, width, fps=fps)
        plan = processor.plan(ref, info, PUBLISHED)
        count = len(plan.frame_indices)
        assert count == len(frames) // 2 * 2
        if count == len(frames):
            # Of many frames one falls between two: qwen-vl-utils, as we do, counts in float32.
            off = max(abs(a - b) for a, b in zip(plan.frame_indices, frames, strict=True))
            assert off <= (1 if total > 10_000 else 0)
        patches = Qwen3VLVideoProcessor.get_num_of_video_patches(theirs, count, height, width)
        assert plan.grid_thw[0] * plan.grid_thw[1] * plan.grid_thw[2] == patches, (count, height, width, plan.grid_thw)
        assert plan.height % 32 == plan.width % 32 == 0 and plan.num_tokens == patches // 4


def test_size_of_a_frame() -> None:
    """Their rule for all frames together is ours for one, with the budget shared out evenly."""
    for frames in (2, 8, 30):
        for height in (32, 47, 48, 64, 111, 240, 333, 720, 1080, 2160):
            for width in (32, 50, 100, 333, 640, 1280, 1920):
                for low, high in ((4096, 786_432), (131_072, 786_432), (65_536, 131_072), (1024, 1024)):
                    wanted = smart_resize(frames, height, width, 2, 32, frames * low, frames * high)
                    assert rules.smart_resize(height, width, 32, low, high) == wanted, (height, width, low, high)


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_patches_of_a_video(tiny: Tiny, frames: int) -> None:
    """Order, the last frame of an odd count, normalising; at a size that needs no resizing."""
    made = Media.make(tiny.encoder.processor, [medium("video", frames, 96, 160)])
    pixels = torch.randint(0, 256, (frames, 3, 96, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patches, *grid = Qwen3VLVideoProcessor.patchify(None, (pixels[None].float() / 255 - 0.5) / 0.5, 16, 2, 2)
    assert tuple(grid) == made.plans[0].grid_thw
    plan = made.plans[0]
    found = tiny.ours().normalise(patches_of(pixels, plan, tiny.encoder.processor).pixels_PD)
    assert float((found - patches[0]).abs().max()) <= 1e-6


@pytest.mark.parametrize("grid", [(1, 48, 48), (2, 6, 4), (1, 2, 90), (3, 64, 34)])
def test_learned_positions_are_the_table_stretched(processor: Qwen3Processor, grid: tuple[int, int, int]) -> None:
    """By torch's own bilinear interpolation, and in the order of the patches; two media share what they can."""
    table_NE = torch.randn(48 * 48, 5, generator=torch.Generator().manual_seed(0))
    picture = table_NE.T.reshape(1, 5, 48, 48)
    stretched = F.interpolate(picture, grid[1:], mode="bilinear", align_corners=True)[0]
    ref, info = medium("image", 1, 64, 64)
    layout = processor.layout([MediaPlan(ref, info, (0,), 0, 0, size, 0) for size in (grid, (1, 4, 8), grid)])
    assert len(layout.corners_U4) == grid[1] * grid[2] + 4 * 8
    found_UE = (table_NE[layout.corners_U4] * layout.shares_U4[:, :, None]).sum(1)
    row_P, column_P = layout.positions_P2.unbind(1)
    wanted_PE = stretched[:, row_P.clamp(max=grid[1] - 1), column_P.clamp(max=grid[2] - 1)].T
    own = grid[0] * grid[1] * grid[2]
    for part in (slice(0, own), slice(own + 32, None)):
        torch.testing.assert_close(found_UE[layout.place_P][part], wanted_PE[part], rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- released sizes


# In thousands of millions: the cards say 2B, 8B and 32B; the hub counts 8.77 for the second.
@pytest.mark.parametrize(
    ("size", "whole", "lora"), [("2B", 2.13, 17.4), ("8B", 8.77, 43.6), ("32B", 33.4, 134.2), ("4B", 4.44, 33.0)]
)
def test_released_sizes(size: str, whole: float, lora: float) -> None:
    """Every name and shape is transformers'; adapters of rank 16 on each linear of the language model."""
    config = Qwen3VLConfig(**RELEASED[f"Qwen3-VL-{size}-"])
    with torch.device("meta"):
        model = qwen3_vl.build(config, {}, torch.bfloat16)
        theirs = Qwen3VLForConditionalGeneration(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(whole, rel=3e-3)
    (row,) = choose_trainable(model, LoraConfig(rank=16, targets=("language_model.*",)), [])
    assert row.parameters / 1e6 == pytest.approx(lora, rel=5e-3)
    layers = [p for n, p in model.decoder.layers.named_parameters() if p.dim() == 2 and not p.requires_grad]
    assert FlopCounter(model).token == 4 * sum(p.numel() for p in layers) + 6 * row.parameters
