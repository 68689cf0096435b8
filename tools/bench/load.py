#!/usr/bin/env python
"""Seconds to load a checkpoint: python tools/bench/load.py [--shape small | --model FOLDER] [--output FILE]

Four ways, each in a new process, in turns:

  vft                  Checkpoint.open, build, to_empty, load_weights: a model ready to run, its weights in own memory
  safetensors          safetensors.torch.load_file of every file: tensors without a model, on a CPU views of the file
  safetensors, copied  the same, then each tensor copied to memory of its own, as training needs it
  transformers         Qwen2_5_VLForConditionalGeneration.from_pretrained; on a CPU views of the file

Imports are not counted. "weights" are load_weights alone; the rest of vft's time is the same for a model of any width.
As tensors may be views of the mapped file, all sides end by looking at one value of each page. Host
memory is what the process came to have of its own meanwhile, beside the bytes of the tensors themselves; pages of
mapped files, which the system can take back, don't count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from load_side import SIDES
from measure import default_device, median, report
from workload import SHAPES, write_checkpoint

from vft.common.console import user_errors
from vft.common.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GIB = 2**30


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=sorted(SHAPES), default="small", help="size of a random checkpoint (small)")
    model.add_argument("--model", type=Path, help="folder of a Qwen2.5-VL checkpoint instead")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the model and a made file (bf16)")
    parser.add_argument(
        "--device", default=str(default_device()), help="where the weights go (a GPU where there is one)"
    )
    parser.add_argument("--cold", action="store_true", help="drop the files from the system's cache before each run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side (5)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with user_errors(), tempfile.TemporaryDirectory(prefix="vft-load-") as folder:
        if options.repeats < 1:
            raise UserError(f"--repeats {options.repeats}: must be at least 1")
        if options.model is not None and not list(options.model.glob("*.safetensors")):
            raise UserError(f"--model {str(options.model)!r}: no safetensors files there")
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Time all sides and report."""
    load = os.getloadavg()[0]
    model = options.model or write_checkpoint(folder / "model", SHAPES[options.shape], DTYPES[options.dtype])
    files = sorted(model.glob("*.safetensors"))
    file_bytes = sum(file.stat().st_size for file in files)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in SIDES:
            for file in files:
                to_cache(file, drop=options.cold)
            runs[side].append(run(side, model, options))
    rows = [row(side, found, runs["vft"], file_bytes) for side, found in runs.items()]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    title = f"Loading {file_bytes / GIB:.3g} GiB {'from the disk' if options.cold else 'from the file cache'}"
    report(title, rows, options.output, settings=settings, file_bytes=file_bytes, load_before=load)


def row(side: str, runs: list[dict[str, Any]], ours: list[dict[str, Any]], file_bytes: int) -> dict[str, Any]:
    """A side's line: medians over its runs."""
    names = ("seconds", "weights_seconds", "host_bytes")
    seconds, weights, host = (median([run[name] for run in runs]) for name in names)
    return {
        "side": side,
        "seconds": seconds,
        "weights, s": weights,
        "GiB/s": file_bytes / GIB / weights,
        "time / vft's": seconds / median([run["seconds"] for run in ours]),
        "model GiB": runs[0]["bytes"] / GIB,
        "host peak GiB": host / GIB,
        "host / model": host / runs[0]["bytes"],
        "fastest": min(run["seconds"] for run in runs),
        "slowest": max(run["seconds"] for run in runs),
    }


def run(side: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a new process. UserError, with the last line that it printed, where it fails."""
    script = Path(__file__).with_name("load_side.py")
    dtype = str(DTYPES[options.dtype]).removeprefix("torch.")
    command = [sys.executable, str(script), side, str(model), dtype, options.device]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{side}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def to_cache(file: Path, drop: bool) -> None:
    """Read a file, so that it lies in the system's cache; with `drop` take it out of it instead."""
    with file.open("rb") as stream:
        if drop:
            os.fsync(stream.fileno())  # what isn't on the disk yet stays
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while stream.read(1 << 24):
                pass


if __name__ == "__main__":
    main()
