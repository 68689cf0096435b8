"""The training loop, the only one. `Trainer` makes the parts of a run in order, `Trainer.train` loops over steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vft.common.console import stderr_console
from vft.common.files import digest
from vft.common.rules import VERSION
from vft.common.task import Task
from vft.config import run as configs
from vft.config.run import Config
from vft.data.dataset import Dataset, describe_prompts
from vft.data.loader import LoadedPack
from vft.data.workers import WorkerPool
from vft.distributed.heartbeat import main_process_work, report_progress
from vft.distributed.process_group import (
    DataParallel,
    World,
    all_of,
    make_mesh,
    process_group,
    same_on_all_ranks,
    sum_over_ranks,
)
from vft.distributed.signals import Stopped, deferred, stop_if, stop_requested, stopped_by
from vft.inference.engine import Answerer
from vft.inference.evaluate import BestScore, evaluate, questions_digest, write_score_parts
from vft.models.base import Objective
from vft.models.experts import expert_loads, routing_loss
from vft.models.flops import FlopCounter
from vft.parallel.parallelize import sync_gradients
from vft.preparation.documents import load_held_out, load_training, report_classes, training_streams, warn_of_overlap
from vft.preparation.memory import largest_rows, memory_preflight, resolve
from vft.preparation.run import load, open_for_training, start_adapters
from vft.preparation.synthetic import filled_row
from vft.reporting import write_report
from vft.reporting.monitor import (
    ROUTING,
    Monitor,
    Profiler,
    Tally,
    describe_run,
    describe_step,
    require_boards,
    trainable_table,
)
from vft.training import checkpoint as checkpoints
from vft.training.checks import (
    NonFiniteSteps,
    check_first_step,
    check_identity,
    check_output_dir,
    check_steps,
    locked_folder,
    warn_of_benchmarks,
    warn_of_epochs,
    warn_of_rates,
    warn_of_weights,
)
from vft.training.export import with_adapter_folder, write_export
from vft.training.losses import cross_entropy
from vft.training.optimizer import build_optimizer, clip, learning_rate, scale_gradients, set_learning_rate
from vft.training.preferences import Preference
from vft.training.reference import computed_once
from vft.training.run_data import RunData

logger = logging.getLogger(__name__)


def run(task: Task, config: Config, world: World, dry: bool = False, objective: Objective = cross_entropy) -> None:
    """Train, or resume the run in the same folder. With `dry` only the memory preflight is run, and nothing written."""
    with ExitStack() as stack:
        trainer = Trainer(task, config, world, objective, stack)
        if dry:
            trainer.memory_preflight()
        else:
            trainer.fit()


class Trainer:
    """A run: its data, its model, and how far it has come. `fit` trains."""

    def __init__(self, task: Task, config: Config, world: World, objective: Objective, stack: ExitStack) -> None:
        """Prepare everything that `fit` uses. `stack` closes the process group, worker processes and archives."""
        config.require_training()
        config = with_adapter_folder(config)
        check_output_dir(config)
        require_boards(config)
        self.task, self.config, self.world, self.objective = task, config, world, objective
        self.prepared = open_for_training(config)
        self.model = self.prepared.model
        encoder = self.prepared.encoder(config.data)
        # Before the process group: the first scan of a large data set may take longer than any timeout of a collective.
        documents = load_training(task, config, encoder)
        self.held_out = load_held_out(task, config, encoder) if config.eval.every_steps else None
        report_classes(documents, self.held_out)
        if self.held_out is not None:
            warn_of_overlap(task, config, self.held_out, documents)
        stack.enter_context(process_group(world, alone=config.parallel.offload != "none"))
        pool = stack.enter_context(WorkerPool(config.data.workers, config.data.decode_timeout_s))
        streams = stack.enter_context(training_streams(task, config, encoder, pool))

        self.largest_rows = largest_rows(documents, documents.pack_plan(config.seed))
        if streams is not None and world.device.type == "cuda":  # the rows of streams are not known in advance
            self.largest_rows.append(filled_row(self.model.processor, config.data, answers=config.answers))
        parallel = resolve(config.parallel, self.model, objective, self.largest_rows, world)
        mesh = make_mesh(world, parallel.shards(world.size))
        self.data_parallel = DataParallel.of(mesh)
        self.data = RunData(config, documents, streams, pool, self.data_parallel, world.device)
        self.max_steps = self.data.count_steps(0)
        """Steps of the whole run."""
        check_steps(config.train, self.max_steps)
        self.step = self.samples = self.saved = 0
        """The step at work, or the last one that was done; samples trained on; step of the newest checkpoint."""
        self.has_updated = False
        """Whether a step has changed the weights."""
        self.non_finite = NonFiniteSteps()
        self.monitor = Monitor(config, self.max_steps, world.is_main)
        self.profiler = Profiler(config, world.rank)
        archives = sum(len(source.shards) for source in self.data.archives)
        self.facts = describe_run(world, documents.num_samples, documents.lengths, archives)
        self.describe(documents.num_samples)

        self.flops = FlopCounter(self.model, parallel.activation_checkpointing)
        self.data.loader.costs = tuple(self.flops.row(work.tokens, work.pairs, work.patches) for work in documents.work)
        load(self.prepared, world.device, mesh, parallel)
        root = config.output_dir / "checkpoints"
        is_reference = isinstance(objective, Preference) and objective.needs_start(config.model)
        if is_reference or not all_of(checkpoints.list_checkpoints(root))[0]:  # else a checkpoint has their values
            start_adapters(self.prepared, config)
        if isinstance(objective, Preference) and is_reference:
            objective.remember(self.model)
        self.optimizer = build_optimizer(self.model, config.train, self.model.components, config.lora)
        self.answerer = None
        if self.held_out is not None:
            info = self.held_out.info
            self.answerer = Answerer(self.model, encoder, config.data, info, pool, world, self.data_parallel)
        same_on_all_ranks("the configuration", digest(configs.dump(config)))
        same_on_all_ranks("the index of the data", self.data.digest)
        same_on_all_ranks("the held-out samples", self.held_out.digest if self.held_out is not None else "")
        self.checkpointer = checkpoints.AsyncCheckpointer(root, self.model, self.optimizer, config.checkpoint, world)

    def describe(self, samples: int) -> None:
        """Show what the run is, and warn of what is likely to be a mistake."""
        shown = ", ".join(f"{name} {fact}" for name, fact in self.facts.items() if name != "software")
        epochs = self.data.epochs_in(self.max_steps)
        logger.info("%s, steps %d%s", shown, self.max_steps, "" if epochs is None else f", epochs {epochs:.3g}")
        warn_of_rates(self.config.train)
        warn_of_epochs(self.config.train, self.max_steps, epochs, samples)
        warn_of_weights(self.config)
        warn_of_benchmarks(self.config)
        if self.world.is_main:
            stderr_console().print(trainable_table(self.prepared.trainable, self.model))

    def fit(self) -> None:
        """Train up to `max_steps` with evaluations and checkpoints, then export."""
        with locked_folder(self.config, self.facts) if self.world.is_main else nullcontext():
            self.data.report_unusable()
            if isinstance(self.objective, Preference) and self.config.reference_once:
                # Before a checkpoint replaces the weights that the reference has.
                self.objective.known = computed_once(self.objective, self.prepared, self.config, self.data, self.world)
            self.resume()
            if self.step < self.max_steps:
                self.memory_preflight()
            else:
                logger.info("nothing left to train: step %d of %d is done", self.step, self.max_steps)
            first = self.step
            self.monitor.start(first)
            try:
                with deferred():
                    with suppress(Stopped):  # by a signal, in all processes after the same step
                        self.train()
                    if self.saved < self.step:
                        self.save()
                    self.checkpointer.wait()
            finally:
                self.checkpointer.close()
                self.monitor.close()
            if name := stopped_by():
                logger.info("%s: stopped after step %d; the same command goes on there", name, self.step)
                return
            self.export()
            report = self.config.output_dir / "report.html"
            if self.world.is_main and (self.step > first or not report.exists()):
                logger.info("wrote %s", write_report(report.parent, self.held_out, self.model.processor))

    def resume(self) -> None:
        """Load the newest checkpoint that is intact, if there is one. Every process takes the one that rank 0 chose."""
        folder = self.config.output_dir
        found = checkpoints.newest_intact(folder / "checkpoints", self.world)
        if found is not None:
            state = checkpoints.load(found, self.model, self.optimizer)
            check_identity(found, state, self.identity)
            self.step = self.saved = state["step"]
            self.samples, self.has_updated = state["samples"], True
            self.data.loader.restore(state)
            self.max_steps = self.data.count_steps(self.step)
            self.show_quarantined()
            self.data.write_quarantine()
            logger.info("going on from %s", found)
        elif self.world.is_main:
            (folder / "best.json").unlink(missing_ok=True)  # of a run that left no checkpoint
        self.checkpointer.check_space_for(self.max_steps - self.step)
        self.monitor.resume_at(self.step, self.max_steps)

    def memory_preflight(self) -> None:
        """Run the largest rows forward and backward: too little memory shows now, not after hours."""
        for row in self.largest_rows:
            sync_gradients(self.model, last=True, adapters_only=self.config.lora is not None)
            logger.info("%s", memory_preflight(self.model, self.objective, row, self.world.device))

    # -------------------------------------------------------------------------------------------------------- loop

    def train(self) -> None:
        """The steps that are left. Raises Stopped in all processes after the same step if one of them got a signal."""
        every = self.config.checkpoint.every_steps
        # The evaluation of the step that the run resumes from is missing if it was killed in it.
        if (self.step or self.config.eval.at_start) and not any(all_of(self.monitor.evaluated)):
            self.evaluate_if_due()
        while self.step < self.max_steps and not self.is_out_of_patience:
            self.step += 1
            stop = self.train_step()
            if every and self.step % every == 0:
                self.save()
            stop_if(stop)
            self.evaluate_if_due()

    def train_step(self) -> int:
        """One optimizer step over `packs_per_step` packs of all processes together. Returns how many of these have been
        asked to stop.

        Raises Stopped, as if the step had not begun, if a signal comes while it waits for data that may be long in
        coming.
        """
        config, loader, step = self.config, self.data.loader, self.step
        self.profiler.before(step)
        tally = Tally(self.world.device)
        rate = learning_rate(config.train, step, self.max_steps)
        set_learning_rate(self.optimizer, rate)
        sums, missing = self.backward(tally)
        # What the host knows is summed in its memory, while the device still computes.
        counted = self.data_parallel.sum(torch.tensor(list(tally.counts.values()))).tolist()
        counts = dict(zip(tally.counts, counted, strict=True))
        # All processes do the same next, also those that share their part of the data with others.
        own = [missing, len(loader.bad.report), int(self.checkpointer.failed), stop_requested()]
        missing, found, failed_saves, stop = sum_over_ranks(torch.tensor(own)).tolist()
        if failed_saves:
            self.checkpointer.wait()  # raises in all processes at the same step
        if missing:
            self.step -= 1
            loader.abandon_step()
            self.optimizer.zero_grad()
            stop_if(1)
        self.samples += counts["samples"]
        if found or not self.samples:
            self.data.exchange_found(self.samples, step == self.max_steps)
            self.show_quarantined()
        # FSDP2 averages gradients over the parts of the data: times their number it is a sum.
        weight, routing = max(counts["weight"], 1), 1 + len(self.objective.figures)
        gradients, norm_on_device = scale_gradients(self.model.parameters(), self.data_parallel.size / weight)
        # The only wait for the device in a step.
        sums = self.data_parallel.sum(sums)
        parts = [norm_on_device.to(sums).view(1), sums[: routing + 1] / weight]
        if len(sums) > routing:
            parts.append(expert_loads(sums[routing + 1 :].unflatten(0, (-1, self.model.config.num_experts))))
        norm, loss, *more = torch.cat(parts).tolist()
        figures = self.objective.named(more[: routing - 1]) | dict(zip(ROUTING, more[routing - 1 :], strict=False))
        clip(gradients, norm, config.train.max_grad_norm)
        skipped = self.non_finite.skips(step, loss, norm, tally.sample_ids)
        if not skipped and counts["weight"]:  # without any, momentum alone would move the weights
            if not self.has_updated:
                check_first_step(self.model, loss, had_media=counts["patches"] > 0)
            self.optimizer.step()
            self.has_updated = True
        self.optimizer.zero_grad()
        line = describe_step(loss, norm, rate, counts, tally, self.world, self.model.compute_dtype, figures)
        self.monitor.step({"step": step, "epoch": loader.epoch, **line})
        self.profiler.after(step)
        return stop

    def backward(self, tally: Tally) -> tuple[Tensor, int]:
        """Add up the gradients of this process's packs of the step. Returns sums over them (of what the objective sums;
        with experts also of the routing loss times the pack's weight, and of each expert's rows, layer by layer), and
        the number of packs for which a stream found nothing before a signal came."""
        config, decoder = self.config, self.model.decoder
        sums, missing = torch.zeros(1, dtype=torch.float64, device=self.world.device), 0
        packs_left = config.train.packs_per_step // self.data_parallel.size
        packs: Iterable[LoadedPack] = self.packs(tally, packs_left)
        if self.objective.looks_ahead:
            packs = list(packs)
            looks = []
            for pack in packs:
                self.seed_dropout(pack)
                looks.append(self.objective.look(self.model, pack.batch))
            self.objective.set_ahead(self.data_parallel.sum(torch.stack(looks).sum(0)))
        for pack in packs:
            packs_left -= 1
            missing += pack.is_missing
            weight = self.objective.weight(pack.batch)
            tally.add(pack.batch, self.flops.count(pack.batch), pack.digest, weight)
            sync_gradients(self.model, last=packs_left == 0, adapters_only=config.lora is not None)
            self.seed_dropout(pack)
            parts, routed = [self.objective(self.model, pack.batch).flatten()], decoder.routed
            loss = parts[0][0]
            if routed:
                # Weighted like the pack's own mean in the loss of the step: what transformers adds to it.
                parts.append(routing_loss(torch.stack(routed)).view(1) * weight)
                parts.extend(rows_G for rows_G, _ in routed)
                loss = loss + decoder.routing_weight * parts[1].sum() if decoder.routing_weight else loss
            loss.backward()
            sums = sums + torch.cat(parts).detach()
        return sums, missing

    def packs(self, tally: Tally, number: int) -> Iterator[LoadedPack]:
        """This process's packs of the step; the time that it waits for them counts."""
        packs = self.data.loader.step(is_last=self.step == self.max_steps)
        for _ in range(number):
            report_progress(f"at step {self.step}, waiting for data")
            with tally.waiting():
                pack = next(packs)
            report_progress(f"at step {self.step}, computing")
            yield pack

    def seed_dropout(self, pack: LoadedPack) -> None:
        """Dropout depends on the pack, not on the process that runs it."""
        torch.manual_seed(int(digest(f"dropout:{self.config.seed}:{self.step}:{pack.slot}"), 16) >> 8)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether `eval.patience` evaluations have passed since the best one, the last of them after this step."""
        limits = self.config.eval
        if not limits.patience or self.held_out is None or self.step % limits.every_steps:
            return False
        best = BestScore.of(self.config, self.held_out, self.world)
        if not best.is_stale(self.step, limits.every_steps, limits.patience):
            return False
        text = "%s has not been better for %d evaluations: stopped after step %d of %d; best/ has the best"
        logger.info(text, limits.best_metric, limits.patience, self.step, self.max_steps)
        return True

    # --------------------------------------------------------------------------------------------- what a run leaves

    def evaluate_if_due(self) -> None:
        """Evaluate if it is time for it: every `eval.every_steps`, and after the last step."""
        if self.held_out is not None and (self.step % self.config.eval.every_steps == 0 or self.step == self.max_steps):
            self.evaluate(self.held_out)

    def evaluate(self, held_out: Dataset) -> None:
        """Write answers and scores on held-out samples, and export the model if they are the best so far."""
        assert self.answerer is not None
        step, limits, folder = self.step, self.config.eval, self.config.output_dir
        report_progress(f"evaluating after step {step}", has_timeout=False)
        name = f"step-{step:06d}"
        file, objective = folder / "predictions" / f"{name}.jsonl", self.objective
        reference = None
        if isinstance(objective, Preference) and self.config.rewards_held_out:
            reference = objective.reference
        scores = evaluate(self.task, self.answerer, held_out, limits, file, reference)
        if self.world.is_main:
            write_score_parts(folder / "scores" / f"{name}.json", scores)
        if step and limits.best_metric:
            best = BestScore.of(self.config, held_out, self.world)
            if best.is_beaten_by(scores):
                self.export(folder / "best")
                best.record(step, scores)
        self.monitor.evaluation(step, scores)  # last: a resumed run takes this line as a sign that all of it is done

    def show_quarantined(self) -> None:
        """Show in the live view how many items are left out."""
        self.monitor.state.num_quarantined = len(self.data.bad)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of what a resumed run must find unchanged; of the held-out samples and of the settings that choose
        them."""
        identity = {"data": self.data.digest, "base": self.prepared.pretrained.fingerprint}
        if self.held_out is not None:
            settings = self.config.eval.model_dump_json(include={"sources", "split"})
            identity |= {"held_out": questions_digest(self.held_out), "held_out_settings": digest(settings)}
        return identity

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What training asks, for an export of a checkpoint. It is not known what streams will ask."""
        return {"prompt": self.task.prompt, **describe_prompts(self.data.documents.prompts)}

    def save(self) -> None:
        """Write a checkpoint to resume from."""
        state = {"rules": VERSION, **self.identity, **self.data.state(), "samples": self.samples}
        state["asked"] = self.asked
        self.checkpointer.save(self.step, state)
        self.saved = self.step
        self.monitor.state.checkpoint = (self.step, time.monotonic())

    @main_process_work("writing an export")
    def export(self, folder: Path | None = None) -> None:
        """Write the adapter, or the whole model, to `folder` or to its place in the run's folder, with facts of the
        training in vft.json beside it. Every process calls it, because tensors are gathered."""
        config = self.config
        target = folder or config.output_dir / ("model" if config.lora is None else "adapter")
        asked = {"prompt": self.task.prompt, **describe_prompts(self.data.prompts())}
        write_export(self.prepared, config, target, self.step, asked, self.world.is_main)
        logger.info("wrote %s", target)
