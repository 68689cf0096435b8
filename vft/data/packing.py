"""Documents to packed rows: which documents share a pack, which packs a step and a rank take, and the batch itself.

The sequence of packs is a pure function of (seed, epoch, lengths): every process computes it alone.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from typing import NamedTuple

import torch

from vft.common.types import IGNORE_INDEX, Batch, Document, Patches
from vft.models.attention import build_plan, document_segments
from vft.models.processor import VisionProcessor

OPEN_PACKS = 16
"""Packs that stay open while an epoch is laid out: more fill rows better, fewer keep the order closer to random."""


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Lays an epoch of documents out in packs of at most `pack_tokens` tokens and `max_samples` samples (0: any)."""

    lengths: tuple[int, ...]
    """Tokens of each document."""
    samples: tuple[int, ...]
    """Samples (suffixes) of each document."""
    weights: tuple[float, ...]
    """How often each document comes in an epoch: 2.0 twice, 0.5 in every second epoch."""
    pack_tokens: int
    max_samples: int
    seed: int

    def packs(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        """The packs of one epoch, each a tuple of document numbers."""
        return _epoch_packs(self, epoch)

    @property
    def first_packs(self) -> tuple[tuple[int, ...], ...]:
        """The packs of the first epoch that has any: with few documents of small weights some epochs are empty. None
        without documents."""
        if not any(self.weights):
            return ()
        return next(packs for epoch in count() if (packs := self.packs(epoch)))

    def place(self, epoch: int, pack: int) -> tuple[int, int]:
        """Epoch and number of the pack that is number `pack` counted from the start of `epoch`, maybe past its end."""
        while pack >= len(self.packs(epoch)):
            epoch, pack = epoch + 1, pack - len(self.packs(epoch))
        return epoch, pack

    def packs_left(self, cursor: Cursor, epochs: int) -> int:
        """Packs from `cursor` to the end of the run's `epochs` epochs."""
        return max(0, sum(_number_of_packs(self, epoch) for epoch in range(cursor.epoch, epochs)) - cursor.pack)

    def documents(self, epoch: int) -> list[int]:
        """Document numbers of one epoch in random order.

        A document of weight 1.3 comes once in every epoch, and again in 3 of 10, at even distances.
        """
        generator = random.Random(f"order:{self.seed}:{epoch}")
        # A run of an earlier version, which drew a number for each document first, must resume in the same order.
        for _ in self.weights:
            generator.random()
        order = []
        for number, (weight, phase) in enumerate(zip(self.weights, _phases(self), strict=True)):
            fraction = weight % 1
            extra = math.floor(fraction * (epoch + 1) + phase) - math.floor(fraction * epoch + phase) if fraction else 0
            order += [number] * (int(weight) + extra)
        generator.shuffle(order)
        return order

    def replacement(self, number: int, epoch: int, attempt: int) -> int | None:
        """A document no longer than `number` that takes its place, chosen by (seed, epoch, number, attempt) alone; None
        if there is none."""
        candidates = [i for i, n in enumerate(self.lengths) if n <= self.lengths[number] and i != number]
        candidates = [i for i in candidates if self.samples[i] <= self.samples[number]]
        if not candidates:
            return None
        return random.Random(f"replace:{self.seed}:{epoch}:{number}:{attempt}").choice(candidates)


@lru_cache(maxsize=3)
def _phases(plan: PackPlan) -> tuple[float, ...]:
    """The fraction of its period, from 0 to 1, with which each document starts.

    The phases of documents of one weight are spread evenly, in an order by the seed: so every epoch has as many of them
    as the weight says, and each comes as often as the others.
    """
    numbers = list(range(len(plan.weights)))
    random.Random(f"phase:{plan.seed}").shuffle(numbers)
    totals = Counter(plan.weights)
    counts: Counter[float] = Counter()
    phases = [0.0] * len(numbers)
    for number in numbers:
        weight = plan.weights[number]
        phases[number] = (counts[weight] + 0.5) / totals[weight]
        counts[weight] += 1
    return tuple(phases)


@cache
def _number_of_packs(plan: PackPlan, epoch: int) -> int:
    """Cached for all epochs, unlike their packs: a resumed run counts them twice."""
    return len(plan.packs(epoch))


@lru_cache(maxsize=3)
def _epoch_packs(plan: PackPlan, epoch: int) -> tuple[tuple[int, ...], ...]:
    """First fit over the open packs. If a document fits none of them, the fullest pack is closed for a new one.

    Millions of documents take seconds: parallel lists are faster here than one object for each open pack.
    """
    closed: list[tuple[int, ...]] = []
    tokens_left: list[int] = []
    samples_left: list[float] = []
    opened: list[list[int]] = []
    max_samples = plan.max_samples or math.inf

    def close(index: int) -> None:
        del tokens_left[index], samples_left[index]
        closed.append(tuple(opened.pop(index)))

    lengths, samples = plan.lengths, plan.samples
    for number in plan.documents(epoch):
        length, count = lengths[number], samples[number]
        for index, left in enumerate(tokens_left):
            if length <= left and count <= samples_left[index]:
                break
        else:
            if len(opened) == OPEN_PACKS:
                close(tokens_left.index(min(tokens_left)))
            index = len(opened)
            tokens_left.append(plan.pack_tokens)
            samples_left.append(max_samples)
            opened.append([])
        tokens_left[index] -= length
        samples_left[index] -= count
        opened[index].append(number)
        if samples_left[index] <= 0:
            close(index)  # it has as many samples as a pack may have
    return tuple(closed) + tuple(tuple(members) for members in opened)


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a run continues: the next pack of the index. With the positions of streams, the whole dataloader state."""

    epoch: int = 0
    pack: int = 0
    step: int = 0
    """Steps before it."""


class PackRef(NamedTuple):
    """One pack of a step. Empty packs fill up the last step."""

    epoch: int
    documents: tuple[int, ...] = ()


def take_step(
    plan: PackPlan, cursor: Cursor, packs_per_step: int, last_epoch: int | None
) -> tuple[list[PackRef], Cursor]:
    """The packs of the next step and the cursor after it. Past `last_epoch` (None: no end) packs are empty."""
    taken: list[PackRef] = []
    epoch, pack = cursor.epoch, cursor.pack
    for _ in range(packs_per_step):
        while (last_epoch is None or epoch <= last_epoch) and pack >= len(plan.packs(epoch)):
            epoch, pack = epoch + 1, 0
        is_over = last_epoch is not None and epoch > last_epoch
        taken.append(PackRef(epoch, () if is_over else plan.packs(epoch)[pack]))
        pack += not is_over
    return taken, Cursor(epoch, pack, cursor.step + 1)


def share_out(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The slots of each rank in a step whose packs have these costs, equally many for each: the most expensive packs
    first, to the rank with the least work."""
    each = len(costs) // ranks
    assert each * ranks == len(costs), f"{len(costs)} packs, {ranks} ranks"
    loads = [0.0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for slot in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(shares[r]) < each), key=lambda r: (loads[r], r))
        shares[rank].append(slot)
        loads[rank] += costs[slot]
    return [sorted(share) for share in shares]


