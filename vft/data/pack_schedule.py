"""Which packs of each step this process takes, and which feed fills them: the index, or one of the streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vft.data.packing import Cursor, PackPlan, PackRef, share_out, take_step
from vft.data.streaming.stream import INDEX, Streams
from vft.distributed.process_group import DataParallel

Positions = Mapping[str, tuple[int, ...]]
"""Where the streams of slots continue, by `FEED:SLOT`. With shares also each slot's next row of the index (`-1:SLOT`:
epoch and pack) and its tally (`share:SLOT`: rows, then samples by feed)."""


@dataclass(frozen=True)
class PlannedPack:
    """A pack of this process and the step that it belongs to."""

    pack: PackRef
    feed: int
    """Number of the stream that fills it, or INDEX."""
    is_last_of_step: bool
    cursor_after: Cursor
    epoch: int
    """Epoch in which the step ends."""
    positions_after: Positions = field(default_factory=dict)
    """With shares: where the slot stands once this pack is taken."""

    @property
    def stream_key(self) -> str:
        """Name of its stream among the positions."""
        return f"{self.feed}:{self.pack.slot}"


class PackSchedule:
    """The packs of this process in order, planned step by step ahead of the training."""

    def __init__(
        self,
        plan: PackPlan,
        parallel: DataParallel,
        packs_per_step: int,
        last_epoch: int | None,
        streams: Streams | None,
    ) -> None:
        """`last_epoch` None: no end."""
        self.plan, self.parallel, self.streams = plan, parallel, streams
        self.packs_per_step, self.last_epoch = packs_per_step, last_epoch
        self.costs: Sequence[float] = plan.lengths
        """What each document costs: the packs of a step are divided so that each rank has equally much to do."""
        self.by_share = streams is not None and streams.by_share
        self._cursor = Cursor()
        """The next step to plan."""
        self._slots: dict[str, tuple[int, ...]] = {}
        """With shares: the positions after the packs planned so far."""
        self._planned: deque[PlannedPack] = deque()

    def seek(self, cursor: Cursor, positions: Positions) -> None:
        """Continue at `cursor`, where the slots have these positions."""
        self._cursor, self._slots = cursor, dict(positions)
        self._planned.clear()

    def peek(self) -> PlannedPack:
        """The next pack. With shares it still has no feed: see `choose_feed`."""
        if not self._planned:
            self._planned.extend(self.plan_step())
        return self._planned[0]

    def advance(self) -> PlannedPack:
        """Take the next pack off the schedule."""
        return self._planned.popleft()

    def plan_step(self) -> list[PlannedPack]:
        """This process's packs of one more step."""
        slots, streams, cursor = range(self.packs_per_step), self.streams, self._cursor
        rank, ranks = self.parallel.rank, self.parallel.size
        feeds = dict.fromkeys(slots, INDEX)
        if self.by_share:  # feeds are chosen when the packs are begun, since they depend on what the slots had before
            after, epoch = replace(cursor, step=cursor.step + 1), 0
            own = [PackRef(0, slot, ()) for slot in slots[rank::ranks]]
        else:
            if streams is not None:
                feeds = {slot: streams.feed_of(cursor.step, slot) for slot in slots}
            indexed = [slot for slot in slots if feeds[slot] == INDEX]
            taken, after = take_step(self.plan, cursor, len(indexed), self.last_epoch)
            packs = {slot: replace(pack, slot=slot) for slot, pack in zip(indexed, taken, strict=True)}
            # The epoch of the whole step, so that it does not depend on which packs this process takes.
            epoch = max((pack.epoch for pack in taken if pack.documents), default=cursor.epoch)
            step = [packs.get(slot) or PackRef(epoch, slot, ()) for slot in slots]
            if streams is None:
                costs = [float(sum(self.costs[n] for n in pack.documents)) for pack in step]
                own = share_out(step, costs, ranks)[rank]
            else:  # a stream stays with one process, and nobody knows the length of its next pack
                own = step[rank::ranks]
        self._cursor = after
        return [PlannedPack(pack, feeds[pack.slot], pack is own[-1], after, epoch) for pack in own]

    def choose_feed(self, planned: PlannedPack) -> PlannedPack:
        """With shares: the pack with the feed that fills it, and if that is the index, with its documents. A slot takes
        rows of its own from the index, one in every `packs_per_step`."""
        assert self.streams is not None
        slot = planned.pack.slot
        feed = self.streams.feed_of(planned.cursor_after.step - 1, slot, self._tally(slot))
        if feed != INDEX:
            return replace(planned, feed=feed)
        epoch, pack = self.plan.place(*self._slots.get(f"{INDEX}:{slot}", (0, slot)))
        after = self.plan.place(epoch, pack + self.packs_per_step)
        documents = PackRef(epoch, slot, self.plan.packs(epoch)[pack])
        return replace(planned, feed=feed, pack=documents, positions_after={f"{INDEX}:{slot}": after})

    def count_samples(self, planned: PlannedPack, samples: int) -> PlannedPack:
        """With shares: add a pack of so many samples to its slot's tally; the pack with the positions after it."""
        slot = planned.pack.slot
        tally = list(self._tally(slot))
        tally[0] += 1
        tally[planned.feed + 2] += samples
        after = {**planned.positions_after, f"share:{slot}": tuple(tally)}
        self._slots |= after
        return replace(planned, positions_after=after)

    def _tally(self, slot: int) -> tuple[int, ...]:
        assert self.streams is not None
        return self._slots.get(f"share:{slot}", (0,) * (len(self.streams.archives) + 2))
