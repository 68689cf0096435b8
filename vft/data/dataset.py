"""All documents of a run: sources read, media looked up, videos shared, lengths known. Nothing is decoded yet."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from vft.common.errors import UserError
from vft.common.types import Conversation, Document, MediaInfo, MediaRef, Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats as sources
from vft.data.budget import limits_of
from vft.data.chat import ChatEncoder
from vft.data.document_planner import DocumentPlanner, PlannedDocument
from vft.data.frame_times import with_frame_times
from vft.data.media.index import build
from vft.data.packing import PackPlan
from vft.data.quarantine import BadItem, check_bad
from vft.data.records.unread_keys import report_unread_keys
from vft.data.split import Split
from vft.distributed.process_group import environment

logger = logging.getLogger(__name__)

MakeConversations = Callable[[Sample], Sequence[Conversation]]


@dataclass(eq=False)
class Dataset:
    """The documents of a run, or of one streamed clip, planned and ready to be built."""

    encoder: ChatEncoder
    config: DataConfig
    info: Callable[[MediaRef], MediaInfo]
    """What a scan of a medium found; raises MediaError if the medium cannot be used."""
    documents: list[PlannedDocument]
    bad: list[BadItem]
    """Samples that cannot be used."""
    num_shortened: int = 0
    """Samples whose media have fewer frames or pixels than their limits allow, so that they fit a row."""

    @cached_property
    def num_samples(self) -> int:
        """Samples of all documents."""
        return sum(len(document.conversations) for document in self.documents)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return tuple(document.num_tokens for document in self.documents)

    @property
    def conversations(self) -> list[Conversation]:
        """Conversations of all documents, in order."""
        return [one for document in self.documents for one in document.conversations]

    @cached_property
    def _samples_by_medium(self) -> Counter[str]:
        return Counter(name for one in self.conversations for name in {ref.name for ref in one.media})

    def samples_with(self, name: str) -> int:
        """How many samples show the medium of this name: all of them are lost if it cannot be decoded."""
        return max(1, self._samples_by_medium[name])

    def build(self, number: int) -> Document:
        """Ids, labels, positions and media plans of one document, the same in every call."""
        planned, processor = self.documents[number], self.encoder.processor
        refs = planned.conversations[0].media
        limits = planned.media_limits or [limits_of(ref, self.config) for ref in refs]
        plans = [processor.plan(ref, self.info(ref), own) for ref, own in zip(refs, limits, strict=True)]
        encoded = [self.encoder.encode(one, media=plans) for one in planned.conversations]
        return self.encoder.document(encoded, plans, [one.id for one in planned.conversations])

    def pack_plan(self, seed: int) -> PackPlan:
        """How these documents are laid out in packs."""
        return PackPlan(
            lengths=self.lengths,
            samples=tuple(len(document.conversations) for document in self.documents),
            weights=tuple(document.weight for document in self.documents),
            pack_tokens=self.config.pack_tokens,
            max_samples=self.config.max_samples_per_pack,
            seed=seed,
        )

    @property
    def digest(self) -> str:
        """A digest of ids, texts, media (by their names below `data.root` and what is taken of them) and lengths of all
        documents, wherever `data.root` lies."""
        content, root = hashlib.sha256(), os.path.realpath(self.config.root)
        for document in self.documents:
            shown = [(one.id, one.content(root), one.options) for one in document.conversations]
            content.update(f"{shown}:{document.num_tokens};".encode(errors="replace"))
        return content.hexdigest()[:16]


def make_dataset(
    conversations: Sequence[Conversation],
    encoder: ChatEncoder,
    config: DataConfig,
    info: Callable[[MediaRef], MediaInfo],
) -> Dataset:
    """A dataset of conversations that each come once in an epoch."""
    planner = DocumentPlanner(encoder, config, info)
    documents = planner.plan([(one, 1.0) for one in conversations])
    return Dataset(encoder, config, info, documents, planner.bad, planner.num_shortened)


def load_dataset(
    config: DataConfig,
    wanted: Sequence[SourceConfig],
    make_conversations: MakeConversations,
    encoder: ChatEncoder,
    seed: int,
    split: Split | None = None,
) -> Dataset:
    """Read the sources, scan their media once and plan documents, those about the same media together.

    With a `split`, only the samples of its side. Raises UserError if more than `max_bad_fraction` of the samples cannot
    be used, with the counts by reason and the first message, or if there are none.
    """
    records = _read_records(config, wanted, seed, split)
    bad = records.bad
    conversations: list[list[tuple[Conversation, float]]] = []
    for source, samples in zip(wanted, records.samples, strict=True):
        made = [converse(sample, make_conversations, config) for sample in samples]
        conversations.append([(one, source.times) for own, _ in made for one in own])
        bad += [item for _, wrong in made for item in wrong]
    refs = [ref for of_source in conversations for one, _ in of_source for ref in one.media]
    index = build(refs, config.cache_path, config.workers, config.decode_timeout_s, config.index == "header")

    planner, is_main = DocumentPlanner(encoder, config, index.info), environment().is_main
    # Sources that have a share each keep their documents to themselves.
    has_shares = any(source.share is not None for source in wanted)
    apart = conversations if has_shares else [list(chain.from_iterable(conversations))]
    planned = [planner.plan(together, is_main) for together in apart]
    dataset = Dataset(
        encoder, config, index.info, list(chain.from_iterable(planned)), bad + planner.bad, planner.num_shortened
    )
    check_bad(dataset.bad, dataset.num_samples + len(dataset.bad) + records.num_left_out, config.max_bad_fraction)
    if wanted and not dataset.documents:
        raise _no_documents(wanted, dataset.bad, records, split)
    if has_shares:
        dataset.documents = _weighted_by_share(wanted, planned)
    if dataset.num_shortened:
        count = f"{dataset.num_shortened:,} of {dataset.num_samples:,} samples"
        text = f"fewer frames or pixels than asked for, to fit data.pack_tokens = {config.pack_tokens}"
        logger.info("%s: %s have %s; tools/inspect_batch.py shows them", _paths(wanted), count, text)
    return dataset


@dataclass
class _Records:
    """What the sources hold."""

    samples: list[list[Sample]]
    """Samples to use, of each source."""
    bad: list[BadItem]
    """Records that cannot be read."""
    num_taken: int
    """Samples before the split."""
    num_left_out: int
    """Samples that `take` or the split leaves out."""


def _read_records(config: DataConfig, wanted: Sequence[SourceConfig], seed: int, split: Split | None) -> _Records:
    records = _Records([], [], 0, 0)
    for source in wanted:
        samples, errors = sources.read(source, config)
        records.bad += [BadItem(error.origin, "", "record", str(error)) for error in errors]
        if environment().is_main:
            report_unread_keys(source.path, [sample.unread for sample in samples])
        taken = take(samples, source.take, seed)
        records.samples.append(taken)
        records.num_taken += len(taken)
        records.num_left_out += len(samples) - len(taken)
    if split is not None:
        sides, num_on_neither = split.select(list(chain.from_iterable(records.samples)), config.root)
        if num_on_neither:
            text = "eval.split: %d records to train on show media of held-out ones too, and are left out"
            logger.info(text, num_on_neither)
        records.num_left_out += sides.count(False)
        each = iter(sides)
        records.samples = [[sample for sample in samples if next(each)] for samples in records.samples]
    return records


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


def _no_documents(
    wanted: Sequence[SourceConfig], bad: Sequence[BadItem], records: _Records, split: Split | None
) -> UserError:
    paths = _paths(wanted)
    if bad and (split is None or any(records.samples)):
        return UserError(f"{paths}: none of {len(bad)} samples can be used; the first: {bad[0].message}")
    if split is None or not records.num_taken:
        return UserError(f"{paths}: no samples; data.sources must name files with records")
    side = "is held out" if split.held_out else "is left to train on"
    return UserError(
        f"eval.split = {split.share:g}: none of {records.num_taken} samples of {paths} {side}; change it, or name "
        "eval.sources"
    )


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


def take(samples: Sequence[Sample], rule: str, seed: int) -> list[Sample]:
    """`all`, `first:N` or `random:N` of the samples, in their order."""
    kind, _, count = rule.partition(":")
    if kind == "all":
        return list(samples)
    if kind == "first":
        return list(samples[: int(count)])
    chosen = random.Random(f"take:{seed}").sample(range(len(samples)), min(int(count), len(samples)))
    return [samples[i] for i in sorted(chosen)]
