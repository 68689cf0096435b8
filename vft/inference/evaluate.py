"""Evaluation on held-out samples: the task's scores of the answers, and the loss beside them."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from vft.adapters.peft_format import recorded, trained_rope_factor, warn_of_other_text
from vft.common.errors import UserError
from vft.common.files import digest, replace_text
from vft.common.scores import Interval, Samples, clusters_of
from vft.common.task import Answer, Task, files_of
from vft.common.types import Batch, Conversation
from vft.common.unique import unique_names
from vft.config.run import Config, EvalConfig
from vft.data.dataset import Dataset
from vft.data.loader import Loader
from vft.data.packing import PackPlan
from vft.data.workers import WorkerPool
from vft.distributed import signals as stopping
from vft.distributed.process_group import DataParallel, World, all_of, make_mesh, process_group, sum_over_ranks
from vft.inference.answers_file import Line, as_text, evaluation_line
from vft.inference.engine import Answerer, Failure
from vft.inference.generate import Sampling
from vft.inference.kept_answers import KeptAnswers
from vft.metrics import mean_interval, parts_to_json, ratio_interval
from vft.models.base import VideoLanguageModel
from vft.preparation.documents import PAIR_SCORES, load_held_out, questions, spread, warn_of_overlap
from vft.preparation.memory import inference_shard
from vft.preparation.run import DTYPES, load_for_inference, open_for_inference

logger = logging.getLogger(__name__)

Reference = Callable[[VideoLanguageModel], AbstractContextManager[None]]
"""In what it gives for a model, that is what preferences are compared with."""
SCORING_VERSION = 3
"""Version of the rules by which answers are scored. Raise it with every change, so that nothing is compared with older
scores."""


def evaluation_config(config: Config, adapter: Path | None) -> Config:
    """`config` with the task and `model.rope_factor` of the adapter's training, if it names none itself.

    A merged model has the task of the adapter that is merged into it. The base beside an adapter is asked the same
    questions, so it gets the same `rope_factor`, and with it the same length of context.
    """
    if adapter is None and (start := config.model.adapter):
        logger.warning(
            "model.adapter = %r is what training starts from, and is not scored; name it with --adapter", start
        )
    about = recorded(adapter or Path(config.model.path))
    warn_of_other_text(about, config.data)
    rope_factor = trained_rope_factor(adapter, config.model.rope_factor)
    model = config.model.model_copy(update={"rope_factor": rope_factor})
    task = config.task or about.get("task")
    return Config.model_validate({**config.model_dump(), "task": task, "model": model.model_dump()})


def evaluate(
    task: Task,
    answerer: Answerer,
    held_out: Dataset,
    settings: EvalConfig,
    file: Path,
    reference: Reference | None = None,
) -> dict[str, Interval]:
    """Scores of the task on (`max_samples`) held-out documents and the loss on them. Counts stand beside them:
    `answered`, `unreadable`, and `cut_off`, the answers that ended at `max_new_tokens` or with the model's context.

    The answers go to `file`, a line each, and held-out pairs to `NAME.pairs.jsonl` beside it. Every process must call
    it; all get the same scores.
    """
    pairs_file = file.with_suffix(".pairs.jsonl")
    # Training's graphs would be compiled anew for these shapes.
    with evaluating(answerer.model), torch.compiler.set_stance("force_eager"):
        answers, counts = answer_questions(answerer, held_out, settings, file)
        of_documents = held_out_scores(answerer, held_out, settings.max_samples, reference, pairs_file)
    scores = task.score(answers) if answers else {}
    return {**scores, **_by_source(task, answers), **of_documents, **counts}


def _by_source(task: Task, answers: Sequence[Answer]) -> dict[str, Interval]:
    """The task's main score of the answers of each source, if there are several."""
    by_source: dict[str, list[Answer]] = {}
    for answer in answers:
        by_source.setdefault(answer.question.prompt.source, []).append(answer)
    own = {name: task.score(some) for name, some in sorted(by_source.items()) if len(by_source) > 1}
    main = task.main_metric
    return {f"{main}/source/{name}": scores[main] for name, scores in own.items() if main in scores}


