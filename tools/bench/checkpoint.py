#!/usr/bin/env python
"""Seconds that a checkpoint stops training: python tools/bench/checkpoint.py [--shape small] [--ranks 8 64] [--full]

`vft.checkpoint.save` of a real model with optimizer state, and of that: copying and writing, hashing for the manifest,
flushing to the disk. Then what a resumed run waits for: `newest_good` (hashes again) and `load`. Training stands still
in both. Which disk the folder lies on decides about flushing: name one with --folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import default_device, median, report, synchronise
from workload import SHAPES, build_model, fill

from vft import checkpoint as checkpoints
from vft.config import LoraConfig, TrainConfig
from vft.console import user_errors
from vft.lora import choose_trainable
from vft.models.family import VideoLanguageModel
from vft.optim import build_optimizer
from vft.types import UserError

STATE = {"cursor": {"epoch": 0, "pack": 0, "step": 1}, "bad": []}
MIB = 2**20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="size of a random model (small)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64], help="LoRA ranks on all linears (8 64)")
    parser.add_argument("--full", action="store_true", help="also with the language model trained in full")
    parser.add_argument("--device", default=str(default_device()), help="where the model is (a GPU where there is one)")
    parser.add_argument("--folder", type=Path, help="where to write checkpoints (the folder for temporary files)")
    parser.add_argument("--repeats", type=int, default=5, help="saves and loads of each, after one that warms up (5)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with user_errors():
        check(options)
        with tempfile.TemporaryDirectory(prefix="vft-checkpoint-", dir=options.folder) as folder:
            compare(options, Path(folder))


def check(options: argparse.Namespace) -> None:
    """UserError where there is nothing to do, or a number can't be."""
    for name, values in (("--ranks", options.ranks), ("--repeats", [options.repeats])):
        for value in values:
            if value < 1:
                raise UserError(f"{name} {value}: must be at least 1")
    if not options.ranks and not options.full:
        raise UserError("--ranks is empty: name ranks, or add --full")
    if options.folder is not None and not options.folder.is_dir():
        raise UserError(f"--folder {str(options.folder)!r}: no such folder")


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Time every kind and report."""
    load, rows = os.getloadavg()[0], []
    for rank in [*options.ranks, *([None] if options.full else [])]:
        name = "full" if rank is None else f"LoRA rank {rank}"
        rows.append(
            {"trained": name, **timed(trainer(options, rank), folder / name.replace(" ", "-"), options.repeats)}
        )
        print(f"{name}: done", file=sys.stderr)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    disk = shutil.disk_usage(folder)
    report("Seconds that a checkpoint takes", rows, options.output, settings=settings, load_before=load, disk=disk)


def trainer(options: argparse.Namespace, rank: int | None) -> tuple[VideoLanguageModel, torch.optim.Optimizer]:
    """A model with random weights and its optimizer; no rank: the language model is trained in full."""
    model = build_model(SHAPES[options.shape], torch.bfloat16)
    lora = None if rank is None else LoraConfig(rank=rank, alpha=2.0 * rank)
    choose_trainable(model, model.towers, lora, () if lora else ("language_model",))
    model.to_empty(device=options.device)
    fill(model)
    return model, build_optimizer(model, TrainConfig(max_steps=1))


def timed(trained: tuple[VideoLanguageModel, torch.optim.Optimizer], root: Path, repeats: int) -> dict[str, Any]:
    """Save and load `repeats` times, in turns."""
    model, optimizer = trained
    parts: dict[str, list[float]] = defaultdict(list)
    for number in range(repeats + 1):
        synchronise()
        with stopwatch() as took:
            took["save"] = seconds(partial(checkpoints.save, root, number, model, optimizer, STATE, 1, write=True))
        took["verify"] = seconds(partial(checkpoints.newest_good, root, print))
        newest = checkpoints.list_checkpoints(root)[0]
        took["load"] = seconds(partial(checkpoints.load, newest, model, optimizer))
        if number:  # the first one warms up
            for name, value in took.items():
                parts[name].append(value)
    size = sum(path.stat().st_size for path in newest.iterdir())
    medians = {name: median(values) for name, values in parts.items()}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "parameters": count,
        "MiB": size / MIB,
        "save, s": medians["save"],
        "copy and write, s": medians["save"] - medians["hash"] - medians["flush"],
        "hash, s": medians["hash"],
        "flush, s": medians["flush"],
        "MiB/s": size / MIB / medians["save"],
        "verify, s": medians["verify"],
        "load, s": medians["load"],
        "slowest save, s": max(parts["save"]),
    }


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Seconds that a save spends hashing and flushing."""
    took = {"hash": 0.0, "flush": 0.0}

    def timing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            since = time.perf_counter()
            try:
                return function(*args)
            finally:
                took[name] += time.perf_counter() - since

        return call

    with (
        patch.object(checkpoints, "_describe", timing("hash", checkpoints._describe)),
        patch.object(os, "fsync", timing("flush", os.fsync)),
    ):
        yield took


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    since = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - since


if __name__ == "__main__":
    main()
