"""Packs of a run, step by step: decoded ahead in worker processes, bad clips replaced, the cursor carried along."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from vft.data import vision
from vft.data.documents import BadItem, Documents
from vft.data.packing import Cursor, PackPlan, PackRef, collate, share_out, take_step
from vft.data.pool import WorkerPool
from vft.data.video import MediaError
from vft.types import Batch, Document, Patches

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
    last_of_step: bool
    cursor_after: Cursor
    epoch: int


@dataclass
class _Pending:
    """A pack whose media are being decoded."""

    place: _Place
    documents: list[tuple[int, Document, list[Future[Patches]]]]

    @property
    def pixel_bytes(self) -> int:
        return sum(patch_bytes(document) for _, document, _ in self.documents)


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
    known_bad: dict[str, BadItem] = field(default_factory=dict)
    """By path: what failed so far, in this run and before it was resumed."""
    new_bad: list[BadItem] = field(default_factory=list)
    """What this process has found since the list was last emptied."""

    def __post_init__(self) -> None:
        self.seek(Cursor(), [])

    def seek(self, cursor: Cursor, bad: Sequence[BadItem]) -> None:
        """Go on at `cursor`, knowing what was found bad before; nothing is read to skip."""
        self.cursor = self._planned = cursor
        self.known_bad = {item.path: item for item in bad}
        self._agreed = frozenset(self.known_bad)
        self._ahead: deque[_Place] = deque()
        self._pending: deque[_Pending] = deque()
        self.epoch = cursor.epoch
        """Epoch that the newest step ends in."""

    def step(self) -> Iterator[LoadedPack]:
        """This process's packs of the next step; take them all."""
        # Known to all processes alike: what one of them finds during the step counts from the next step on.
        self._agreed = frozenset(self.known_bad)
        while True:
            self._fill()
            pending = self._pending.popleft()
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
            pending = _Pending(place, [self._order(number) for number in place.pack.documents])
            waiting += pending.pixel_bytes
            self._pending.append(pending)

    def _plan_step(self) -> None:
        """This process's packs of one more step."""
        packs, after = take_step(self.plan, self._planned, self.packs_per_step, self.last_epoch)
        costs = [float(sum(self.plan.lengths[n] for n in pack.documents)) for pack in packs]
        # Of the whole step, so that it doesn't depend on which packs this process got.
        epoch = max((pack.epoch for pack in packs if pack.documents), default=self._planned.epoch)
        mine = share_out(packs, costs, self.ranks)[self.rank]
        self._ahead.extend(_Place(pack, pack is mine[-1], after, epoch) for pack in mine)
        self._planned = after

    def _order(self, number: int) -> tuple[int, Document, list[Future[Patches]]]:
        document = self.documents.build(number)
        if any(path_of(plan.ref.path) in self._agreed for plan in document.media):
            return number, document, []
        spec = self.documents.encoder.spec
        return number, document, [self.pool.submit(vision.load, plan, spec) for plan in document.media]

    def _finish(self, pending: _Pending) -> LoadedPack:
        ready = []
        for number, document, futures in pending.documents:
            good = self._decoded(document, futures)
            attempt = 0
            while good is None and attempt < MAX_REPLACEMENTS:
                other = self.plan.replacement(number, pending.place.pack.epoch, attempt)
                if other is None:
                    break
                _, document, futures = self._order(other)
                good = self._decoded(document, futures)
                attempt += 1
            if good is not None:
                ready.append((document, good))
        batch = collate(ready, self.documents.encoder.spec)
        return LoadedPack(batch, pending.place.pack.slot, _digest(pending.place.pack.slot, batch.sample_ids))

    def _decoded(self, document: Document, futures: list[Future[Patches]]) -> list[Patches] | None:
        """None where a medium failed; the first time that it did is put on record."""
        if any(path_of(plan.ref.path) in self._agreed for plan in document.media):
            return None
        patches, failed = [], False
        for plan, future in zip(document.media, futures, strict=True):
            try:
                patches.append(future.result())
            except MediaError as error:
                failed = True
                path = path_of(plan.ref.path)
                if path not in self.known_bad:
                    item = BadItem(document.sample_ids[0], path, error.reason, str(error))
                    self.known_bad[path] = item
                    self.new_bad.append(item)
        return None if failed else patches


def path_of(path: Path | tuple[Path, ...]) -> str:
    """The file that stands for a medium in records: of a list of pictures the first."""
    return str(path[0] if isinstance(path, tuple) else path)


def patch_bytes(document: Document) -> int:
    """Bytes of the document's patches once they are decoded."""
    return sum(plan.grid_thw[0] * plan.height * plan.width * 6 for plan in document.media)


def _digest(slot: int, sample_ids: tuple[str, ...]) -> int:
    content = hashlib.sha256(f"{slot}:{sample_ids}".encode()).digest()
    return int.from_bytes(content[:6], "little")
