"""All documents of a run: sources read, media looked up, videos shared, lengths known. Nothing is decoded yet.

Every conversation is planned and encoded once, here: grouped by its media, the media fitted into a row, the groups cut
into rows. What remains of it is its length and cost, and the limits of its media where they had to be shortened: token
ids of millions of samples would not fit in memory.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.types import Conversation, Document, MediaInfo, MediaPlan, MediaRef, Sample, Turn, VisionLimits
from vft.config.data import DataConfig, SourceConfig, source_names
from vft.data import formats as sources
from vft.data.budget import Fit, PlannedMedia, check_spans, fit, limits_of, plan_conversation
from vft.data.chat import ChatEncoder
from vft.data.media.errors import MediaError
from vft.data.media.index import Index, StoredIndex, build
from vft.data.media.timed_text import with_frame_times
from vft.data.packing import PackPlan
from vft.data.quarantine import BadItem, check_bad
from vft.data.records.preferences import REJECTED
from vft.data.records.unread_keys import describe_unread_keys, log_once
from vft.data.split import Split
from vft.data.workers import WorkerPool
from vft.distributed.process_group import environment
from vft.models.attention import attended_pairs, document_segments

logger = logging.getLogger(__name__)

MakeConversations = Callable[[Sample], Sequence[Conversation]]
MAX_OTHERS = 1000
"""Conversations among which an answer to another prompt is looked for."""


class Work(NamedTuple):
    """What a document costs."""

    tokens: int
    pairs: int
    """Query-key pairs of a layer's attention."""
    patches: int
    """Vision patches."""
    keys: int
    """Rows of keys that its segments attend: those of a shared prefix count once for each suffix."""


@dataclass(frozen=True, slots=True)
class PlannedDocument:
    """A document before it is built: its conversations, and what planning found out about it."""

    conversations: tuple[Conversation, ...]
    """They share all their media."""
    work: Work
    weight: float
    """How often the document comes in an epoch."""
    media_limits: tuple[VisionLimits, ...] | None = None
    """Limits of the media if they had to be shortened to fit a row; None: those of the configuration and record."""