def collate(documents: Sequence[tuple[Document, Sequence[Patches]]], processor: VisionProcessor) -> Batch:
    """One row of documents. Without documents it holds one token that is not supervised: a pack of weight zero."""
    members = [document for document, _ in documents]
    pixels = [torch.zeros(0, processor.patch_features, dtype=torch.uint8)]
    for document, patches in documents:
        grids = tuple(p.grid_thw for p in patches), tuple(m.grid_thw for m in document.media)
        assert grids[0] == grids[1], f"patches do not match their plan: {grids}"
        pixels += [p.pixels_PD for p in patches]
    rows, segments, targets, start = members or [Document.blank()], [], [], 0
    counts: list[int] = []  # supervised tokens of each suffix
    for document in rows:
        segments += document_segments(start, document.prefix_length, document.suffix_lengths)
        targets.append(_predicting_rows(document) + start)
        counts += [int((document.labels_T[rows] != IGNORE_INDEX).sum()) for rows in document.suffix_rows]
        start += document.num_tokens
    media = [plan for document in members for plan in document.media]
    labels_T = torch.cat([d.labels_T for d in rows])
    return Batch(
        input_ids_T=torch.cat([d.ids_T for d in rows]),
        positions_3T=torch.cat([d.positions_3T for d in rows], dim=1),
        plan=build_plan(segments, causal=True),
        target_index_N=torch.cat(targets),
        target_ids_N=labels_T[labels_T != IGNORE_INDEX],
        target_suffix_N=torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
        media_index_M=torch.cat([d.media_mask_T for d in rows]).nonzero().flatten(),
        pixels_PD=pixels[1] if len(pixels) == 2 else torch.cat(pixels),
        layout=processor.layout(media) if media else None,
        documents=tuple(members),
    )


def owners(documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token of a row the number of its document, and of its suffix there (-1 in a shared prefix), both [T].
    Empty if there are no documents."""
    parts = [
        (number, suffix, length)
        for number, document in enumerate(documents)
        for suffix, length in enumerate((document.prefix_length, *document.suffix_lengths), start=-1)
    ]
    document_S, suffix_S, length_S = torch.tensor(parts, dtype=torch.long).view(-1, 3).unbind(1)
    return document_S.repeat_interleave(length_S), suffix_S.repeat_interleave(length_S)


def _predicting_rows(document: Document) -> torch.Tensor:
    """The row before each supervised token; for a suffix's first token that is the last of the shared prefix."""
    before = torch.arange(document.num_tokens) - 1
    if document.prefix_length:
        before[[rows.start for rows in document.suffix_rows]] = document.prefix_length - 1
    rows = before[document.labels_T != IGNORE_INDEX]
    assert bool((rows >= 0).all()), f"{document.sample_ids}: the first token of a document can't be supervised"
    return rows
