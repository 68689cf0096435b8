"""Scores on held-out samples: of answers, as the task has it, and the loss beside them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vft.common.errors import UserError
from vft.common.files import digest, replace_text
from vft.common.scores import Interval, Samples, clusters_of
from vft.common.task import (
    Answer,
    Task,
    files_of,
    likeliest,
)
from vft.common.types import IGNORE_INDEX, Document
from vft.common.unique import unique_names
from vft.config.run import Config
from vft.data.dataset import Dataset
from vft.data.loader import Loader
from vft.data.packing import PackPlan
from vft.data.workers import WorkerPool
from vft.distributed import signals as stopping
from vft.distributed.process_group import DataParallel, World, all_of, sum_over_ranks
from vft.inference.engine import Answerer
from vft.inference.generate import Sampling
from vft.metrics import parts_to_json, ratio_interval
from vft.models.base import VideoLanguageModel
from vft.models.cross_entropy import token_losses
from vft.preparation.documents import questions, spread

SCORED_BY = "sum of log-probabilities, closing token included"
"""What the scores of options in a file of predictions are."""

MOST_OPTIONS = 5
"""Options of a question, the likeliest, whose scores stand in a file of predictions; those of right ones stand too."""


def evaluate(
    task: Task, answerer: Answerer, held_out: Dataset, sampling: Sampling, batch_size: int, limit: int, file: Path
) -> dict[str, Interval]:
    """Scores of the task on held-out documents, the loss on them, how many questions could be asked, and how many
    answers were cut off at `max_new_tokens` or the end of the model's context.

    The answers go to `file`, a line each. Every process must call it; all get the same scores.
    """
    asked = questions(held_out.conversations, limit)
    try:
        with torch.compiler.set_stance("force_eager"):  # graphs that were compiled for training would be compiled anew
            answers = answerer.answer_all(asked, sampling, batch_size)
            loss = held_out_loss(answerer.model, held_out, answerer.pool, answerer.world, limit)
    finally:
        for module in answerer.model.modules():
            if isinstance(module, FSDPModule):
                # After a pass without a backward one the root's weights stay gathered (and those of layers that are not
                # resharded after it), in tensors that the optimizer, and so a checkpoint, knows nothing of.
                module.reshard()
    if answerer.world.is_main:
        replace_text(file, "".join(prediction_line(answer) for answer in answers.values()))
    scores = task.score(list(answers.values()))
    if loss is not None:
        scores["loss"] = loss
    left_out = len(held_out.bad) + len(asked) - len(answers)
    cut_off = sum(answer.is_cut_off for answer in answers.values())
    counts = {"answered": len(answers), "unreadable": left_out, "cut_off": cut_off}
    return {**scores, **{name: Interval.point(count) for name, count in counts.items()}}


def keep_parts(file: Path, scores: Mapping[str, Interval]) -> None:
    """Write what the scores were computed from, for comparisons with the base's or another run's on equal questions."""
    replace_text(file, json.dumps(parts_to_json(scores)) + "\n")


def cut_off_warning(scores: Mapping[str, Interval], limit: int) -> str:
    """A line that says how many answers the limit of tokens cut off, to be scored as they are; empty for none."""
    cut_off, answered = (int(scores[name].value) for name in ("cut_off", "answered"))
    if not cut_off:
        return ""
    return f"warning: {cut_off} of {answered} answers were cut off at eval.max_new_tokens = {limit}: raise it"


def questions_digest(held_out: Dataset, limit: int = 0) -> str:
    """Tells evaluations of other questions apart: prompts, media, options, and what would be right."""
    asked = questions(held_out.conversations, limit)
    root = os.path.realpath(held_out.config.root)
    content = [
        (q.prompt.content(root), sorted(q.prompt.options), sorted(q.references), q.prompt.facts.get("segments"))
        for q in asked
    ]
    return digest(repr(sorted(map(repr, content))))


class _NothingInstead(PackPlan):
    """Leaves the place of what can't be decoded empty: another document in it would count twice."""

    def replacement(self, number: int, epoch: int, attempt: int) -> int | None:
        """There is none."""
        return None


SCORING_VERSION = 2
"""Of the rules by which answers are scored; raised where one changes, so that nothing is compared with older scores."""