def answer_questions(
    answerer: Answerer,
    held_out: Dataset,
    settings: EvalConfig,
    file: Path,
    kept: KeptAnswers | None = None,
    setting: str = "eval.max_new_tokens",
) -> tuple[list[Answer], dict[str, Interval]]:
    """Answers to (`max_samples`) held-out questions, and the counts `answered`, `unreadable` and `cut_off`. They go to
    `file`, a line each; what `kept` knows is not asked again. `setting` names the limit of tokens in a warning."""
    asked = questions(held_out.conversations, settings.max_samples)
    results = [] if kept is None else kept.known(asked)
    for result in answerer.answers(asked[len(results) :], Sampling(settings.max_new_tokens), settings.batch_size):
        results.append(result)
        if kept is not None:
            kept.add(result)
    answers = [result for result in results if isinstance(result, Answer)]
    failures = [result for result in results if isinstance(result, Failure)]
    if failures:
        logger.warning("%d of %d questions cannot be asked: %s", len(failures), len(asked), failures[0].message)
    if answerer.world.is_main:
        replace_text(file, "".join(as_text(evaluation_line(answer)) for answer in answers))
    cut_off = sum(answer.is_cut_off for answer in answers)
    if cut_off:
        limit_set = f"{setting} = {settings.max_new_tokens}"
        logger.warning("%s: %d of %d answers were cut off at %s: raise it", file.stem, cut_off, len(answers), limit_set)
    counts = {"answered": len(answers), "unreadable": len(held_out.bad) + len(failures), "cut_off": cut_off}
    return answers, {name: Interval.point(count) for name, count in counts.items()}


def score_all(
    task: Task, config: Config, runs: Mapping[Path, Path | None], world: World
) -> dict[str, dict[str, Interval]]:
    """Scores by the name of the file that the answers go to; `runs` says which adapter each file is of (None: the base
    alone)."""
    dtype = DTYPES[config.train.precision]
    models = {file: open_for_inference(config.model, adapter, dtype) for file, adapter in runs.items()}
    # Before the process group, as in training: the first scan of many files may outlast any timeout.
    held_out = load_held_out(task, config, next(iter(models.values())).encoder(config.data))
    warn_of_overlap(task, config, held_out)
    scores = {}
    with (
        process_group(world, alone=config.parallel.offload != "none"),
        WorkerPool(config.data.workers, config.data.decode_timeout_s) as pool,
    ):
        for file in runs:
            mesh = make_mesh(world, inference_shard(config.parallel, models[file].model, world))
            load_for_inference(models[file], world.device, mesh, config.parallel)
            model, parallel = models.pop(file).model, DataParallel.of(mesh)
            answerer = Answerer(model, held_out.encoder, config.data, held_out.info, pool, world, parallel)
            scores[file.stem] = evaluate(task, answerer, held_out, config.eval, file)
            del model, answerer
            gc.collect()  # a sharded model holds itself through its hooks; two may not fit in memory
    return scores


def write_score_parts(file: Path, scores: Mapping[str, Interval]) -> None:
    """Write what the scores were computed from, so that another run's can be compared question by question."""
    replace_text(file, json.dumps(parts_to_json(scores)) + "\n")


def questions_digest(held_out: Dataset, limit: int = 0) -> str:
    """A digest of what is asked: prompts, media, options and right answers."""
    root = os.path.realpath(held_out.config.root)
    content = [
        (q.prompt.content(root), sorted(q.prompt.options), sorted(q.references), q.prompt.facts.get("segments"))
        for q in questions(held_out.conversations, limit)
    ]
    return digest(repr(sorted(map(repr, content))))


