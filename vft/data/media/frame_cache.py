"""Decoded and resized frames kept on disk, so that from the second epoch on, and in later runs, nothing is decoded.

Frames and not patches: they depend on files and sizes alone and not on a model family, and cutting costs little beside
decoding (docs/develop/decisions.md). Any number of processes and hosts may share a folder. Trouble with the cache
costs time, never a clip and never the run; what fails to decode is not kept.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from vft.common.types import MediaPlan, Patches
from vft.config.data import DataConfig
from vft.data.media import frame_files
from vft.data.media import patches as vision
from vft.data.workers import WorkerPool
from vft.models.processor import VisionSpec

KEPT_FREE = 0.05
"""Share of the disk that is left to others: a checkpoint there must not fail for the cache's sake."""
COUNT_AGAIN_S = 10.0
"""Seconds after which a process looks what others have added; longer where looking itself takes long."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class _Told(Patches):
    """Patches with something that a worker has to say about the cache."""

    note: str


@dataclass
class _Room:
    """What a process knows of the space in a cache."""

    used_bytes: int = 0
    count_again_at: float = -math.inf
    is_closed: bool = False
    """Writing failed: this process adds no more."""
    note: str = ""


_rooms: dict[FrameCache, _Room] = {}  # of this process


@dataclass(frozen=True)
class FrameCache:
    """Where frames are kept (None: nowhere), and how many bytes of them."""

    folder: Path | None
    limit_bytes: int = 0

    @staticmethod
    def of(config: DataConfig) -> FrameCache:
        """As `data.cache` says. Tells, once, how much there is."""
        if config.cache == "none":
            return NO_CACHE
        return _open(config.cache_path / "frames", int(config.cache_gib * GIB))

    def submit(self, pool: WorkerPool, plan: MediaPlan, spec: VisionSpec) -> Future[Patches]:
        """Have a worker load a medium, a video out of the cache where it is there; else it will be.

        Pictures are decoded: as frames they take many times the bytes of their files, and reading those saves little.
        """
        if self.folder is None or plan.ref.kind == "image":
            return pool.submit(vision.load, plan, spec)
        future = pool.submit(self.load, plan, spec)
        future.add_done_callback(_tell)
        return future

    def load(self, plan: MediaPlan, spec: VisionSpec) -> Patches:
        """What `vision.load` returns, or raises."""
        patches, room = vision.load(plan, spec, self._frames), self._room
        note, room.note = room.note, ""
        return _Told(patches.pixels_PD, patches.grid_thw, patches.seconds_per_grid, note) if note else patches

    @property
    def _room(self) -> _Room:
        return _rooms.setdefault(self, _Room())

    def _frames(self, plan: MediaPlan) -> Tensor:
        """The planned frames at the planned size."""
        digest = frame_files.digest_of(plan)
        if digest is None or self.folder is None:
            return vision.decode_resized(plan)
        file, is_damaged = frame_files.file_of(self.folder, digest, plan), False
        with suppress(OSError):  # most often: it is not there yet
            frames_TCHW = frame_files.read(file, digest, plan)
            if frames_TCHW is not None:
                return frames_TCHW
            is_damaged = True
        frames_TCHW = vision.decode_resized(plan)
        # Had the medium changed meanwhile, nobody would know which of the two this is.
        if not self._room.is_closed and frame_files.digest_of(plan) == digest:
            self._add(file, digest, frames_TCHW, is_damaged)
        return frames_TCHW

    def _add(self, file: Path, digest: bytes, frames_TCHW: Tensor, is_damaged: bool) -> None:
        """Write a file where there is room, or in the place of a damaged one."""
        room, size = self._room, frame_files.HEADER_BYTES + frames_TCHW.numel()
        try:
            note = "held a damaged file, made anew" if is_damaged else self._why_not(size)
            if is_damaged or not note:
                frame_files.write(file, digest, frames_TCHW)
                room.used_bytes += 0 if is_damaged else size
        except OSError as error:
            note, room.is_closed = f"can't be written ({error.strerror}); the run goes on without adding frames", True
        room.note = f"{self.folder}: {note}" if note else ""

    def _why_not(self, size: int) -> str:
        """Why so many bytes more can't be kept; empty where they can."""
        assert self.folder is not None
        room, now = self._room, time.monotonic()
        if now >= room.count_again_at:
            self.folder.mkdir(parents=True, exist_ok=True)
            room.used_bytes = frame_files.count_bytes(self.folder)
            room.count_again_at = now + max(COUNT_AGAIN_S, 50 * (time.monotonic() - now))
        if room.used_bytes + size > self.limit_bytes:
            mend = "raise it, or remove the folder where it holds what no run needs"
            return f"data.cache_gib = {self.limit_bytes / GIB:g} is reached, no more is added; {mend}"
        disk = shutil.disk_usage(self.folder)
        is_full = disk.free - size < KEPT_FREE * disk.total
        return f"the disk is {1 - KEPT_FREE:.0%} full, no more is added; free space" if is_full else ""


NO_CACHE = FrameCache(None)


@cache
def _open(folder: Path, limit_bytes: int) -> FrameCache:
    with suppress(OSError):
        _say(f"{folder}: {frame_files.count_bytes(folder) / GIB:.1f} of {limit_bytes / GIB:g} GiB of frames")
    return FrameCache(folder, limit_bytes)


def _tell(future: Future[Patches]) -> None:
    """Pass on what a worker has to say."""
    if not future.cancelled() and future.exception() is None and isinstance(told := future.result(), _Told):
        _say(told.note)


@cache  # once
def _say(text: str) -> None:
    """A line on stderr, of one process a host: they share its disk."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
