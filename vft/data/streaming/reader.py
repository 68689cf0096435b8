"""Reads a slot's share of the archives of a source in a thread of its own, some clips ahead of the training."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Event

from filelock import FileLock, Timeout

from vft.common.errors import UserError
from vft.common.files import digest
from vft.common.types import MediaRef
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats
from vft.data.chat import ChatEncoder
from vft.data.dataset import MakeConversations, Prompts
from vft.data.media.scan import scan_file
from vft.data.quarantine import BadItem, check_bad
from vft.data.records.unread_keys import report_unread_keys
from vft.data.streaming.clips import ArchiveClip, EmptyArchive, Position
from vft.data.streaming.tar import DamagedArchive
from vft.data.workers import WorkerPool
from vft.distributed.process_group import environment

LOOKAHEAD = 2
"""Clips that each slot has read beyond the one in use."""


class SearchStopped(Exception):
    """A signal came while a slot looked for a clip. If the run goes on, so does the search."""


@dataclass(frozen=True)
class ArchiveEnd:
    """The end of an archive."""

    after: Position
    """Where the next archive begins."""
    archive: str
    is_whole: bool
    """It was read from its start, not from where a resumed run goes on."""
    damage: str = ""
    emptiness: str = ""
    """Why there are no clips in it."""


@dataclass(frozen=True)
class StreamSource:
    """A source with `stream = true`."""

    name: str
    weight: float
    shards: Sequence[str]
    """Paths or URLs of its archives."""
    clips: Callable[[str, int, Path, Callable[[int], bool]], Iterator[ArchiveClip]]
    """As `vft.data.formats.Archives.clips`."""
    digest: str
    """Identifies the archives and their records, wherever they are."""
    bad: Sequence[BadItem] = ()
    """Records that no clip can have."""
    warning: str = ""
    """What looks wrong about the names in the archives."""
    unread_keys: set[str] = field(default_factory=set)
    """Keys of records that are not read, as far as they have been reported."""


def open_source(source: SourceConfig, config: DataConfig) -> StreamSource:
    """List the archives of a source with `stream = true`. UserError if there are none."""
    archives = formats.find(source.format).open_archives(formats.locate(source.path, config.root))
    if environment().is_main:
        report_unread_keys(source.path, archives.unread)
    bad = [BadItem(error.origin, "", "record", str(error)) for error in archives.bad]
    check_bad(bad, len(archives.unread) + len(bad), config.max_bad_fraction)
    names = [shard.rpartition("/")[2] for shard in archives.shards]
    return StreamSource(
        source.path,
        source.of_rows,
        archives.shards,
        archives.clips,
        digest(f"{names}{archives.digest}"),
        bad,
        archives.warning,
        set(chain.from_iterable(archives.unread)),
    )


class StreamContext:
    """What all streams of a process share. Close it at the end."""

    def __init__(
        self,
        config: DataConfig,
        encoder: ChatEncoder,
        make_conversations: MakeConversations,
        pool: WorkerPool,
        slots: int,
        seed: int,
    ) -> None:
        self.config, self.encoder, self.make_conversations = config, encoder, make_conversations
        self.pool, self.slots, self.seed = pool, slots, seed
        self.prompts: Prompts = Counter()
        self.is_closing = Event()
        self._threads: list[ThreadPoolExecutor] = []
        self.spool, self._lock = make_spool(config.cache_path / "stream")

    def start_thread(self) -> ThreadPoolExecutor:
        """A thread that reads for one stream: over a network, several threads read faster than one."""
        self._threads.append(ThreadPoolExecutor(1, "vft-archives"))
        return self._threads[-1]

    def close(self) -> None:
        """Stop reading and remove the copies of clips."""
        self.is_closing.set()
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        self._lock.release()
        shutil.rmtree(self.spool, ignore_errors=True)


def make_spool(folder: Path) -> tuple[Path, FileLock]:
    """A folder for this process's copies, and a lock that is held while it is in use.

    Removes the folders of killed processes. UserError if `folder` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without this lock, processes that start now would take a folder that is not locked yet for an abandoned one.
        with FileLock(folder / ".lock"):
            for old in folder.glob("*/"):
                lock = FileLock(old / ".lock")
                try:
                    lock.acquire(timeout=0)
                except (Timeout, OSError):
                    continue
                lock.release()
                shutil.rmtree(old, ignore_errors=True)
            spool = Path(tempfile.mkdtemp(dir=folder))
            lock = FileLock(spool / ".lock")
            lock.acquire(timeout=0)
    except OSError as error:
        raise UserError(
            f"{folder}: can't be written ({error.strerror}); name another data.cache_dir for copies of streamed clips"
        ) from error
    return spool, lock


