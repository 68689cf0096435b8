"""Packs of a run, step by step: decoded ahead in worker processes, bad clips replaced, the cursor carried along.

Packs come from the index, from streams, or from both: which feed fills a slot of a step is drawn by weight, as a pure
function of (seed, step, slot).
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from vft.data.chat import ChatEncoder
from vft.data.documents import Documents, MakeConversations
from vft.data.frame_cache import NO_CACHE, FrameCache
from vft.data.media_error import MediaError
from vft.data.packing import Cursor, PackPlan, PackRef, collate, share_out, take_step
from vft.data.pool import WorkerPool
from vft.data.quarantine import BadItem
from vft.data.stream import (
    Archives,
    Position,
    SlotStream,
    Spooled,
    StreamContext,
    name_members,
    open_archives,
)
from vft.data_config import DataConfig
from vft.types import Batch, Document, Patches, UserError

MAX_PENDING_BYTES = 2 << 30
"""Decoded pixels that may wait for their turn, in each process."""
MAX_REPLACEMENTS = 100
"""Documents tried in the place of one that can't be decoded before its place is left empty."""


@dataclass(frozen=True, slots=True)
class LoadedPack:
    """A batch and its place in the step."""

    batch: Batch
    slot: int
    digest: int
    """Of its sample ids and its place; those of a step add up to the step's."""


@dataclass(frozen=True)
class _Place:
    """A pack of this process and the step that it belongs to."""

    pack: PackRef
    feed: int
    """Number of the stream that fills it; -1: the index."""
    last_of_step: bool
    cursor_after: Cursor
    epoch: int


@dataclass(frozen=True)
class _Ordered:
    """A document whose media are being decoded."""

    number: int
    """In the index; -1: out of a stream."""
    document: Document
    patches: list[Future[Patches]]
    clip: Spooled | None = None


@dataclass
class _Pending:
    """A pack whose media are being decoded."""

    place: _Place
    documents: list[_Ordered]
    bad: list[BadItem]
    after: Position | None
    """Where the pack's stream goes on."""

    @property
    def pixel_bytes(self) -> int:
        """What its documents will hold, at most."""
        return sum(patch_bytes(one.document) for one in self.documents)


@dataclass(frozen=True)
class Streams:
    """The archives of a run, what it takes to read them, and how often the index comes beside them."""

    archives: Sequence[Archives]
    context: StreamContext
    index_weight: float

    def feed_of(self, step: int, slot: int) -> int:
        """Which stream fills a slot of a step; -1: the index."""
        weights = [self.index_weight, *(one.weight for one in self.archives)]
        draw = random.Random(f"feed:{self.context.seed}:{step}:{slot}")
        return draw.choices(range(-1, len(self.archives)), weights)[0]


@contextmanager
def open_streams(
    config: DataConfig,
    make_conversations: MakeConversations,
    encoder: ChatEncoder,
    pool: WorkerPool,
    slots: int,
    seed: int,
) -> Iterator[Streams | None]:
    """The sources with `stream = true`, for `slots` rows a step; None where there are none."""
    streaming = [source for source in config.sources if source.stream]
    if not streaming:
        yield None
        return
    archives = [open_archives(source, config) for source in streaming]
    context = StreamContext(config, encoder, make_conversations, pool, slots, seed)
    try:
        yield Streams(archives, context, sum(source.of_rows for source in config.sources if not source.stream))
    finally:
        context.close()