@dataclass(frozen=True)
class Best:
    """The best value of a metric so far, in a file of the run's folder, so that a resumed run knows it."""

    file: Path
    metric: str
    world: World
    questions: str = ""
    """Digest of what is asked and how it is scored: a value of another one is not compared with."""
    say: Callable[[str], None] = print

    @staticmethod
    def of(config: Config, held_out: Dataset, world: World, say: Callable[[str], None]) -> Best:
        """The one of a run."""
        asked, limits = questions_digest(held_out, config.eval.max_samples), config.eval
        rules = f"{SCORING_VERSION}:{asked}:{limits.max_new_tokens}:{limits.max_samples}:{limits.japanese}"
        return Best(config.output_dir / "best.json", config.eval.best_metric, world, digest(rules), say)

    def is_beaten(self, scores: Mapping[str, Interval]) -> bool:
        """Whether these scores are the best so far: of `loss` the lowest, else the highest. Every process must ask.

        Where other samples could be read than before, those of more samples are the best.
        """
        if self.metric not in scores:
            raise UserError(f"eval.best_metric = {self.metric!r}: not among the scores, {', '.join(scores)}")
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.world.is_main and self.file.exists() else {}
        best = all_of(known)[0]
        if not best:
            return True
        told = f"{self.file}: {best.get('metric')} {best.get('value')} of step {best.get('step')} was taken on other"
        if best.get("metric") != self.metric or best.get("questions") != self.questions:
            if best.get("metric") == self.metric:
                self.say(f"{told} questions, or by other rules: the best begins anew")
            return True
        value, samples = scores[self.metric].value, self._samples(scores)
        if samples != best["samples"]:
            kept = "this one, of more, is the best" if samples > best["samples"] else "it stays the best"
            self.say(f"{told} samples ({best['samples']} could be read then, {samples} now): {kept}")
            return samples > int(best["samples"])
        return value < best["value"] if self.metric == "loss" else value > best["value"]

    def record(self, step: int, scores: Mapping[str, Interval]) -> None:
        """Note them as the best."""
        if self.world.is_main:
            line = {"step": step, "metric": self.metric, "value": scores[self.metric].value}
            line |= {"samples": self._samples(scores), "questions": self.questions}
            replace_text(self.file, json.dumps(line) + "\n")

    def _samples(self, scores: Mapping[str, Interval]) -> int:
        """How many the score was taken on; 0 for one of a group."""
        parts = scores[self.metric].parts
        return 0 if parts is None else len(parts.samples.names)


@torch.no_grad()
def held_out_loss(
    model: VideoLanguageModel, held_out: Dataset, pool: WorkerPool, world: World, limit: int = 0
) -> Interval | None:
    """Mean loss over the supervised tokens of (`limit`) held-out documents; None where nothing is readable.

    The interval is of documents drawn anew, those about one video together: their losses over their tokens.
    """
    whole = held_out.pack_plan(seed=0)
    chosen = frozenset(spread(len(whole.lengths), limit))
    weights = tuple(float(i in chosen) for i in range(len(whole.lengths)))
    plan = _NothingInstead(whole.lengths, whole.samples, weights, whole.pack_tokens, whole.max_samples, whole.seed)
    parallel = DataParallel(world.rank, world.size)
    loader = Loader(held_out, plan, pool, parallel, parallel.size, prefetch_packs=4, last_epoch=0)
    packs = len(plan.packs(0))
    found: list[tuple[int, tuple[Document, ...], Tensor]] = []
    training = model.training
    model.eval()
    try:
        for step in range(math.ceil(packs / world.size)):
            stopping.stop_if(int(sum_over_ranks(torch.tensor(stopping.stop_requested(), device=world.device))))
            for pack in loader.step():
                batch = pack.batch.to(world.device)
                losses_N = token_losses(model(batch), model.head, model.config.vocabulary, batch.target_ids_N)
                found.append((step * world.size + pack.slot, pack.batch.documents, losses_N))
    finally:
        model.train(training)
    parts = [(place, _documents_losses(documents, losses_N.tolist())) for place, documents, losses_N in found]
    everything = sorted((part for some in all_of(parts) for part in some), key=lambda part: part[0])
    read = [document for _, some in everything for document in some]
    if not read:
        return None
    names = tuple(unique_names(name for name, *_ in read))
    samples = Samples(names, clusters_of([files for _, files, *_ in read]))
    return ratio_interval([sums for *_, sums in read], samples)


def _documents_losses(
    documents: Sequence[Document], losses: Sequence[float]
) -> list[tuple[str, tuple[str, ...], tuple[float, float]]]:
    """Name, files, summed loss and supervised tokens of each document of a row."""
    told, row = [], 0
    for document in documents:
        count = int((document.labels_T != IGNORE_INDEX).sum())
        files = files_of(plan.ref for plan in document.media)
        told.append((f"{document.sample_ids} {files}", files, (math.fsum(losses[row : row + count]), float(count))))
        row += count
    assert row == len(losses), f"{row} supervised tokens, {len(losses)} losses"
    return told


def prediction_line(answer: Answer) -> str:
    """A line of a predictions file: id, prompt, prediction, the references, the likeliest options and their scores;
    `source` and `media` tell questions with equal ids apart. `cut_off` stands where the limit of tokens ended it.

    `scored_by` says which scores `option_scores` are and `choice` is chosen by; `..._norm` are those a character.
    """
    question = answer.question
    line: dict[str, Any] = {
        "id": question.id,
        "prompt": question.prompt.turns[-1].text,
        "prediction": answer.text,
        "reference": question.references[0] if question.references else None,
        "source": question.prompt.origin,
        "media": [ref.name for ref in question.prompt.media],
    }
    if len(question.references) > 1:
        line["references"] = question.references
    line |= {"reasoning": answer.reasoning} if answer.reasoning else {}
    line |= {"cut_off": True} if answer.is_cut_off else {}
    if answer.choice is not None:
        options, scores = question.prompt.options, answer.option_scores
        kept = sorted(range(len(options)), key=lambda i: -scores[i])[:MOST_OPTIONS]
        kept += sorted(answer.right_options - {*kept})
        line |= {"choice": options[answer.choice], "option_scores": {options[i]: round(scores[i], 4) for i in kept}}
        line["scored_by"] = SCORED_BY
        norms = answer.option_scores_norm
        if (by_length := likeliest(norms)) is not None:
            line |= {"choice_norm": options[by_length]}
            line["option_scores_norm"] = {options[i]: round(norms[i], 4) for i in dict.fromkeys([*kept, by_length])}
    return json.dumps(line, ensure_ascii=False) + "\n"
