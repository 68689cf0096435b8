"""Dataset out of archives that are read as they come: no index, nothing unpacked, a cursor for each row of a step.

Each of the `train.packs_per_step` rows of a step, a slot, has a stream of its own through a share of the shards, so
what a row holds depends neither on the number of processes nor on when it was asked for. A clip is copied to a spool
folder, scanned there in a worker process, planned and packed like any other, and removed once it is decoded.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from vft.common.errors import UserError
from vft.common.files import digest
from vft.common.types import Document, MediaInfo, MediaRef
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats
from vft.data.chat import ChatEncoder
from vft.data.dataset import Dataset, MakeConversations, converse
from vft.data.media.errors import MediaError
from vft.data.media.scan import join_pictures, scan_file
from vft.data.quarantine import ArchivePass, BadItem, check_bad
from vft.data.records.record import ClipRecords
from vft.data.records.unread_keys import report_new_unread_keys, report_unread_keys
from vft.data.streaming.tar import BarrenArchive, DamagedArchive
from vft.data.training_prompts import Asked
from vft.data.workers import WorkerPool
from vft.distributed.heartbeat import report_detail
from vft.distributed.process_group import environment
from vft.distributed.signals import asked

LOOKAHEAD = 2
"""Clips that each slot has read beyond the one in use."""
SEARCH = 16
"""Clips, and ends of archives, that a slot goes through without finding a document before it ends the row that it
fills. A step that waits for the next good clip could otherwise take for ever, and its bad ones would not be told."""
MAX_BARREN = 16
"""Archives one behind another without anything that is looked for before a slot gives up."""
POLL_S = 0.5
"""Between two looks whether a signal has come."""
TELL_S = 20.0
"""Seconds of looking for a clip after which a slot says so; then twice as many, and so on."""


class SearchStopped(Exception):
    """A signal came while a slot looked for a clip: it goes on there if the run does."""


class Position(NamedTuple):
    """Where a slot's stream stands: the next document is number `document` of the clip at `place`."""

    epoch: int = 0
    shard: int = 0
    """Number in the slot's order of shards."""
    place: int = 0
    """In the shard, as `vft.data.streaming.tar` counts."""
    clip: int = 0
    """How many clips of the shard come before."""
    document: int = 0


@dataclass(frozen=True)
class StreamSource:
    """A source that streams: its shards, and how the clips of one are read from a place on."""

    name: str
    weight: float
    shards: Sequence[str]
    groups: Callable[[str, int, Path, Callable[[int], bool]], Iterator[ClipRecords]]
    """Of an archive from a place on; copied into a folder where their number is wanted, else empty."""
    digest: str
    """Tells these archives and their records from others, wherever they lie."""
    bad: Sequence[BadItem] = ()
    """Records that no clip can have."""
    warning: str = ""
    """What is odd about the names in the archives."""
    told: set[str] = field(default_factory=set)
    """Keys of records that nothing reads, that the user was told of."""


def open_archives(source: SourceConfig, config: DataConfig) -> StreamSource:
    """List the shards of a source with `stream = true`. UserError where there are none."""
    opened = formats.find(source.format).open_archives(formats.locate(source.path, config.root))
    if environment().is_main:
        report_unread_keys(source.path, opened.unread)
    bad = [BadItem(error.origin, "", "record", str(error)) for error in opened.bad]
    check_bad(bad, len(opened.unread) + len(bad), config.max_bad_fraction)
    name = _digest(opened.shards, opened.digest)
    known = set(chain.from_iterable(opened.unread))
    return StreamSource(source.path, source.of_rows, opened.shards, opened.clips, name, bad, opened.warning, known)


def _digest(shards: Sequence[str], records: str) -> str:
    return digest(f"{[shard.rpartition('/')[2] for shard in shards]}{records}")


