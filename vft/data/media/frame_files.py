"""Frames as files, for `frame_cache`: one a medium, `3f/3f…-BYTES` in the cache's folder.

A file is the SHA-256 of all that the frames depend on, a CRC-32 of that and the pixels, then raw uint8
[T, 3, height, width]. Its name is the digest and its own size, so that a listing says how much a folder holds.

Files are written aside and renamed; two processes that write the same one write the same content, and what is read is
checked. It is read, not mapped: a file that is cut short kills the process that has it mapped.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
import uuid
import zlib
from contextlib import suppress
from pathlib import Path

import av
import PIL
import torch
import torchcodec
from torch import Tensor

from vft.common.files import PARTIAL
from vft.common.types import MediaPlan

CACHE_VERSION = 3
"""Raise it when the same plan of the same file gives other pixels than before, or the files have another form."""
DECODERS = tuple((one.__name__, str(one.__version__)) for one in (torch, torchcodec, av, PIL))
"""Those of another version may round pixels in another way."""
HEADER_BYTES = 32 + 4
ABANDONED_S = 24 * 3600.0
"""Age after which a half-written file is that of a killed process."""

_NAME = re.compile(r"[0-9a-f]{64}-([0-9]+)")


def digest_of(plan: MediaPlan) -> bytes | None:
    """SHA-256 of all that the frames depend on; None where a file can't be looked at: decoding will say why.

    Files are told apart as the index does it: by path, size and modification time.
    """
    try:
        files = [(os.path.abspath(path), s.st_size, s.st_mtime_ns) for path in plan.ref.files for s in (path.stat(),)]
    except (OSError, ValueError):
        return None
    info = plan.info
    found = (info.height, info.width, info.num_frames, info.fps, info.stream_index)  # decoding fails where they differ
    wanted = (plan.ref.kind, plan.frame_indices, plan.frame_times_s, plan.height, plan.width, *plan.views)
    return hashlib.sha256(repr((CACHE_VERSION, DECODERS, files, found, wanted)).encode()).digest()


def file_of(folder: Path, digest: bytes, plan: MediaPlan) -> Path:
    """Where the frames of a plan lie, if they do."""
    return folder / digest.hex()[:2] / f"{digest.hex()}-{HEADER_BYTES + math.prod(_shape(plan))}"


def read(file: Path, digest: bytes, plan: MediaPlan) -> Tensor | None:
    """The frames of a plan; None where the file is damaged.

    Raises:
        OSError: there is no such file, or it can't be read.
    """
    with file.open("rb") as stream:
        frames_TCHW = torch.empty(_shape(plan), dtype=torch.uint8)
        pixels = frames_TCHW.numpy().data.cast("B")
        header = stream.read(HEADER_BYTES)
        is_whole = stream.readinto(pixels) == len(pixels) and not stream.read(1)
    return frames_TCHW if is_whole and header == _header(digest, pixels) else None


def write(file: Path, digest: bytes, frames_TCHW: Tensor) -> None:
    """Write a file, or put it in the place of a damaged one. Not flushed to the disk: if the power fails, the checksum
    will tell.

    Raises:
        OSError: it can't be written; nothing is left of it.
    """
    pixels = frames_TCHW.contiguous().numpy().data.cast("B")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as stream:
            stream.write(_header(digest, pixels))
            stream.write(pixels)
        partial.replace(file)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def count_bytes(folder: Path) -> int:
    """Bytes of the frames in a folder; none where there is no folder. Removes what killed processes left half-written.

    Raises:
        OSError: the folder can't be listed.
    """
    total = 0
    for shard in folder.glob("[0-9a-f][0-9a-f]"):
        for name in os.listdir(shard):
            if found := _NAME.fullmatch(name):
                total += int(found[1])
            elif name.startswith(PARTIAL):
                with suppress(OSError):  # it has been renamed meanwhile
                    if time.time() - (shard / name).stat().st_mtime > ABANDONED_S:
                        (shard / name).unlink()
    return total


def _shape(plan: MediaPlan) -> tuple[int, int, int, int]:
    return plan.num_pictures, 3, plan.height, plan.width


def _header(digest: bytes, pixels: memoryview) -> bytes:
    return digest + zlib.crc32(pixels, zlib.crc32(digest)).to_bytes(4, "little")
