"""Rows of documents out of archives that are read as a stream: no index, nothing unpacked, and a place to go on from.

Each of the `train.packs_per_step` rows of a step, called a slot, has a stream of its own through a share of the
archives. What a row holds therefore depends neither on the number of processes nor on timing. A clip is copied to a
spool folder, scanned in a worker process, planned and packed like any other, and removed once it is decoded.
"""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

from filelock import FileLock, Timeout

from vft.common.errors import UserError
from vft.common.files import cannot_write, digest
from vft.common.types import Document, MediaInfo, MediaRef
from vft.config.data import DataConfig, SourceConfig, source_names
from vft.data import formats
from vft.data.chat import ChatEncoder
from vft.data.dataset import MakeConversations, Prompts, converse, make_dataset, prompts_of
from vft.data.media.errors import MediaError
from vft.data.media.video import join_scans, scan_file
from vft.data.quarantine import ArchivePass, BadItem, by_kind, check_bad
from vft.data.records.unread_keys import report_new_unread_keys, report_unread_keys
from vft.data.streaming.archives import ArchiveClip, DamagedArchive, EmptyArchive, Position
from vft.data.workers import WorkerPool
from vft.distributed.heartbeat import report_detail
from vft.distributed.process_group import environment
from vft.distributed.signals import stop_requested

logger = logging.getLogger(__name__)

INDEX = -1
"""The feed that is no stream: documents of the index."""
LOOKAHEAD = 2
"""Clips that each slot has read beyond the one in use."""
MAX_MISSES = 16
"""Clips without a document and ends of archives in sequence after which a slot ends its row. If it searched on, a step
could take for ever, and the bad clips would not be reported."""
MAX_EMPTY = 16
"""Archives without clips in sequence after which a slot gives up."""
POLL_S = 0.5
"""Seconds between two checks for a signal."""
REPORT_S = 20.0
"""Seconds of searching after which a slot logs a message; the next comes after twice as long, and so on."""


# -------------------------------------------------------------------------------------------------------------- sources


class StreamSource:
    """A source with `stream = true`: its archives (`vft.data.formats.Archives`), and what is known before they are
    read. UserError if there are none."""

    def __init__(self, source: SourceConfig, config: DataConfig) -> None:
        archives = formats.find(source.format).open_archives(formats.locate(source.path, config.root))
        if environment().is_main:
            report_unread_keys(source.path, archives.unread)
        self.name, self.weight = source.path, source.of_rows
        self.label = source_names(config.sources)[source.path]
        self.shards, self.clips, self.warning = archives.shards, archives.clips, archives.warning
        self.bad = [BadItem(error.origin, "", "record", str(error)) for error in archives.bad]
        check_bad(self.bad, len(archives.unread) + len(self.bad), config.max_bad_fraction)
        names = [shard.rpartition("/")[2] for shard in archives.shards]
        self.digest = digest(f"{names}{archives.digest}")
        """Identifies the archives and their records, wherever they are."""
        self.unread_keys = set(chain.from_iterable(archives.unread))
        """Keys of records that are not read, as far as they have been reported."""


