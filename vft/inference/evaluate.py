"""Evaluation on held-out samples: the task's scores of the answers, and the loss beside them."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from vft.common.files import digest, replace_text
from vft.common.scores import Interval, Samples, clusters_of
from vft.common.task import Answer, Task, files_of
from vft.common.types import IGNORE_INDEX, Document
from vft.common.unique import unique_names
from vft.config.run import Config, EvalConfig
from vft.data.dataset import Dataset
from vft.data.loader import Loader
from vft.data.packing import PackPlan
from vft.data.workers import WorkerPool
from vft.distributed import signals as stopping
from vft.distributed.process_group import DataParallel, World, all_of, make_mesh, process_group, sum_over_ranks
from vft.inference.answers_file import as_text, evaluation_line
from vft.inference.engine import Answerer, Failure
from vft.inference.generate import Sampling
from vft.metrics import parts_to_json, ratio_interval
from vft.models.base import VideoLanguageModel
from vft.preparation.documents import load_held_out, questions, spread, warn_of_overlap
from vft.preparation.run import DTYPES, load_for_inference, open_for_inference

logger = logging.getLogger(__name__)


def evaluate(
    task: Task, answerer: Answerer, held_out: Dataset, settings: EvalConfig, file: Path
) -> dict[str, Interval]:
    """Scores of the task on (`max_samples`) held-out documents and the loss on them. Counts stand beside them:
    `answered`, `unreadable`, and `cut_off`, the answers that ended at `max_new_tokens` or with the model's context.

    The answers go to `file`, a line each. Every process must call it; all get the same scores.
    """
    limit = settings.max_samples
    asked = questions(held_out.conversations, limit)
    try:
        with torch.compiler.set_stance("force_eager"):  # training's graphs would be compiled anew for these shapes
            results = list(answerer.answers(asked, Sampling(settings.max_new_tokens), settings.batch_size))
            loss = held_out_loss(answerer.model, held_out, answerer.pool, answerer.world, answerer.parallel, limit)
    finally:
        for module in answerer.model.modules():
            if isinstance(module, FSDPModule):
                # Without a backward pass the root's weights stay gathered (and those of layers that are not resharded
                # after a forward pass), in tensors that the optimizer and checkpoints know nothing of.
                module.reshard()
    answers = [result for result in results if isinstance(result, Answer)]
    failures = [result for result in results if isinstance(result, Failure)]
    if failures:
        logger.warning("%d of %d questions cannot be asked: %s", len(failures), len(asked), failures[0].message)
    if answerer.world.is_main:
        replace_text(file, "".join(as_text(evaluation_line(answer)) for answer in answers))
    scores = task.score(answers) if answers else {}
    if loss is not None:
        scores["loss"] = loss
    cut_off = sum(answer.is_cut_off for answer in answers)
    if cut_off:
        limit_set = f"eval.max_new_tokens = {settings.max_new_tokens}"
        logger.warning("%s: %d of %d answers were cut off at %s: raise it", file.stem, cut_off, len(answers), limit_set)
    counts = {"answered": len(answers), "unreadable": len(held_out.bad) + len(failures), "cut_off": cut_off}
    return {**scores, **{name: Interval.point(count) for name, count in counts.items()}}


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
            mesh = make_mesh(world, config.parallel.shard)
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


class _PackPlanWithGaps(PackPlan):
    """Leaves the place of a document that cannot be decoded empty: a replacement would count twice."""

    def replacement(self, number: int, epoch: int, attempt: int) -> int | None:
        """There is none."""
        return None


@torch.no_grad()
def held_out_loss(
    model: VideoLanguageModel,
    held_out: Dataset,
    pool: WorkerPool,
    world: World,
    parallel: DataParallel,
    limit: int = 0,
) -> Interval | None:
    """Mean loss over the supervised tokens of (`limit`) held-out documents; None if none of them is readable.

    For its interval documents are drawn anew, those about one video together: their losses over their tokens.
    """
    whole = held_out.pack_plan(seed=0)
    chosen = frozenset(spread(len(whole.lengths), limit))
    weights = tuple(float(i in chosen) for i in range(len(whole.lengths)))
    plan = _PackPlanWithGaps(whole.lengths, whole.samples, weights, whole.pack_tokens, whole.max_samples, whole.seed)
    loader = Loader(held_out, plan, pool, parallel, parallel.size, prefetch_packs=4, last_epoch=0)
    parts: list[tuple[int, list[_DocumentLoss]]] = []
    was_training = model.training
    model.eval()
    try:
        for step in range(math.ceil(len(plan.packs(0)) / parallel.size)):
            stopping.stop_if(int(sum_over_ranks(torch.tensor(stopping.stop_requested(), device=world.device))))
            for pack in loader.step():
                batch = pack.batch.to(world.device)
                chunks = model.chunks(model(batch), batch.target_ids_N)
                with torch.no_grad():
                    losses_N = [F.cross_entropy(model.head(x).float(), y, reduction="none") for x, y in chunks]
                losses = _document_losses(pack.batch.documents, torch.cat(losses_N).tolist())
                parts.append((step * parallel.size + pack.slot, losses))
    finally:
        model.train(was_training)
    in_order = sorted((part for of_rank in all_of(parts, parallel.group) for part in of_rank), key=lambda part: part[0])
    documents = [document for _, losses in in_order for document in losses]
    if not documents:
        return None
    names = tuple(unique_names(document.name for document in documents))
    samples = Samples(names, clusters_of([document.files for document in documents]))
    return ratio_interval([(document.loss_sum, float(document.num_targets)) for document in documents], samples)


class _DocumentLoss(NamedTuple):
    name: str
    files: tuple[str, ...]
    loss_sum: float
    num_targets: int


def _document_losses(documents: Sequence[Document], losses: Sequence[float]) -> list[_DocumentLoss]:
    """Those of each document of a row."""
    found: list[_DocumentLoss] = []
    row = 0
    for document in documents:
        count = int((document.labels_T != IGNORE_INDEX).sum())
        files = files_of(plan.ref for plan in document.media)
        name = f"{document.sample_ids} {files}"
        found.append(_DocumentLoss(name, files, math.fsum(losses[row : row + count]), count))
        row += count
    assert row == len(losses), f"{row} supervised tokens, {len(losses)} losses"
    return found