@dataclass(eq=False)
class Spooled:
    """The files of one clip and how many documents still need them."""

    files: Sequence[Path]
    needed: int

    def release(self) -> None:
        """One need less; after the last the files are removed."""
        self.needed -= 1
        for file in self.files if self.needed <= 0 else ():
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class StreamedDocument:
    """A document, the files that it is decoded from, and where the stream goes on behind it."""

    document: Document
    clip: Spooled
    after: Position
    bad: Sequence[BadItem] = ()
    """Of the same clip; the first document tells it."""


@dataclass(frozen=True)
class Passed:
    """A clip without a document, or the end of an archive, and where the stream goes on behind it."""

    after: Position
    bad: Sequence[BadItem]
    archive: str = ""
    """Which one ended; empty: it was a clip."""
    counts: ArchivePass | None = None
    """What was found in the archive, where it was read from its start."""
    barren: bool = False
    """The archive holds files, but nothing of what is looked for."""


@dataclass(frozen=True)
class StreamedPack:
    """The documents of one row, what was met on the way to them, and where the stream goes on."""

    documents: list[StreamedDocument]
    bad: list[BadItem]
    archives: list[ArchivePass]
    after: Position
    searched: bool = False
    """So many clips gave no document that the row was ended before it was full."""
    exhausted: bool = False
    """No archive has a document for this slot: there is no use in going on."""


@dataclass(frozen=True)
class _Read:
    """A clip that has been copied out, its media being scanned."""

    position: Position
    group: ClipRecords
    scans: dict[Path, Future[MediaInfo]]


@dataclass(frozen=True)
class _End:
    """The end of an archive."""

    position: Position
    """Of what comes behind it."""
    archive: str
    is_whole: bool
    """It was read from its start, not from where a run goes on."""
    damage: str = ""
    barren: str = ""
    """Why there is nothing in it."""


@dataclass
class StreamContext:
    """What all streams of a process share; close it at the end."""

    config: DataConfig
    encoder: ChatEncoder
    make_conversations: MakeConversations
    pool: WorkerPool
    slots: int
    seed: int

    say: Callable[[str], None] = field(default=lambda text: print(text, file=sys.stderr, flush=True))
    """Shows a line to the user."""

    def __post_init__(self) -> None:
        self.readers: list[ThreadPoolExecutor] = []
        self.closing = Event()
        self.asked = Asked()
        self.spool, self._lock = _make_spool(self.config.cache_path / "stream")

    def reader(self) -> ThreadPoolExecutor:
        """A thread that reads for one stream: over a network, many read faster than one."""
        self.readers.append(ThreadPoolExecutor(1, "vft-archives"))
        return self.readers[-1]

    def close(self) -> None:
        """Stop reading and remove the copies."""
        self.closing.set()
        for reader in self.readers:
            reader.shutdown(wait=True, cancel_futures=True)
        self._lock.release()
        shutil.rmtree(self.spool, ignore_errors=True)