class Dataset:
    """The documents of a run, or of one streamed clip, planned and ready to be built."""

    def __init__(self, encoder: ChatEncoder, config: DataConfig, info: Callable[[MediaRef], MediaInfo]) -> None:
        """`info` is what a scan of a medium found; it raises MediaError if the medium cannot be used."""
        self.encoder, self.config, self.info = encoder, config, info
        self.documents: Sequence[PlannedDocument] = []
        self.bad: list[BadItem] = []
        """Samples that cannot be used."""
        self.num_shortened = 0
        """Samples whose media have fewer frames or pixels than their limits allow, so that they fit a row."""

        self.num_paired: dict[str, int] = {}
        """Records with a rejected answer beside the chosen one, by the path of their source."""
        self.index: Index | StoredIndex | None = None
        """The scans behind `info`, if there is an index."""
        self.notes: list[str] = []
        """What to tell the user about the records, a line each."""

    @cached_property
    def num_samples(self) -> int:
        """Samples of all documents."""
        return sum(self.samples)

    @cached_property
    def samples(self) -> tuple[int, ...]:
        """Samples of each document."""
        return tuple(len(document.conversations) for document in self.documents)

    @property
    def work(self) -> list[Work]:
        """What each document costs."""
        return [document.work for document in self.documents]

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """How often each document comes in an epoch."""
        return tuple(document.weight for document in self.documents)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return tuple(work.tokens for work in self.work)

    @property
    def conversations(self) -> list[Conversation]:
        """Conversations of all documents, in order."""
        return [one for document in self.documents for one in document.conversations]

    @property
    def distinct(self) -> Iterator[Conversation]:
        """All conversations except those about the same media as another of their document."""
        for document in self.documents:
            yield from document.conversations[: 1 if document.conversations[0].media else None]

    @property
    def prompts(self) -> Prompts:
        """What the conversations ask."""
        return prompts_of(one for document in self.documents for one in document.conversations)

    @cached_property
    def samples_by_medium(self) -> Counter[str]:
        """How many samples show the medium of each name: all of them are lost if it cannot be decoded."""
        return Counter(name for one in self.conversations for name in {ref.name for ref in one.media})

    def build(self, number: int) -> Document:
        """Ids, labels, positions and media plans of one document, the same in every call."""
        planned, processor = self.documents[number], self.encoder.processor
        refs = planned.conversations[0].media
        limits = planned.media_limits or [limits_of(ref, self.config) for ref in refs]
        plans = [processor.plan(ref, self.info(ref), own) for ref, own in zip(refs, limits, strict=True)]
        return self.encoder.document(planned.conversations, plans)

    def pack_plan(self, seed: int) -> PackPlan:
        """How these documents are laid out in packs."""
        return PackPlan(
            lengths=self.lengths,
            samples=self.samples,
            weights=self.weights,
            pack_tokens=self.config.pack_tokens,
            max_samples=self.config.max_samples_per_pack,
            seed=seed,
        )

    @cached_property
    def digest(self) -> str:
        """A digest of ids, texts, media (by their names below `data.root` and what is taken of them) and lengths of all
        documents, wherever `data.root` lies."""
        content, root = hashlib.sha256(), os.path.realpath(self.config.root)
        for document in self.documents:
            shown = [(one.id, one.content(root), one.options) for one in document.conversations]
            content.update(f"{shown}:{document.work.tokens};".encode(errors="replace"))
        return content.hexdigest()[:16]

    # ------------------------------------------------------------------------------------------------------ planning

    def add(
        self, conversations: Sequence[tuple[Conversation, float]], show_progress: bool = False, workers: int = 0
    ) -> list[PlannedDocument]:
        """Plan the documents of conversations with their weights; those about the same media come together. With
        `workers`, in as many processes."""
        groups: dict[tuple[object, float], list[Conversation]] = {}
        parts = [(part, weight) for one, weight in conversations for part in self.encoder.split_for_learning(one)]
        for number, (one, weight) in enumerate(parts):
            key = one.media_key if one.media and self.config.share_videos else number
            groups.setdefault((key, weight), []).append(one)
        added = []
        weighted = [(group, weight) for (_, weight), group in groups.items()]
        with progress_bar(len(weighted), "counting tokens", "document", show_progress) as bar:
            planned = self._plan_in(workers, weighted) if workers else (self._plan_group(*one) for one in weighted)
            for documents in planned:
                added += documents
                bar.update()
        self.documents = [*self.documents, *added]
        return added

    def _plan_in(self, workers: int, groups: Sequence[WeightedGroup]) -> Iterator[list[PlannedDocument]]:
        """The documents of each group, planned in worker processes."""
        waiting: deque[tuple[Sequence[WeightedGroup], Future[list[PlannedGroup]]]] = deque()

        def finish() -> Iterator[list[PlannedDocument]]:
            chunk, future = waiting.popleft()
            for (group, weight), planned in zip(chunk, future.result(), strict=True):
                self.bad += planned.bad
                self.num_shortened += planned.num_shortened
                yield [
                    PlannedDocument(tuple(group[i] for i in members), work, weight, limits)
                    for members, work, limits in planned.documents
                ]

        with WorkerPool(workers, math.inf, partial(_start_planning, self.encoder, self.config)) as pool:
            for start in range(0, len(groups), CHUNK):
                chunk = groups[start : start + CHUNK]
                refs = {ref for group, _ in chunk for one in group for ref in one.media}
                waiting.append((chunk, pool.submit(_plan_groups, chunk, {ref: self._found(ref) for ref in refs})))
                if len(waiting) > 4 * workers:
                    yield from finish()
            while waiting:
                yield from finish()

    def _found(self, ref: MediaRef) -> MediaInfo | MediaError:
        """What `info` returns or raises."""
        try:
            return self.info(ref)
        except MediaError as error:
            return error

    def _plan_group(self, conversations: Sequence[Conversation], weight: float) -> list[PlannedDocument]:
        """Documents of conversations that have the same media; those with equal shareable prefixes may share one."""
        groups: dict[object, list[Conversation]] = {}
        for number, one in enumerate(conversations):
            try:
                for ref in one.media:
                    self.info(ref)
                check_spans(one, self.info)
                first = self.encoder.encode(one.branches[0])
                prefix = first.shareable_prefix if self.config.share_videos else None
            except MediaError as error:
                self.bad.append(BadItem(one.id, ref.name, error.reason, f"{one.origin}: {ref.field}: {error}"))
            except UserError as error:
                self.bad.append(BadItem(one.id, "", "record", str(error)))
            else:
                groups.setdefault(number if prefix is None else prefix, []).append(one)
        return [
            document
            for group in groups.values()
            for fitted in self._fit_media(group)
            for document in self._cut_into_rows(fitted, weight)
        ]

    def _fit_media(self, conversations: Sequence[Conversation]) -> list[Fit]:
        """The conversations in groups that see the same frames.

        Each sees what it would see alone, unless `frames_for_sharing` allows fewer frames.
        """
        media: PlannedMedia | None = None
        groups: dict[tuple[MediaPlan, ...], Fit] = {}
        for one in conversations:
            try:
                media = media or plan_conversation(one, self.encoder.processor, self.config, self.info)
                alone = fit([one], media, self.encoder, self.config)
            except UserError as error:
                self.bad.append(BadItem(one.id, "", "unfit", str(error)))
                continue
            same = groups.get(alone.media.plans, Fit((), alone.media, ()))
            groups[alone.media.plans] = replace(
                same, conversations=(*same.conversations, one), encoded=(*same.encoded, *alone.encoded)
            )
        usable = [one for group in groups.values() for one in group.conversations]
        together = min(len(usable), self.config.max_samples_per_pack or len(usable))
        if media is not None and together > 1 and self.config.frames_for_sharing:
            with suppress(UserError):  # one group instead of several, with somewhat fewer frames
                fitted = fit(usable, media, self.encoder, self.config, together)
                most = max(group.media.num_tokens for group in groups.values())
                if fitted.media.num_tokens >= (1 - self.config.frames_for_sharing) * most:
                    groups = {fitted.media.plans: fitted}
        self.num_shortened += sum(len(group.conversations) for group in groups.values() if group.media.is_shortened)
        return list(groups.values())

    def _cut_into_rows(self, group: Fit, weight: float) -> list[PlannedDocument]:
        """As few documents as fit `pack_tokens` and `max_samples_per_pack`, all with the same frames."""
        limit = self.config.max_samples_per_pack
        shared_text = group.encoded[0][0].prefix_tokens
        prefix = shared_text + sum(map(self.encoder.media_length, group.media.plans))
        patches = sum(math.prod(plan.grid_thw) for plan in group.media.plans)
        rows: list[tuple[list[Conversation], list[int]]] = []
        for one, encoded in zip(group.conversations, group.encoded, strict=True):
            own = [text.text_tokens - shared_text for text in encoded]
            is_full = not rows or 0 < limit <= len(rows[-1][0])
            if is_full or prefix + sum(rows[-1][1]) + sum(own) > self.config.pack_tokens:
                rows.append(([], []))
            rows[-1][0].append(one)
            rows[-1][1].extend(own)
        made = []
        for conversations, suffixes in rows:
            segments = document_segments(0, prefix, suffixes)
            pairs, keys = attended_pairs(segments, causal=True), sum(segment.k_length for segment in segments)
            work = Work(prefix + sum(suffixes), pairs, patches, keys)
            shortened = group.media.limits if group.media.is_shortened else None
            made.append(PlannedDocument(tuple(conversations), work, weight, shortened))
        return made