class SlotReader:
    """The clips of one slot of one source, without end, copied to the spool and with their media being scanned."""

    def __init__(self, source: StreamSource, slot: int, context: StreamContext, start: Position) -> None:
        self.source, self.slot, self.context = source, slot, context
        self.archive = ""
        """The archive that is being read, for messages."""
        self._thread = context.start_thread()
        self._items = self._read(start)
        self._ahead: deque[Future[ArchiveClip | ArchiveEnd]] = deque()

    def peek(self) -> Future[ArchiveClip | ArchiveEnd]:
        """The next clip or end of an archive; stays the next one until `advance`."""
        while len(self._ahead) <= LOOKAHEAD:
            self._ahead.append(self._thread.submit(next, self._items))
        return self._ahead[0]

    def advance(self) -> None:
        """Go on to the one after."""
        self._ahead.popleft()

    # ------------------------------------------------------------------------------------- what the thread runs

    def _read(self, start: Position) -> Iterator[ArchiveClip | ArchiveEnd]:
        while True:
            yield from self._read_epoch(start)
            start = Position(start.epoch + 1)

    def _read_epoch(self, start: Position) -> Iterator[ArchiveClip | ArchiveEnd]:
        shards, stride, offset = self._share(start.epoch)
        for number in range(start.shard, len(shards)):
            begin = start if number == start.shard else Position(start.epoch, number)
            self.archive = shards[number]
            damage = emptiness = ""

            def is_mine(clip: int, before: int = begin.clip) -> bool:
                if self.context.is_closing.is_set():
                    raise SearchStopped
                return (before + clip) % stride == offset

            try:
                clips = self.source.clips(self.archive, begin.place, self.context.spool, is_mine)
                for count, clip in enumerate(clips):
                    if is_mine(count):
                        # Only the first clip begins within its documents.
                        first = begin.document if clip.place == begin.place else 0
                        clip.position = Position(start.epoch, number, clip.place, begin.clip + count, first)
                        self._scan(clip)
                        yield clip
            except DamagedArchive as error:
                damage = str(error)
            except EmptyArchive as error:
                emptiness = str(error)
            is_whole = begin[2:] == (0, 0, 0)
            yield ArchiveEnd(Position(start.epoch, number + 1), self.archive, is_whole, damage, emptiness)

    def _share(self, epoch: int) -> tuple[list[str], int, int]:
        """This slot's archives in the order of the epoch; of their clips it takes every `stride`-th, from `offset` on.

        With fewer archives than slots, several slots share an archive.
        """
        shards = list(self.source.shards)
        random.Random(f"shards:{self.context.seed}:{epoch}").shuffle(shards)
        slots, count = self.context.slots, len(shards)
        if count >= slots:
            return shards[self.slot :: slots], 1, 0
        own = self.slot % count
        return [shards[own]], len(range(own, slots, count)), self.slot // count

    def _scan(self, clip: ArchiveClip) -> None:
        parts = (part for sample in clip.samples for turn in sample.turns for part in turn.parts)
        for ref in parts:
            if isinstance(ref, MediaRef):
                for path in ref.files:
                    if path not in clip.scans:
                        clip.scans[path] = self.context.pool.submit(scan_file, ref.file_kind, path)