class SlotStream:
    """One slot's share of one source, as packs."""

    def __init__(self, archives: StreamSource, slot: int, context: StreamContext, start: Position) -> None:
        self.archives, self.slot, self.context = archives, slot, context
        self._position = start
        self._clips = self._read(start)
        self._reader = context.reader()
        self._reading = ""
        """The archive that is read."""
        self._ahead: deque[Future[_Read | _End]] = deque()
        self._ready: deque[StreamedDocument | Passed] = deque()
        self._in_archive = 0
        """Samples found since an archive began."""
        self._given = False
        """Whether there was a document since an archive began."""
        self._in_vain: set[str] = set()
        """Archives read from end to end since the last document."""
        self._barren = 0
        """Archives in a row that hold nothing of what is looked for."""

    def next_pack(self) -> StreamedPack:
        """As many documents, in order, as fit a row; fewer, or none, where many clips in a row give none.

        Raises:
            SearchStopped: a signal asks the run to stop, and there was no document yet.
        """
        config, tokens, samples, misses = self.context.config, 0, 0, 0
        taken: list[StreamedDocument] = []
        bad: list[BadItem] = []
        archives: list[ArchivePass] = []
        began_s = time.monotonic()
        while misses < SEARCH and not self._is_exhausted and not (0 < config.max_samples_per_pack <= samples):
            one = self._peek(began_s, searching=misses > 0 and not taken)
            if isinstance(one, Passed):
                misses += 1
                archives += [one.counts] if one.counts else []
                self._note_end(one)
            else:
                more, most = samples + len(one.document.sample_ids), config.max_samples_per_pack
                if taken and (tokens + one.document.num_tokens > config.pack_tokens or 0 < most < more):
                    break
                taken.append(one)
                tokens, samples, misses = tokens + one.document.num_tokens, more, 0
                self._given, self._barren = True, 0
                self._in_vain.clear()
            self._ready.popleft()
            self._position = one.after
            bad += one.bad
        return StreamedPack(taken, bad, archives, self._position, misses >= SEARCH, self._is_exhausted)

    @property
    def _is_exhausted(self) -> bool:
        return len(self._in_vain) == len(self.archives.shards) or self._barren >= MAX_BARREN

    def _note_end(self, one: Passed) -> None:
        if not one.archive:
            return
        if one.counts and not self._given:
            self._in_vain.add(one.archive)
        self._given = False
        self._barren = self._barren + 1 if one.barren else 0

    def _peek(self, began_s: float, searching: bool) -> StreamedDocument | Passed:
        while not self._ready:
            while len(self._ahead) <= LOOKAHEAD:
                self._ahead.append(self._reader.submit(next, self._clips))
            self._wait([self._ahead[0]], began_s, searching)
            read = self._ahead[0].result()
            if isinstance(read, _End):
                self._end(read)
            else:
                self._wait([*read.scans.values()], began_s, searching)
                self._unfold(read)
            self._ahead.popleft()
        return self._ready[0]

    def _wait(self, futures: Sequence[Future[Any]], began_s: float, searching: bool) -> None:
        """Until all are done. SearchStopped where a signal came and the search may take long."""
        tell_s = TELL_S
        while True:
            if searching and asked():
                raise SearchStopped
            if not wait(futures, POLL_S).not_done:
                return
            searching, waited_s = True, time.monotonic() - began_s
            report_detail(f"looking for a clip that can be used in {self._reading}")
            if waited_s > tell_s:
                self.context.say(f"row {self.slot + 1}: {waited_s:.0f} s without a clip, reading {self._reading}")
                tell_s = 2 * waited_s

    def _end(self, end: _End) -> None:
        """What there is to say of an archive."""
        message = end.damage or end.barren
        bad = [self._bad(end.archive, end.archive, "archive", message, 0)] if message else []
        counts = ArchivePass(self._in_archive, bool(end.damage)) if end.is_whole else None
        self._ready.append(Passed(end.position, bad, end.archive, counts, bool(end.barren)))
        self._in_archive = 0

    def _unfold(self, read: _Read) -> None:
        """The documents of a clip, those before the stream's position left out."""
        context, group = self.context, read.group

        def info(ref: MediaRef) -> MediaInfo:
            try:
                found = [read.scans[path].result() for path in ref.files]
                return join_pictures(ref, found) if ref.is_list else found[0]
            except MediaError as error:
                raise MediaError(error.reason, name_members(str(error), ref)) from None

        documents = Dataset(context.encoder, context.config, info)
        documents.bad += [BadItem(error.origin, error.origin, "record", str(error)) for error in group.bad]
        conversations = []
        for sample in group.samples:
            if environment().is_main:
                report_new_unread_keys(self.archives.name, sample.origin, sample.unread, self.archives.told)
            made, wrong = converse(sample, context.make_conversations, context.config)
            conversations += made
            documents.bad += wrong
        documents.add_all([(one, 1.0) for one in conversations], show_progress=False)
        clip = Spooled(group.files, len(documents.members) + 1)
        bad = self._once_each(documents.bad)
        self._in_archive += documents.num_samples + sum(item.samples for item in bad)
        after = read.position._replace(document=max(1, len(documents.members)))
        if not documents.members and not read.position.document:
            self._ready.append(Passed(after, bad))
        for number in range(len(documents.members)):
            if number >= read.position.document:
                after = read.position._replace(document=number + 1)
                context.asked.add(documents.members[number])
                one = StreamedDocument(documents.build(number), clip, after, bad if number == 0 else ())
                self._ready.append(one)
            else:
                clip.release()
        clip.release()

    def _once_each(self, bad: Sequence[BadItem]) -> list[BadItem]:
        """One for each medium or record, with the number of samples that are lost by it."""
        counts: dict[tuple[str, str], int] = {}
        first: dict[tuple[str, str], BadItem] = {}
        for item in bad:
            counts[item.key] = counts.get(item.key, 0) + item.samples
            first.setdefault(item.key, item)
        return [self._bad(one.id, one.path, one.reason, one.message, counts[key]) for key, one in first.items()]

    def _bad(self, name: str, path: str, reason: str, message: str, samples: int) -> BadItem:
        return BadItem(name, path, reason, message, samples, self.archives.name)

    # ------------------------------------------------------------------------------ in the reading thread, from here

    def _read(self, start: Position) -> Iterator[_Read | _End]:
        """The slot's clips for ever, from `start` on."""
        yield from self._read_epoch(start.epoch, start)
        epoch = start.epoch
        while True:
            epoch += 1
            yield from self._read_epoch(epoch, Position(epoch))

    def _read_epoch(self, epoch: int, start: Position) -> Iterator[_Read | _End]:
        """One epoch's, from `start` on, and the end of each archive."""
        shards, stride, offset = self._share(epoch)
        for number in range(start.shard, len(shards)):
            place, before = (start.place, start.clip) if number == start.shard else (0, 0)
            is_whole = number != start.shard or start[2:] == (0, 0, 0)
            self._reading = shards[number]
            damage = barren = ""

            def is_mine(clip: int, before: int = before) -> bool:
                if self.context.closing.is_set():
                    raise SearchStopped
                return (before + clip) % stride == offset

            try:
                found = self.archives.groups(shards[number], place, self.context.spool, is_mine)
                for clip, group in enumerate(found):
                    if is_mine(clip):
                        position = Position(epoch, number, group.place, before + clip)
                        if position[:3] == start[:3]:
                            position = start
                        yield _Read(position, group, self._scan(group))
            except DamagedArchive as error:
                damage = str(error)
            except BarrenArchive as error:
                barren = str(error)
            yield _End(Position(epoch, number + 1), shards[number], is_whole, damage, barren)

    def _share(self, epoch: int) -> tuple[list[str], int, int]:
        """This slot's shards in the order of the epoch, and of their clips every how manieth, from which on."""
        order = list(self.archives.shards)
        random.Random(f"shards:{self.context.seed}:{epoch}").shuffle(order)
        slots, count = self.context.slots, len(order)
        if count >= slots:
            return order[self.slot :: slots], 1, 0
        mine = self.slot % count
        return [order[mine]], len(range(mine, slots, count)), self.slot // count

    def _scan(self, group: ClipRecords) -> dict[Path, Future[MediaInfo]]:
        refs = [ref for s in group.samples for turn in s.turns for ref in turn.parts if isinstance(ref, MediaRef)]
        scans: dict[Path, Future[MediaInfo]] = {}
        for ref in refs:
            for path in ref.files:
                if path not in scans:
                    scans[path] = self.context.pool.submit(scan_file, "image" if ref.is_list else ref.kind, path)
        return scans


def name_members(message: str, ref: MediaRef) -> str:
    """A message about a medium with its name in the archive in the place of the passing copy's."""
    for path in ref.files if ref.member else ():
        message = message.replace(str(path), ref.name)
    return message


def _make_spool(folder: Path) -> tuple[Path, FileLock]:
    """A folder for this process's copies, and the lock that says it is in use; those of the killed are removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # or others that start now would take a folder not yet locked for left behind
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
