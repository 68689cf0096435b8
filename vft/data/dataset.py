"""All the documents of a run: sources read, media looked up, videos shared, lengths known, nothing decoded yet."""

from __future__ import annotations

import hashlib
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise

from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.types import Conversation, Document, MediaInfo, MediaPlan, MediaRef, Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats as sources
from vft.data.budget import fit, plan_within
from vft.data.chat import ChatEncoder, Encoded
from vft.data.frame_times import with_frame_times
from vft.data.media.errors import MediaError
from vft.data.media.index import build
from vft.data.packing import PackPlan
from vft.data.quarantine import BadItem, check_bad
from vft.data.records.unread_keys import report_unread_keys
from vft.data.spans import check_spans
from vft.data.split import Split
from vft.distributed.process_group import environment
from vft.models.attention import attended_pairs, document_segments

MakeConversations = Callable[[Sample], Sequence[Conversation]]
Plans = tuple[MediaPlan, ...]
PlannedGroup = tuple[list[Conversation], Plans, int]


@dataclass
class Dataset:
    """What the documents of a run, or of one streamed clip, are made of, and how long each one is."""

    encoder: ChatEncoder
    config: DataConfig
    info: Callable[[MediaRef], MediaInfo]
    """What a scan of a medium found; MediaError where it can't be used."""
    members: list[tuple[Conversation, ...]] = field(default_factory=list)
    """The conversations of each document."""
    lengths: list[int] = field(default_factory=list)
    rooms: list[int] = field(default_factory=list)
    """Tokens that the media of each document were planned to fit into."""
    weights: list[float] = field(default_factory=list)
    work: list[tuple[int, int, int]] = field(default_factory=list)
    """Tokens, attended pairs and vision patches of each document: what it costs."""
    bad: list[BadItem] = field(default_factory=list)
    num_samples: int = 0
    num_shortened: int = 0
    """Samples whose media have fewer frames or pixels than their limits allow, so that they fit a row."""
    ends: list[int] = field(default_factory=list)
    """Numbers of the documents before which those of each source end, where these are kept apart."""

    @cached_property
    def _samples_by_medium(self) -> Counter[str]:
        return Counter(name for one in self.conversations for name in {ref.name for ref in one.media})

    @property
    def conversations(self) -> list[Conversation]:
        """Those of all documents, in order."""
        return [one for members in self.members for one in members]

    def samples_with(self, name: str) -> int:
        """How many samples show the medium of this name, all of which are lost where it fails."""
        return max(1, self._samples_by_medium[name])

    def build(self, number: int) -> Document:
        """Ids, labels, positions and media plans of one document: always the same ones."""
        conversations = self.members[number]
        plans = plan_within(self.rooms[number], conversations[0], self.encoder.processor, self.config, self.info)
        encoded = [self.encoder.encode(one, media=plans) for one in conversations]
        return self.encoder.document(encoded, plans, [one.id for one in conversations])

    def pack_plan(self, seed: int) -> PackPlan:
        """How these documents are laid out in packs."""
        return PackPlan(
            lengths=tuple(self.lengths),
            samples=tuple(len(conversations) for conversations in self.members),
            weights=tuple(self.weights),
            pack_tokens=self.config.pack_tokens,
            max_samples=self.config.max_samples_per_pack,
            seed=seed,
        )

    def weights_of(self, wanted: Sequence[SourceConfig]) -> list[float]:
        """How often each document comes in an epoch so that every source has its share of the samples, and the epoch
        as many of them as there are. UserError where a source has none."""
        own = [self.members[start:end] for start, end in pairwise((0, *self.ends))]
        counts = [sum(map(len, members)) for members in own]
        shares = [source.share or 0.0 for source in wanted]
        weights: list[float] = []
        for source, share, count, members in zip(wanted, shares, counts, own, strict=True):
            if not count:
                raise UserError(f"{source.path}: share = {share:g}, but it has no samples; take the source out")
            weights += [share / sum(shares) * sum(counts) / count] * len(members)
        return weights

    @property
    def digest(self) -> str:
        """Tells two data indexes apart: ids, texts, media (by name below `data.root` and what is taken of them)
        and lengths of all documents, wherever `data.root` lies."""
        content, root = hashlib.sha256(), os.path.realpath(self.config.root)
        for conversations, length in zip(self.members, self.lengths, strict=True):
            said = [(one.id, one.content(root), one.options) for one in conversations]
            content.update(f"{said}:{length};".encode(errors="replace"))
        return content.hexdigest()[:16]

    def add_all(self, conversations: Sequence[tuple[Conversation, float]], show_progress: bool) -> None:
        """Take in conversations with their weights, those about the same media together."""
        groups: dict[object, list[tuple[Conversation, float]]] = {}
        parts = [(part, weight) for one, weight in conversations for part in self.encoder.learnt_apart(one)]
        for number, (one, weight) in enumerate(parts):
            key = (one.media_key, weight) if one.media and self.config.share_videos else number
            groups.setdefault(key, []).append((one, weight))
        with progress_bar(len(groups), "counting tokens", "document", show_progress) as bar:
            for group in groups.values():
                self.add([one for one, _ in group], group[0][1])
                bar.update()

    def add(self, conversations: Sequence[Conversation], weight: float) -> None:
        """Take in conversations that have the same media: one document where they can share a trunk and fit."""
        good = [(one, encoded) for one in conversations if (encoded := self._try_encode(one)) is not None]
        groups: dict[object, list[Conversation]] = {}
        for number, (one, encoded) in enumerate(good):
            head = self.encoder.shareable_head(encoded) if self.config.share_videos else None
            groups.setdefault(number if head is None else head, []).append(one)
        for group in groups.values():
            for members, plans, room in self._plan_group(group):
                self._add_group(members, plans, room, weight)

    def _plan_group(self, conversations: Sequence[Conversation]) -> list[PlannedGroup]:
        """The conversations in groups that see the same frames, with their plans and the room that these fit into.

        Each sees what it would see alone, unless `frames_for_sharing` allows less.
        """
        free: Plans | None = None
        with suppress(UserError):  # told where they are planned one by one
            free = plan_within(sys.maxsize, conversations[0], self.encoder.processor, self.config, self.info)
        groups = self._trade_frames(self._plan_alone(conversations, free))
        self.num_shortened += sum(len(members) for members, plans, _ in groups if plans != free)
        return groups

    def _plan_alone(self, conversations: Sequence[Conversation], free: Plans | None) -> list[PlannedGroup]:
        """Groups of those whose plans are equal where each is planned by itself; `free` are plans without a limit."""
        if len(conversations) > 1:
            with suppress(UserError):  # the longest text may have no room at all
                plans, room = fit(conversations, self.encoder, self.config, self.info)
                if plans == free:  # most often: the row limits none of them
                    return [([*conversations], plans, room)]
        alone: dict[Plans, PlannedGroup] = {}
        for one in conversations:
            try:
                plans, room = fit([one], self.encoder, self.config, self.info)
            except UserError as error:
                self.reject(one, "unfit", str(error))
                continue
            alone.setdefault(plans, ([], plans, room))[0].append(one)
        return list(alone.values())

    def _trade_frames(self, groups: list[PlannedGroup]) -> list[PlannedGroup]:
        """One group in the place of several, with a few frames less, where `frames_for_sharing` allows that."""
        members = [one for group, _, _ in groups for one in group]
        together = min(len(members), self.config.max_samples_per_pack or len(members))
        if together > 1 and self.config.frames_for_sharing:
            with suppress(UserError):
                plans, room = fit(members, self.encoder, self.config, self.info, together=together)
                most = max(_vision_tokens(own) for _, own, _ in groups)
                if _vision_tokens(plans) >= (1 - self.config.frames_for_sharing) * most:
                    return [(members, plans, room)]
        return groups

    def _add_group(self, conversations: Sequence[Conversation], plans: Plans, room: int, weight: float) -> None:
        """As few documents as fit `pack_tokens` and `max_samples_per_pack`, all with the same frames."""
        encoded = [self.encoder.encode(one, media=plans) for one in conversations]
        shared = encoded[0].prefix_tokens
        trunk = shared + sum(len(self.encoder.media_tokens(plan)[0]) for plan in plans)
        patches = sum(math.prod(plan.grid_thw) for plan in plans)
        members: list[Conversation] = []
        texts: list[int] = []
        for one, text in zip(conversations, (one.text_tokens - shared for one in encoded), strict=True):
            full = 0 < self.config.max_samples_per_pack <= len(members)
            if members and (full or trunk + sum(texts) + text > self.config.pack_tokens):
                self._close(members, (trunk, texts, patches), room, weight)
                members, texts = [], []
            members.append(one)
            texts.append(text)
        if members:
            self._close(members, (trunk, texts, patches), room, weight)

    def _close(
        self, conversations: Sequence[Conversation], size: tuple[int, list[int], int], room: int, weight: float
    ) -> None:
        trunk, texts, patches = size
        tokens = trunk + sum(texts)
        pairs = attended_pairs(document_segments(0, trunk, texts), causal=True)
        self.members.append(tuple(conversations))
        self.lengths.append(tokens)
        self.work.append((tokens, pairs, patches))
        self.rooms.append(room)
        self.weights.append(weight)
        self.num_samples += len(conversations)

    def _try_encode(self, conversation: Conversation) -> Encoded | None:
        """None, and an entry in `bad`, where a medium is bad or the text can't be used."""
        for ref in conversation.media:
            try:
                self.info(ref)
            except MediaError as error:
                self.reject(conversation, error.reason, f"{conversation.origin}: {ref.field}: {error}", ref)
                return None
        try:
            check_spans(conversation, self.info)
            return self.encoder.encode(conversation)
        except UserError as error:
            self.reject(conversation, "record", str(error))
            return None

    def reject(self, conversation: Conversation, reason: str, message: str, ref: MediaRef | None = None) -> None:
        """Keep a conversation out of training, with its reason."""
        self.bad.append(BadItem(conversation.id, "" if ref is None else ref.name, reason, message))


