"""Documents out of archives that are read as they come: no index, nothing unpacked, a cursor for each row of a step.

Each of the `train.packs_per_step` rows of a step, a slot, has a stream of its own through a share of the shards, so
what a row holds depends neither on the number of processes nor on when it was asked for. A clip is copied to a spool
folder, scanned there in a worker process, planned and packed like any other, and removed once it is decoded.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from vft.data.archives import DamagedArchive
from vft.data.chat import ChatEncoder
from vft.data.documents import Documents, MakeConversations, converse
from vft.data.media_error import MediaError
from vft.data.pool import WorkerPool
from vft.data.quarantine import BadItem, check_bad
from vft.data.sources import llava_video, locate, pe_video
from vft.data.sources.records import Group
from vft.data.sources.unread_keys import tell
from vft.data.video import join_pictures, scan_file
from vft.data_config import DataConfig, SourceConfig
from vft.distributed import environment
from vft.types import Document, MediaInfo, MediaRef, UserError

LOOKAHEAD = 2
"""Clips that each slot has read beyond the one in use."""
MAX_BARREN = 16
"""Archives that a slot reads one behind another without finding a clip before it gives up."""


class Position(NamedTuple):
    """Where a slot's stream stands: the next document is number `document` of the clip at `place`."""

    epoch: int = 0
    shard: int = 0
    """Number in the slot's order of shards."""
    place: int = 0
    """In the shard, as `vft.data.archives` counts."""
    clip: int = 0
    """How many clips of the shard come before."""
    document: int = 0


@dataclass(frozen=True)
class Archives:
    """A source that streams: its shards, and how the clips of one are read from a place on."""

    name: str
    weight: float
    shards: Sequence[str]
    groups: Callable[[str, int, Path, Callable[[int], bool]], Iterator[Group]]
    """Of an archive from a place on; copied into a folder where their number is wanted, else empty."""
    digest: str
    """Tells these archives and their records from others, wherever they lie."""
    bad: Sequence[BadItem] = ()
    """Records that no clip can have."""


def open_archives(source: SourceConfig, config: DataConfig) -> Archives:
    """List the shards of a source with `stream = true`. UserError where there are none."""
    location = locate(source.path, config.root)
    if source.format == "pe_video":
        shards = pe_video.shards(location)
        return Archives(source.path, source.of_rows, shards, pe_video.groups, _digest(shards, ""))
    opened = llava_video.Archives.open(location)
    if environment().is_main:
        tell(source.path, opened.unread)
    bad = [BadItem(error.origin, "", "record", str(error)) for error in opened.bad]
    check_bad(bad, sum(map(len, opened.records.values())) + len(bad), config.max_bad_fraction)
    digest = _digest(opened.shards, opened.digest)
    return Archives(source.path, source.of_rows, opened.shards, opened.groups, digest, bad)


def _digest(shards: Sequence[str], records: str) -> str:
    names = [shard.rpartition("/")[2] for shard in shards]
    return hashlib.sha256(f"{names}{records}".encode()).hexdigest()[:16]


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


@dataclass(frozen=True)
class StreamedPack:
    """The documents of one row, what could not be used on the way to them, and where the stream goes on."""

    documents: list[StreamedDocument]
    bad: list[BadItem]
    after: Position


@dataclass(frozen=True)
class _Read:
    """A clip that has been copied out, its media being scanned."""

    position: Position
    group: Group
    scans: dict[Path, Future[MediaInfo]]
    damage: list[BadItem]
    """Archives that ended before their time, on the way here."""


@dataclass
class StreamContext:
    """What all streams of a process share; close it at the end."""

    config: DataConfig
    encoder: ChatEncoder
    make_conversations: MakeConversations
    pool: WorkerPool
    slots: int
    seed: int

    def __post_init__(self) -> None:
        self.readers: list[ThreadPoolExecutor] = []
        self.spool, self._lock = _make_spool(self.config.cache_path / "stream")

    def reader(self) -> ThreadPoolExecutor:
        """A thread that reads for one stream: over a network, many read faster than one."""
        self.readers.append(ThreadPoolExecutor(1, "vft-archives"))
        return self.readers[-1]

    def close(self) -> None:
        """Stop reading and remove the copies."""
        for reader in self.readers:
            reader.shutdown(wait=True, cancel_futures=True)
        self._lock.release()
        shutil.rmtree(self.spool, ignore_errors=True)


