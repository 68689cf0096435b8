"""The packs of a run, step by step: decoded ahead in worker processes, with the state from which a run resumes.

While a pack is trained on, a thread makes the next one: it builds documents, waits for their frames, joins them to one
row and copies that to the device. What the rest of the program sees changes when a pack is taken, not before.

Packs come from the index, from streams, or from both: which feed fills a slot of a step is drawn by weight, as a pure
function of (seed, step, slot). With shares of the samples the draw also depends on what the slot's rows held so far,
because nobody knows the samples of a streamed row before it is made: each slot then takes its own rows of the index and
keeps its own count.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from vft.common.errors import UserError
from vft.common.types import Batch, Document, Patches, each_tensor
from vft.data.dataset import Dataset
from vft.data.media.errors import MediaError
from vft.data.media.frame_cache import NO_CACHE, FrameCache
from vft.data.packing import Cursor, PackPlan, PackRef, collate, share_out, take_step
from vft.data.quarantine import BadItem, BadItemLog, Encountered
from vft.data.streaming.archives import ArchiveClip, Position
from vft.data.streaming.stream import INDEX, SearchStopped, SlotStream, StreamedPack, Streams, name_members
from vft.data.workers import MORE_SHARED_MEMORY, SHARED_MEMORY, WorkerPool, shared_memory_bytes
from vft.distributed.process_group import DataParallel, local_world_size
from vft.distributed.signals import SIGNALS

T = TypeVar("T")
MAX_PENDING_BYTES = 2 << 30
"""Decoded pixels that may wait for their turn, in each process."""
MAX_REPLACEMENTS = 100
"""Documents tried in place of one that cannot be decoded before its place is left empty."""

Positions = dict[str, tuple[int, ...]]
"""Where the streams of slots continue, by `FEED:SLOT`. With shares also each slot's next row of the index (`-1:SLOT`:
epoch and pack) and its tally (`share:SLOT`: rows, then samples by feed)."""


@dataclass(frozen=True, slots=True)
class LoadedPack:
    """A batch and its place in the step."""

    batch: Batch
    slot: int
    digest: int
    """Of the slot and the batch's sample ids; the sum over a step's packs is the step's digest."""
    is_missing: bool = False
    """A signal came before there was anything to put into it: the step does not count."""


@dataclass(frozen=True)
class PlannedPack:
    """A pack of this process and the step that it belongs to. With shares it has neither documents nor feed yet."""

    slot: int
    pack: PackRef
    feed: int
    """Number of the stream that fills it, or INDEX."""
    is_last_of_step: bool
    cursor_after: Cursor
    epoch: int
    """Epoch in which the step ends."""


@dataclass(frozen=True)
class PendingDocument:
    """A document whose media are being decoded."""

    document: Document
    patches: list[Future[Patches]]
    """None if a medium is known to be bad."""
    number: int | None = None
    """In the index; None: out of a stream."""
    clip: ArchiveClip | None = None
    source: str = ""
    """The streaming source that it comes from."""


@dataclass(frozen=True)
class _PendingPack:
    """A pack whose media are being decoded."""

    planned: PlannedPack
    epoch: int
    """Of its documents in the index."""
    documents: list[PendingDocument]
    positions_after: Positions
    """Where its slot stands once it is taken, as far as this pack has moved it."""
    streamed: StreamedPack | None
    """What it was made of, if it comes out of a stream."""
    source: str

    @property
    def pixel_bytes(self) -> int:
        """Bytes of its patches once they are decoded, at most: two frames a temporal patch."""
        media = [plan for pending in self.documents for plan in pending.document.media]
        return sum(plan.grid_thw[0] * plan.height * plan.width * 6 for plan in media)


@dataclass(frozen=True)
class _ReadyPack:
    """A pack that can be taken."""

    batch: Batch
    """On the device, or on its way there."""
    arrives: torch.cuda.Event | None
    """When it is there; None on a CPU."""
    failed: list[list[BadItem]]
    """What could not be decoded, by document."""
    agreed: frozenset[tuple[str, str]]
    """What was known to be bad when it was made."""


