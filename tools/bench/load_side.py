#!/usr/bin/env python
"""Load a checkpoint once in one way, for load.py: python tools/bench/load_side.py SIDE FOLDER DTYPE DEVICE

Prints one line of JSON: seconds, bytes of the tensors, most host memory that was taken meanwhile.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from measure import synchronise
from torch import Tensor

POLL_S = 0.002
PAGE_BYTES = 4096


class Memory(threading.Thread):
    """Watches the memory that this process has of its own: pages of files that it has mapped don't count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = own_bytes()
        self.done = threading.Event()

    def run(self) -> None:
        """Until `done`."""
        while not self.done.wait(POLL_S):
            self.peak = max(self.peak, own_bytes())


def own_bytes() -> int:
    """Anonymous and shared memory, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def load_vft(folder: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Iterable[Tensor]]:
    """Model, memory, weights: as a training run does it."""
    from vft.models import build
    from vft.models.pretrained import Pretrained, load_weights

    checkpoint = Pretrained.open(folder)
    model = build(checkpoint, dtype)
    model.to_empty(device=device)
    synchronise()
    marks["weights_begin"] = time.perf_counter()
    load_weights(model, checkpoint, frozenset())
    return model, model.parameters()


def load_safetensors(folder: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Iterable[Tensor]]:
    """The tensors alone, without a model."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= {name: tensor.to(dtype) for name, tensor in load_file(file, device=str(device)).items()}
    return tensors, tensors.values()


def load_copied(folder: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Iterable[Tensor]]:
    """The tensors alone, each in memory of its own."""
    tensors, _ = load_safetensors(folder, dtype, device)
    copies = {name: tensor.clone() if device.type == "cpu" else tensor for name, tensor in tensors.items()}
    return copies, copies.values()


def load_transformers(folder: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Iterable[Tensor]]:
    """transformers' own model."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
    return model, model.parameters()


marks: dict[str, float] = {}
"""When what began, where a side has parts; seconds on the clock."""

SIDES = {
    "vft": load_vft,
    "safetensors": load_safetensors,
    "safetensors, copied": load_copied,
    "transformers": load_transformers,
}


def prepare(side: str) -> None:
    """Import what the side needs: a program has to do it once, whatever it loads."""
    if side == "vft":
        importlib.import_module("vft.models.pretrained")
    if side == "transformers":
        importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Command line."""
    side, folder, dtype, device = sys.argv[1:]
    prepare(side)
    memory = Memory()
    memory.start()
    since = time.perf_counter()
    kept, tensors = SIDES[side](folder, getattr(torch, dtype), torch.device(device))
    tensors = list(tensors)
    # A tensor may still be a view of the mapped file: look at one value of each page, so that all has been read.
    for tensor in tensors:
        tensor.detach().flatten()[:: max(1, PAGE_BYTES // tensor.element_size())].sum()
    synchronise()
    end = time.perf_counter()
    memory.done.set()
    memory.join()
    size = sum(tensor.nbytes for tensor in tensors)
    times = {"seconds": end - since, "weights_seconds": end - marks.get("weights_begin", since)}
    print(json.dumps({**times, "bytes": size, "host_bytes": memory.peak - memory.before}))
    del kept


if __name__ == "__main__":
    main()
