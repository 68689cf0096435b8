#!/usr/bin/env python
"""What a checkpoint costs: python tools/bench/checkpoint.py [--shape small] [--ranks 8 64] [--full]

First a save of a real model with optimizer state in which training stands still, and of that: copying and writing,
hashing for the manifest, flushing to the disk. Then what a resumed run waits for: `newest_intact` (hashes again) and
`load`. Last, real training steps with a save every --steps of them: how long the loop stands still, with saves in the
loop and beside it, and how much longer the steps between two saves take in all. Which disk the folder lies on decides
about flushing: name one with --folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from measure import benchmark, default_device, median, report, show_table, synchronise
from workload import SHAPES, fill

from vft.adapters.targets import choose_trainable
from vft.common import safetensors_io as tensor_files
from vft.common.errors import UserError
from vft.config.run import CheckpointConfig, LoraConfig, TrainConfig
from vft.distributed.process_group import environment
from vft.models.base import VideoLanguageModel
from vft.models.released import build_from_config
from vft.preparation.synthetic import row_of, text_document
from vft.training import checkpoint as checkpoints
from vft.training.checkpoint_writer import AsyncCheckpointer
from vft.training.losses import cross_entropy
from vft.training.optimizer import build_optimizer, scale_and_clip

STATE = {"cursor": {"epoch": 0, "pack": 0, "step": 1}, "bad": []}
MIB = 2**20
SAVES = ("in the loop", "beside the loop")
"""`checkpoint.asynchronous`: false, true."""


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_arguments, may_be_zero=("steps",)) as (options, folder):
        if not options.ranks and not options.full:
            raise UserError("--ranks is empty: name ranks, or add --full")
        compare(options, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="size of a random model (small)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64], help="LoRA ranks on all linears (8 64)")
    parser.add_argument("--full", action="store_true", help="also with the language model trained in full")
    parser.add_argument("--device", default=str(default_device()), help="device of the model (default: the GPU)")
    parser.add_argument("--folder", type=Path, help="folder for checkpoints (default: that for temporary files)")
    parser.add_argument("--steps", type=int, default=50, help="training steps between two saves; 0: none (50)")
    parser.add_argument("--tokens", type=int, default=256, help="of text in a step: fewer is a harder test (256)")


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Time every kind and report."""
    rows, stalls = [], []
    for rank in [*options.ranks, *([None] if options.full else [])]:
        name = "full" if rank is None else f"LoRA rank {rank}"
        trained, root = trainer(options, rank), folder / name.replace(" ", "-")
        rows.append({"trained": name, **timed(trained, root, options.repeats)})
        print(f"{name}: saved and loaded", file=sys.stderr)
        if options.steps:
            stalls += [{"trained": name, **line} for line in stalled(trained, root, options)]
            print(f"{name}: trained", file=sys.stderr)
    report("Seconds that a checkpoint takes", rows, options, stalls=stalls)
    if stalls:
        show_table(f"Steps of training with a save every {options.steps}", stalls)


def trainer(options: argparse.Namespace, rank: int | None) -> tuple[VideoLanguageModel, torch.optim.Optimizer]:
    """A model with random weights and its optimizer; without a rank the language model is trained in full."""
    model = build_from_config(SHAPES[options.shape], torch.bfloat16 if options.device == "cuda" else torch.float32)
    lora = None if rank is None else LoraConfig(rank=rank, alpha=2.0 * rank)
    choose_trainable(model, lora, () if lora else ("language_model",))
    model.to_empty(device=options.device)
    fill(model)
    return model, build_optimizer(model, TrainConfig(max_steps=1))


def timed(trained: tuple[VideoLanguageModel, torch.optim.Optimizer], root: Path, repeats: int) -> dict[str, Any]:
    """Save and load `repeats` times, in turns."""
    model, optimizer = trained
    saver = make_saver(trained, root, asynchronous=False)
    parts: dict[str, list[float]] = defaultdict(list)
    for number in range(repeats + 1):
        synchronise()
        with stopwatch() as took:
            took["save"] = seconds(partial(saver.save, number, STATE))
        took["verify"] = seconds(partial(checkpoints.newest_intact, root, saver.world))
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


def make_saver(
    trained: tuple[VideoLanguageModel, torch.optim.Optimizer], root: Path, asynchronous: bool
) -> AsyncCheckpointer:
    """A writer of checkpoints like that of a run."""
    return AsyncCheckpointer(root, *trained, CheckpointConfig(keep_last=1, asynchronous=asynchronous), environment())


def stalled(
    trained: tuple[VideoLanguageModel, torch.optim.Optimizer], root: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Steps without a save, with a save in the loop and with one beside it, in turns."""
    model, optimizer = trained
    device = torch.device(options.device)
    row = row_of(model.processor, [text_document(options.tokens, options.tokens // 4, seed=0)]).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        cross_entropy(model, row).backward()
        scale_and_clip(parameters, 1 / row.num_targets, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    savers = {"none": None, **{name: make_saver(trained, root, name == "beside the loop") for name in SAVES}}
    took: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in savers}
    for number in range(options.repeats + 1):
        for name, saver in savers.items():
            synchronise()
            since = time.perf_counter()
            stall = seconds(partial(saver.save, number, STATE)) if saver else 0.0
            for _ in range(options.steps):
                step()
            synchronise()
            between = time.perf_counter() - since
            if saver:
                saver.wait()
            if number:  # the first one warms up: it also allocates the memory for the copies
                for key, value in {"stall": stall, "between": between}.items():
                    took[name][key].append(value)
    plain = median(took["none"]["between"])
    return [
        {
            "saves": name,
            "step, s": plain / options.steps,
            "between saves, s": median(times["between"]),
            "stall, s": median(times["stall"]),
            "slowest stall, s": max(times["stall"]),
            "stall / between": median(times["stall"]) / plain,
            "between / without": median(times["between"]) / plain,
        }
        for name, times in took.items()
    ]


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

    def digest() -> Any:
        real = sha256()
        return SimpleNamespace(update=timing("hash", real.update), hexdigest=real.hexdigest)

    with (
        patch.object(tensor_files, "hashlib", SimpleNamespace(sha256=digest)),
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