@contextmanager
def evaluating(model: VideoLanguageModel) -> Iterator[None]:
    """In it the model is in evaluation mode and builds no graph; at the end its weights are sharded as in training."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Without a backward pass the root's weights stay gathered (and those of layers that are not resharded
                # after a forward pass), in tensors that the optimizer and checkpoints know nothing of.
                module.reshard()


class _PackPlanWithGaps(PackPlan):
    """Leaves the place of a document that cannot be decoded empty: a replacement would count twice."""

    def replacement(self, number: int, epoch: int, attempt: int) -> int | None:
        """There is none."""
        return None


def each_once(
    documents: Dataset, numbers: Collection[int], pool: WorkerPool, parallel: DataParallel, world: World, seed: int = 0
) -> tuple[Loader, int]:
    """A loader of the documents with these numbers, each once, and how many steps it has for that."""
    whole, chosen = documents.pack_plan(seed), frozenset(numbers)
    weights = tuple(float(i in chosen) for i in range(len(whole.lengths)))
    plan = _PackPlanWithGaps(whole.lengths, whole.samples, weights, whole.pack_tokens, whole.max_samples, whole.seed)
    loader = Loader(documents, plan, pool, parallel, parallel.size, 4, last_epoch=0, device=world.device)
    return loader, math.ceil(len(plan.packs(0)) / parallel.size)


def held_out_scores(
    answerer: Answerer,
    held_out: Dataset,
    limit: int = 0,
    reference: Reference | None = None,
    pairs_file: Path | None = None,
) -> dict[str, Interval]:
    """The `loss`, a mean over the supervised tokens of (`limit`) held-out documents, and PAIR_SCORES of their pairs, of
    which the chosen answer counts in the loss. Rewards need the `reference`. Empty if none of them is readable.
    Pairs go to `pairs_file`, a line each.

    For its interval documents are drawn anew, those about one video together: their losses over their tokens.
    """
    model, parallel = answerer.model, answerer.parallel
    numbers = spread(len(held_out.documents), limit)
    loader, steps = each_once(held_out, numbers, answerer.pool, parallel, answerer.world)
    has_pairs = any(one.rejected is not None for one in held_out.conversations)
    found: list[_Scored] = []
    with evaluating(model):
        for step in range(steps):
            stopping.stop_if(int(sum_over_ranks(torch.tensor(stopping.stop_requested()))))
            for pack in loader.step(is_last=step == steps - 1):
                losses = iter(_losses_by_suffix(model, pack.batch))
                with nullcontext() if reference is None else reference(model):
                    of_base = iter(_losses_by_suffix(model, pack.batch) if has_pairs and reference else [])
                for document in pack.batch.documents:
                    own = []
                    for is_rejected in document.rejected:
                        loss, tokens = next(losses)
                        own.append(_Suffix(loss, tokens, next(of_base, (0.0, 0))[0], is_rejected))
                    files = files_of(plan.ref for plan in document.media)
                    place = step * parallel.size + pack.slot
                    found.append(_Scored(place, document.sample_ids, files, own, document.conversations))
    in_order = sorted((one for of_rank in all_of(found, parallel.group) for one in of_rank), key=lambda one: one.place)
    if not in_order:
        return {}
    names = tuple(unique_names(f"{one.ids} {one.files}" for one in in_order))
    samples = Samples(names, clusters_of([one.files for one in in_order]))
    scores = {"loss": ratio_interval([_sums(one.learnt) for one in in_order], samples), **_source_losses(in_order)}
    pairs = [
        (number, chosen, rejected)
        for number, one in enumerate(in_order)
        for chosen, rejected in pairwise(one.suffixes)
        if rejected.is_rejected
    ]
    if pairs:
        names = tuple(unique_names(f"{names[number]} pair" for number, _, _ in pairs))
        samples = Samples(names, clusters_of([in_order[number].files for number, _, _ in pairs]))
        of_pairs = _pair_scores([pair for _, *pair in pairs], samples)
        scores |= {name: of_pairs[name] for name in (PAIR_SCORES if reference else PAIR_SCORES[:1])}
        texts = [text for one in in_order for text in one.conversations if text.rejected is not None]
        if pairs_file is not None and answerer.world.is_main:
            lines = [_pair_line(text, c, r, bool(reference)) for text, (_, c, r) in zip(texts, pairs, strict=True)]
            replace_text(pairs_file, "".join(map(as_text, lines)))
    return scores


def _source_losses(documents: Sequence[_Scored]) -> dict[str, Interval]:
    """The loss of each source, if there are several."""
    by_source: dict[str, list[_Suffix]] = {}
    for document in documents:
        for suffix, conversation in zip(document.learnt, document.conversations, strict=True):
            by_source.setdefault(conversation.source, []).append(suffix)
    sums = {name: _sums(own) for name, own in sorted(by_source.items()) if len(by_source) > 1}
    return {f"loss/source/{name}": Interval.point(loss / max(1.0, tokens)) for name, (loss, tokens) in sums.items()}


def _sums(suffixes: Sequence[_Suffix]) -> tuple[float, float]:
    """Summed loss and number of tokens."""
    return math.fsum(one.loss for one in suffixes), float(sum(one.tokens for one in suffixes))


def _pair_scores(pairs: Sequence[Sequence[_Suffix]], samples: Samples) -> dict[str, Interval]:
    """PAIR_SCORES of pairs of a chosen and a rejected suffix."""
    gained = [chosen.gain - rejected.gain for chosen, rejected in pairs]
    likelier = [_won(rejected.loss - chosen.loss) for chosen, rejected in pairs]
    each = likelier, [_won(margin) for margin in gained], gained
    return {name: mean_interval(one, samples) for name, one in zip(PAIR_SCORES, each, strict=True)}


class _Suffix(NamedTuple):
    """What the model makes of a suffix: summed loss and number of its supervised tokens, and the reference's loss."""

    loss: float
    tokens: int
    reference_loss: float
    is_rejected: bool

    @property
    def gain(self) -> float:
        """By how much training has raised the log-probability."""
        return self.reference_loss - self.loss


