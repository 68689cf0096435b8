"""A cache on disk of decoded and resized video frames, so that later epochs and later runs decode nothing.

It holds frames rather than patches: frames depend on files and sizes alone and not on the model family, and cutting
them into patches is cheap compared with decoding (docs/develop/decisions.md). Any number of processes and hosts may
share a folder. A problem with the cache costs time, never a clip and never the run. Errors of decoding are not cached.

Each medium is one file, `3f/3f...-BYTES`. It holds the SHA-256 of everything that the frames depend on, a CRC-32 of
that digest and the pixels, then raw uint8 [T, 3, height, width]. Its name is the digest and the file's own size, so
that a listing of names tells how much a folder holds. Files are written under a temporary name and renamed: two
processes that write the same file write the same content. What is read is checked. Files are read and not
memory-mapped: a process that has mapped a file dies if that file is truncated.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
import time
import uuid
import zlib
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import av
import PIL
import torch
import torchcodec
from torch import Tensor

from vft.common.files import PARTIAL
from vft.common.types import MediaPlan, Patches
from vft.config.data import DataConfig
from vft.data.media.errors import as_media_error
from vft.data.media.patches import cut_patches, decode_resized, load_patches
from vft.data.workers import WorkerPool
from vft.models.processor import VisionProcessor

logger = logging.getLogger(__name__)

CACHE_VERSION = 3
"""Raise it if the same plan of the same file gives other pixels than before, or if the layout of a file changes."""
DECODERS = tuple((module.__name__, str(module.__version__)) for module in (torch, torchcodec, av, PIL))
"""Other versions of these may round pixels differently."""
HEADER_BYTES = 32 + 4
RESERVED_DISK = 0.05
"""Share of the disk that the cache leaves free, so that a checkpoint on the same disk does not fail."""
COUNT_EVERY_S = 10.0
"""Seconds between two counts of what other processes have added; longer if counting itself takes long."""
ABANDONED_S = 24 * 3600.0
"""Age after which a half-written file is taken for that of a killed process."""
GIB = 2**30

_NAME = re.compile(r"[0-9a-f]{64}-([0-9]+)")


@dataclass(frozen=True, slots=True)
class _Loaded(Patches):
    """Patches from a worker, and what the worker did to the cache."""

    added_bytes: int = 0
    message: str = ""
    """For the user; empty if there is nothing to report."""
    write_failed: bool = False


class FrameCache:
    """The frame cache as one process sees it: its folder (None: no cache), its limit, and how full it is.

    The workers of the process read and write the files. This object tells them whether they may add more.
    """

    def __init__(self, folder: Path | None, limit_bytes: int = 0) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._used_bytes = 0
        self._next_count_s = -math.inf
        """Earliest time of the next count, in `time.monotonic` seconds."""
        self._has_missed = True
        """A medium was not in the cache since the last count; without misses nothing needs counting."""
        self._failure = ""
        """The message about a write that failed: nothing more is added."""

    @staticmethod
    def of(config: DataConfig) -> FrameCache:
        """The cache that `data.cache` asks for: one object for each folder and process."""
        if config.cache == "none":
            return NO_CACHE
        return _open(config.cache_path / "frames", int(config.cache_gib * GIB))

    def submit(self, pool: WorkerPool, plan: MediaPlan, processor: VisionProcessor) -> Future[Patches]:
        """Let a worker load a medium. A video is read from the cache if it is there, and added if it is not.

        Pictures are always decoded: as frames they take many times the bytes of their files, and reading those saves
        little.
        """
        if self.folder is None or plan.ref.kind == "image":
            return pool.submit(load_patches, plan, processor)
        self._count()
        refusal = self._failure
        if not refusal and self._used_bytes + _file_bytes(plan) > self.limit_bytes:
            fix = "raise it, or remove the folder if no run needs what it holds"
            refusal = f"data.cache_gib = {self.limit_bytes / GIB:g} is reached, no more is added; {fix}"
        future = pool.submit(load_cached, plan, processor, self.folder, refusal)
        future.add_done_callback(self._update)
        return future

    def _count(self) -> None:
        """Count the bytes in the folder from time to time: other processes add to it."""
        assert self.folder is not None
        begin_s = time.monotonic()
        if not self._has_missed or begin_s < self._next_count_s:
            return
        with suppress(OSError):  # a worker that writes will report it
            self._used_bytes = count_bytes(self.folder)
        end_s = time.monotonic()
        self._has_missed, self._next_count_s = False, end_s + max(COUNT_EVERY_S, 50 * (end_s - begin_s))

    def _update(self, future: Future[Patches]) -> None:
        """Account for what a worker did."""
        if future.cancelled() or future.exception() is not None or not isinstance(loaded := future.result(), _Loaded):
            return
        self._has_missed = True
        self._used_bytes += loaded.added_bytes
        self._failure = loaded.message if loaded.write_failed else self._failure
        if loaded.message:
            _log(logging.WARNING, f"{self.folder}: {loaded.message}")


NO_CACHE = FrameCache(None)


@cache
def _open(folder: Path, limit_bytes: int) -> FrameCache:
    with suppress(OSError):
        _log(logging.INFO, f"{folder}: {count_bytes(folder) / GIB:.1f} of {limit_bytes / GIB:g} GiB of frames")
    return FrameCache(folder, limit_bytes)


@cache
def _log(level: int, message: str) -> None:
    """Log a message once, in one process of each host, as they share the host's disk."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logger.log(level, "%s", message, extra={"all_ranks": True})