# --------------------------------------------------------------------------------------------- in a worker process

WeightedGroup = tuple[list[Conversation], float]
CHUNK = 64
"""Groups that a worker plans at once."""


class PlannedGroup(NamedTuple):
    """What a worker finds out about a group. Its conversations stay where they are."""

    documents: list[tuple[list[int], Work, tuple[VisionLimits, ...] | None]]
    """Each with the places of its conversations in the group."""
    bad: list[BadItem]
    num_shortened: int


_planning: tuple[ChatEncoder, DataConfig] | None = None


def _start_planning(encoder: ChatEncoder, config: DataConfig) -> None:
    global _planning
    _planning = encoder, config


def _plan_groups(
    groups: Sequence[WeightedGroup], found: Mapping[MediaRef, MediaInfo | MediaError]
) -> list[PlannedGroup]:
    assert _planning is not None

    def info(ref: MediaRef) -> MediaInfo:
        if isinstance(one := found[ref], MediaError):
            raise one.with_traceback(None)
        return one

    planned = []
    for group, weight in groups:
        dataset, places = Dataset(*_planning, info), {id(one): place for place, one in enumerate(group)}
        documents = [
            ([places[id(one)] for one in document.conversations], document.work, document.media_limits)
            for document in dataset._plan_group(group, weight)
        ]
        planned.append(PlannedGroup(documents, dataset.bad, dataset.num_shortened))
    return planned


# ----------------------------------------------------------------------------------------------- reading the sources


def make_dataset(
    conversations: Sequence[Conversation],
    encoder: ChatEncoder,
    config: DataConfig,
    info: Callable[[MediaRef], MediaInfo],
) -> Dataset:
    """A dataset of conversations that each come once in an epoch."""
    dataset = Dataset(encoder, config, info)
    dataset.add([(one, 1.0) for one in conversations])
    return dataset


