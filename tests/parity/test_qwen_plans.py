"""Indices, sizes and seconds of the Qwen families beside those of qwen-vl-utils 0.0.14, for random videos and keys."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tests.parity import qwen_plans
from tests.parity.qwen_plans import Made, Request
from vft.common.types import MediaInfo, MediaOptions, MediaRef, VisionLimits
from vft.config.data import DataConfig, VideoConfig
from vft.data.budget import limits_of
from vft.data.media.patches import frames_of, load_patches
from vft.data.media.video import scan
from vft.models.processor import QwenProcessor
from vft.models.qwen2_5_vl.processor import Qwen2_5Processor
from vft.models.qwen3_vl.processor import Qwen3Processor

COUNT = int(os.environ.get("VFT_QWEN_PLANS", 300))
CONFIG = DataConfig(video=VideoConfig(max_frames=768))
SPECS: dict[int, QwenProcessor] = {
    14: Qwen2_5Processor(image_token=1, video_token=2, tokens_per_second=2.0),
    16: Qwen3Processor(image_token=1, video_token=2, table_side=48),
}


def compare(plans: Iterable[tuple[Request, Made]]) -> int:
    """How many plans there are, all of them ours; those that differ fail with what was asked."""
    count = 0
    for request, wanted in plans:
        ref = MediaRef("video", Path("clip.mp4"), MediaOptions(**request.keys))
        seconds = request.num_frames / request.fps
        info = MediaInfo("video", request.height, request.width, request.num_frames, request.fps, duration_s=seconds)
        plan = SPECS[request.patch].plan(ref, info, limits_of(ref, CONFIG))
        found = Made(list(plan.frame_indices), plan.height, plan.width, 2 / plan.seconds_per_grid)
        assert (found.indices, found.height, found.width) == (wanted.indices, wanted.height, wanted.width), request
        assert found.sample_fps == pytest.approx(wanted.sample_fps, rel=1e-12), request
        count += 1
    return count


def test_stored_plans() -> None:
    assert compare(qwen_plans.stored_plans()) == 300


@pytest.fixture
def vision_process() -> ModuleType:
    """qwen-vl-utils 0.0.14, where it is installed."""
    try:
        return qwen_plans.load_vision_process()
    except ImportError as error:
        pytest.skip(str(error))


def test_plans_of_qwen_vl_utils(vision_process: ModuleType) -> None:
    """`VFT_QWEN_PLANS=15000` for as many."""
    print(compare(qwen_plans.random_plans(vision_process, 1, COUNT, most_frames=768)), "plans")


def test_an_odd_number_of_frames_is_what_was_asked_for() -> None:
    """The last one fills the pair, as transformers' processor does; qwen-vl-utils would take 2 or 4."""
    info = MediaInfo("video", 112, 112, 10, 5.0, duration_s=2.0)
    for patch, processor in SPECS.items():
        ref = MediaRef("video", Path("clip.mp4"), MediaOptions(nframes=3))
        plan = processor.plan(ref, info, limits_of(ref, CONFIG))
        assert plan.frame_indices == (0, 4, 9) and plan.grid_thw[0] == 2, (
            patch
        )  # round(linspace(0, 9, 3)), ties to even


@pytest.mark.parametrize("least", [100_352, 96_000, 50_000])
def test_total_pixels_never_makes_a_frame_larger(least: int) -> None:
    """Also where 1.05 x min_pixels, the least that it leaves a frame, is more than max_pixels."""
    limits, ref = VisionLimits(2.0, None, 4, 32, least, 100_352, total_pixels=100_352), MediaRef("video", Path("a.mp4"))
    for width in range(100, 2000, 20):
        info = MediaInfo("video", 200, width, 300, 30.0, duration_s=10.0)
        within, free = (SPECS[14].plan(ref, info, replace(limits, total_pixels=total)) for total in (100_352, None))
        assert within.height * within.width <= free.height * free.width, width
    if least == 100_352:
        info = MediaInfo("video", 200, 720, 300, 30.0, duration_s=10.0)
        plan = SPECS[14].plan(ref, info, limits)
        assert (plan.width, plan.height) == (588, 140)  # qwen-vl-utils' own


def test_pictures_of_qwen_vl_utils(tmp_path: Path, vision_process: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own list branch beside ours, pixels too, at a size that it leaves as it is."""

    def resize(frames: torch.Tensor, size: list[int], **_: object) -> torch.Tensor:
        assert [*frames.shape[2:]] == size
        return frames

    monkeypatch.setattr(vision_process.transforms.functional, "resize", resize)
    rng = np.random.default_rng(0)
    for count in range(1, 10):
        names = [str(tmp_path / f"{i}.png") for i in range(count)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (112, 168, 4), np.uint8), "RGBA").save(name)
        asked = {"video": names, "sample_fps": 3.0, "min_pixels": 784, "max_pixels": 112 * 168, "total_pixels": 10**9}
        frames, rate = vision_process.fetch_video(asked, return_video_sample_fps=True)
        ref = MediaRef("video", tuple(map(Path, names)), MediaOptions(sample_fps=3.0))
        config = DataConfig(video=VideoConfig(min_pixels=784, max_pixels=112 * 168))
        made = SPECS[14].plan(ref, scan(ref), limits_of(ref, config))
        assert 2 / made.seconds_per_grid == pytest.approx(rate)
        patches = load_patches(made, SPECS[14])
        ours = frames_of(patches.pixels_PD, replace(made, frame_indices=tuple(range(len(frames)))), SPECS[14])
        assert torch.equal(ours, frames.to(torch.uint8))