# ---------------------------------------------------------------------------------------------- in a worker process


def load_cached(plan: MediaPlan, processor: VisionProcessor, folder: Path, refusal: str = "") -> Patches:
    """`load_patches` through the cache. `refusal` says why nothing may be added; empty if it may."""
    digest = digest_of(plan)
    if digest is None:
        return load_patches(plan, processor)
    with as_media_error(plan.ref.files[0]):
        file, is_damaged = file_of(folder, digest, plan), False
        with suppress(OSError):  # usually: it is not there yet
            frames_TCHW = read(file, digest, plan)
            if frames_TCHW is not None:
                return cut_patches([frames_TCHW], plan, processor)
            is_damaged = True
        frames_TCHW = decode_resized(plan)
        added_bytes, message, write_failed = 0, "", False
        # If the file has changed meanwhile, nobody knows which version was decoded.
        if digest_of(plan) == digest:
            try:
                if is_damaged:
                    write(file, digest, frames_TCHW)
                    message = "held a damaged file, made anew"
                elif not (message := refusal or _disk_message(folder, _file_bytes(plan))):
                    write(file, digest, frames_TCHW)
                    added_bytes = _file_bytes(plan)
            except OSError as error:
                message = f"can't be written ({error.strerror}); the run goes on without adding frames"
                write_failed = True
        patches = cut_patches([frames_TCHW], plan, processor)
    return _Loaded(patches.pixels_PD, patches.grid_thw, patches.seconds_per_grid, added_bytes, message, write_failed)


def _disk_message(folder: Path, size_bytes: int) -> str:
    """Why the disk has no room for so many bytes more; empty if it has."""
    folder.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(folder)
    is_full = disk.free - size_bytes < RESERVED_DISK * disk.total
    return f"the disk is {1 - RESERVED_DISK:.0%} full, no more is added; free space" if is_full else ""


# ------------------------------------------------------------------------------------------------------------ files


def digest_of(plan: MediaPlan) -> bytes | None:
    """SHA-256 of everything that the frames depend on; None if a file cannot be looked at (decoding will say why).

    A file is identified as in the index: by path, size and modification time.
    """
    try:
        files = [(os.path.abspath(path), s.st_size, s.st_mtime_ns) for path in plan.ref.files for s in (path.stat(),)]
    except (OSError, ValueError):
        return None
    info = plan.info
    scanned = (info.height, info.width, info.num_frames, info.fps, info.stream_index)  # decoding compares with these
    planned = (plan.ref.kind, plan.frame_indices, plan.frame_times_s, plan.height, plan.width, *plan.views)
    return hashlib.sha256(repr((CACHE_VERSION, DECODERS, files, scanned, planned)).encode()).digest()


def file_of(folder: Path, digest: bytes, plan: MediaPlan) -> Path:
    """The file that holds the frames of a plan, if there is one."""
    return folder / digest.hex()[:2] / f"{digest.hex()}-{_file_bytes(plan)}"


def read(file: Path, digest: bytes, plan: MediaPlan) -> Tensor | None:
    """The frames of a plan; None if the file is damaged.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    with file.open("rb") as stream:
        frames_TCHW = torch.empty(_shape(plan), dtype=torch.uint8)
        pixels = frames_TCHW.numpy().data.cast("B")
        header = stream.read(HEADER_BYTES)
        is_complete = stream.readinto(pixels) == len(pixels) and not stream.read(1)
    return frames_TCHW if is_complete and header == _header(digest, pixels) else None


def write(file: Path, digest: bytes, frames_TCHW: Tensor) -> None:
    """Write a file, or replace a damaged one. Not flushed to disk: after a power failure the checksum tells.

    Raises:
        OSError: it cannot be written; nothing is left of it.
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
    """Bytes of the frames in a folder, 0 if there is no folder. Removes what killed processes left half-written.

    Raises:
        OSError: the folder cannot be listed.
    """
    total = 0
    for shard in folder.glob("[0-9a-f][0-9a-f]"):
        for name in os.listdir(shard):
            if match := _NAME.fullmatch(name):
                total += int(match[1])
            elif name.startswith(PARTIAL):
                with suppress(OSError):  # another process has renamed it
                    if time.time() - (shard / name).stat().st_mtime > ABANDONED_S:
                        (shard / name).unlink()
    return total


def _shape(plan: MediaPlan) -> tuple[int, int, int, int]:
    return plan.num_pictures, 3, plan.height, plan.width


def _file_bytes(plan: MediaPlan) -> int:
    return HEADER_BYTES + math.prod(_shape(plan))


def _header(digest: bytes, pixels: memoryview) -> bytes:
    return digest + zlib.crc32(pixels, zlib.crc32(digest)).to_bytes(4, "little")