def _vision_tokens(plans: Sequence[MediaPlan]) -> int:
    return sum(plan.num_tokens for plan in plans)


def load_dataset(
    config: DataConfig,
    wanted: Sequence[SourceConfig],
    make_conversations: MakeConversations,
    encoder: ChatEncoder,
    seed: int,
    split: Split | None = None,
) -> Dataset:
    """Read the sources, scan their media once and lay conversations of the same media together.

    With a `split` the samples of its side alone.

    UserError where more than `max_bad_fraction` of the samples can't be used: the first reasons and their counts.
    """
    read: list[tuple[int, Sample]] = []
    bad: list[BadItem] = []
    passed_over = 0
    for number, source in enumerate(wanted):
        samples, errors = sources.read(source, config)
        bad += [BadItem(error.origin, "", "record", str(error)) for error in errors]
        if environment().is_main:
            report_unread_keys(source.path, [sample.unread for sample in samples])
        chosen = take(samples, source.take, seed)
        passed_over += len(samples) - len(chosen)
        read += [(number, sample) for sample in chosen]
    if split is not None:
        sides, on_neither = split.select([sample for _, sample in read], config.root)
        if on_neither and environment().is_main:
            told = f"eval.split: {on_neither} records to train on show media of held-out ones too"
            print(f"{told}, and are left out", file=sys.stderr, flush=True)
        passed_over += sides.count(False)
        read = [one for one, is_ours in zip(read, sides, strict=True) if is_ours]
    conversations: list[list[tuple[Conversation, float]]] = [[] for _ in wanted]
    for number, sample in read:
        made, wrong = converse(sample, make_conversations, config)
        conversations[number] += [(one, wanted[number].times) for one in made]
        bad += wrong
    refs = [ref for of_source in conversations for one, _ in of_source for ref in one.media]
    index = build(refs, config.cache_path, config.workers, config.decode_timeout_s, config.index == "header")
    documents = Dataset(encoder, config, index.info, bad=bad)
    # Documents of sources that have a share of their own are theirs alone.
    has_shares = any(source.share is not None for source in wanted)
    for together in conversations if has_shares else [list(chain.from_iterable(conversations))]:
        documents.add_all(together, environment().is_main)
        documents.ends.append(len(documents.members))
    check_bad(documents.bad, documents.num_samples + len(documents.bad) + passed_over, config.max_bad_fraction)
    if wanted and not documents.members:
        if bad and (split is None or read):
            where = ", ".join(source.path for source in wanted)
            raise UserError(f"{where}: none of {len(bad)} samples can be used; the first: {bad[0].message}")
        raise UserError(_nothing_read(wanted, split, len(sides) if split is not None else 0))
    if has_shares:
        documents.weights = documents.weights_of(wanted)
    if documents.num_shortened and environment().is_main:
        count = f"{documents.num_shortened:,} of {documents.num_samples:,} samples"
        text = f"fewer frames or pixels than asked for, to fit data.pack_tokens = {config.pack_tokens}"
        where = ", ".join(source.path for source in wanted)
        print(f"{where}: {count} have {text}; tools/inspect_batch.py shows them", file=sys.stderr, flush=True)
    return documents


