#!/usr/bin/env python
"""Host work between two steps of one pack: python tools/bench/feeding.py [--frames N] [--output FILE]

The loader builds a pack, joins it to one row and copies it to the device. Two ways, in turns:

  beside   in the loader's thread, while the step before is at work, as in training
  between  when the step asks for it

The step is a pause as long as `--step`: a device computes beside the host, so only what the host does in between
counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import in_venv  # noqa: F401
import torch
from measure import DEVICE, benchmark, report
from workload import DEMO_BASE, write_clips, write_records

from vft.config.data import DataConfig, SourceConfig, VideoConfig
from vft.config.run import ModelConfig
from vft.data import loader as loading
from vft.data.dataset import Dataset, load_dataset
from vft.data.loader import Loader
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel
from vft.preparation.run import open_for_inference
from vft.recipes.caption import Caption


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_arguments) as (options, folder):
        dataset = make_dataset(options, folder)
        waits: dict[str, list[float]] = {"beside": [], "between": []}
        with WorkerPool(1, 600.0) as pool:
            for _ in range(options.repeats):
                for way, found in waits.items():
                    with patch.object(loading, "_in_thread", Later if way == "between" else loading._in_thread):
                        found += seconds_between_steps(dataset, pool, options)
        row_tokens = max(dataset.lengths)
        before = median(waits["between"])
        rows: list[dict[str, Any]] = [
            {
                "made": way,
                "row tokens": row_tokens,
                "ms between steps": 1000 * median(found),
                "of before": median(found) / before,
            }
            for way, found in waits.items()
        ]
        report("Host work between two steps", rows, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--frames", type=int, default=64, help="frames of a video, one video a row (64)")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed (6)")
    parser.add_argument("--step", type=float, default=1.0, help="seconds of a step (1)")


def make_dataset(options: argparse.Namespace, folder: Path) -> Dataset:
    """Rows of one video with one question."""
    encoder = open_for_inference(ModelConfig(path=str(DEMO_BASE)), None, torch.float32).encoder(DataConfig())
    clips = write_clips(folder / "clips", 4, 336, 448, options.frames)
    config = DataConfig(
        root=folder,
        sources=(SourceConfig(format="llava_video", path=str(write_records(folder / "records.json", clips, 1))),),
        pack_tokens=32768,
        max_samples_per_pack=1,
        cache_dir=str(folder / "cache"),
        video=VideoConfig(frames=options.frames, max_pixels=336 * 448),
    )
    return load_dataset(config, config.sources, Caption().conversations, encoder, seed=0)


def seconds_between_steps(dataset: Dataset, pool: WorkerPool, options: argparse.Namespace) -> list[float]:
    """How long each step has to wait for its pack, the first ones left out."""
    loader = Loader(dataset, dataset.pack_plan(0), pool, DataParallel(), 1, 4, None, device=DEVICE)
    seconds = []
    for number in range(2 + options.steps):
        since = time.perf_counter()
        for _ in loader.step(is_last=number == 1 + options.steps):
            seconds.append(time.perf_counter() - since)
            time.sleep(options.step)
    return seconds[2:]


@dataclass
class Later:
    """Work that is done when its result is asked for."""

    work: Callable[[], Any]

    def result(self) -> Any:
        """Do it."""
        return self.work()


if __name__ == "__main__":
    main()
