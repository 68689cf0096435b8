"""Runs a program of vft on the pretend device: python -m tests.accelerator.on_pretend [options] PROGRAM ARGUMENT...

PROGRAM is a module, or a script (`.py`), that runs as `__main__`. Each run takes a process of its own
(`tests.helpers.pretend`).
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.accelerator import planted
from tests.helpers import fla, kernels
from tests.helpers.pretend import GIB, Device, pretend_device
from vft.distributed.process_group import local_part
from vft.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plant", choices=sorted(planted.FAULTS), help="make this mistake")
    parser.add_argument("--kernel", choices=("exact", "missing", "nan", "none"), default="exact")
    parser.add_argument("--fla", choices=("exact", "nan"), help="its kernels are installed")
    parser.add_argument("--gib", type=float, default=80, help="memory of the device, 2^30 bytes")
    parser.add_argument("--allow", help="places that may wait in a step, with commas; without it every place may")
    parser.add_argument("--notes", type=Path, help="folder for waits.json and the weights after each step")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    sys.argv = [options.program, *options.arguments]
    if options.kernel != "none":
        kernels.register(options.kernel)
    if options.fla:
        fla.install(fla.give_nan if options.fla == "nan" else None)
    with pretend_device(int(options.gib * GIB)) as device, ExitStack() as stack:
        if options.plant:
            planted.FAULTS[options.plant](stack)
        observe(device, options.notes, None if options.allow is None else tuple(options.allow.split(",")))
        try:
            if options.program.endswith(".py"):
                sys.path.insert(0, str(Path(options.program).parent))
                runpy.run_path(options.program, run_name="__main__")
            else:
                runpy.run_module(options.program, run_name="__main__", alter_sys=True)
        finally:
            device.wait("the end")
            if options.notes:
                ledger(options.notes / "waits.json", device.waits)


def observe(device: Device, notes: Path | None, allowed: tuple[str, ...] | None) -> None:
    """Note the waits and the weights of each training step."""
    train_step = Trainer.train_step

    def step(self: Trainer) -> Any:
        before = Counter(device.waits)
        with nullcontext() if allowed is None else device.no_waits(*allowed):
            result = train_step(self)
        if notes:
            name = f"step-{self.step:06d}"
            ledger(notes / f"{name}.json", device.waits - before)
            weights = {n: values_of(p) for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(weights, notes / f"{name}.safetensors")
        return result

    Trainer.train_step = step  # type: ignore[method-assign]


def values_of(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter, without a wait."""
    return local_part(parameter.detach()).values.clone()  # type: ignore[attr-defined]


def ledger(file: Path, waits: Counter[tuple[str, str]]) -> None:
    """Waits as JSON: "place: why" to how often."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({f"{where}: {why}": count for (where, why), count in sorted(waits.items())}, indent=1))


if __name__ == "__main__":
    main()