def load_dataset(
    config: DataConfig,
    wanted: Sequence[SourceConfig],
    make_conversations: MakeConversations,
    encoder: ChatEncoder,
    seed: int,
    split: Split | None = None,
    planners: int = 0,
) -> Dataset:
    """Read the sources, scan their media once and plan documents, those about the same media together.

    With a `split`, only the samples of its side. With `planners`, as many processes plan. Raises UserError if more than
    `max_bad_fraction` of the samples cannot be used, with the counts by reason and the first message, or if there are
    none.
    """
    notes: list[str] = []
    records, bad, num_untaken, num_split_off = _read_records(config, wanted, seed, split, notes)
    has_records = any(records)
    conversations: list[list[tuple[Conversation, float]]] = [[] for _ in wanted]
    names = source_names([*config.sources, *wanted])
    num_paired = Counter[str]()
    for source, samples, made in zip(wanted, records, conversations, strict=True):
        num_paired[source.path] += sum(one.fields.get(REJECTED) is not None for one in samples)
        samples.reverse()
        while samples:  # millions of both would not fit
            own, wrong = converse(samples.pop(), make_conversations, config)
            made += [(replace(one, source=names[source.path]), source.times) for one in own]
            bad += wrong
    add_answers_of_others(conversations)
    refs = [ref for of_source in conversations for one, _ in of_source for ref in one.media]
    index = build(refs, config.cache_path, config.workers, config.decode_timeout_s, config.index == "header")

    dataset = Dataset(encoder, config, index.info)
    dataset.bad, dataset.notes, dataset.index, dataset.num_paired = bad, notes, index, num_paired
    # Sources that have a share each keep their documents to themselves.
    has_shares = any(source.share is not None for source in wanted)
    apart = conversations if has_shares else [list(chain.from_iterable(conversations))]
    planned = [dataset.add(together, environment().is_main, planners) for together in apart]
    num_left_out = num_untaken + num_split_off
    check_bad(dataset.bad, dataset.num_samples + len(dataset.bad) + num_left_out, config.max_bad_fraction)
    if wanted and not dataset.documents:
        paths = _paths(wanted)
        if bad and (split is None or has_records):
            raise UserError(f"{paths}: none of {len(bad)} samples can be used; the first: {bad[0].message}")
        if split is None or not num_split_off:
            raise UserError(f"{paths}: no samples; data.sources must name files with records")
        side, way = ("is held out", "raise") if split.held_out else ("is left to train on", "lower")
        raise UserError(
            f"eval.split = {split.share:g}: none of {num_split_off} samples of {paths} {side}; {way} it, or name "
            "eval.sources"
        )
    if has_shares:
        dataset.documents = _weighted_by_share(wanted, planned)
    if dataset.num_shortened:
        count = f"{dataset.num_shortened:,} of {dataset.num_samples:,} samples"
        text = f"fewer frames or pixels than asked for, to fit data.pack_tokens = {config.pack_tokens}"
        notes.append(f"{_paths(wanted)}: {count} have {text}; tools/inspect_batch.py shows them")
        logger.info("%s", notes[-1])
    return dataset


def _read_records(
    config: DataConfig, wanted: Sequence[SourceConfig], seed: int, split: Split | None, notes: list[str]
) -> tuple[list[list[Sample]], list[BadItem], int, int]:
    """The samples to use of each source, records that cannot be read, and how many samples `take` and the split leave
    out. What to tell the user is logged and added to `notes`."""
    records: list[list[Sample]] = []
    bad: list[BadItem] = []
    num_untaken = 0
    for source in wanted:
        samples, errors = sources.read(source, config)
        bad += [BadItem(error.origin, "", "record", str(error)) for error in errors]
        if line := describe_unread_keys(source.path, [sample.unread for sample in samples]):
            notes.append(line)
            if environment().is_main:
                log_once(line)
        records.append(take(samples, source.take, seed))
        num_untaken += len(samples) - len(records[-1])
    if split is None:
        return records, bad, num_untaken, 0
    sides, num_on_neither = split.select(list(chain.from_iterable(records)), config.root)
    if num_on_neither:
        text = "records to train on show media of held-out ones too, and are left out"
        notes.append(f"eval.split: {num_on_neither} {text}")
        logger.info("%s", notes[-1])
    each = iter(sides)
    return [[one for one in samples if next(each)] for samples in records], bad, num_untaken, sides.count(False)


def _weighted_by_share(
    wanted: Sequence[SourceConfig], planned: Sequence[Sequence[PlannedDocument]]
) -> list[PlannedDocument]:
    """The documents of all sources, weighted so that each source has its share of an epoch's samples, and an epoch as
    many samples as there are. UserError if a source has none."""
    counts = [sum(len(document.conversations) for document in documents) for documents in planned]
    shares = [source.share or 0.0 for source in wanted]
    weighted = []
    for source, share, count, documents in zip(wanted, shares, counts, planned, strict=True):
        if not count:
            raise UserError(f"{source.path}: share = {share:g}, but it has no samples; take the source out")
        weight = share / sum(shares) * sum(counts) / count
        weighted += [replace(document, weight=weight) for document in documents]
    return weighted


