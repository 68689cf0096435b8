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
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from measure import benchmark, default_device, median, report, synchronise
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
    parser.add_argument("--device", default=str(default_device()), help="where the weights go (default: the GPU)")


def compare(options: argparse.Namespace, model: Path) -> None:
    """Time all ways and report."""
    files = sorted(model.glob("*.safetensors"))
    file_bytes = sum(file.stat().st_size for file in files)
    for file in files:  # so that it lies in the system's file cache
        file.read_bytes()
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            runs[way].append(run(way, model, options.device))
    rows = []
    for way, found in runs.items():
        seconds, host = (median([run[name] for run in found]) for name in ("seconds", "host_bytes"))
        size = found[0]["bytes"]
        times = [run["seconds"] for run in found]
        row = {"way": way, "seconds": seconds, "fastest": min(times), "slowest": max(times)}
        ours = median([run["seconds"] for run in runs["vft"]])
        row |= {"time / vft's": seconds / ours, "GiB/s": file_bytes / GIB / seconds}
        rows.append({**row, "model GiB": size / GIB, "host peak GiB": host / GIB, "host / model": host / size})
    report(f"Loading {file_bytes / GIB:.3g} GiB from the file cache", rows, options, file_bytes=file_bytes)


def run(way: str, model: Path, device: str) -> dict[str, Any]:
    """One run in a new process. UserError, with the last line that it printed, if it fails."""
    command = [sys.executable, __file__, "--way", way, str(model), device]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{way}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -------------------------------------------------------------------------------------------- in the child process


def measure(way: str, folder: Path, device: torch.device) -> None:
    """Load once and print one line of JSON: seconds, bytes of the tensors, peak of host memory."""
    if way == "transformers":
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401  # not part of the time
    torch.zeros(1, device=device)
    memory = MemoryWatcher()
    memory.start()
    since = time.perf_counter()
    tensors = list(WAYS[way](folder, device))
    for tensor in tensors:
        tensor.detach().flatten()[:: max(1, PAGE_BYTES // tensor.element_size())].sum()
    synchronise()
    seconds = time.perf_counter() - since
    memory.done.set()
    memory.join()
    size = sum(tensor.nbytes for tensor in tensors)
    print(json.dumps({"seconds": seconds, "bytes": size, "host_bytes": memory.peak - memory.before}))


class MemoryWatcher(threading.Thread):
    """Follows this process's own memory; pages of mapped files do not count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = own_bytes()
        self.done = threading.Event()

    def run(self) -> None:
        """Until `done` is set."""
        while not self.done.wait(POLL_S):
            self.peak = max(self.peak, own_bytes())


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
