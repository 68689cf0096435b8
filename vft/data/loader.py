"""Packs of a run, step by step: decoded ahead in worker processes, bad clips replaced, the cursor carried along.

Packs come from the index, from streams, or from both: which feed fills a slot of a step is drawn by weight, as a pure
function of (seed, step, slot). With shares of the samples it also depends on what the slot's rows held so far, because
nobody knows the samples of a row before it is made: each slot then takes its own rows of the index and keeps its own
count.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vft.common.errors import UserError
from vft.common.types import Batch, Document, Patches
from vft.config.data import DataConfig
from vft.data.chat import ChatEncoder
from vft.data.dataset import Dataset, MakeConversations
from vft.data.media.errors import MediaError
from vft.data.media.frame_cache import NO_CACHE, FrameCache
from vft.data.packing import Cursor, PackPlan, PackRef, collate, share_out, take_step
from vft.data.quarantine import ArchivePass, BadItem, Encountered, by_kind, check_bad_of_stream
from vft.data.streaming.clips import ArchiveClip, Position
from vft.data.streaming.reader import SearchStopped, StreamContext, StreamSource, open_source
from vft.data.streaming.stream import SlotStream, StreamedPack, name_members
from vft.data.workers import WorkerPool

MAX_PENDING_BYTES = 2 << 30
"""Decoded pixels that may wait for their turn, in each process."""
MAX_REPLACEMENTS = 100
"""Dataset tried in the place of one that can't be decoded before its place is left empty."""
MAX_KEPT = 10_000
"""Bad items of streams that are remembered one by one; further ones are counted alone. A stream has no end."""


@dataclass(frozen=True, slots=True)
class LoadedPack:
    """A batch and its place in the step."""

    batch: Batch
    slot: int
    digest: int
    """Of its sample ids and its place; those of a step add up to the step's."""
    is_missing: bool = False
    """A signal came before there was anything to put into it: the step does not count."""


