"""The data sets of a run: what is trained on, what is evaluated, and what is in both by mistake."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace

from vft.common.errors import UserError
from vft.common.task import Answer, Question, Task, main_conversation, split_reasoning, trained_conversations
from vft.common.types import Conversation, Sample
from vft.config.run import Config
from vft.data import formats
from vft.data.chat import ChatEncoder
from vft.data.dataset import Dataset, MakeConversations, converse, describe_prompts, take
from vft.data.records.preferences import DESIRABLE, REJECTED
from vft.data.split import Split, overlap_warning
from vft.data.stored import load_stored
from vft.data.streaming.stream import Streams
from vft.data.workers import WorkerPool
from vft.distributed.process_group import environment

logger = logging.getLogger(__name__)


MAX_CLASSES = 20
"""Classes that a message lists."""
MAX_COUNTED = 100_000
"""Samples up to which those of each class are counted."""
PAIR_SCORES = ("likelier_chosen", "reward_accuracy", "reward_margin")
"""Beside the loss, of held-out pairs: the share whose chosen answer is likelier than the rejected one; while training
also the share whose chosen answer it has raised more, and by how much more, in log-probability. A tie counts half."""


def _with_rejected(make: MakeConversations) -> MakeConversations:
    """What `make` makes of a record, with its rejected answer if it has one."""

    def paired(sample: Sample) -> Sequence[Conversation]:
        rejected = sample.fields.get(REJECTED)
        return [replace(one, rejected=rejected if isinstance(rejected, str) else None) for one in make(sample)]

    return paired


def learnt_conversations(task: Task, config: Config) -> MakeConversations:
    """What is trained on of a record: the task's conversations; with an objective of pairs the main one with both
    answers; with `kto` that with its answer, which is desirable or not, of a pair both. That raises UserError for a
    record without what the objective needs, or with an answer that is not to be learnt."""
    objective = config.objective
    if objective is None:
        return _desirable_only(trained_conversations(task, config.data.segment_questions))
    paired = _with_rejected(main_conversation(task))

    def make(sample: Sample) -> Sequence[Conversation]:
        conversations = paired(sample)
        if objective.kind == "kto":
            return [labelled for one in conversations for labelled in _labelled(sample, one)]
        if any(one.rejected is None for one in conversations):
            raise UserError(
                f"{sample.origin}: {REJECTED}: objective.kind = {objective.kind!r} learns from pairs, and the "
                "record has one answer; add a rejected one, or take the [objective] table out"
            )
        return conversations

    return make


def _labelled(sample: Sample, one: Conversation) -> list[Conversation]:
    """The conversation with its label, or the two of a pair."""
    if one.rejected is not None:
        _, worse = one.branches
        return [replace(one, rejected=None, desirable=True), replace(worse, id=f"{one.id}/rejected", desirable=False)]
    label = sample.fields.get(DESIRABLE)
    if not isinstance(label, bool):
        raise UserError(
            f"{sample.origin}: label: objective.kind = 'kto' learns from answers with a label, true or false, or from "
            "pairs, and the record has neither; add it, or take the [objective] table out"
        )
    return [replace(one, desirable=label)]


def _desirable_only(make: MakeConversations, leave_out: bool = False) -> MakeConversations:
    """As `make`; UserError, or nothing to `leave_out`, for a record whose answer is not one to give."""

    def checked(sample: Sample) -> Sequence[Conversation]:
        if sample.fields.get(DESIRABLE) is False:
            if leave_out:
                return []
            raise UserError(
                f"{sample.origin}: label: false marks an answer not to give; set objective.kind = 'kto' to learn from "
                "it, or take the record out"
            )
        return make(sample)

    return checked


def load_training(task: Task, config: Config, encoder: ChatEncoder) -> Dataset:
    """What is trained on, except streams. A message says so if rejected answers are left out."""
    make, split = learnt_conversations(task, config), held_out_split(config, held_out=False)
    about = "to train on"
    if config.objective is not None:
        about = f"{'answers' if config.objective.kind == 'kto' else 'pairs'} {about}"
    documents = load_stored(config.data, config.data.indexed, make, task, about, encoder, config.seed, split)
    for path, count in documents.num_paired.items():
        if count and config.objective is None:
            text = 'as in supervised tuning; add objective.kind = "dpo" to learn from both'
            logger.info("%s: of %d pairs of answers only the chosen one is learnt, %s", path, count, text)
    return documents


def training_streams(
    task: Task, config: Config, encoder: ChatEncoder, pool: WorkerPool
) -> AbstractContextManager[Streams | None]:
    """The sources of `data.sources` with `stream = true`, which are read while they are trained on; None if there are
    none."""
    if not config.data.streamed:
        return nullcontext()
    make = learnt_conversations(task, config)
    return closing(Streams(config.data, make, encoder, pool, config.train.packs_per_step, config.seed))


def load_held_out(task: Task, config: Config, encoder: ChatEncoder) -> Dataset:
    """What is evaluated: the main conversation of each held-out record.

    Raises UserError before the run starts if the task cannot score the references (a metric's package is missing, say),
    or if `eval.best_metric` is not among its scores.
    """
    sources = config.eval.sources or config.data.indexed
    if not sources:
        raise UserError("eval.sources = []: a stream has no held-out records; name some, or set eval.every_steps = 0")
    check_answer_length(config.eval.max_new_tokens, encoder.processor.context_tokens, "eval.max_new_tokens")
    if not config.eval.sources and config.eval.split is None:
        fix = "eval.split = 0.1 would hold a tenth out"
        logger.info("eval.sources = []: scored are the samples of data.sources, those of training; %s", fix)
    split = held_out_split(config, held_out=True)
    seed = config.seed if split else 0  # held-out sources of their own are read alike whatever the run's seed
    make, about = evaluated_conversations(task), "to evaluate"
    if config.objective is not None:
        make, about = _with_rejected(make), "pairs to evaluate"
    make = _desirable_only(make, leave_out=config.objective is not None)
    held_out = load_stored(config.data, sources, make, task, about, encoder, seed, split)
    if held_out.bad:
        text = "%d held-out sample(s) can't be used, such as %s: %s"
        logger.warning(text, len(held_out.bad), held_out.bad[0].id, held_out.bad[0].message)
    examples = questions(held_out.conversations)
    examples = [examples[i] for i in spread(len(examples), 64)]
    equal_scores = [(0.0,) * len(question.prompt.options) for question in examples]
    answers = [
        Answer(question, question.references[0], scores, scores)
        for question, scores in zip(examples, equal_scores, strict=True)
    ]
    metrics, best = [*(task.score(answers) if answers else ()), "loss"], config.eval.best_metric
    if any(one.rejected is not None for one in held_out.conversations):
        metrics += PAIR_SCORES if config.rewards_held_out else PAIR_SCORES[:1]
    if best and examples and "/" not in best and best not in metrics:
        known = ", ".join(name for name in metrics if "/" not in name)
        raise UserError(f"eval.best_metric = {best!r}: {task.name} has {known}")
    return held_out


def load_asked(task: Task, config: Config, encoder: ChatEncoder) -> Dataset:
    """The main conversation of each record that is trained on, to be asked as in evaluation, without those whose answer
    is not one to give. UserError if all sources are streams."""
    if not config.data.indexed:
        raise UserError("data.sources: a stream can't be asked about; name sources without stream = true")
    check_answer_length(config.eval.max_new_tokens, encoder.processor.context_tokens, "eval.max_new_tokens")
    make = _desirable_only(evaluated_conversations(task), leave_out=True)
    split = held_out_split(config, held_out=False)
    return load_stored(config.data, config.data.indexed, make, task, "to ask", encoder, config.seed, split)


def report_classes(training: Dataset, held_out: Dataset | None) -> None:
    """Say how many samples each label has, if all samples answer one question with one of the same labels, and warn of
    labels that can't be learnt or scored. Of large sets nothing is said, because all of their samples would be read."""
    asked = describe_prompts(training.prompts)
    labels = asked.get("labels", [])
    if not labels or asked["other_prompts"] or training.num_samples > MAX_COUNTED:
        return
    trained = Counter(one.turns[-1].text for one in training.conversations)
    scored = Counter(one.turns[-1].text for one in held_out.conversations) if held_out is not None else None
    counts = [f"{label} {trained[label]:,}" + (f" + {scored[label]:,}" if scored else "") for label in labels]
    beside = " + held out" if scored else ""
    logger.info("classes (%d), samples%s: %s", len(labels), beside, _some(counts))
    alike = Counter(label.casefold() for label in labels)
    for found, what in (
        ([] if len(labels) > 1 else labels, "the only class, so there is nothing to tell apart"),
        ([label for label in labels if not trained[label]], "classes without a sample to train on"),
        ([label for label in labels if scored and not scored[label]], "classes without a held-out sample, or a score"),
        ([label for label in labels if alike[label.casefold()] > 1], "classes that differ in case alone"),
    ):
        if found:
            logger.warning("%s: %s", what, _some([repr(label) for label in found]))


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:MAX_CLASSES]) + (f" and {len(texts) - MAX_CLASSES} more" if texts[MAX_CLASSES:] else "")


