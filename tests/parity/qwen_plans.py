"""Random videos with what a record asks of them, and the plans that qwen-vl-utils makes: indices, size, seconds.

`python -m tests.parity.qwen_plans 300 > tests/parity/qwen_plans.jsonl` writes those that CI compares with. It needs
qwen-vl-utils 0.0.14 (`pip install --no-deps qwen-vl-utils==0.0.14`) but not torchvision: nothing is decoded or resized.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

TABLE = Path(__file__).with_name("qwen_plans.jsonl")


@dataclass(frozen=True)
class Request:
    """A video and a record's keys for it."""

    height: int
    width: int
    num_frames: int
    fps: float
    patch: int
    keys: dict[str, Any]


@dataclass(frozen=True)
class Made:
    """A plan, as far as both sides have one."""

    indices: list[int]
    height: int
    width: int
    sample_fps: float


def load_vision_process() -> ModuleType:
    """qwen-vl-utils' module, with stand-ins for what it would download, decode and resize with.

    Raises:
        ImportError: the package is not there.
    """
    names = ("requests", "torchvision", "torchvision.io", "torchvision.transforms")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names}):  # for these lines alone
        return importlib.import_module("qwen_vl_utils.vision_process")


def random_request(rng: random.Random, most_frames: int) -> Request:
    """Lengths, rates, sizes and limits of all kinds; limits of pixels stay within the 768 tokens of a frame to which
    qwen-vl-utils cuts every budget (we take a larger one as it is given)."""
    patch = rng.choice((14, 16))
    token = (2 * patch) ** 2
    fps = rng.choice((1.0, 8.0, 10.0, 12.5, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0, rng.uniform(0.5, 120)))
    num_frames = rng.choice((rng.randint(4, 100), rng.randint(4, 3000), rng.randint(4, 40_000)))
    height, width = (rng.choice((rng.randint(6, 400), rng.randint(6, 2200))) for _ in range(2))
    most = rng.choice((rng.randint(4, 768) * token, rng.randint(4 * token, 768 * token)))
    keys: dict[str, Any] = {"min_pixels": rng.randint(1, most // rng.choice((1, 4, 50))), "max_pixels": most}
    how = rng.random()
    if how < 0.3:
        # Even: of an odd number we show as many and the last one twice, as the model's own processor does.
        keys["nframes"] = 2 * rng.randint(1, min(num_frames, most_frames) // 2)
    else:
        keys["max_frames"] = rng.randint(4, most_frames)
        if how < 0.8:
            keys["fps"] = rng.choice((0.1, 0.5, 1.0, 2.0, 3.0, 24.0, rng.uniform(0.01, 30)))
        if rng.random() < 0.3:
            keys["min_frames"] = rng.randint(1, keys["max_frames"])
    frames = keys.get("nframes", keys.get("max_frames"))
    if rng.random() < 0.5 or frames * most > 2 * 115_200 * token:  # their own default, 0.9 of a context of 128,000
        keys["total_pixels"] = rng.randint(1, most * 16)
    if rng.random() < 0.1:
        keys["resized_height"], keys["resized_width"] = rng.randint(20, 900), rng.randint(20, 900)
    seconds = num_frames / fps
    if rng.random() < 0.3:
        keys["video_start"] = rng.uniform(0, seconds)
    if rng.random() < 0.3:
        keys["video_end"] = rng.uniform(keys.get("video_start", 1e-6), 1.2 * seconds) or 1e-6
    return Request(height, width, num_frames, fps, patch, keys)


def planner(vision_process: ModuleType) -> Callable[[Request], Made | None]:
    """qwen-vl-utils' own `fetch_video`; a request that it refuses has no plan."""

    def plan(request: Request) -> Made | None:
        def frames_at(indices: list[int]) -> SimpleNamespace:
            assert all(0 <= i < request.num_frames for i in indices)
            return SimpleNamespace(data=torch.zeros(1).expand(len(indices), 3, request.height, request.width))

        def decoder(*_: object, **__: object) -> SimpleNamespace:
            metadata = SimpleNamespace(average_fps=request.fps, num_frames=request.num_frames)
            return SimpleNamespace(metadata=metadata, get_frames_at=lambda indices: frames_at(indices))

        def resize(frames: torch.Tensor, size: list[int], **_: object) -> torch.Tensor:
            return torch.zeros(1).expand(*frames.shape[:2], *size)

        with (
            mock.patch("torchcodec.decoders.VideoDecoder", decoder),
            mock.patch.object(vision_process.transforms.functional, "resize", resize),
            mock.patch.dict(vision_process.VIDEO_READER_BACKENDS, torchvision=lambda _: 1 / 0),  # after a refusal
        ):
            try:
                (frames, metadata), sample_fps = vision_process.fetch_video(
                    {"video": "clip.mp4", **request.keys}, request.patch, True, True
                )
            except (ValueError, AssertionError, ZeroDivisionError):
                return None
        height, width = frames.shape[-2:]
        if not height or not width:  # it rounds a narrow frame down to nothing
            return None
        return Made(metadata["frames_indices"], height, width, sample_fps)

    return plan


def random_plans(vision_process: ModuleType, seed: int, count: int, most_frames: int) -> Iterator[tuple[Request, Made]]:
    """So many requests that qwen-vl-utils has a plan for."""
    rng, plan = random.Random(seed), planner(vision_process)
    while count:
        request = random_request(rng, most_frames)
        if (made := plan(request)) is not None:
            yield request, made
            count -= 1


def stored_plans() -> Iterator[tuple[Request, Made]]:
    """Those of the table."""
    for line in TABLE.read_text().splitlines():
        *request, keys, indices, height, width, sample_fps = json.loads(line)
        yield Request(*request, keys), Made(indices, height, width, sample_fps)


if __name__ == "__main__":
    for asked, given in random_plans(load_vision_process(), 0, int(sys.argv[1]), most_frames=24):
        print(json.dumps([*vars(asked).values(), *vars(given).values()], separators=(",", ":")))