@dataclass
class Found:
    """What a process has met besides good documents since it was last asked."""

    bad: list[BadItem] = field(default_factory=list)
    """Items of streams each time they are met, those of the index once."""
    archives: list[ArchivePass] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Lines for the user."""
    exhausted: list[str] = field(default_factory=list)
    """Paths of streaming sources that have no document for a row."""

    def __len__(self) -> int:
        return len(self.bad) + len(self.archives) + len(self.notes) + len(self.exhausted)


@dataclass(frozen=True)
class _Place:
    """A pack of this process and the step that it belongs to."""

    pack: PackRef
    feed: int
    """Number of the stream that fills it; -1: the index."""
    last_of_step: bool
    cursor_after: Cursor
    epoch: int
    at: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """With shares: where the slot stands after it, by the names in `Loader.positions`."""


@dataclass(frozen=True)
class _Ordered:
    """A document whose media are being decoded."""

    number: int
    """In the index; -1: out of a stream."""
    document: Document
    patches: list[Future[Patches]]
    clip: ArchiveClip | None = None
    source: str = ""
    """That it streams out of."""


@dataclass
class _Pending:
    """A pack whose media are being decoded."""

    place: _Place
    documents: list[_Ordered]
    streamed: StreamedPack | None = None
    """What it was made of, where it comes out of a stream."""

    @property
    def pixel_bytes(self) -> int:
        """What its documents will hold, at most."""
        return sum(patch_bytes(one.document) for one in self.documents)

    @property
    def found_nothing(self) -> bool:
        """Whether its stream has looked for documents in vain."""
        return self.streamed is not None and not self.documents


@dataclass(frozen=True)
class Streams:
    """The archives of a run, what it takes to read them, and how often the index comes beside them."""

    archives: Sequence[StreamSource]
    context: StreamContext
    index_weight: float
    by_share: bool = False
    """Weights are shares of the samples rather than of the rows."""

    def feed_of(self, step: int, slot: int, tally: Sequence[int] = ()) -> int:
        """Which stream fills a slot of a step; -1: the index.

        It is drawn by the weights, or where these are shares by how many samples each feed would lack after one more
        row: `tally` is the slot's rows so far and the samples in them of each feed, the index first.
        """
        weights = [self.index_weight, *(one.weight for one in self.archives)]
        if tally:
            rows, *samples = tally
            total = sum(samples)
            after = total + (total / rows if total else 1.0)
            weights = [max(0.0, share * after - count) for share, count in zip(weights, samples, strict=True)]
        draw = random.Random(f"feed:{self.context.seed}:{step}:{slot}")
        return draw.choices(range(-1, len(self.archives)), weights)[0]

    @property
    def passes(self) -> int:
        """Reads of an archive that make up an epoch of all of them."""
        return sum(max(len(one.shards), self.context.slots) for one in self.archives)

    def nothing_in(self, name: str, bad: Sequence[BadItem], given: int) -> UserError:
        """Why the source `name` has no document for a row: what is wrong with all that was met in it, of which `given`
        samples were good."""
        shards = sum(len(one.shards) for one in self.archives if one.name == name)
        warnings = [one.warning for one in self.archives if one.name == name and one.warning]
        why = by_kind(item for item in bad if item.source == name) or "; ".join(warnings)
        if why and not given:
            return UserError(f"{name}: no clip met in {shards} archive(s) can be trained on: {why}")
        return UserError(
            f"{name}: too few clips with records in {shards} archive(s) for the {self.context.slots} streams of "
            "train.packs_per_step; lower it, or read the source with stream = false" + (f" [{why}]" if why else "")
        )


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
    if not config.streamed:
        yield None
        return
    archives = [open_source(source, config) for source in config.streamed]
    context = StreamContext(config, encoder, make_conversations, pool, slots, seed)
    try:
        index_weight = sum(source.of_rows for source in config.indexed)
        yield Streams(archives, context, index_weight, by_share=config.streamed[0].share is not None)
    finally:
        context.close()


@dataclass
class Loader:
    """This process's packs in order. `cursor` says where to go on once the packs taken so far are trained."""

    documents: Dataset
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
    known_bad: dict[tuple[str, str], BadItem] = field(default_factory=dict)
    """By key: what failed so far, in this run and before it was resumed."""
    seen: Encountered = field(default_factory=Encountered)
    """Of the streams of all processes."""
    found: Found = field(default_factory=Found)
    """By this process; hand those of all to `learn`."""

    def __post_init__(self) -> None:
        self._frames = FrameCache.of(self.documents.config)
        self.seek(Cursor(), [])

    def seek(
        self, cursor: Cursor, bad: Sequence[BadItem], positions: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """Go on at `cursor` and where the streams stood, knowing what was found bad before; nothing is read to skip."""
        self.cursor = self._planned = cursor
        self.known_bad = {item.key: item for item in bad}
        self.given: Counter[str] = Counter()
        """Good samples out of each source that streams, in this process."""
        self._agreed = frozenset(self.known_bad)
        self._ahead: deque[_Place] = deque()
        self._pending: deque[_Pending] = deque()
        self.epoch = cursor.epoch
        """Epoch that the newest step ends in."""
        self.positions: dict[str, tuple[int, ...]] = {
            name: tuple(values)
            for name, values in (positions or {}).items()
            if int(name.partition(":")[2]) % self.ranks == self.rank
        }
        """Of this process's streams (`FEED:SLOT`): where each goes on once the packs taken so far are trained. With
        shares also each slot's next row of the index, an epoch and a pack (`-1:SLOT`), and its tally (`share:SLOT`)."""
        self._slots = dict(self.positions)
        self._open: dict[str, SlotStream] = {}
        self._before = dict(self.positions)

    def state(self) -> dict[str, Any]:
        """What `restore` takes to go on after the packs taken so far, for JSON; `streams` are those of this process."""
        streams = {name: list(position) for name, position in self.positions.items()}
        bad = [asdict(item) for item in self.known_bad.values()]
        seen = {} if self.streams is None else {"seen": asdict(self.seen)}
        return {"cursor": asdict(self.cursor), "streams": streams, "bad": bad, **seen}

    def restore(self, state: Mapping[str, Any]) -> None:
        """`seek` to where `state` was taken; its `streams` may be those of all processes."""
        self.seek(Cursor(**state["cursor"]), [BadItem(**item) for item in state["bad"]], state["streams"])
        self.seen = Encountered(**state.get("seen", {}))

    def leave_step(self) -> None:
        """`state` is again that before the step that was begun; the loader is of no use afterwards."""
        self.positions = self._before

    def learn(self, found: Sequence[Found]) -> list[BadItem]:
        """What all processes have found becomes known to this one, each calling it with the same; the new bad items."""
        fresh = []
        for item in (item for one in found for item in one.bad):
            is_new = item.key not in self.known_bad
            if is_new and (not item.source or len(self.known_bad) < MAX_KEPT):
                self.known_bad[item.key] = item
                fresh.append(item)
        for one in found:
            self.seen.add(one.bad, one.archives)
        self.found = Found()
        return fresh

    def check_streams(self, trained: int, limit: float) -> None:
        """UserError where more than `limit` of what streams gave, of which `trained` samples were good, is bad."""
        assert self.streams is not None
        if self.known_bad:
            first = next(iter(self.known_bad.values()))
            check_bad_of_stream(self.seen, first, trained, self.streams.passes, limit)

    def step(self) -> Iterator[LoadedPack]:
        """This process's packs of the next step; take them all."""
        # Known to all processes alike: what one of them finds during the step counts from the next step on.
        self._agreed = frozenset(self.known_bad)
        self._before = dict(self.positions)
        while True:
            try:
                self._fill()
            except SearchStopped:
                place = self._ahead.popleft()
                yield LoadedPack(collate([], self.documents.encoder.processor), place.pack.slot, 0, is_missing=True)
                if place.last_of_step:
                    return
                continue
            pending = self._pending.popleft()
            self.positions |= pending.place.at
            if pending.streamed is not None:
                self.positions[_stream_name(pending.place)] = pending.streamed.after
                self._look_at(pending.place, pending.streamed)
            yield self._finish(pending)
            if pending.place.last_of_step:
                self.cursor, self.epoch = pending.place.cursor_after, pending.place.epoch
                return

    def _fill(self) -> None:
        """Hand out work for the packs ahead, within the bounds on packs and bytes.

        SearchStopped where the run is to stop and there is none.
        """
        waiting = sum(pending.pixel_bytes for pending in self._pending)
        while not self._pending or (len(self._pending) < self.prefetch_packs and waiting < MAX_PENDING_BYTES):
            if self._pending and self._pending[-1].found_nothing:
                return  # first what is there: it may be the end of the run
            if not self._ahead:
                self._plan_step()
            try:
                pending = self._order_pack(self._ahead[0])
            except SearchStopped:
                if self._pending:
                    return
                raise
            self._ahead.popleft()
            waiting += pending.pixel_bytes
            self._pending.append(pending)

    def _plan_step(self) -> None:
        """This process's packs of one more step."""
        slots = range(self.packs_per_step)
        step = self._planned.step
        if self.streams is not None and self.streams.by_share:
            # Filled when their turn comes.
            own = [PackRef(0, slot, ()) for slot in slots[self.rank :: self.ranks]]
            after = replace(self._planned, step=step + 1)
            self._ahead.extend(_Place(pack, -1, pack is own[-1], after, 0) for pack in own)
            self._planned = after
            return
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
        by_share = self.streams is not None and self.streams.by_share
        if by_share:
            place = self._choose_feed(place)
        if place.feed < 0:
            pending = _Pending(place, [self._order(number) for number in place.pack.documents])
        else:
            pending = self._order_streamed(place)
        if by_share:
            tally = list(self._tally(place.pack.slot))
            tally[0] += 1
            tally[place.feed + 2] += sum(len(one.document.sample_ids) for one in pending.documents)
            at = {**place.at, f"share:{place.pack.slot}": tuple(tally)}
            self._slots |= at
            pending.place = replace(place, at=at)
        return pending

    def _tally(self, slot: int) -> tuple[int, ...]:
        assert self.streams is not None
        return self._slots.get(f"share:{slot}", (0,) * (len(self.streams.archives) + 2))

    def _choose_feed(self, place: _Place) -> _Place:
        """The place with the feed that fills it, and if that is the index its documents: the slot's own rows of it, one
        in every `packs_per_step`."""
        assert self.streams is not None
        slot = place.pack.slot
        feed = self.streams.feed_of(place.cursor_after.step - 1, slot, self._tally(slot))
        if feed >= 0:
            return replace(place, feed=feed)
        epoch, pack = self.plan.place(*self._slots.get(f"-1:{slot}", (0, slot)))
        after = self.plan.place(epoch, pack + self.packs_per_step)
        documents = PackRef(epoch, slot, self.plan.packs(epoch)[pack])
        return replace(place, feed=feed, pack=documents, at={f"-1:{slot}": after})

    def _order_streamed(self, place: _Place) -> _Pending:
        assert self.streams is not None
        name = _stream_name(place)
        if name not in self._open:
            archives, start = self.streams.archives[place.feed], Position(*self.positions.get(name, ()))
            self._open[name] = SlotStream(archives, place.pack.slot, self.streams.context, start)
        try:
            pack = self._open[name].next_pack()
        except UserError as error:
            error.on_one_rank = True
            raise
        source = self.streams.archives[place.feed].name
        ordered = [
            _Ordered(-1, one.document, self._decode(one.document, NO_CACHE, source), one.clip, source)
            for one in pack.documents
        ]
        return _Pending(place, ordered, pack)

    def _look_at(self, place: _Place, pack: StreamedPack) -> None:
        """Keep what a stream has met on the way to a pack."""
        assert self.streams is not None
        source, found = self.streams.archives[place.feed].name, self.found
        found.bad += pack.bad
        found.archives += pack.archives
        self.given[source] += sum(len(one.document.sample_ids) for one in pack.documents)
        if pack.exhausted:
            found.exhausted.append(source)
        elif pack.searched and not pack.documents:
            last = f", the last: {pack.bad[-1].message}" if pack.bad else ""
            found.notes.append(
                f"{source}: no document in many clips or archives one behind another, row {place.pack.slot + 1} of "
                f"this step stays empty{last}; the search goes on"
            )

    def _order(self, number: int) -> _Ordered:
        document = self.documents.build(number)
        return _Ordered(number, document, self._decode(document, self._frames))

    def _decode(self, document: Document, frames: FrameCache, source: str = "") -> list[Future[Patches]]:
        if any((source, plan.ref.name) in self._agreed for plan in document.media):
            return []
        processor = self.documents.encoder.processor
        return [frames.submit(self.pool, plan, processor) for plan in document.media]

    def _finish(self, pending: _Pending) -> LoadedPack:
        ready = []
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
        batch = collate(ready, self.documents.encoder.processor)
        return LoadedPack(batch, pending.place.pack.slot, _digest(pending.place.pack.slot, batch.sample_ids))

    def _decoded(self, one: _Ordered) -> list[Patches] | None:
        """None where a medium failed; that it did is put on record, of the index once."""
        samples = len(one.document.sample_ids)
        for plan in one.document.media:
            known = self.known_bad.get((one.source, plan.ref.name))
            if known is not None and known.key in self._agreed:
                if one.source:  # its samples come again in every epoch, as do the good ones
                    self.found.bad.append(replace(known, samples=samples))
                return None
        failed: list[BadItem] = []
        patches = []
        for plan, future in zip(one.document.media, one.patches, strict=True):
            try:
                patches.append(future.result())
            except MediaError as error:
                message, name = name_members(str(error), plan.ref), plan.ref.name
                count = samples if one.source else self.documents.samples_with(name)
                # Of several media the first one's trouble counts the samples.
                failed.append(
                    BadItem(one.document.sample_ids[0], name, error.reason, message, 0 if failed else count, one.source)
                )
        told = {item.key for item in self.found.bad}
        self.found.bad += (item for item in failed if one.source or item.key not in told | self.known_bad.keys())
        return None if failed else patches


def _stream_name(place: _Place) -> str:
    return f"{place.feed}:{place.pack.slot}"


def patch_bytes(document: Document) -> int:
    """Bytes of the document's patches once they are decoded, at most: two frames a temporal patch."""
    return sum(plan.grid_thw[0] * plan.height * plan.width * 6 for plan in document.media)


def _digest(slot: int, sample_ids: tuple[str, ...]) -> int:
    content = hashlib.sha256(f"{slot}:{sample_ids}".encode()).digest()
    return int.from_bytes(content[:6], "little")
