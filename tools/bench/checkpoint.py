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
import cProfile
import pstats
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import in_venv  # noqa: F401
import torch
from measure import DEVICE, benchmark, report, seconds_of, show_table
from workload import SHAPES, add_shape, make_step, random_model, settings

from vft.common.errors import UserError
from vft.config.run import CheckpointConfig, LoraConfig, ModelConfig, TrainConfig
from vft.distributed.process_group import environment
from vft.models.base import VideoLanguageModel
from vft.preparation.synthetic import row_of, text_document
from vft.training import checkpoint as checkpoints
from vft.training.checkpoint import AsyncCheckpointer
from vft.training.optimizer import build_optimizer

STATE = {"cursor": {"epoch": 0, "pack": 0, "step": 1}, "bad": []}
MIB = 2**20
Trained = tuple[VideoLanguageModel, torch.optim.Optimizer]


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_arguments, may_be_zero=("steps",)) as (options, folder):
        if not options.ranks and not options.full:
            raise UserError("--ranks is empty: name ranks, or add --full")
        compare(options, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_shape(parser, SHAPES, on_gpu="small")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64], help="LoRA ranks on all linears (8 64)")
    parser.add_argument("--full", action="store_true", help="also with the language model trained in full")
    parser.add_argument("--device", default=str(DEVICE), help="device of the model (default: the GPU)")
    parser.add_argument("--folder", type=Path, help="folder for checkpoints (default: that for temporary files)")
    parser.add_argument("--steps", type=int, default=50, help="training steps between two saves; 0: none (50)")
    parser.add_argument("--tokens", type=int, default=256, help="of text in a step: fewer is a harder test (256)")


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Time every kind and report."""
    rows, stalls = [], []
    device = torch.device(options.device)
    kinds = {f"LoRA rank {rank}": LoraConfig(rank=rank, alpha=2.0 * rank) for rank in options.ranks}
    for name, lora in {**kinds, **({"full": None} if options.full else {})}.items():
        model_config = ModelConfig(path=options.shape, train=() if lora else ("language_model",))
        model = random_model(settings(options.shape, device, model=model_config, lora=lora), device)
        trained, root = (model, build_optimizer(model, TrainConfig(max_steps=1))), folder / name.replace(" ", "-")
        rows.append({"trained": name, **timed(trained, root, options.repeats)})
        print(f"{name}: saved and loaded", file=sys.stderr)
        if options.steps:
            stalls += [{"trained": name, **line} for line in stalled(trained, root, options)]
            print(f"{name}: trained", file=sys.stderr)
    report("Seconds that a checkpoint takes", rows, options, stalls=stalls)
    if stalls:
        show_table(f"Steps of training with a save every {options.steps}", stalls)


def timed(trained: Trained, root: Path, repeats: int) -> dict[str, Any]:
    """Save and load `repeats` times, in turns."""
    model, optimizer = trained
    saver = make_saver(trained, root, asynchronous=False)
    parts: dict[str, list[float]] = defaultdict(list)
    for number in range(repeats + 1):
        with cProfile.Profile() as profile:
            took = {"save": seconds_of(partial(saver.save, number, STATE))}
        took |= {"hash": seconds_in(profile, "_hashlib.HASH"), "flush": seconds_in(profile, "posix.fsync")}
        took["verify"] = seconds_of(partial(checkpoints.newest_intact, root, saver.world))
        newest = checkpoints.list_checkpoints(root)[0]
        took["load"] = seconds_of(partial(checkpoints.load, newest, model, optimizer))
        for name, value in took.items() if number else ():  # the first one warms up
            parts[name].append(value)
    size = sum(path.stat().st_size for path in newest.iterdir())
    medians = {name: median(values) for name, values in parts.items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
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


def seconds_in(profile: cProfile.Profile, builtin: str) -> float:
    """Seconds that a profile counts in built-in functions of this name."""
    stats: Any = pstats.Stats(profile)
    return sum(entry[2] for (_, _, name), entry in stats.stats.items() if builtin in name)


def make_saver(trained: Trained, root: Path, asynchronous: bool) -> AsyncCheckpointer:
    """A writer of checkpoints like that of a run."""
    return AsyncCheckpointer(root, *trained, CheckpointConfig(keep_last=1, asynchronous=asynchronous), environment())


def stalled(trained: Trained, root: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps without a save, with a save in the loop and with one beside it, in turns."""
    model, optimizer = trained
    device = torch.device(options.device)
    row = row_of(model.processor, [text_document(options.tokens, options.tokens // 4, seed=0)]).to(device)
    step = make_step(model, row, device, optimizer)

    def steps() -> None:
        for _ in range(options.steps):
            step()

    savers = {
        "none": None,
        "in the loop": make_saver(trained, root, asynchronous=False),
        "beside the loop": make_saver(trained, root, asynchronous=True),
    }
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in savers}
    for number in range(options.repeats + 1):
        for name, saver in savers.items():
            stall = seconds_of(partial(saver.save, number, STATE)) if saver else 0.0
            took[name].append((stall, stall + seconds_of(steps)))
            if saver:
                saver.wait()
    lines, plain = [], 0.0
    for name, times in took.items():
        stalls, between = zip(*times[1:], strict=True)  # the first one also allocates the memory for the copies
        plain = plain or median(between)
        lines.append(
            {
                "saves": name,
                "step, s": plain / options.steps,
                "between saves, s": median(between),
                "stall, s": median(stalls),
                "slowest stall, s": max(stalls),
                "stall / between": median(stalls) / plain,
                "between / without": median(between) / plain,
            }
        )
    return lines


if __name__ == "__main__":
    main()
