#!/usr/bin/env python
"""Seconds to load a checkpoint: python tools/bench/load.py [--shape small | --model FOLDER] [--output FILE]

Three ways, each in a new process, in turns:

  vft                  the model as a run loads it: built, allocated, its weights read into memory of its own
  safetensors, copied  safetensors.torch.load_file, each tensor copied to memory of its own; no model
  transformers         Qwen2_5_VLForConditionalGeneration.from_pretrained; on a CPU its tensors are views of the file

Imports are not counted. All ways end by reading one value of each page, because tensors may be views of the mapped
file. Host memory is what the process allocated meanwhile; pages of mapped files, which the system can take back, do not
count.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import in_venv  # noqa: F401
import torch
from measure import DEVICE, benchmark, in_new_process, report, seconds_of
from safetensors.torch import load_file
from torch import Tensor
from workload import SHAPES, write_checkpoint

from vft.common.errors import UserError
from vft.config.run import ModelConfig, ParallelConfig
from vft.preparation.run import load_for_inference, open_for_inference

GIB = 2**30
POLL_S = 0.002
PAGE_BYTES = 4096


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--way"]:  # a child process of `compare`
        measure(sys.argv[2], Path(sys.argv[3]), torch.device(sys.argv[4]))
        return
    with benchmark(__doc__, add_arguments) as (options, folder):
        if options.model is not None and not list(options.model.glob("*.safetensors")):
            raise UserError(f"--model {str(options.model)!r}: no safetensors files there")
        compare(options, options.model or write_checkpoint(folder, SHAPES[options.shape], torch.bfloat16))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=sorted(SHAPES), default="small", help="size of a random checkpoint (small)")
    model.add_argument("--model", type=Path, help="folder of a Qwen2.5-VL checkpoint instead")
    parser.add_argument("--device", default=str(DEVICE), help="where the weights go (default: the GPU)")


def compare(options: argparse.Namespace, model: Path) -> None:
    """Time all ways and report."""
    # Reading puts the files into the system's file cache.
    file_bytes = sum(len(file.read_bytes()) for file in sorted(model.glob("*.safetensors")))
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            runs[way].append(in_new_process(__file__, "--way", way, model, options.device))
    rows = []
    ours = median(run["seconds"] for run in runs["vft"])
    for way, found in runs.items():
        times, size = [run["seconds"] for run in found], found[0]["bytes"]
        seconds, host = median(times), median(run["host_bytes"] for run in found)
        row = {"way": way, "seconds": seconds, "fastest": min(times), "slowest": max(times)}
        row |= {"time / vft's": seconds / ours, "GiB/s": file_bytes / GIB / seconds}
        rows.append({**row, "model GiB": size / GIB, "host peak GiB": host / GIB, "host / model": host / size})
    report(f"Loading {file_bytes / GIB:.3g} GiB from the file cache", rows, options, file_bytes=file_bytes)


# -------------------------------------------------------------------------------------------- in the child process


def measure(way: str, folder: Path, device: torch.device) -> None:
    """Load once and print one line of JSON: seconds, bytes of the tensors, peak of host memory."""
    if way == "transformers":
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401  # not part of the time
    torch.zeros(1, device=device)
    tensors: list[Tensor] = []

    def work() -> None:
        tensors.extend(WAYS[way](folder, device))
        for tensor in tensors:
            tensor.detach().flatten()[:: max(1, PAGE_BYTES // tensor.element_size())].sum()

    with watched_memory() as seen:
        seconds = seconds_of(work)
    size = sum(tensor.nbytes for tensor in tensors)
    print(json.dumps({"seconds": seconds, "bytes": size, "host_bytes": max(seen) - seen[0]}))


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """This process's anonymous and shared memory every `POLL_S`, bytes; pages of mapped files do not count."""
    seen, done = [own_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(POLL_S):
            seen.append(own_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield seen
    done.set()
    thread.join()


def own_bytes() -> int:
    """Anonymous and shared memory of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def load_vft(folder: Path, device: torch.device) -> Iterable[Tensor]:
    """As prediction loads a model."""
    prepared = open_for_inference(ModelConfig(path=str(folder)), None, torch.bfloat16)
    load_for_inference(prepared, device, None, ParallelConfig())
    return prepared.model.parameters()


def load_copied(folder: Path, device: torch.device) -> Iterable[Tensor]:
    """The tensors without a model; on a CPU each is copied out of the mapped file."""
    for file in sorted(folder.glob("*.safetensors")):
        for tensor in load_file(file, device=str(device)).values():
            yield tensor.clone() if device.type == "cpu" else tensor


def load_transformers(folder: Path, device: torch.device) -> Iterable[Tensor]:
    """transformers' own model."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(device).parameters()


WAYS = {"vft": load_vft, "safetensors, copied": load_copied, "transformers": load_transformers}

if __name__ == "__main__":
    main()
