"""The training loop, the only one. `run` makes the parts of a run in order, `Trainer.train` is the loop over steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vft.common.console import stderr_console
from vft.common.errors import UserError
from vft.common.files import digest
from vft.common.rules import VERSION
from vft.common.task import Task
from vft.common.types import Batch
from vft.config import run as configs
from vft.config.run import Config
from vft.data.dataset import Dataset, describe_prompts
from vft.data.streaming.sources import Streams
from vft.data.workers import WorkerPool
from vft.distributed.heartbeat import report_progress
from vft.distributed.process_group import (
    DataParallel,
    World,
    all_of,
    make_mesh,
    process_group,
    same_on_all_ranks,
)
from vft.distributed.signals import Stopped, deferred, stop_if, stop_requested, stopped_by
from vft.inference.engine import Answerer
from vft.models.base import Objective, VideoLanguageModel
from vft.models.flops import FlopCounter
from vft.parallel.parallelize import sync_gradients
from vft.preparation.documents import load_held_out, load_training, training_streams, warn_of_overlap
from vft.preparation.memory import longest_row, memory_preflight, resolve_checkpointing
from vft.preparation.run import PreparedModel, load, open_for_training, start_adapters
from vft.reporting import write_card, write_report
from vft.reporting.loggers import require_boards
from vft.reporting.metrics_log import Monitor
from vft.reporting.profiler import Profiler
from vft.reporting.run_facts import describe_run, trainable_table
from vft.reporting.step_metrics import StepResult, Stopwatch, Tally, describe_step
from vft.training import checkpoint as checkpoints
from vft.training.checkpoint_writer import AsyncCheckpointer
from vft.training.checks import (
    NonFiniteSteps,
    check_first_step,
    check_identity,
    check_output_dir,
    check_warmup,
    locked_folder,
    warn_of_benchmarks,
    warn_of_weights,
)
from vft.training.evaluator import Evaluator
from vft.training.export import export
from vft.training.losses import cross_entropy
from vft.training.optimizer import build_optimizer, learning_rate, scale_and_clip, set_learning_rate
from vft.training.run_data import RunData

logger = logging.getLogger(__name__)


def run(task: Task, config: Config, world: World, dry: bool = False, objective: Objective = cross_entropy) -> None:
    """Train, or resume the run in the same folder. With `dry` only the memory preflight is run, and nothing written."""
    config.require_training()
    check_output_dir(config)
    require_boards(config)
    prepared = open_for_training(config)
    encoder = prepared.encoder(config.data)
    # Before the process group: the first scan of a large data set may take longer than any timeout of a collective.
    documents = load_training(task, config, encoder)
    held_out = load_held_out(task, config, encoder) if config.eval.every_steps else None
    if held_out is not None:
        warn_of_overlap(task, config, held_out, documents)
    with (
        process_group(world, alone=config.parallel.offload != "none"),
        WorkerPool(config.data.workers, config.data.decode_timeout_s) as pool,
        training_streams(task, config, encoder, pool) as streams,
    ):
        trainer = make_trainer(task, config, world, prepared, documents, streams, held_out, pool, objective)
        if dry:
            trainer.memory_preflight()
        else:
            trainer.fit()


def make_trainer(
    task: Task,
    config: Config,
    world: World,
    prepared: PreparedModel,
    documents: Dataset,
    streams: Streams | None,
    held_out: Dataset | None,
    pool: WorkerPool,
    objective: Objective,
) -> Trainer:
    """The parts of a run: data, model with its weights, optimizer, and what records and saves the run."""
    model, root = prepared.model, config.output_dir / "checkpoints"
    mesh = make_mesh(world, config.parallel.shard)
    data_parallel = DataParallel.of(mesh)
    data = RunData.of(config, documents, streams, pool, data_parallel)
    max_steps = data.count_steps(0)
    if not max_steps:
        raise UserError(f"train.epochs = {config.train.epochs}: by repeats no record comes in so few; raise either")
    check_warmup(config, max_steps)
    monitor = Monitor(config, max_steps, world.is_main)

    archives = sum(len(source.shards) for source in streams.archives) if streams is not None else 0
    facts = describe_run(world, documents.num_samples, documents.lengths, archives)
    shown = ", ".join(f"{name} {fact}" for name, fact in facts.items() if name != "software")
    logger.info("%s, steps %d", shown, max_steps)
    warn_of_weights(config)
    warn_of_benchmarks(config)
    if world.is_main:
        stderr_console().print(trainable_table(prepared.trainable, model))

    row, parallel = longest_row(documents, data.plan), config.parallel
    if parallel.memory_budget_gib is not None:
        parallel = resolve_checkpointing(parallel, model, objective, row, world)
    flops = FlopCounter(model, parallel.activation_checkpointing)
    data.loader.schedule.costs = tuple(flops.row(*planned.work) for planned in documents.documents)

    load(prepared, world.device, mesh, parallel)
    if not all_of(checkpoints.list_checkpoints(root))[0]:  # else the checkpoint has the values of the adapters
        start_adapters(prepared, config)
    optimizer = build_optimizer(model, config.train, model.components, config.lora)
    evaluator = None
    if held_out is not None:
        answerer = Answerer(model, documents.encoder, config.data, held_out.info, pool, world, data_parallel)
        evaluator = Evaluator(task, config, held_out, answerer)

    same_on_all_ranks("the configuration", digest(configs.dump(config)))
    same_on_all_ranks("the index of the data", data.digest)
    same_on_all_ranks("the held-out samples", held_out.digest if held_out is not None else "")
    return Trainer(
        task=task,
        config=config,
        world=world,
        data_parallel=data_parallel,
        prepared=prepared,
        objective=objective,
        data=data,
        optimizer=optimizer,
        flops=flops,
        longest_row=row,
        evaluator=evaluator,
        checkpointer=AsyncCheckpointer(root, model, optimizer, config.checkpoint, world),
        monitor=monitor,
        profiler=Profiler.of(config.log, config.output_dir, world),
        non_finite=NonFiniteSteps(),
        facts=facts,
        progress=Progress(max_steps),
    )


@dataclass
class Progress:
    """How far a run has come."""

    max_steps: int
    """Steps of the whole run."""
    step: int = 0
    """The step at work, or the last one that was done."""
    samples: int = 0
    """Trained on so far."""
    saved: int = 0
    """Step of the newest checkpoint; 0 if there is none."""
    has_updated: bool = False
    """Whether a step has changed the weights."""


class AbandonedStep(Exception):
    """Raised in all processes if a signal comes while a step waits for data that may be long in coming."""


@dataclass(frozen=True)
class Trainer:
    """The parts of a run. `fit` uses them."""

    task: Task
    config: Config
    world: World
    data_parallel: DataParallel
    prepared: PreparedModel
    objective: Objective
    data: RunData
    optimizer: torch.optim.Optimizer
    flops: FlopCounter
    longest_row: Batch | None
    """The first epoch's longest row, for the memory preflight; None if everything is streamed."""
    evaluator: Evaluator | None
    """None without evaluation."""
    checkpointer: AsyncCheckpointer
    monitor: Monitor
    profiler: Profiler | None
    non_finite: NonFiniteSteps
    facts: dict[str, Any]
    """What the run is, for run.json."""
    progress: Progress

    @property
    def model(self) -> VideoLanguageModel:
        """What is trained."""
        return self.prepared.model

    def fit(self) -> None:
        """Train up to `max_steps` with evaluations and checkpoints, then export."""
        with self.start_folder():
            self.resume()
            self.memory_preflight()
            first = self.progress.step
            if not self.train_and_save():
                return
            self.export()
            report = self.config.output_dir / "report.html"
            if self.world.is_main and (self.progress.step > first or not report.exists()):
                held_out = self.evaluator.held_out if self.evaluator is not None else None
                logger.info("wrote %s", write_report(report.parent, held_out, self.model.processor))

    # ------------------------------------------------------------------------------------------------------- start

    @contextmanager
    def start_folder(self) -> Iterator[None]:
        """Lock the run's folder, write what the run is, and report which samples it leaves out."""
        with locked_folder(self.config, self.facts) if self.world.is_main else nullcontext():
            self.data.report_unusable()
            yield

    def resume(self) -> None:
        """Load the newest checkpoint that is intact, if there is one. Every process takes the one that rank 0 chose."""
        progress, folder = self.progress, self.config.output_dir
        found = checkpoints.newest_intact(folder / "checkpoints", self.world)
        if found is not None:
            state = checkpoints.load(found, self.model, self.optimizer)
            check_identity(found, state, self.identity)
            progress.step = progress.saved = state["step"]
            progress.samples, progress.has_updated = state["samples"], True
            self.data.loader.restore(state)
            progress.max_steps = self.data.count_steps(progress.step)
            self.show_quarantined()
            self.data.write_quarantine()
            logger.info("going on from %s", found)
        elif self.world.is_main:
            (folder / "best.json").unlink(missing_ok=True)  # of a run that left no checkpoint
        self.checkpointer.check_space_for(progress.max_steps - progress.step)
        self.monitor.resume_at(progress.step, progress.max_steps)

    def memory_preflight(self) -> None:
        """Run the longest row forward and backward: too little memory shows now, not after hours."""
        if self.longest_row is not None:
            sync_gradients(self.model, last=True, adapters_only=self.config.lora is not None)
            logger.info("%s", memory_preflight(self.model, self.objective, self.longest_row, self.world.device))

    # -------------------------------------------------------------------------------------------------------- loop

    def train_and_save(self) -> bool:
        """`train`, and a checkpoint of the last step. Returns False if a signal stopped the run."""
        progress = self.progress
        self.monitor.start(progress.step)
        try:
            with deferred():
                is_stopped = False
                try:
                    self.train()
                except Stopped:  # in all processes, after the same step
                    is_stopped = True
                if progress.saved < progress.step:
                    self.save()
                self.checkpointer.wait()
                if is_stopped:
                    logger.info(
                        "%s: stopped after step %d; the same command goes on there", stopped_by(), progress.step
                    )
                return not is_stopped
        finally:
            self.checkpointer.close()
            self.monitor.close()

    def train(self) -> None:
        """The steps that are left. Raises Stopped in all processes after the same step if one of them got a signal."""
        progress, every = self.progress, self.config.checkpoint.every_steps
        # The evaluation of the step that the run resumes from is missing if it was killed in it.
        if (progress.step or self.config.eval.at_start) and not any(all_of(self.monitor.evaluated)):
            self.evaluate_if_due()
        while progress.step < progress.max_steps:
            progress.step += 1
            try:
                stop = self.train_step()
            except AbandonedStep:
                progress.step -= 1
                self.data.loader.abandon_step()
                self.optimizer.zero_grad()
                stop_if(1)
            if every and progress.step % every == 0:
                self.save()
            stop_if(stop)
            self.evaluate_if_due()

    def train_step(self) -> int:
        """One optimizer step over `packs_per_step` packs of all processes together. Returns how many of these have been
        asked to stop."""
        progress, step = self.progress, self.progress.step
        if self.profiler is not None:
            self.profiler.before(step)
        watch = Stopwatch()
        rate = learning_rate(self.config.train, step, progress.max_steps)
        set_learning_rate(self.optimizer, rate)
        result = self.forward_backward(watch)
        skipped = self.non_finite.skips(step, result.loss, result.grad_norm, result.sample_ids)
        if not skipped and result.counts["num_targets"]:  # without any, momentum alone would move the weights
            if not progress.has_updated:
                check_first_step(self.model, result.loss, had_media=result.counts["patches"] > 0)
            self.optimizer.step()
            progress.has_updated = True
        self.optimizer.zero_grad()
        line = describe_step(result, watch, rate, self.world.device, self.world.size)
        self.monitor.step({"step": step, "epoch": self.data.loader.epoch, **line})
        if self.profiler is not None and self.profiler.after(step):
            logger.info("wrote %s", self.profiler.file)
        return result.counts["stop"]

    def forward_backward(self, watch: Stopwatch) -> StepResult:
        """Gradients of the mean loss over the step's supervised tokens, clipped."""
        config, device, loader, progress = self.config, self.world.device, self.data.loader, self.progress
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        tally, missing = Tally(), 0
        packs_left = config.train.packs_per_step // self.data_parallel.size
        packs = loader.step()
        while packs_left:
            since = time.perf_counter()
            report_progress(f"at step {progress.step}, waiting for data")
            pack = next(packs)
            report_progress(f"at step {progress.step}, computing")
            watch.waiting(since)
            packs_left -= 1
            missing += pack.is_missing
            tally.add(pack.batch, self.flops.count(pack.batch), pack.digest)
            batch = pack.batch.to(device)
            sync_gradients(self.model, last=packs_left == 0, adapters_only=config.lora is not None)
            # Dropout depends on the pack, not on the process that runs it.
            torch.manual_seed(int(digest(f"dropout:{config.seed}:{progress.step}:{pack.slot}"), 16) >> 8)
            loss = self.objective(self.model, batch)
            loss.backward()
            loss_sum += loss.detach()
        next(packs, None)  # lets the loader note the end of the step
        tally.counts |= {"bad": len(loader.report.bad), "found": len(loader.report), "missing": missing}
        tally.counts |= {"failed_saves": int(self.checkpointer.failed), "stop": stop_requested()}
        totals = self.data_parallel.sum(torch.tensor(list(tally.counts.values()), device=device))
        counts = dict(zip(tally.counts, totals.tolist(), strict=True))
        total_loss = float(self.data_parallel.sum(loss_sum))
        if counts["failed_saves"]:
            self.checkpointer.wait()  # raises in all processes at the same step
        if counts["missing"]:
            raise AbandonedStep
        progress.samples += counts["samples"]
        if counts["found"] or not progress.samples:
            self.data.exchange_found(progress.samples, progress.step == progress.max_steps)
            self.show_quarantined()
        targets = max(counts["num_targets"], 1)
        # FSDP2 averages gradients over the parts of the data: times their number it is a sum.
        scale = self.data_parallel.size / targets
        norm = scale_and_clip(self.model.parameters(), scale, config.train.max_grad_norm)
        return StepResult(total_loss / targets, counts, norm, tuple(tally.sample_ids))

    # --------------------------------------------------------------------------------------------- what a run leaves

    def evaluate_if_due(self) -> None:
        """Evaluate if it is time for it after this step."""
        if self.evaluator is not None and self.evaluator.is_due(self.progress.step, self.progress.max_steps):
            self.evaluate(self.evaluator)

    def evaluate(self, evaluator: Evaluator) -> None:
        """Record the scores on held-out samples, and export the model if they are the best so far."""
        step = self.progress.step
        scores = evaluator.evaluate(step)
        best = evaluator.best() if step else None
        if best is not None and best.is_beaten_by(scores):
            self.export(self.config.output_dir / "best")
            best.record(step, scores)
        self.monitor.evaluation(step, scores)  # last: a resumed run takes this line as a sign that all of it is done

    def show_quarantined(self) -> None:
        """Show in the live view how many items are left out."""
        self.monitor.state.num_quarantined = len(self.data.bad)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of what a resumed run must find unchanged."""
        held_out = self.evaluator.identity if self.evaluator is not None else {}
        return {"data": self.data.digest, "base": self.prepared.pretrained.fingerprint, **held_out}

    def save(self) -> None:
        """Write a checkpoint to resume from."""
        progress = self.progress
        state = {"rules": VERSION, **self.identity, **self.data.state(), "samples": progress.samples}
        self.checkpointer.save(progress.step, state)
        progress.saved = progress.step
        self.monitor.state.checkpoint = (progress.step, time.monotonic())

    def export(self, folder: Path | None = None) -> None:
        """Export the adapter, or the whole model, to `folder` or to its place in the run's folder."""
        run_folder, pretrained, step = self.config.output_dir, self.prepared.pretrained, self.progress.step
        target = folder or run_folder / ("model" if self.config.lora is None else "adapter")
        prompts = describe_prompts(self.data.prompts())
        export(self.model, pretrained, self.config, self.task, prompts, step, target, self.world.is_main)
        if self.world.is_main:
            write_card(run_folder, target, step, pretrained)
        logger.info("wrote %s", target)
