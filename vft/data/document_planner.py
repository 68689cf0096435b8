"""Conversations to planned documents: grouped by their media, the media fitted into a row, the groups cut into rows.

Every conversation is planned and encoded once, here. What remains of it is its length and cost, and the limits of its
media where they had to be shortened: token ids of millions of samples would not fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.types import Conversation, MediaInfo, MediaPlan, MediaRef, VisionLimits
from vft.config.data import DataConfig
from vft.data.budget import Candidate, Fit, PlannedMedia, fit, plan_conversation
from vft.data.chat import ChatEncoder
from vft.data.media.errors import MediaError
from vft.data.quarantine import BadItem
from vft.data.spans import check_spans
from vft.models.attention import attended_pairs, document_segments


@dataclass(frozen=True, slots=True)
class PlannedDocument:
    """A document before it is built: its conversations, and what planning found out about it."""

    conversations: tuple[Conversation, ...]
    """They share all their media."""
    num_tokens: int
    attended_pairs: int
    """Query-key pairs of a layer's attention."""
    num_patches: int
    weight: float
    """How often the document comes in an epoch."""
    media_limits: tuple[VisionLimits, ...] | None = None
    """Limits of the media if they had to be shortened to fit a row; None: those of the configuration and record."""

    @property
    def work(self) -> tuple[int, int, int]:
        """Tokens, attended pairs and vision patches: what the document costs."""
        return self.num_tokens, self.attended_pairs, self.num_patches


class DocumentPlanner:
    """Plans documents. `bad` and `num_shortened` count over all calls of `plan`."""

    def __init__(self, encoder: ChatEncoder, config: DataConfig, info: Callable[[MediaRef], MediaInfo]) -> None:
        self.encoder, self.config, self.info = encoder, config, info
        self.bad: list[BadItem] = []
        """Conversations that cannot be used."""
        self.num_shortened = 0
        """Samples whose media have fewer frames or pixels than their limits allow, so that they fit a row."""

    def plan(
        self, conversations: Sequence[tuple[Conversation, float]], show_progress: bool = False
    ) -> list[PlannedDocument]:
        """Documents of conversations with their weights; those about the same media come together."""
        groups: dict[object, list[tuple[Conversation, float]]] = {}
        parts = [(part, weight) for one, weight in conversations for part in self.encoder.split_for_learning(one)]
        for number, (one, weight) in enumerate(parts):
            key = (one.media_key, weight) if one.media and self.config.share_videos else number
            groups.setdefault(key, []).append((one, weight))
        documents = []
        with progress_bar(len(groups), "counting tokens", "document", show_progress) as bar:
            for group in groups.values():
                documents += self._plan_group([one for one, _ in group], group[0][1])
                bar.update()
        return documents

    def _plan_group(self, conversations: Sequence[Conversation], weight: float) -> list[PlannedDocument]:
        """Documents of conversations that have the same media; those with equal shareable prefixes may share one."""
        groups: dict[object, list[Candidate]] = {}
        for number, one in enumerate(filter(None, map(self._candidate, conversations))):
            prefix = one.text.shareable_prefix if self.config.share_videos else None
            groups.setdefault(number if prefix is None else prefix, []).append(one)
        return [
            document
            for group in groups.values()
            for fitted in self._fit_media(group)
            for document in self._cut_into_rows(fitted, weight)
        ]

    def _candidate(self, conversation: Conversation) -> Candidate | None:
        """None, and an entry in `bad`, if a medium is bad or the text cannot be used."""
        for ref in conversation.media:
            try:
                self.info(ref)
            except MediaError as error:
                self._reject(conversation, error.reason, f"{conversation.origin}: {ref.field}: {error}", ref)
                return None
        try:
            check_spans(conversation, self.info)
            return Candidate(conversation, self.encoder)
        except UserError as error:
            self._reject(conversation, "record", str(error))
            return None

    def _reject(self, conversation: Conversation, reason: str, message: str, ref: MediaRef | None = None) -> None:
        self.bad.append(BadItem(conversation.id, "" if ref is None else ref.name, reason, message))

    def _fit_media(self, candidates: Sequence[Candidate]) -> list[Fit]:
        """The candidates in groups that see the same frames.

        Each sees what it would see alone, unless `frames_for_sharing` allows fewer frames.
        """
        media: PlannedMedia | None = None
        for one in candidates:  # of the same media: all of them can be planned, or each gets a message of its own
            try:
                media = media or plan_conversation(one.conversation, self.encoder.processor, self.config, self.info)
            except UserError as error:
                self._reject(one.conversation, "unfit", str(error))
        if media is None:
            return []
        groups = self._trade_frames(self._fit_alone(candidates, media), media)
        self.num_shortened += sum(len(group.candidates) for group in groups if group.media.is_shortened)
        return groups

    def _fit_alone(self, candidates: Sequence[Candidate], media: PlannedMedia) -> list[Fit]:
        """Fit the media for each candidate by itself and group those whose plans come out equal."""
        if len(candidates) > 1:
            with suppress(UserError):  # the longest text may leave no room at all
                together = fit(candidates, media, self.encoder, self.config)
                if not together.media.is_shortened:  # most often
                    return [together]
        groups: dict[tuple[MediaPlan, ...], Fit] = {}
        for one in candidates:
            try:
                alone = fit([one], media, self.encoder, self.config)
            except UserError as error:
                self._reject(one.conversation, "unfit", str(error))
                continue
            same = groups.get(alone.media.plans)
            groups[alone.media.plans] = alone if same is None else same.joined_by(alone)
        return list(groups.values())

    def _trade_frames(self, groups: list[Fit], media: PlannedMedia) -> list[Fit]:
        """One group instead of several, with somewhat fewer frames, if `frames_for_sharing` allows that."""
        candidates = [one for group in groups for one in group.candidates]
        together = min(len(candidates), self.config.max_samples_per_pack or len(candidates))
        if together > 1 and self.config.frames_for_sharing:
            with suppress(UserError):
                fitted = fit(candidates, media, self.encoder, self.config, together)
                most = max(group.media.num_tokens for group in groups)
                if fitted.media.num_tokens >= (1 - self.config.frames_for_sharing) * most:
                    return [fitted]
        return groups

    def _cut_into_rows(self, group: Fit, weight: float) -> list[PlannedDocument]:
        """As few documents as fit `pack_tokens` and `max_samples_per_pack`, all with the same frames."""
        limit = self.config.max_samples_per_pack
        shared_text = group.encoded[0].prefix_tokens
        prefix = shared_text + sum(map(self.encoder.media_length, group.media.plans))
        patches = sum(math.prod(plan.grid_thw) for plan in group.media.plans)
        rows: list[tuple[list[Conversation], list[int]]] = []
        for one, encoded in zip(group.candidates, group.encoded, strict=True):
            suffix = encoded.text_tokens - shared_text
            is_full = not rows or 0 < limit <= len(rows[-1][0])
            if is_full or prefix + sum(rows[-1][1]) + suffix > self.config.pack_tokens:
                rows.append(([], []))
            rows[-1][0].append(one.conversation)
            rows[-1][1].append(suffix)
        return [
            PlannedDocument(
                conversations=tuple(conversations),
                num_tokens=prefix + sum(suffixes),
                attended_pairs=attended_pairs(document_segments(0, prefix, suffixes), causal=True),
                num_patches=patches,
                weight=weight,
                media_limits=group.media.limits if group.media.is_shortened else None,
            )
            for conversations, suffixes in rows
        ]
