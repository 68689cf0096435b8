"""Encoded conversations to documents: media in place of their placeholders, a shared prefix with its suffixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vft.common.types import IGNORE_INDEX, Document, MediaPlan
from vft.models.processor import VisionProcessor

Tensors = tuple[torch.Tensor, ...]
"""ids [T], labels [T], media mask [T], positions [3, T] of a part of a document."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as token ids and labels, media still one placeholder each."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    media_rows: tuple[int, ...]
    """Where each medium's placeholder begins. A template may put the media of one turn in another order."""
    leads: tuple[str, ...] = ()
    """Text before the media that depends on their plans; () if these were not known."""

    @property
    def text_tokens(self) -> int:
        """Tokens that are not a medium's placeholder (each is one token in every family so far)."""
        return len(self.ids) - len(self.media_rows)

    @property
    def prefix_tokens(self) -> int:
        """Text tokens up to the one after the last medium: those that suffixes may share."""
        return max(self.media_rows) + 2 - len(self.media_rows) if self.media_rows else 0

    @property
    def shareable_prefix(self) -> tuple[int, ...] | None:
        """The ids up to the token after the last medium. Conversations about the same media can share them if theirs
        are equal.

        None if something in it is supervised, or if nothing stands before or after it: a question or an answer before
        its video cannot share it.
        """
        end = max(self.media_rows) + 2 if self.media_rows else 0
        if not 0 < end < len(self.ids) or set(self.labels[:end]) != {IGNORE_INDEX}:
            return None
        return self.ids[:end]

    def in_row_order(self, media: Sequence[MediaPlan]) -> list[tuple[int, MediaPlan]]:
        """The media of the conversation with their rows, as they stand in the row."""
        return sorted(zip(self.media_rows, media, strict=True), key=lambda pair: pair[0])

    def with_last_answer(self) -> Encoded:
        """With labels for the last answer only: earlier answers are part of the question."""
        start = max(i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)
        while start and self.labels[start - 1] != IGNORE_INDEX:
            start -= 1
        labels = (IGNORE_INDEX,) * start + self.labels[start:]
        return Encoded(self.ids, labels, self.media_rows, self.leads)


class DocumentLayout:
    """Lays out documents by a family's rules."""

    def __init__(self, processor: VisionProcessor, ids_of: Callable[[str], Sequence[int]]) -> None:
        """`ids_of` tokenizes the text between vision embeddings."""
        self.processor, self._ids_of = processor, ids_of

    def media_length(self, plan: MediaPlan) -> int:
        """Tokens that replace a medium's placeholder: vision embeddings and the text between them."""
        return sum(
            len(self._ids_of(piece)) if isinstance(piece, str) else piece for piece in self.processor.expand(plan)
        )

    def document(self, encoded: Sequence[Encoded], media: Sequence[MediaPlan], sample_ids: Sequence[str]) -> Document:
        """One document of conversations that share all their media. Several of them need equal shareable prefixes."""
        wholes = [self._expand(one, media) for one in encoded]
        length = 0
        if len(wholes) > 1:
            prefixes = {one.shareable_prefix for one in encoded}
            assert len(prefixes) == 1 and None not in prefixes, "these conversations share no prefix"
            length = int(wholes[0][2].nonzero()[-1]) + 2
        suffixes = [tuple(x[..., length:] for x in whole) for whole in wholes]
        in_order = [plan for _, plan in encoded[0].in_row_order(media)]
        return _join(tuple(x[..., :length] for x in wholes[0]), suffixes, in_order, sample_ids)

    def options(self, encoded: Sequence[Encoded], media: Sequence[MediaPlan], options: Sequence[str]) -> Document:
        """One document of a prompt answered by each of `options`; the conversations are labelled in that answer only.

        The shared prefix is all that they have in common except for its last token, which begins each suffix and
        predicts its first label.
        """
        common = min(next(i for i, label in enumerate(one.labels) if label != IGNORE_INDEX) for one in encoded)
        while any(one.ids[:common] != encoded[0].ids[:common] for one in encoded):
            common -= 1  # a token that straddles the answer's start differs from option to option
        # The media's tokens are laid out once, for the longest; the positions after them are the same for all.
        longest = max(encoded, key=lambda one: len(one.ids))
        whole = self._expand(longest, media)
        length = common - 1 + len(whole[0]) - len(longest.ids)
        suffixes = []
        for one in encoded:
            ids, labels = torch.tensor(one.ids[common - 1 :]), torch.tensor(one.labels[common - 1 :])
            mask_T, positions_3T = whole[2][length:], whole[3][:, length:]
            suffixes.append((ids, labels, mask_T[: len(ids)], positions_3T[:, : len(ids)]))
        ids_T, labels_T, mask_T, positions_3T = (x[..., :length] for x in whole)
        prefix = ids_T, torch.full_like(labels_T, IGNORE_INDEX), mask_T, positions_3T
        return _join(prefix, suffixes, [plan for _, plan in longest.in_row_order(media)], options)

    def _expand(self, one: Encoded, media: Sequence[MediaPlan]) -> Tensors:
        """The whole conversation with every placeholder replaced."""
        leads = tuple(self.processor.lead(plan) for plan in media)
        assert "".join(leads) == "".join(one.leads), f"encoded with {one.leads}, planned with {leads}"
        ids: list[int] = []
        labels: list[int] = []
        mask: list[bool] = []
        runs = []
        row = 0
        for start, plan in one.in_row_order(media):
            ids += one.ids[row:start]
            labels += one.labels[row:start]
            mask += [False] * (start - row)
            (mark,) = self.processor.placeholder(plan.ref.kind)
            run_starts: list[int] = []
            for piece in self.processor.expand(plan):
                is_vision = not isinstance(piece, str)
                new = self._ids_of(piece) if isinstance(piece, str) else [mark] * piece
                if is_vision and not (run_starts and mask[-1]):
                    run_starts.append(len(ids))
                ids += new
                labels += [IGNORE_INDEX] * len(new)
                mask += [is_vision] * len(new)
            runs.append((run_starts, plan))
            row = start + 1
        ids += one.ids[row:]
        labels += one.labels[row:]
        mask += [False] * (len(one.ids) - row)
        positions_3T = self.processor.positions(len(ids), runs)
        return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask), positions_3T


def _join(
    prefix: Tensors, suffixes: Sequence[Tensors], media: Sequence[MediaPlan], sample_ids: Sequence[str]
) -> Document:
    """A document of a shared prefix, which may be empty, and its suffixes."""
    ids, labels, mask, positions = (torch.cat(parts, dim=-1) for parts in zip(prefix, *suffixes, strict=True))
    return Document(
        sample_ids=tuple(sample_ids),
        ids_T=ids,
        labels_T=labels,
        positions_3T=positions,
        prefix_length=prefix[0].numel(),
        suffix_lengths=tuple(suffix[0].numel() for suffix in suffixes),
        media=tuple(media),
        media_mask_T=mask,
    )