def _pair_line(pair: Conversation, chosen: _Suffix, rejected: _Suffix, has_reference: bool) -> Line:
    """A line of the held-out pairs: both answers and what the model makes of them. `margin` is (c - c0) - (r - r0),
    without a reference c - r."""
    asked, answer = pair.turns[-2:]
    line: Line = {"id": pair.id, "prompt": asked.text, "chosen": answer.text, "rejected": pair.rejected}
    line |= {"source": pair.origin, "media": [ref.name for ref in pair.media]}
    for which, one in {"chosen": chosen, "rejected": rejected}.items():
        line |= {f"log_p_{which}": -one.loss, f"tokens_{which}": one.tokens}
        line |= {f"reference_{which}": -one.reference_loss} if has_reference else {}
    return {**line, "margin": chosen.gain - rejected.gain}


class _Scored(NamedTuple):
    """A held-out document, and what the model makes of its suffixes."""

    place: int
    """In the order of all."""
    ids: tuple[str, ...]
    files: tuple[str, ...]
    suffixes: list[_Suffix]
    conversations: tuple[Conversation, ...]

    @property
    def learnt(self) -> list[_Suffix]:
        """One for each conversation: that with its own answer."""
        return [one for one in self.suffixes if not one.is_rejected]


def _won(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _losses_by_suffix(model: VideoLanguageModel, batch: Batch) -> list[tuple[float, int]]:
    """Summed loss of each suffix's supervised tokens, and their number."""
    chunks = model.chunks(model(batch), batch.target_ids_N)
    losses_N = torch.cat([F.cross_entropy(model.head(x).float(), y, reduction="none") for x, y in chunks]).cpu()
    counts = batch.target_suffix_N.cpu().bincount(minlength=batch.num_suffixes).tolist()
    return [(math.fsum(part.tolist()), len(part)) for part in losses_N.split(counts)]


@dataclass(frozen=True)
class BestScore:
    """The best value of a metric so far (`eval.best_metric`), in a file, so that a resumed run knows it."""

    file: Path
    metric: str
    world: World
    questions: str = ""
    """Digest of what is asked and of how it is scored. A value with another digest is not compared."""

    @staticmethod
    def of(config: Config, held_out: Dataset, world: World) -> BestScore:
        """That of a run."""
        asked, limits = questions_digest(held_out, config.eval.max_samples), config.eval
        rules = f"{SCORING_VERSION}:{asked}:{limits.max_new_tokens}:{limits.max_samples}:{limits.japanese}"
        return BestScore(config.output_dir / "best.json", config.eval.best_metric, world, digest(rules))

    def is_beaten_by(self, scores: Mapping[str, Interval]) -> bool:
        """Whether `scores` are the best so far: the lowest `loss`, the highest value of another metric. If another
        number of samples could be read, the score on more samples is the best. Every process must call it.

        Raises:
            UserError: the metric is not among the scores.
        """
        if self.metric not in scores:
            raise UserError(f"eval.best_metric = {self.metric!r}: not among the scores, {', '.join(scores)}")
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.world.is_main and self.file.exists() else {}
        best = all_of(known)[0]
        if not best:
            return True
        before = f"{self.file}: {best.get('metric')} {best.get('value')} of step {best.get('step')} was taken on other"
        if best.get("metric") != self.metric or best.get("questions") != self.questions:
            if best.get("metric") == self.metric:
                logger.info("%s questions, or by other rules: the best score starts anew", before)
            return True
        value, samples = scores[self.metric].value, self._samples(scores)
        if samples != best["samples"]:
            which = "this one, on more samples, is the best" if samples > best["samples"] else "it stays the best"
            logger.info("%s samples (%d were readable then, %d now): %s", before, best["samples"], samples, which)
            return samples > int(best["samples"])
        return value < best["value"] if self.metric == "loss" else value > best["value"]

    def is_stale(self, step: int, every_steps: int, patience: int) -> bool:
        """Whether the best score is older than `patience` evaluations at `step`. Every process must call it."""
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.world.is_main and self.file.exists() else {}
        best = all_of(known)[0]
        return bool(best) and math.ceil((step - best["step"]) / every_steps) >= patience

    def record(self, step: int, scores: Mapping[str, Interval]) -> None:
        """Write `scores` as the best."""
        if self.world.is_main:
            line = {"step": step, "metric": self.metric, "value": scores[self.metric].value}
            line |= {"samples": self._samples(scores), "questions": self.questions}
            replace_text(self.file, json.dumps(line) + "\n")

    def _samples(self, scores: Mapping[str, Interval]) -> int:
        """How many samples the score was taken on; 0 for that of a group."""
        parts = scores[self.metric].parts
        return 0 if parts is None else len(parts.samples.names)
