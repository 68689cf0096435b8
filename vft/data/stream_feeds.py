"""The streaming sources of a run beside its index, and which of them fills which slot of a step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vft.common.errors import UserError
from vft.config.data import DataConfig
from vft.data.chat import ChatEncoder
from vft.data.dataset import MakeConversations
from vft.data.quarantine import BadItem, by_kind
from vft.data.streaming.reader import StreamContext, StreamSource, open_source
from vft.data.workers import WorkerPool

INDEX = -1
"""The feed that is no stream: documents of the index."""


@dataclass(frozen=True)
class Streams:
    """The streaming sources of a run, what is needed to read them, and how often the index comes beside them."""

    archives: Sequence[StreamSource]
    context: StreamContext
    index_weight: float
    by_share: bool = False
    """The weights are shares of the samples, not of the rows."""

    def feed_of(self, step: int, slot: int, tally: Sequence[int] = ()) -> int:
        """Number of the stream that fills a slot of a step, or INDEX: drawn by weight from (seed, step, slot).

        If the weights are shares, the draw is by how many samples each feed would lack after one more row. `tally` then
        holds the slot's rows so far and the samples in them by feed, the index first.
        """
        weights = [self.index_weight, *(one.weight for one in self.archives)]
        if tally:
            rows, *samples = tally
            total = sum(samples)
            after = total + (total / rows if total else 1.0)
            weights = [max(0.0, share * after - count) for share, count in zip(weights, samples, strict=True)]
        draw = random.Random(f"feed:{self.context.seed}:{step}:{slot}")
        return draw.choices(range(INDEX, len(self.archives)), weights)[0]

    @property
    def passes(self) -> int:
        """Passes through an archive that make up one epoch of all archives."""
        return sum(max(len(one.shards), self.context.slots) for one in self.archives)

    def nothing_in(self, name: str, bad: Sequence[BadItem], num_good: int) -> UserError:
        """The error that the source `name` has no document for a row, with what is wrong with the `bad` items found in
        it. It gave `num_good` good samples."""
        shards = sum(len(one.shards) for one in self.archives if one.name == name)
        warnings = [one.warning for one in self.archives if one.name == name and one.warning]
        why = by_kind(item for item in bad if item.source == name) or "; ".join(warnings)
        if why and not num_good:
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
    """The sources with `stream = true`, for `slots` rows a step; None if there are none."""
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