def _paths(wanted: Sequence[SourceConfig]) -> str:
    return ", ".join(source.path for source in wanted)


def converse(
    sample: Sample, make_conversations: MakeConversations, config: DataConfig
) -> tuple[list[Conversation], list[BadItem]]:
    """The conversations that the task makes of a sample, or why it makes none."""
    try:
        made = list(make_conversations(sample))
    except UserError as error:
        return [], [BadItem(sample.id, "", "record", str(error))]
    return [with_frame_times(one) for one in made] if config.video.timestamps else made, []


def add_answers_of_others(conversations: Sequence[list[tuple[Conversation, float]]]) -> None:
    """Give each conversation whose answer is desirable or not the answer to another prompt as well: in a random order,
    which is always the same, that of the next one. UserError if there is none."""
    places = [(of_source, i) for of_source in conversations for i, (one, _) in enumerate(of_source)]
    places = [(of_source, i) for of_source, i in places if of_source[i][0].desirable is not None]
    random.Random("answers of others").shuffle(places)
    for place, (of_source, i) in enumerate(places):
        one, weight = of_source[i]
        next_ones = (places[(place + further) % len(places)] for further in range(1, min(len(places), MAX_OTHERS)))
        others = (found[j][0] for found, j in next_ones)
        answer = next((o.turns[-1].text for o in others if _asks_and_says_other(o, one)), None)
        if answer is None:
            raise UserError(
                f"{one.origin}: no record has another answer to another prompt, which objective.kind = "
                "'kto' needs beside this one; add records, or take another objective"
            )
        of_source[i] = replace(one, rejected=answer), weight


def _asks_and_says_other(one: Conversation, other: Conversation) -> bool:
    is_same = (one.media_key, one.turns[:-1]) == (other.media_key, other.turns[:-1])
    return not is_same and one.turns[-1].text != other.turns[-1].text


def take(samples: Sequence[Sample], rule: str, seed: int) -> list[Sample]:
    """`all`, `first:N` or `random:N` of the samples, in their order."""
    kind, _, count = rule.partition(":")
    if kind == "all":
        return list(samples)
    if kind == "first":
        return list(samples[: int(count)])
    chosen = random.Random(f"take:{seed}").sample(range(len(samples)), min(int(count), len(samples)))
    return [samples[i] for i in sorted(chosen)]


# ------------------------------------------------------------------------------- prompts, which a trained model knows

Prompts = Counter[tuple[str, str, str | None, tuple[str, ...]]]
"""How many samples have a prompt: the text before and after the first medium of the first user turn, the system text
(None: no system turn; a template may add one), and the closed set of answers."""


def prompts_of(conversations: Iterable[Conversation]) -> Prompts:
    """Count conversations, without text that depends on frames (times, subtitles): that belongs to the video."""
    prompts: Prompts = Counter()
    for one in conversations:
        first = next((turn for turn in one.turns if turn.role == "user"), None)
        if first is None or one.is_part:
            continue
        start = next((place for place, part in enumerate(first.parts) if isinstance(part, MediaRef)), 0)
        before, behind = (Turn("user", parts).text for parts in (first.parts[:start], first.parts[start:]))
        system = next((turn.text for turn in one.turns if turn.role == "system"), None)
        prompts[before, behind, system, one.options] += 1
    return prompts


def describe_prompts(counts: Prompts) -> dict[str, Any]:
    """For vft.json: the most frequent prompt (with the text before the media) and system text, the fraction of samples
    that had it, and how many others there were; the `labels` of a prompt of at least half of them, if they all have the
    same. Empty if nothing was counted."""
    if not counts:
        return {}
    prompts, systems = Counter[tuple[str, str]](), Counter[str | None]()
    for (before, prompt, system, _), count in counts.items():
        prompts[before, prompt] += count
        systems[system] += count
    (((before, prompt), of_prompt),) = prompts.most_common(1)
    ((system, of_system),) = systems.most_common(1)
    labels, *others = {tuple(sorted(options)) for *asked, _, options in counts if asked == [before, prompt]}
    return {
        "prompt": prompt,
        "prompt_before_media": before,
        "prompt_share": of_prompt / counts.total(),
        "other_prompts": len(prompts) - 1,
        "system": system,
        "system_share": of_system / counts.total(),
        "other_systems": len(systems) - 1,
        "labels": list(labels) if not others and 2 * of_prompt >= counts.total() else [],
    }
