"""A frame cache in this process, and clips to put into it: what its tests share."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchcodec.encoders import VideoEncoder

from tests.helpers.patches import SPEC, plan_of
from vft.common.types import MediaPlan, MediaRef
from vft.config.data import DataConfig
from vft.data.media.frame_cache import FrameCache
from vft.data.media.patches import load_patches
from vft.data.media.video import decode_chunks, scan
from vft.data.workers import WorkerPool

GIB = 2**30


def cache_in(folder: Path, limit_bytes: float = GIB) -> FrameCache:
    return FrameCache.of(DataConfig(cache="frames", cache_dir=str(folder), cache_gib=limit_bytes / GIB))


def files_in(cache: FrameCache) -> list[Path]:
    """The cached media, and whatever else lies there."""
    assert cache.folder is not None
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


def plan_for(path: Path, size: tuple[int, int] = (28, 56), indices: tuple[int, ...] = (0, 3, 5, 7)) -> MediaPlan:
    ref = MediaRef("video", path)
    return plan_of(ref, scan(ref), indices, *size)


def film(path: Path, seed: int = 0, frames: int = 8) -> Path:
    """A clip of noise, 96 x 64 pixels (width x height), unlike that of any other seed."""
    coarse = torch.rand(frames, 3, 8, 12, generator=torch.Generator().manual_seed(seed)) * 255
    pixels_TCHW = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")
    VideoEncoder(pixels_TCHW.to(torch.uint8), frame_rate=10).to_file(path)
    return path


def loaded(cache: FrameCache, plan: MediaPlan) -> Tensor:
    """What a worker returns, run in this process."""
    with WorkerPool(0, 60.0) as pool:
        return cache.submit(pool, plan, SPEC).result().pixels_PD


def decoded(plan: MediaPlan) -> Tensor:
    return load_patches(plan, SPEC).pixels_PD


def overwrite(path: Path) -> None:
    """Other content of the same size and time: whoever opens the file notices, whoever looks at it does not."""
    status = path.stat()
    path.write_bytes(random.Random(0).randbytes(status.st_size))  # some noise FFmpeg takes for sound
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[MediaPlan]:
    """The plans that are decoded from now on, in this process."""
    seen: list[MediaPlan] = []

    def counted(plan: MediaPlan, *args: Any, **more: Any) -> Any:
        seen.append(plan)
        return decode_chunks(plan, *args, **more)

    monkeypatch.setattr("vft.data.media.patches.decode_chunks", counted)
    return seen
