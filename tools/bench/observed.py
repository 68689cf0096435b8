#!/usr/bin/env python
"""Runs a command of vft, and notes what only its own process knows: observed.py --notes FILE [--clones DIR] PROGRAM ...

PROGRAM is a module (`vft.recipes.caption`) or a script. The notes are JSON objects, one a line, in the order of events:

  planned       bytes that the plan expects of the largest rows; before the weights are loaded
  step          its number, compiled graphs so far, bytes of the device, allocations that had to be tried again
  token_s       seconds of each token of a batch of answers but the first, whose pass reads the prompts
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import in_venv  # noqa: F401
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.utils import counters

from vft.inference import engine, generate
from vft.preparation import memory
from vft.preparation.memory import resolve
from vft.training import trainer
from vft.training.trainer import Trainer

Write = Callable[[dict[str, Any]], None]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=Path, required=True, help="file of the notes")
    parser.add_argument("--clones", type=Path, help="folder for copies of what is trained, made when a save begins")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    sys.argv = [options.program, *options.arguments]

    def write(note: dict[str, Any]) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        with options.notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")

    with ExitStack() as stack:
        for place, name, replacement in observers(write):
            stack.enter_context(patch.object(place, name, replacement))
        if options.clones:
            stack.enter_context(clones(options.clones))
        if options.program.endswith(".py"):
            runpy.run_path(options.program, run_name="__main__")
        else:
            runpy.run_module(options.program, run_name="__main__", alter_sys=True)


def observers(write: Write) -> Iterator[tuple[Any, str, Any]]:
    """Functions that do what they did before, and note it: where they are, their names, their replacements."""
    train_step, generate_all, choose = Trainer.train_step, generate.generate, generate.choose
    chosen_at_s: list[float] = []

    def plan(config: Any, model: Any, objective: Any, rows: Any, world: Any) -> Any:
        found = resolve(config, model, objective, rows, world)
        steps = [memory.step_bytes(model, found, objective, row, world.device) for row in rows]
        resident = memory.resident_bytes(model, found.shards(world.size), found)
        write({"planned": resident + max(steps, default=0)} | found.model_dump(include={"activation_checkpointing"}))
        return found

    def step(self: Trainer) -> Any:
        stop = train_step(self)
        note = {"step": self.step, "graphs": counters["stats"]["unique_graphs"]}
        if self.world.device.type == "cuda":
            stats = torch.cuda.memory_stats()
            note |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
            note["retries"] = stats.get("num_alloc_retries", 0)
        write(note)
        return stop

    def choose_one(*arguments: Any) -> Tensor:
        chosen_at_s.append(time.perf_counter())  # the token before has arrived by then
        return choose(*arguments)

    def answers(*arguments: Any, **options: Any) -> Any:
        chosen_at_s.clear()
        found = generate_all(*arguments, **options)
        ends = [*chosen_at_s, time.perf_counter()]
        write({"token_s": [b - a for a, b in pairwise(ends[1:])]})
        return found

    yield trainer, "resolve", plan
    yield Trainer, "train_step", step
    yield generate, "choose", choose_one
    yield engine, "generate", answers


@contextmanager
def clones(folder: Path) -> Iterator[None]:
    """Copy what is trained, on the device, whenever a save begins; write the copies at the end."""
    save, copies = Trainer.save, {}

    def save_and_copy(self: Trainer) -> None:
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        copies[self.step] = {name: values.clone() for name, values in trained.items()}
        save(self)

    with patch.object(Trainer, "save", save_and_copy):
        yield
    folder.mkdir(parents=True, exist_ok=True)
    for step, tensors in copies.items():
        save_file({name: values.cpu() for name, values in tensors.items()}, folder / f"step-{step:06d}.safetensors")


if __name__ == "__main__":
    main()
