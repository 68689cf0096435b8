#!/usr/bin/env python
"""Frames a second out of the frame cache and by decoding: python tools/bench/frame_cache.py [--clips N] [--output FILE]

On one core, as a worker has it, in turns: H.264 clips of 10 s, 640 x 360 at 30 frames a second, sampled with the
default limits; JPEG pictures of 1280 x 960, which a run doesn't keep. Files lie in the file cache.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import benchmark, interleaved, median, report
from PIL import Image
from workload import write_clips

from vft.common.types import MediaPlan, MediaRef
from vft.config.data import DataConfig
from vft.data.budget import limits_of
from vft.data.media.frame_cache import count_bytes, load_cached
from vft.data.media.patches import load_patches
from vft.data.media.video import scan
from vft.models.qwen2_5_vl.processor import Qwen2_5Processor

SPEC: Any = Qwen2_5Processor(image_token=0, video_token=1, tokens_per_second=2.0)


def main() -> None:
    """Command line."""
    torch.set_num_threads(1)
    with benchmark(__doc__, add_arguments, repeats=7) as (options, folder):
        clips = write_clips(folder / "clips", options.clips, 360, 640, frames=300)
        rows = compare("clips", [MediaRef("video", path) for path in clips], folder, options.repeats)
        pictures = write_pictures(folder, options.clips)
        rows += compare("pictures", [MediaRef("image", path) for path in pictures], folder, options.repeats)
        report("Frame cache", rows, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--clips", type=int, default=8, help="number of clips, and of pictures (default 8)")


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Pictures of coarse noise."""
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        coarse = torch.rand(1, 3, 60, 80, generator=torch.Generator().manual_seed(number))
        pixels_HWC = torch.nn.functional.interpolate(coarse, scale_factor=16, mode="bicubic")[0].permute(1, 2, 0)
        Image.fromarray((pixels_HWC.clamp(0, 1) * 255).byte().numpy()).save(path, quality=90)
    return paths


def compare(name: str, media: Sequence[MediaRef], folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Rows: decoding alone, decoding and storing in the cache, reading from the cache."""
    config = DataConfig()
    plans = [SPEC.plan(ref, scan(ref), limits_of(ref, config)) for ref in media]
    emptied, filled = (folder / f"{name}-{kept}" for kept in ("emptied", "filled"))
    ways: dict[str, Callable[[MediaPlan], Any]] = {
        "decoded": lambda plan: load_patches(plan, SPEC),
        "decoded and kept": lambda plan: load_cached(plan, SPEC, emptied),
        "out of the cache": lambda plan: load_cached(plan, SPEC, filled),
    }

    def all_of_them(way: str) -> None:
        if way == "decoded and kept":
            shutil.rmtree(emptied, ignore_errors=True)
        for plan in plans:
            ways[way](plan)

    times = interleaved({way: lambda way=way: all_of_them(way) for way in ways}, repeats)  # type: ignore[misc]
    file_bytes = sum(ref.path.stat().st_size for ref in media if isinstance(ref.path, Path))
    filled_bytes = count_bytes(filled)
    frames = sum(len(plan.frame_indices) for plan in plans)
    size = f"{len(plans[0].frame_indices)} x {plans[0].width} x {plans[0].height}"
    return [
        {
            "media": f"{name}, {size}",
            "way": way,
            "frames/s": frames / median(taken),
            "ms each": 1000 * median(taken) / len(plans),
            "times the bytes": filled_bytes / file_bytes if way == "out of the cache" else 1.0,
            "times as fast": median(times["decoded"]) / median(taken),
        }
        for way, taken in times.items()
    ]


if __name__ == "__main__":
    main()