def held_out_split(config: Config, held_out: bool) -> Split | None:
    """One side of `eval.split`; None without that setting."""
    return None if config.eval.split is None else Split(config.eval.split, config.seed, held_out)


def evaluated_conversations(task: Task) -> MakeConversations:
    """What `task` asks of each record in evaluation. Raises UserError for a record that asks nothing before its last
    answer."""

    def make(sample: Sample) -> Sequence[Conversation]:
        conversations = main_conversation(task)(sample)
        for conversation in conversations:
            if [turn.role for turn in conversation.turns if turn.role != "system"][:1] != ["user"]:
                raise UserError(f"{sample.origin}: a conversation must begin with a question to be asked in evaluation")
        return conversations

    return make


def questions(conversations: Sequence[Conversation], limit: int = 0) -> list[Question]:
    """The questions of an evaluation, at most `limit` of them (0: all).

    The reference is the last answer of a conversation without its reasoning, beside the other right answers that its
    record lists. Conversations with equal prompts, media and options (in any order) are one question, unless the fact
    `apart` differs.
    """
    by_content: dict[object, Question] = {}
    for conversation in conversations:
        if conversation.is_part:
            continue
        last = max(i for i, turn in enumerate(conversation.turns) if turn.role == "assistant")
        turns, options = conversation.turns[:last], conversation.options
        source, origin = conversation.source, conversation.origin
        prompt = Conversation(conversation.id, turns, origin, options, conversation.facts, source=source)
        shown = tuple((turn.role, turn.text) for turn in turns)
        key = (conversation.media_key, shown, frozenset(options), conversation.facts.get("apart"))
        question = by_content.get(key, Question(conversation.id, prompt, ()))
        answer = split_reasoning(conversation.turns[last].text)[1]
        # An option's text may have white space around it that the answer lacks.
        as_option = {option.strip(): option for option in options}
        right = (answer, *conversation.facts.get("answers", ())[1:])
        references = (*question.references, *(as_option.get(text.strip(), text) for text in right))
        by_content[key] = Question(question.id, question.prompt, references)
    everything = list(by_content.values())
    return [everything[i] for i in spread(len(everything), limit)]