def _nothing_read(wanted: Sequence[SourceConfig], split: Split | None, of: int) -> str:
    paths = ", ".join(source.path for source in wanted)
    if split is None or not of:
        return f"{paths}: no samples; data.sources must name files with records"
    side = "is held out" if split.held_out else "is left to train on"
    return f"eval.split = {split.share:g}: none of {of} samples of {paths} {side}; change it, or name eval.sources"


def converse(
    sample: Sample, make_conversations: MakeConversations, config: DataConfig
) -> tuple[list[Conversation], list[BadItem]]:
    """The conversations that the task makes of a sample, or why it makes none."""
    try:
        made = list(make_conversations(sample))
    except UserError as error:
        return [], [BadItem(sample.id, "", "record", str(error))]
    return [with_frame_times(one) for one in made] if config.video.timestamps else made, []


def take(samples: Sequence[Sample], rule: str, seed: int) -> list[Sample]:
    """`all`, `first:N` or `random:N` of the samples, in their order."""
    kind, _, count = rule.partition(":")
    if kind == "all":
        return list(samples)
    if kind == "first":
        return list(samples[: int(count)])
    chosen = random.Random(f"take:{seed}").sample(range(len(samples)), min(int(count), len(samples)))
    return [samples[i] for i in sorted(chosen)]