class Streams:
    """The streaming sources of a run and what all their streams in this process share, for `slots` rows a step. Close
    it at the end."""

    def __init__(
        self,
        config: DataConfig,
        make_conversations: MakeConversations,
        encoder: ChatEncoder,
        pool: WorkerPool,
        slots: int,
        seed: int,
    ) -> None:
        self.config, self.encoder, self.make_conversations = config, encoder, make_conversations
        self.pool, self.slots, self.seed = pool, slots, seed
        self.archives = [StreamSource(source, config) for source in config.streamed]
        self.weights = [sum(source.of_rows for source in config.indexed), *(one.weight for one in self.archives)]
        """Of the index, then of each source."""
        self.by_share = config.streamed[0].share is not None
        """The weights are shares of the samples, not of the rows."""
        self.prompts: Prompts = Counter()
        self.is_closing = Event()
        self.threads: list[ThreadPoolExecutor] = []
        """One that reads for each stream: over a network, several threads read faster than one."""
        self.spool, self._lock = make_spool(config.cache_path / "stream")

    def close(self) -> None:
        """Stop reading and remove the copies of clips."""
        self.is_closing.set()
        for thread in self.threads:
            thread.shutdown(wait=True, cancel_futures=True)
        self._lock.release()
        shutil.rmtree(self.spool, ignore_errors=True)

    def feed_of(self, step: int, slot: int, tally: Sequence[int] = ()) -> int:
        """Number of the stream that fills a slot of a step, or INDEX: drawn by weight from (seed, step, slot).

        If the weights are shares, the draw is by how many samples each feed would lack after one more row. `tally` then
        holds the slot's rows so far and the samples in them by feed, the index first.
        """
        weights = self.weights
        if tally:
            rows, *samples = tally
            total = sum(samples)
            after = total + (total / rows if total else 1.0)
            weights = [max(0.0, share * after - count) for share, count in zip(weights, samples, strict=True)]
        draw = random.Random(f"feed:{self.seed}:{step}:{slot}")
        return draw.choices(range(INDEX, len(self.archives)), weights)[0]

    @property
    def passes(self) -> int:
        """Passes through an archive that make up one epoch of all archives."""
        return sum(max(len(one.shards), self.slots) for one in self.archives)

    def nothing_in(self, name: str, bad: Iterable[BadItem], num_good: int) -> UserError:
        """The error that the source `name` has no document for a row, with what is wrong with the `bad` items found in
        it. It gave `num_good` good samples."""
        sources = [one for one in self.archives if one.name == name]
        shards = sum(len(one.shards) for one in sources)
        warnings = [one.warning for one in sources if one.warning]
        why = by_kind(item for item in bad if item.source == name) or "; ".join(warnings)
        if why and not num_good:
            return UserError(f"{name}: no clip met in {shards} archive(s) can be trained on: {why}")
        return UserError(
            f"{name}: too few clips with records in {shards} archive(s) for the {self.slots} streams of "
            "train.packs_per_step; lower it, or read the source with stream = false" + (f" [{why}]" if why else "")
        )


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
        raise cannot_write(folder, error, "name another data.cache_dir for copies of streamed clips") from error
    return spool, lock


# ------------------------------------------------------------------------------------------------------------ documents


class SearchStopped(Exception):
    """A signal came while a slot looked for a clip. If the run goes on, so does the search."""


@dataclass(frozen=True)
class StreamedDocument:
    """A document, the clip that it is decoded from, and where the stream goes on behind it."""

    document: Document
    clip: ArchiveClip
    after: Position
    bad: Sequence[BadItem] = ()
    """Of the same clip; only its first document has them."""


@dataclass(frozen=True)
class Miss:
    """A clip that gives no document, or the end of an archive, and where the stream goes on behind it."""

    after: Position
    bad: Sequence[BadItem]


@dataclass(frozen=True)
class ArchiveEnd(Miss):
    """The end of an archive. If it is damaged or has no clips, `bad` says so."""

    archive: str
    is_whole: bool
    """It was read from its start, not from where a resumed run goes on."""
    is_damaged: bool
    is_empty: bool


@dataclass
class StreamedPack:
    """The documents of one row, what was met on the way to them, and where the stream goes on."""

    after: Position
    documents: list[StreamedDocument] = field(default_factory=list)
    bad: list[BadItem] = field(default_factory=list)
    archives: list[ArchivePass] = field(default_factory=list)
    searched: bool = False
    """The row ended before it was full, since `MAX_MISSES` clips in sequence gave no document."""
    exhausted: bool = False
    """No archive has a document for this slot: it is no use to go on."""