def spread(count: int, limit: int) -> list[int]:
    """`limit` random indices below `count`, in order; all of them if `limit` is 0. The same in every run.

    They are not the first ones, because data sets are often sorted.
    """
    if not limit or limit >= count:
        return list(range(count))
    return sorted(random.Random(f"some:{count}").sample(range(count), limit))


def check_answer_length(new_tokens: int, context: int | None, setting: str) -> None:
    """Raises UserError if an answer may be as long as the model's context (in tokens)."""
    if context is not None and new_tokens >= context:
        raise UserError(
            f"{setting} = {new_tokens}: the model's context is {context} tokens, question and answer together; take "
            "fewer"
        )


def warn_of_overlap(task: Task, config: Config, held_out: Dataset, training: Dataset | None = None) -> None:
    """Log a warning that names the held-out samples that are also trained on. Without held-out samples of their own the
    training samples are evaluated, which is no warning.

    Without `training` its records are read here; if that fails, the warning says so. Streams cannot be compared.
    """
    if not environment().is_main or (not config.eval.sources and config.eval.split is None):
        return
    try:
        trained = list(_training_records(task, config)) if training is None else training.distinct
    except UserError as error:
        logger.warning("held-out samples can't be looked for among those of training: %s", error)
        return
    if warning := overlap_warning([one for one in held_out.conversations if not one.is_part], trained):
        logger.warning("%s", warning)


def _training_records(task: Task, config: Config) -> Iterator[Conversation]:
    samples = [
        sample
        for source in config.data.indexed
        for sample in take(formats.read(source, config.data)[0], source.take, config.seed)
    ]
    split = held_out_split(config, held_out=False)
    sides = [True] * len(samples) if split is None else split.select(samples, config.data.root)[0]
    for sample in itertools.compress(samples, sides):
        yield from converse(sample, main_conversation(task), config.data)[0]