@dataclass
class Loader:
    """This process's packs in order. `cursor` says where to go on once the packs taken so far are trained."""

    documents: Documents
    plan: PackPlan
    pool: WorkerPool
    ranks: int
    rank: int
    packs_per_step: int
    prefetch_packs: int
    last_epoch: int | None
    """None: go round for ever."""
    streams: Streams | None = None
    costs: Sequence[float] = ()
    """What each document costs, by which packs are shared out; empty: its tokens."""
    known_bad: dict[str, BadItem] = field(default_factory=dict)
    """By key: what failed so far, in this run and before it was resumed."""
    new_bad: list[BadItem] = field(default_factory=list)
    """What this process has found since the list was last emptied."""

    def __post_init__(self) -> None:
        self._frames = FrameCache.of(self.documents.config)
        self.seek(Cursor(), [])

    def seek(
        self, cursor: Cursor, bad: Sequence[BadItem], positions: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """Go on at `cursor` and where the streams stood, knowing what was found bad before; nothing is read to skip."""
        self.cursor = self._planned = cursor
        self.known_bad = {item.key: item for item in bad}
        self._agreed = frozenset(self.known_bad)
        self._ahead: deque[_Place] = deque()
        self._pending: deque[_Pending] = deque()
        self.epoch = cursor.epoch
        """Epoch that the newest step ends in."""
        self.positions = {
            name: Position(*values)
            for name, values in (positions or {}).items()
            if int(name.partition(":")[2]) % self.ranks == self.rank
        }
        """Of this process's streams: where each goes on once the packs taken so far are trained."""
        self._open: dict[str, SlotStream] = {}

    def state(self) -> dict[str, Any]:
        """What `restore` takes to go on after the packs taken so far, for JSON; `streams` are those of this process."""
        streams = {name: list(position) for name, position in self.positions.items()}
        bad = [asdict(item) for item in self.known_bad.values()]
        return {"cursor": asdict(self.cursor), "streams": streams, "bad": bad}

    def restore(self, state: Mapping[str, Any]) -> None:
        """`seek` to where `state` was taken; its `streams` may be those of all processes."""
        self.seek(Cursor(**state["cursor"]), [BadItem(**item) for item in state["bad"]], state["streams"])

    def step(self) -> Iterator[LoadedPack]:
        """This process's packs of the next step; take them all."""
        # Known to all processes alike: what one of them finds during the step counts from the next step on.
        self._agreed = frozenset(self.known_bad)
        while True:
            self._fill()
            pending = self._pending.popleft()
            if pending.after is not None:
                self.positions[_stream_name(pending.place)] = pending.after
            yield self._finish(pending)
            if pending.place.last_of_step:
                self.cursor, self.epoch = pending.place.cursor_after, pending.place.epoch
                return

    def _fill(self) -> None:
        """Hand out work for the packs ahead, within the bounds on packs and bytes."""
        waiting = sum(pending.pixel_bytes for pending in self._pending)
        while not self._pending or (len(self._pending) < self.prefetch_packs and waiting < MAX_PENDING_BYTES):
            if not self._ahead:
                self._plan_step()
            place = self._ahead.popleft()
            pending = self._order_pack(place)
            waiting += pending.pixel_bytes
            self._pending.append(pending)

    def _plan_step(self) -> None:
        """This process's packs of one more step."""
        slots = range(self.packs_per_step)
        step = self._planned.step
        feeds = [-1 if self.streams is None else self.streams.feed_of(step, slot) for slot in slots]
        indexed = [slot for slot in slots if feeds[slot] < 0]
        taken, after = take_step(self.plan, self._planned, len(indexed), self.last_epoch)
        packs = {slot: PackRef(pack.epoch, slot, pack.documents) for slot, pack in zip(indexed, taken, strict=True)}
        # Of the whole step, so that it doesn't depend on which packs this process got.
        epoch = max((pack.epoch for pack in taken if pack.documents), default=self._planned.epoch)
        everything = [packs.get(slot) or PackRef(epoch, slot, ()) for slot in slots]
        if self.streams is None:
            each = self.costs or self.plan.lengths
            costs = [float(sum(each[n] for n in pack.documents)) for pack in everything]
            mine = share_out(everything, costs, self.ranks)[self.rank]
        else:
            # A stream stays with one process; how long its next pack is, nobody knows.
            mine = everything[self.rank :: self.ranks]
        self._ahead.extend(_Place(pack, feeds[pack.slot], pack is mine[-1], after, epoch) for pack in mine)
        self._planned = after

    def _order_pack(self, place: _Place) -> _Pending:
        """Hand out the work of one pack."""
        if place.feed < 0:
            return _Pending(place, [self._order(number) for number in place.pack.documents], [], None)
        assert self.streams is not None
        name = _stream_name(place)
        if name not in self._open:
            archives, start = self.streams.archives[place.feed], self.positions.get(name, Position())
            self._open[name] = SlotStream(archives, place.pack.slot, self.streams.context, start)
        try:
            pack = self._open[name].next_pack()
        except UserError as error:
            error.on_one_rank = True
            raise
        ordered = [_Ordered(-1, one.document, self._decode(one.document, NO_CACHE), one.clip) for one in pack.documents]
        return _Pending(place, ordered, pack.bad, pack.after)

    def _order(self, number: int) -> _Ordered:
        document = self.documents.build(number)
        return _Ordered(number, document, self._decode(document, self._frames))

    def _decode(self, document: Document, frames: FrameCache) -> list[Future[Patches]]:
        if any(plan.ref.name in self._agreed for plan in document.media):
            return []
        spec = self.documents.encoder.spec
        return [frames.submit(self.pool, plan, spec) for plan in document.media]

    def _finish(self, pending: _Pending) -> LoadedPack:
        ready = []
        for item in pending.bad:
            self._note(item)
        for one in pending.documents:
            document, good = one.document, self._decoded(one)
            if one.clip is not None:
                one.clip.release()
            attempt = 0
            while good is None and attempt < MAX_REPLACEMENTS and one.number >= 0:
                other = self.plan.replacement(one.number, pending.place.pack.epoch, attempt)
                if other is None:
                    break
                instead = self._order(other)
                document, good = instead.document, self._decoded(instead)
                attempt += 1
            if good is not None:
                ready.append((document, good))
        batch = collate(ready, self.documents.encoder.spec)
        return LoadedPack(batch, pending.place.pack.slot, _digest(pending.place.pack.slot, batch.sample_ids))

    def _decoded(self, one: _Ordered) -> list[Patches] | None:
        """None where a medium failed; the first time that it did is put on record."""
        if any(plan.ref.name in self._agreed for plan in one.document.media):
            return None
        patches, failed = [], False
        for plan, future in zip(one.document.media, one.patches, strict=True):
            try:
                patches.append(future.result())
            except MediaError as error:
                failed = True
                message = name_members(str(error), plan.ref)
                self._note(BadItem(one.document.sample_ids[0], plan.ref.name, error.reason, message))
        return None if failed else patches

    def _note(self, item: BadItem) -> None:
        if item.key not in self.known_bad:
            self.known_bad[item.key] = item
            self.new_bad.append(item)


def _stream_name(place: _Place) -> str:
    return f"{place.feed}:{place.pack.slot}"


def patch_bytes(document: Document) -> int:
    """Bytes of the document's patches once they are decoded, at most: two frames a temporal patch."""
    return sum(plan.grid_thw[0] * plan.height * plan.width * 6 for plan in document.media)


def _digest(slot: int, sample_ids: tuple[str, ...]) -> int:
    content = hashlib.sha256(f"{slot}:{sample_ids}".encode()).digest()
    return int.from_bytes(content[:6], "little")