class SlotStream:
    """One slot's share of one source, as packs. A thread of its own reads some clips ahead: it copies them to the
    spool, and workers scan their media."""

    def __init__(self, source: StreamSource, slot: int, streams: Streams, start: Position) -> None:
        self.source, self.slot, self.streams = source, slot, streams
        self._archive = ""
        """The archive that is being read, for messages."""
        self._thread = ThreadPoolExecutor(1, "vft-archives")
        streams.threads.append(self._thread)
        self._items = self._read(start)
        self._ahead: deque[Future[ArchiveClip | ArchiveEnd]] = deque()
        self._ready: deque[StreamedDocument | Miss] = deque()
        self._position = start
        self._samples = 0
        """Good and bad samples since the archive began."""
        self._has_document = False
        """There was a document since the archive began."""
        self._fruitless: set[str] = set()
        """Archives that were read from start to end since the last document, without one."""
        self._num_empty = 0
        """Archives without clips in sequence."""

    def next_pack(self) -> StreamedPack:
        """As many documents, in order, as fit a row; fewer, or none, if many clips in sequence give none.

        Raises:
            SearchStopped: a signal asks the run to stop, and there was no document yet.
        """
        config, begin_s = self.streams.config, time.monotonic()
        pack, tokens, samples, misses = StreamedPack(self._position), 0, 0, 0
        max_samples = config.max_samples_per_pack or float("inf")
        while misses < MAX_MISSES and not self._is_exhausted and samples < max_samples:
            item = self._peek(begin_s, searching=misses > 0 and not pack.documents)
            if isinstance(item, StreamedDocument):
                tokens += item.document.num_tokens
                samples += len(item.document.sample_ids)
                if pack.documents and (tokens > config.pack_tokens or samples > max_samples):
                    break
                pack.documents.append(item)
                misses = self._num_empty = 0
                self._has_document = True
                self._fruitless.clear()
                self._samples += len(item.document.sample_ids)
            else:
                misses += 1
            pack.bad += item.bad
            self._samples += sum(bad.samples for bad in item.bad)
            if isinstance(item, ArchiveEnd):
                self._end_archive(item, pack)
            self._ready.popleft()
            self._position = pack.after = item.after
        pack.searched, pack.exhausted = misses >= MAX_MISSES, self._is_exhausted
        return pack

    @property
    def _is_exhausted(self) -> bool:
        return len(self._fruitless) == len(self.source.shards) or self._num_empty >= MAX_EMPTY

    def _end_archive(self, end: ArchiveEnd, pack: StreamedPack) -> None:
        if end.is_whole:
            pack.archives.append(ArchivePass(self._samples, end.is_damaged))
            if not self._has_document:
                self._fruitless.add(end.archive)
        self._samples, self._has_document = 0, False
        self._num_empty = self._num_empty + 1 if end.is_empty else 0

    def _peek(self, begin_s: float, searching: bool) -> StreamedDocument | Miss:
        while not self._ready:
            while len(self._ahead) <= LOOKAHEAD:
                self._ahead.append(self._thread.submit(next, self._items))
            self._wait([self._ahead[0]], begin_s, searching)
            item = self._ahead[0].result()
            if isinstance(item, ArchiveEnd):
                self._ready.append(item)
            else:
                self._wait([*item.scans.values()], begin_s, searching)
                self._ready += self._documents_of(item)
            self._ahead.popleft()
        return self._ready[0]

    def _wait(self, futures: Sequence[Future[Any]], begin_s: float, searching: bool) -> None:
        """Wait until all are done. SearchStopped if a signal came and the search may take long."""
        report_s = REPORT_S
        while True:
            if self.streams.is_closing.is_set() or (searching and stop_requested()):
                raise SearchStopped
            if not wait(futures, POLL_S).not_done:
                return
            searching, waited_s = True, time.monotonic() - begin_s
            report_detail(f"looking for a clip that can be used in {self._archive}")
            if waited_s > report_s:
                message = "row %d: %.0f s without a clip, reading %s"
                logger.info(message, self.slot + 1, waited_s, self._archive, extra={"all_ranks": True})
                report_s = 2 * waited_s

    def _documents_of(self, clip: ArchiveClip) -> Sequence[StreamedDocument | Miss]:
        """The documents of a scanned clip from its position on. None at all if there were some before the position."""

        def info(ref: MediaRef) -> MediaInfo:
            try:
                return join_scans(ref, [clip.scans[path].result() for path in ref.files])
            except MediaError as error:
                raise MediaError(error.reason, name_members(str(error), ref)) from None

        streams = self.streams
        bad = [BadItem(error.origin, error.origin, "record", str(error)) for error in clip.bad]
        conversations = []
        for sample in clip.samples:
            if environment().is_main:
                report_new_unread_keys(self.source.name, sample.origin, sample.unread, self.source.unread_keys)
            made, unusable = converse(sample, streams.make_conversations, streams.config)
            conversations += [replace(one, source=self.source.label) for one in made]
            bad += unusable
        dataset = make_dataset(conversations, streams.encoder, streams.config, info)
        bad = _join_by_key(bad + dataset.bad, self.source.name)
        first = clip.position.document
        clip.num_documents = len(dataset.documents) - first
        if clip.num_documents <= 0:
            clip.remove()
        if not dataset.documents and not first:
            return [Miss(clip.position._replace(document=1), bad)]
        documents = []
        for number in range(first, len(dataset.documents)):
            streams.prompts.update(prompts_of(dataset.documents[number].conversations))
            after = clip.position._replace(document=number + 1)
            documents.append(StreamedDocument(dataset.build(number), clip, after, () if number else bad))
        return documents

    # ------------------------------------------------------------------------------------- what the thread runs

    def _read(self, start: Position) -> Iterator[ArchiveClip | ArchiveEnd]:
        while True:
            yield from self._read_epoch(start)
            start = Position(start.epoch + 1)

    def _read_epoch(self, start: Position) -> Iterator[ArchiveClip | ArchiveEnd]:
        shards, stride, offset = self._share(start.epoch)
        for number in range(start.shard, len(shards)):
            begin = start if number == start.shard else Position(start.epoch, number)
            self._archive = archive = shards[number]
            damage = emptiness = ""

            def is_mine(clip: int, before: int = begin.clip) -> bool:
                if self.streams.is_closing.is_set():
                    raise SearchStopped
                return (before + clip) % stride == offset

            try:
                clips = self.source.clips(archive, begin.place, self.streams.spool, is_mine)
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
            message, is_whole = damage or emptiness, begin[2:] == (0, 0, 0)
            bad = [BadItem(archive, archive, "archive", message, 0, self.source.name)] if message else []
            after = Position(start.epoch, number + 1)
            yield ArchiveEnd(after, bad, archive, is_whole, bool(damage), bool(emptiness))

    def _share(self, epoch: int) -> tuple[list[str], int, int]:
        """This slot's archives in the order of the epoch; of their clips it takes every `stride`-th, from `offset` on.

        With fewer archives than slots, several slots share an archive.
        """
        shards = list(self.source.shards)
        random.Random(f"shards:{self.streams.seed}:{epoch}").shuffle(shards)
        slots, count = self.streams.slots, len(shards)
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
                        clip.scans[path] = self.streams.pool.submit(scan_file, ref.file_kind, path)


def _join_by_key(items: Sequence[BadItem], source: str) -> list[BadItem]:
    """One item for each medium or record, with the number of samples that are lost through it."""
    joined: dict[tuple[str, str], BadItem] = {}
    for item in items:
        earlier = joined.get(item.key)
        samples = item.samples + (earlier.samples if earlier else 0)
        joined[item.key] = replace(earlier or item, samples=samples, source=source)
    return list(joined.values())


def name_members(message: str, ref: MediaRef) -> str:
    """A message about a medium, with its name in the archive in place of the temporary copy's."""
    for path in ref.files if ref.member else ():
        message = message.replace(str(path), ref.name)
    return message
