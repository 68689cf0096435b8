"""Qwen2.5-VL's own rules beside transformers' and by hand: sizes, patches, positions, counts of frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pictures

from tests.helpers.patches import patches_of
from tests.helpers.tiny import LIMITS, Media, Tiny, medium
from tests.parity.test_against_transformers import row
from vft.common.errors import UserError
from vft.common.types import MediaInfo, MediaRef
from vft.models import processor as rules

# ----------------------------------------------------------------------------------------------------- preprocessing


def test_smart_resize() -> None:
    sizes = [28, 29, 41, 42, 43, 56, 70, 98, 111, 240, 333, 360, 480, 1080, 1920, 4096]
    budgets = [(28 * 28, 28 * 28), (3136, 7448), (3136, 12845056), (4 * 784, 1280 * 784), (100_352, 602_112)]
    for height in sizes:
        for width in sizes:
            for low, high in budgets:
                wanted = pictures.smart_resize(height, width, 28, low, high)
                assert rules.smart_resize(height, width, 28, low, high) == wanted, (height, width, low, high)


def test_narrow_pictures_are_refused() -> None:
    with pytest.raises(ValueError):
        pictures.smart_resize(28, 28 * 201, 28)
    with pytest.raises(UserError, match="5628 x 28"):
        rules.smart_resize(28, 28 * 201, 28, 3136, 1 << 30)


def random_frames(frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def normalised(tiny: Tiny, pixels_PD: Tensor) -> Tensor:
    return tiny.ours().normalise(pixels_PD).detach()


HALF = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "height", "width", "options"),
    [
        ("qwen2_5_vl", 84, 140, {"min_pixels": 784}),
        ("qwen3_vl", 96, 160, {"min_pixels": 1024, "patch_size": 16, "image_mean": HALF, "image_std": HALF}),
    ],
)
def test_patches_of_a_picture(make_tiny: Any, name: str, height: int, width: int, options: dict[str, Any]) -> None:
    """At a size that needs no resizing (PIL's bicubic differs by a level here and there): order and normalising."""
    tiny = make_tiny(name, "tied")
    processor = tiny.encoder.processor
    (plan,) = Media.make(processor, [medium("image", 1, height, width)]).plans
    frames = random_frames(1, height, width)
    theirs = pictures.Qwen2VLImageProcessorPil(max_pixels=1 << 20, **options)
    wanted = theirs(images=[Image.fromarray(frames[0].permute(1, 2, 0).numpy())], return_tensors="pt")
    assert tuple(wanted["image_grid_thw"][0].tolist()) == plan.grid_thw
    found = normalised(tiny, patches_of(frames, plan, processor).pixels_PD)
    assert float((found - wanted["pixel_values"]).abs().max()) <= 1e-5


@pytest.fixture(scope="module")
def video_processor() -> Any:
    """transformers' video processor."""
    pytest.importorskip("torchvision", reason="transformers' video processor needs torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor


@pytest.mark.parametrize("frames, height, width", [(4, 84, 140), (5, 170, 150), (2, 61, 233), (3, 28, 28)])
def test_patches_of_a_video(tiny: Tiny, video_processor: Any, frames: int, height: int, width: int) -> None:
    """Random frames: resizing, the last frame of an odd count, order and normalising."""
    processor = tiny.encoder.processor
    made = Media.make(processor, [medium("video", frames, height, width)])
    pixels = random_frames(frames, height, width)
    theirs = video_processor(size={"shortest_edge": 784, "longest_edge": 1 << 30}, do_sample_frames=False)
    wanted = theirs(videos=[pixels], return_tensors="pt")
    assert tuple(wanted["video_grid_thw"][0].tolist()) == made.plans[0].grid_thw
    found = normalised(tiny, patches_of(pixels, made.plans[0], processor).pixels_PD)
    assert float((found - wanted["pixel_values_videos"]).abs().max()) <= 1e-5


def test_odd_count_repeats_the_last_frame(tiny: Tiny) -> None:
    """By a frame sequence of even length whose last frame stands twice."""
    processor = tiny.encoder.processor
    odd = Media.make(processor, [medium("video", 5, 100, 90)])
    even = Media.make(processor, [medium("video", 6, 100, 90)])
    pixels = random_frames(5, 100, 90)
    twice = torch.cat([pixels, pixels[-1:]])
    found = patches_of(pixels, odd.plans[0], processor).pixels_PD
    assert torch.equal(found, patches_of(twice, even.plans[0], processor).pixels_PD)


def test_one_frame_fills_its_patch(tiny: Tiny) -> None:
    processor = tiny.encoder.processor
    made = Media.make(processor, [medium("video", 1, 56, 56)])
    patches = patches_of(random_frames(1, 56, 56), made.plans[0], processor)
    features = patches.pixels_PD.unflatten(1, (3, 2, 14, 14))
    assert patches.grid_thw == (1, 4, 4)
    assert torch.equal(features[:, :, 0], features[:, :, 1])


# ------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("name", ["text", "picture"])
def test_positions_where_transformers_agrees(tiny: Tiny, name: str) -> None:
    """Its rule for text after a video differs (the reference cases pin ours); for text and pictures both are one."""
    batch = row(tiny, name)
    kinds = batch.documents[0].media_mask_T.long()[None]
    grids = torch.tensor(batch.grids) if batch.grids else None
    wanted, _ = tiny.theirs.model.get_rope_index(batch.input_ids_T[None], kinds, image_grid_thw=grids)
    assert torch.equal(batch.positions_3T, wanted[:, 0])


def test_positions_of_a_video_by_hand(tiny: Tiny) -> None:
    """3 patches of 2 s at 2 positions a second: 0, 4, 8; text goes on past the largest of all, 8 here, not 6 x 5."""
    batch = row(tiny, "video")
    first = int(batch.media_index_M[0])
    expected = [(first + time, first + y, first + x) for time in (0, 4, 8) for y in range(6) for x in range(5)]
    assert list(map(tuple, batch.positions_3T.T[batch.media_index_M].tolist())) == expected
    after = batch.positions_3T[:, int(batch.media_index_M[-1]) + 1 :]
    assert after.tolist() == [list(range(first + 9, first + 9 + after.shape[1]))] * 3


@pytest.mark.parametrize(
    "available, fps, wanted", [(100, 25.0, 8), (75, 25.0, 6), (70, 25.0, 4), (3, 25.0, 2), (9000, 30.0, 32)]
)
def test_count_of_frames_at_a_rate(available: int, fps: float, wanted: int) -> None:
    """qwen-vl-utils' smart_nframes: rate times duration, between the limits, never more than there are, even."""
    limits = replace(LIMITS, fps=2.0, frames=None, min_frames=4, max_frames=32)
    assert (
        rules.frame_count(available, MediaRef("video", Path("a.mp4")), MediaInfo("video", 1, 1, available, fps), limits)
        == wanted
    )
