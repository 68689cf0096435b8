"""Patches, against a plain resize; the pixels of the reference are in tests/parity/test_reference_cases.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.clips import make_clip
from tests.helpers.patches import SPEC, decode, patches_of, plan_of
from vft.common.types import MediaInfo, MediaRef
from vft.data.media.patches import load_patches
from vft.data.media.video import decode_chunks, scan
from vft.models.qwen2_5_vl.processor import Qwen2_5Processor


@pytest.mark.parametrize("chunk_frames", [0.5, 2, 3, 4.5, 6])
@pytest.mark.parametrize("indices", [(0, 4, 9, 14, 19), (1, 2, 2, 3, 18, 19), tuple(range(20))])
def test_load_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indices: tuple[int, ...], chunk_frames: float
) -> None:
    """Whatever is decoded at a time, patches are those of the whole clip; a temporal patch is never split."""
    ref = MediaRef("video", make_clip(tmp_path / "a.mp4", range(20), size=(96, 64)))
    plan = plan_of(ref, scan(ref), indices, 28, 56)
    whole = patches_of(decode(plan), plan, SPEC)
    monkeypatch.setattr(decode_chunks, "__defaults__", (round(chunk_frames * 3 * 96 * 64),))
    patches = load_patches(plan, SPEC)
    assert torch.equal(patches.pixels_PD, whole.pixels_PD)
    assert (patches.grid_thw, patches.seconds_per_grid) == ((math.ceil(len(indices) / 2), 2, 4), 1.5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("count", "height", "width"), [(2, 28, 28), (6, 56, 140), (4, 84, 28)])
def test_order_of_patches(count: int, height: int, width: int, channels_last: bool, dtype: torch.dtype) -> None:
    """Against a permutation of single pixels, whatever their type and layout in memory."""
    generator = torch.Generator().manual_seed(0)
    frames_TCHW = torch.randint(0, 256, (count, 3, height, width), generator=generator).to(dtype)
    if channels_last:
        frames_TCHW = frames_TCHW.contiguous(memory_format=torch.channels_last)
    processor = Qwen2_5Processor(image_token=0, video_token=1, tokens_per_second=2.0)
    assert torch.equal(processor.order_patches(frames_TCHW), SPEC.order_patches(frames_TCHW))


def test_odd_count_repeats_the_resized_last_frame() -> None:
    frames_TCHW = torch.randint(0, 256, (3, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plan = plan_of(MediaRef("video", Path("a.mp4")), MediaInfo("video", 40, 50, 3, 2.0), (0, 1, 2), 28, 28)
    pixels_PD = patches_of(frames_TCHW, plan, SPEC).pixels_PD
    small = F.interpolate(frames_TCHW, (28, 28), mode="bicubic", antialias=True, align_corners=False)
    last_P2 = pixels_PD.reshape(2, 4, 3, 2, 14, 14)[1]
    assert torch.equal(last_P2[:, :, 0], last_P2[:, :, 1])
    assert torch.equal(last_P2[0, :, 0], small[2, :, :14, :14])


def test_size_kept_is_untouched_and_one_frame_is_doubled() -> None:
    frames_TCHW = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    plan = plan_of(MediaRef("video", Path("a.mp4")), MediaInfo("video", 28, 28, 1, 2.0), (0,), 28, 28)
    pixels_PD = patches_of(frames_TCHW, plan, SPEC).pixels_PD
    assert torch.equal(pixels_PD[0].reshape(3, 2, 14, 14)[:, 1], frames_TCHW[0, :, :14, :14])