class Loader:
    """This process's packs in order, on the device. `state` says where to continue once those taken so far are trained
    on."""

    def __init__(
        self,
        dataset: Dataset,
        plan: PackPlan,
        pool: WorkerPool,
        parallel: DataParallel,
        packs_per_step: int,
        prefetch_packs: int,
        last_epoch: int | None,
        streams: Streams | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`last_epoch` None: no end. `device` None: the CPU."""
        self.dataset, self.plan, self.pool, self.parallel, self.streams = dataset, plan, pool, parallel, streams
        self.packs_per_step, self.prefetch_packs, self.last_epoch = packs_per_step, prefetch_packs, last_epoch
        self.costs: Sequence[float] = plan.lengths
        """What each document costs: the packs of a step are divided so that each rank has equally much to do."""
        self.bad = BadItemLog()
        self.cursor = Cursor()
        """Where the index continues once the steps taken so far are trained on."""
        self.epoch = 0
        """Epoch in which the newest step ends."""
        self.positions: Positions = {}
        """Where this process's streams continue."""
        self.num_streamed: Counter[str] = Counter()
        """Good samples out of each streaming source, in this process."""
        self._by_share = streams is not None and streams.by_share
        self._frames = FrameCache.of(dataset.config)
        self._max_pending_bytes = self._pending_limit()
        self._before: tuple[Positions, Cursor, int] = {}, self.cursor, self.epoch
        """`positions`, `cursor` and `epoch` when the step began."""
        self._copies = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None
        self._device = device or torch.device("cpu")
        self._next: Future[_ReadyPack] | None = None
        """The pack that the thread makes. While it does, nothing below may be touched."""
        self._slot_streams: dict[str, SlotStream] = {}
        self._next_step = Cursor()
        """The next step to plan."""
        self._planned: deque[PlannedPack] = deque()
        self._positions_ahead: Positions = {}
        """`positions` after the packs begun so far."""
        self._pending: deque[_PendingPack] = deque()

    def _pending_limit(self) -> int:
        """Bytes of decoded pixels that may wait besides the row that is made: what shared memory holds.

        Raises UserError if it does not even hold the largest row of each process of this host.
        """
        free = shared_memory_bytes() if self.pool.workers else None
        if free is None:
            return MAX_PENDING_BYTES
        patches = [work.patches for work in self.dataset.work]
        largest = max((sum(patches[n] for n in pack) for pack in self.plan.first_packs), default=0)
        row_bytes, processes = largest * self.dataset.encoder.processor.patch_features, local_world_size()
        if row_bytes * processes > free:
            raise UserError(
                f"{SHARED_MEMORY} has {free:,} bytes free; the frames of the largest row take {row_bytes:,} for each "
                f"of {processes} processes: {MORE_SHARED_MEMORY}",
                on_one_rank=True,
            )
        return min(MAX_PENDING_BYTES, free // processes - row_bytes)

    # ------------------------------------------------------------------------------------------ state of the loader

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue after the packs taken so far, for JSON; `streams` are those of this
        process."""
        streams = {name: list(position) for name, position in self.positions.items()}
        bad = [asdict(item) for item in self.bad.known.values()]
        seen = {} if self.streams is None else {"seen": asdict(self.bad.encountered)}
        return {"cursor": asdict(self.cursor), "streams": streams, "bad": bad, **seen}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; nothing is read to skip. Its `streams` may be those of all processes."""
        assert not self._pending, "a loader is restored before its first step"
        self.cursor = self._next_step = Cursor(**state["cursor"])
        self.epoch = self.cursor.epoch
        self.positions = {
            name: tuple(values)
            for name, values in state["streams"].items()
            if int(name.partition(":")[2]) % self.parallel.size == self.parallel.rank
        }
        self._positions_ahead = dict(self.positions)
        self.bad.restore((BadItem(**item) for item in state["bad"]), Encountered(**state.get("seen", {})))

    def abandon_step(self) -> None:
        """Make `state` again that before the step that was begun. The loader is of no use afterwards."""
        self.positions, self.cursor, self.epoch = self._before

    # ---------------------------------------------------------------------------------------------------- the packs

    def step(self, is_last: bool = False) -> Iterator[LoadedPack]:
        """This process's packs of the next step. Take them all. After the last step of a run nothing more is made."""
        self.bad.begin_step()
        self._before = dict(self.positions), self.cursor, self.epoch
        planned = None
        while planned is None or not planned.is_last_of_step:
            ready = self._ready()
            pending = None if ready is None else self._pending.popleft()
            planned = self._planned.popleft() if pending is None else pending.planned
            if ready is None or pending is None:
                empty = collate([], self.dataset.encoder.processor).to(self._device)
                pack = LoadedPack(empty, planned.slot, 0, is_missing=True)
            else:
                self._note(pending, ready)
                pack = LoadedPack(ready.batch, planned.slot, _digest(planned.slot, ready.batch.sample_ids))
                if planned.is_last_of_step:
                    self.cursor, self.epoch = planned.cursor_after, planned.epoch
            if not (is_last and planned.is_last_of_step):
                self._next = _in_thread(self._make)
            yield pack

    def _ready(self) -> _ReadyPack | None:
        """The next pack, which is the first of `_pending`; None if the run is to stop and there is none."""
        making = self._next or _in_thread(self._make)
        try:
            ready = making.result()
        except SearchStopped:
            return None
        finally:
            self._next = None
        if ready.agreed != self.bad.agreed_keys:  # since then a step has ended that found bad clips
            ready = self._finish(self._pending[0])
        if self._copies is not None and ready.arrives is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready.arrives)
            each_tensor(ready.batch, lambda tensor: tensor.record_stream(stream))  # its memory is the other stream's
        return ready

    def _note(self, pending: _PendingPack, ready: _ReadyPack) -> None:
        """The pack is taken: what came to light on the way to it counts from here on."""
        self.positions |= pending.positions_after
        if pending.streamed is not None:
            self._report(pending.planned.slot, pending.source, pending.streamed)
        for items in ready.failed:
            self.bad.add(items)
        for one in pending.documents:
            if one.clip is not None:
                one.clip.release()

    # -------------------------------------------------------------------------------------------------- in the thread

    def _make(self) -> _ReadyPack:
        """Begin packs ahead, and finish the first of them. SearchStopped as `_prefetch` raises it."""
        self._prefetch()
        return self._finish(self._pending[0])

    def _finish(self, pending: _PendingPack) -> _ReadyPack:
        """Wait for the media of a pack, and copy it to the device."""
        agreed = self.bad.agreed_keys
        failed: list[list[BadItem]] = []
        decoded = [self._decoded(one, pending.epoch, failed) for one in pending.documents]
        batch = collate([one for one in decoded if one is not None], self.dataset.encoder.processor)
        if self._copies is None:
            return _ReadyPack(batch.to(self._device), None, failed, agreed)
        with torch.cuda.stream(self._copies):
            return _ReadyPack(batch.to(self._device), self._copies.record_event(), failed, agreed)

    def plan_step(self) -> list[PlannedPack]:
        """This process's packs of one more step."""
        slots, streams, cursor = range(self.packs_per_step), self.streams, self._next_step
        rank, ranks = self.parallel.rank, self.parallel.size
        own: Sequence[int] = slots[rank::ranks]  # a stream stays with one process
        feeds = dict.fromkeys(slots, INDEX)
        packs = dict.fromkeys(slots, PackRef(0))
        if self._by_share:  # feeds are chosen when the packs are begun, since they depend on what the slots had before
            after, epoch = replace(cursor, step=cursor.step + 1), 0
        else:
            if streams is not None:
                feeds = {slot: streams.feed_of(cursor.step, slot) for slot in slots}
            indexed = [slot for slot in slots if feeds[slot] == INDEX]
            taken, after = take_step(self.plan, cursor, len(indexed), self.last_epoch)
            # The epoch of the whole step, so that it does not depend on which packs this process takes.
            epoch = max((pack.epoch for pack in taken if pack.documents), default=cursor.epoch)
            packs |= zip(indexed, taken, strict=True)
            if streams is None:  # otherwise nobody knows the lengths of all packs
                costs = [float(sum(self.costs[n] for n in pack.documents)) for pack in taken]
                own = share_out(costs, ranks)[rank]
        self._next_step = after
        return [PlannedPack(slot, packs[slot], feeds[slot], slot == own[-1], after, epoch) for slot in own]

    def _prefetch(self) -> None:
        """Begin packs ahead, within the bounds on packs and bytes.

        SearchStopped if the run is to stop and no pack is pending.
        """
        waiting_bytes = sum(pending.pixel_bytes for pending in self._pending)
        while not self._pending or (
            len(self._pending) < self.prefetch_packs and waiting_bytes < self._max_pending_bytes
        ):
            if self._pending and self._pending[-1].streamed is not None and not self._pending[-1].documents:
                return  # a stream searched in vain: the pack before may be the end of the run
            if not self._planned:
                self._planned += self.plan_step()
            try:
                pending = self._begin(self._planned[0])
            except SearchStopped:
                if self._pending:
                    return
                raise
            self._planned.popleft()
            waiting_bytes += pending.pixel_bytes
            self._pending.append(pending)

    def _begin(self, planned: PlannedPack) -> _PendingPack:
        """Start decoding the documents of a pack."""
        pack, feed, slot, streamed, source = planned.pack, planned.feed, planned.slot, None, ""
        after: Positions = {}
        tally: list[int] = []
        if self._by_share:
            assert self.streams is not None
            tally = [*self._positions_ahead.get(f"share:{slot}", (0,) * (len(self.streams.archives) + 2))]
            feed = self.streams.feed_of(planned.cursor_after.step - 1, slot, tally)
            if feed == INDEX:  # a slot takes rows of its own from the index, one in every `packs_per_step`
                epoch, number = self.plan.place(*self._positions_ahead.get(f"{INDEX}:{slot}", (0, slot)))
                after[f"{INDEX}:{slot}"] = self.plan.place(epoch, number + self.packs_per_step)
                pack = PackRef(epoch, self.plan.packs(epoch)[number])
        if feed == INDEX:
            documents = [self._start(self.dataset.build(number), number) for number in pack.documents]
        else:
            assert self.streams is not None
            streamed, source = self._next_streamed(feed, slot), self.streams.archives[feed].name
            documents = [self._start(one.document, None, one.clip, source) for one in streamed.documents]
        if tally:
            tally[0] += 1
            tally[feed + 2] += sum(len(one.document.sample_ids) for one in documents)
            after[f"share:{slot}"] = tuple(tally)
        if streamed is not None:
            after[f"{feed}:{slot}"] = streamed.after
        self._positions_ahead |= after
        return _PendingPack(planned, pack.epoch, documents, after, streamed, source)

    def _next_streamed(self, feed: int, slot: int) -> StreamedPack:
        assert self.streams is not None
        key = f"{feed}:{slot}"
        if key not in self._slot_streams:
            start = Position(*self.positions.get(key, ()))
            self._slot_streams[key] = SlotStream(self.streams.archives[feed], slot, self.streams, start)
        try:
            return self._slot_streams[key].next_pack()
        except UserError as error:
            error.on_one_rank = True
            raise

    def _report(self, slot: int, source: str, pack: StreamedPack) -> None:
        """Report what a stream has met on the way to a pack."""
        report = self.bad.report
        report.bad += pack.bad
        report.archives += pack.archives
        self.num_streamed[source] += sum(len(one.document.sample_ids) for one in pack.documents)
        if pack.exhausted:
            report.exhausted.append(source)
        elif pack.searched and not pack.documents:
            last = f", the last: {pack.bad[-1].message}" if pack.bad else ""
            report.notes.append(
                f"{source}: no document in many clips or archives one behind another, row {slot + 1} of "
                f"this step stays empty{last}; the search goes on"
            )

    # ----------------------------------------------------------------------------------------------------- decoding

    def _start(
        self, document: Document, number: int | None = None, clip: ArchiveClip | None = None, source: str = ""
    ) -> PendingDocument:
        """Start decoding the media of a document, unless one is known to be bad."""
        document.number = number
        frames, processor = NO_CACHE if number is None else self._frames, self.dataset.encoder.processor
        patches = []
        if self.bad.agreed(document, source) is None:
            patches = [frames.submit(self.pool, plan, processor) for plan in document.media]
        return PendingDocument(document, patches, number, clip, source)

    def _decoded(
        self, pending: PendingDocument, epoch: int, failed: list[list[BadItem]]
    ) -> tuple[Document, list[Patches]] | None:
        """Wait for a document. One of the index that cannot be decoded is replaced by another that is no longer, chosen
        by the plan. What could not be decoded is added to `failed`."""
        patches = self._wait(pending, failed)
        if patches is None and pending.number is not None:
            for attempt in range(MAX_REPLACEMENTS):
                other = self.plan.replacement(pending.number, epoch, attempt)
                if other is None:
                    return None
                replacement = self._start(self.dataset.build(other), other)
                if (patches := self._wait(replacement, failed)) is not None:
                    return replacement.document, patches
        return None if patches is None else (pending.document, patches)

    def _wait(self, pending: PendingDocument, all_failed: list[list[BadItem]]) -> list[Patches] | None:
        """None, and an entry in `all_failed`, if a medium cannot be decoded."""
        document, source = pending.document, pending.source
        num_samples = len(document.sample_ids)
        if (known := self.bad.agreed(document, source)) is not None:
            if source:  # only what streams meet again counts again, as do their good samples
                all_failed.append([replace(known, samples=num_samples)])
            return None
        failed: list[BadItem] = []
        patches = []
        for plan, future in zip(document.media, pending.patches, strict=True):
            try:
                patches.append(future.result())
            except MediaError as error:
                name = plan.ref.name
                lost = num_samples if source else max(1, self.dataset.samples_by_medium[name])
                # If several media fail, the samples are counted with the first one.
                samples, message = 0 if failed else lost, name_members(str(error), plan.ref)
                failed.append(BadItem(document.sample_ids[0], name, error.reason, message, samples, source))
        all_failed.append(failed)
        return None if failed else patches


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread of its own, in which no signal arrives: Python handles them in the main thread.

    Nobody has to wait for it: when the worker pool and the streams are closed, what it waits for fails.
    """
    future: Future[T] = Future()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="vft-next-pack").start()
    return future


def _digest(slot: int, sample_ids: tuple[str, ...]) -> int:
    content = hashlib.sha256(f"{slot}:{sample_ids}".encode()).digest()
    return int.from_bytes(content[:6], "little")
