"""Writes safetensors files tensor by tensor, without a second copy in memory, and hashes them while writing.

The format (https://huggingface.co/docs/safetensors, "Format"): the length of the header in 8 bytes, the header in JSON,
then the bytes of the tensors without gaps. `safetensors.torch.save_file` writes the same bytes, but needs all tensors
at once and on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vft.common.errors import UserError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types of weights, by their names in safetensors, in the order in which its own writer sorts tensors."""
BLOCK_BYTES = 8 << 20
"""Written and hashed at a time. Both release Python's lock, so other threads can run."""

Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Type and shape of each tensor in a file, by name."""


def write_tensors(
    path: Path, layout: Layout, fetch: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write a new file with the tensors that `fetch` returns, called in the file's order, and flush it to disk.

    Returns size and SHA-256 as a manifest has them. Raises OSError if the file exists or cannot be written.
    """
    digest = hashlib.sha256()
    with path.open("xb") as stream:

        def put(content: bytes | memoryview) -> None:
            for start in range(0, len(content), BLOCK_BYTES):
                block = content[start : start + BLOCK_BYTES]
                stream.write(block)
                digest.update(block)

        put(_header(layout, metadata))
        for name in file_order(layout):
            put(_content(fetch(name), *layout[name]))  # without a variable, so that it is freed before the next one
        stream.flush()
        os.fsync(stream.fileno())
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


def file_order(layout: Layout) -> list[str]:
    """Names in the order of safetensors' own writer: by type, widest first (so that all are aligned), then name."""
    place = {dtype: number for number, dtype in enumerate(DTYPES.values())}
    return sorted(layout, key=lambda name: (place[layout[name][0]], name))


def _header(layout: Layout, metadata: Mapping[str, str] | None) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in file_order(layout):
        dtype, shape = layout[name]
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _content(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> memoryview:
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), (tensor.dtype, tensor.shape, dtype, shape)
    array: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def open_tensors(file: Path) -> Any:
    """A reader of a safetensors file. Raises UserError if it cannot be read as one."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error