class SlotStream:
    """One slot's share of one source, as packs."""

    def __init__(self, archives: Archives, slot: int, context: StreamContext, start: Position) -> None:
        self.archives, self.slot, self.context = archives, slot, context
        self._position = start
        self._clips = self._read(start)
        self._reader = context.reader()
        self._ahead: deque[Future[_Read]] = deque()
        self._ready: deque[StreamedDocument] = deque()
        self._bad: list[BadItem] = []

    def next_pack(self) -> StreamedPack:
        """As many documents, in order, as fit a row; at least one."""
        config, tokens, samples = self.context.config, 0, 0
        taken: list[StreamedDocument] = []
        while not (0 < config.max_samples_per_pack <= samples):
            one = self._peek()
            more, most = samples + len(one.document.sample_ids), config.max_samples_per_pack
            if taken and (tokens + one.document.num_tokens > config.pack_tokens or 0 < most < more):
                break
            taken.append(self._ready.popleft())
            tokens, samples, self._position = tokens + one.document.num_tokens, more, one.after
        bad, self._bad = self._bad, []
        return StreamedPack(taken, bad, self._position)

    def _peek(self) -> StreamedDocument:
        while not self._ready:
            while len(self._ahead) <= LOOKAHEAD:
                self._ahead.append(self._reader.submit(next, self._clips))
            self._unfold(self._ahead.popleft().result())
        return self._ready[0]

    def _unfold(self, read: _Read) -> None:
        """The documents of a clip, those before the stream's position left out."""
        context, group = self.context, read.group

        def info(ref: MediaRef) -> MediaInfo:
            try:
                if isinstance(ref.path, tuple):
                    return join_pictures(ref, [read.scans[path].result() for path in ref.path])
                return read.scans[ref.path].result()
            except MediaError as error:
                raise MediaError(error.reason, name_members(str(error), ref)) from None

        documents = Documents(context.encoder, context.config, info)
        documents.bad += [BadItem(error.origin, error.origin, "record", str(error)) for error in group.bad]
        conversations = []
        for sample in group.samples:
            made, wrong = converse(sample, context.make_conversations, context.config)
            conversations += made
            documents.bad += wrong
        documents.add_all([(one, 1.0) for one in conversations], show_progress=False)
        numbers = range(read.position.document, len(documents.members))
        clip = Spooled(group.files, len(numbers) + 1)
        if not read.position.document:
            self._bad += [*read.damage, *documents.bad]
        for number in numbers:
            after = read.position._replace(document=number + 1)
            self._ready.append(StreamedDocument(documents.build(number), clip, after))
        clip.release()

    # ------------------------------------------------------------------------------ in the reading thread, from here

    def _read(self, start: Position) -> Iterator[_Read]:
        """The slot's clips for ever, from `start` on."""
        damage: list[BadItem] = []
        barren: list[str] = []
        epoch = start.epoch
        while len(barren) < MAX_BARREN and len(set(barren)) < len(self.archives.shards):
            yield from self._read_epoch(epoch, start if epoch == start.epoch else Position(epoch), damage, barren)
            epoch += 1
        found = f"too few clips with records in {len(self.archives.shards)} archive(s)"
        raise UserError(
            f"{self.archives.name}: {found} for the {self.context.slots} streams of train.packs_per_step; lower it, or "
            "read the source with stream = false" + (f" [{damage[-1].message}]" if damage else "")
        )

    def _read_epoch(self, epoch: int, start: Position, damage: list[BadItem], barren: list[str]) -> Iterator[_Read]:
        """One epoch's. Keeps the `damage` not yet told and the archives without a clip for this slot, one after
        another."""
        shards, stride, offset = self._share(epoch)
        for number in range(start.shard, len(shards)):
            place, before = (start.place, start.clip) if number == start.shard else (0, 0)
            barren.append(shards[number])

            def is_mine(clip: int, before: int = before) -> bool:
                return (before + clip) % stride == offset

            try:
                found = self.archives.groups(shards[number], place, self.context.spool, is_mine)
                for clip, group in enumerate(found):
                    if is_mine(clip):
                        position = Position(epoch, number, group.place, before + clip)
                        if position[:3] == start[:3]:
                            position = start
                        barren.clear()
                        yield _Read(position, group, self._scan(group), damage[:])
                        damage.clear()
            except DamagedArchive as error:
                damage.append(BadItem(shards[number], shards[number], "archive", str(error)))

    def _share(self, epoch: int) -> tuple[list[str], int, int]:
        """This slot's shards in the order of the epoch, and of their clips every how manieth, from which on."""
        order = list(self.archives.shards)
        random.Random(f"shards:{self.context.seed}:{epoch}").shuffle(order)
        slots, count = self.context.slots, len(order)
        if count >= slots:
            return order[self.slot :: slots], 1, 0
        mine = self.slot % count
        return [order[mine]], len(range(mine, slots, count)), self.slot // count

    def _scan(self, group: Group) -> dict[Path, Future[MediaInfo]]:
        refs = [ref for s in group.samples for turn in s.turns for ref in turn.parts if isinstance(ref, MediaRef)]
        scans: dict[Path, Future[MediaInfo]] = {}
        for ref in refs:
            many = isinstance(ref.path, tuple)
            for path in ref.path if isinstance(ref.path, tuple) else (ref.path,):
                if path not in scans:
                    scans[path] = self.context.pool.submit(scan_file, "image" if many else ref.kind, path)
        return scans


def name_members(message: str, ref: MediaRef) -> str:
    """A message about a medium with its name in the archive in the place of the passing copy's."""
    paths = ref.path if isinstance(ref.path, tuple) else (ref.path,)
    for path in paths if ref.member else ():
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
