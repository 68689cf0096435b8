"""The packs of a run, step by step: decoded ahead in worker processes, with the state from which a run resumes.

Packs come from the index, from streams, or from both: which feed fills a slot of a step is drawn by weight, as a pure
function of (seed, step, slot). With shares of the samples the draw also depends on what the slot's rows held so far,
because nobody knows the samples of a streamed row before it is made: each slot then takes its own rows of the index and
keeps its own count.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vft.common.errors import UserError
from vft.common.types import Batch
from vft.data.dataset import Dataset
from vft.data.decoding import Decoder, PendingDocument
from vft.data.pack_schedule import PackSchedule, PlannedPack
from vft.data.packing import Cursor, PackPlan, collate
from vft.data.quarantine import BadItem, BadItemLog, Encountered, LoadReport, check_bad_of_stream
from vft.data.streaming.archives import Position
from vft.data.streaming.stream import INDEX, SearchStopped, SlotStream, StreamedPack, Streams
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel

MAX_PENDING_BYTES = 2 << 30
"""Decoded pixels that may wait for their turn, in each process."""


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
class _PendingPack:
    """A pack whose media are being decoded."""

    planned: PlannedPack
    documents: list[PendingDocument]
    streamed: StreamedPack | None = None
    """What it was made of, if it comes out of a stream."""

    @property
    def pixel_bytes(self) -> int:
        """What its documents will hold, at most."""
        return sum(pending.pixel_bytes for pending in self.documents)

    @property
    def is_fruitless(self) -> bool:
        """Whether its stream searched for documents in vain."""
        return self.streamed is not None and not self.documents


class Loader:
    """This process's packs in order. `state` says where to continue once the packs taken so far are trained on."""

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
    ) -> None:
        """`last_epoch` None: no end."""
        self.dataset, self.streams, self.prefetch_packs = dataset, streams, prefetch_packs
        self.schedule = PackSchedule(plan, parallel, packs_per_step, last_epoch, streams)
        self.bad = BadItemLog()
        self.decoder = Decoder(dataset, plan, pool, self.bad)
        self.cursor = Cursor()
        """Where the index continues once the steps taken so far are trained on."""
        self.epoch = 0
        """Epoch in which the newest step ends."""
        self.positions: dict[str, tuple[int, ...]] = {}
        """Where this process's streams continue (`pack_schedule.Positions`)."""
        self.num_streamed: Counter[str] = Counter()
        """Good samples out of each streaming source, in this process."""
        self._positions_before: dict[str, tuple[int, ...]] = {}
        self._slot_streams: dict[str, SlotStream] = {}
        self._pending: deque[_PendingPack] = deque()

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
        self.cursor = Cursor(**state["cursor"])
        self.epoch = self.cursor.epoch
        rank, ranks = self.schedule.parallel.rank, self.schedule.parallel.size
        self.positions = {
            name: tuple(values)
            for name, values in state["streams"].items()
            if int(name.partition(":")[2]) % ranks == rank
        }
        self.schedule.seek(self.cursor, self.positions)
        self.bad.restore((BadItem(**item) for item in state["bad"]), Encountered(**state.get("seen", {})))

    def abandon_step(self) -> None:
        """Make `state` again that before the step that was begun. The loader is of no use afterwards."""
        self.positions = self._positions_before

    # ---------------------------------------------------------------------------------------------------- the packs

    def step(self) -> Iterator[LoadedPack]:
        """This process's packs of the next step. Take them all."""
        self.bad.begin_step()
        self._positions_before = dict(self.positions)
        is_last = False
        while not is_last:
            try:
                self._prefetch()
            except SearchStopped:
                planned = self.schedule.advance()
                yield LoadedPack(collate([], self.dataset.encoder.processor), planned.pack.slot, 0, is_missing=True)
                is_last = planned.is_last_of_step
                continue
            pending = self._pending.popleft()
            planned, streamed = pending.planned, pending.streamed
            self.positions |= planned.positions_after
            if streamed is not None:
                self.positions[planned.stream_key] = streamed.after
                self._report(planned, streamed)
            batch = self.decoder.finish(pending.documents, planned.pack.epoch)
            yield LoadedPack(batch, planned.pack.slot, _digest(planned.pack.slot, batch.sample_ids))
            is_last = planned.is_last_of_step
            if is_last:
                self.cursor, self.epoch = planned.cursor_after, planned.epoch

    def _prefetch(self) -> None:
        """Begin packs ahead, within the bounds on packs and bytes.

        SearchStopped if the run is to stop and no pack is pending.
        """
        waiting_bytes = sum(pending.pixel_bytes for pending in self._pending)
        while not self._pending or (len(self._pending) < self.prefetch_packs and waiting_bytes < MAX_PENDING_BYTES):
            if self._pending and self._pending[-1].is_fruitless:
                return  # the pack before may be the end of the run
            try:
                pending = self._begin(self.schedule.peek())
            except SearchStopped:
                if self._pending:
                    return
                raise
            self.schedule.advance()
            waiting_bytes += pending.pixel_bytes
            self._pending.append(pending)

    def _begin(self, planned: PlannedPack) -> _PendingPack:
        """Start decoding the documents of a pack."""
        streamed = None
        if self.schedule.by_share:
            planned = self.schedule.choose_feed(planned)
        if planned.feed == INDEX:
            documents = [self.decoder.begin(number) for number in planned.pack.documents]
        else:
            streamed = self._next_streamed(planned)
            source = self._source(planned)
            documents = [self.decoder.begin_streamed(document, source) for document in streamed.documents]
        if self.schedule.by_share:
            planned = self.schedule.count_samples(planned, sum(len(one.document.sample_ids) for one in documents))
        return _PendingPack(planned, documents, streamed)

    def _source(self, planned: PlannedPack) -> str:
        assert self.streams is not None
        return self.streams.archives[planned.feed].name

    def _next_streamed(self, planned: PlannedPack) -> StreamedPack:
        assert self.streams is not None
        key = planned.stream_key
        if key not in self._slot_streams:
            archives, start = self.streams.archives[planned.feed], Position(*self.positions.get(key, ()))
            self._slot_streams[key] = SlotStream(archives, planned.pack.slot, self.streams, start)
        try:
            return self._slot_streams[key].next_pack()
        except UserError as error:
            error.on_one_rank = True
            raise

    # ------------------------------------------------------------------------------------------------ what is bad

    @property
    def report(self) -> LoadReport:
        """What this process has met since the last `merge_reports`."""
        return self.bad.report

    @property
    def known_bad(self) -> list[BadItem]:
        """Everything that is known to be bad, in all processes."""
        return list(self.bad.known.values())

    def merge_reports(self, reports: Sequence[LoadReport]) -> list[BadItem]:
        """Make the reports of all processes known to this one; the new bad items. Every process calls it."""
        return self.bad.merge(reports)

    def check_streams(self, trained: int, limit: float) -> None:
        """UserError if more than `limit` of what streams gave, of which `trained` samples were good, is bad."""
        assert self.streams is not None
        if self.bad.known:
            first = next(iter(self.bad.known.values()))
            check_bad_of_stream(self.bad.encountered, first, trained, self.streams.passes, limit)

    def _report(self, planned: PlannedPack, pack: StreamedPack) -> None:
        """Report what a stream has met on the way to a pack."""
        source, report = self._source(planned), self.bad.report
        report.bad += pack.bad
        report.archives += pack.archives
        self.num_streamed[source] += sum(len(one.document.sample_ids) for one in pack.documents)
        if pack.exhausted:
            report.exhausted.append(source)
        elif pack.searched and not pack.documents:
            last = f", the last: {pack.bad[-1].message}" if pack.bad else ""
            report.notes.append(
                f"{source}: no document in many clips or archives one behind another, row {planned.pack.slot + 1} of "
                f"this step stays empty{last}; the search goes on"
            )


def _digest(slot: int, sample_ids: tuple[str, ...]) -> int:
    content = hashlib.sha256(f"{slot}:{sample_ids}".encode()).digest()
    return int.from_bytes(content[:6], "little")
