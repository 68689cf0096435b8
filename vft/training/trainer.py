"""The only loop: a task and a configuration to trained weights. Read it from `run` down."""

from __future__ import annotations

import math
import sys
import time
from functools import cached_property
from pathlib import Path

import torch

from vft.common.console import STDERR
from vft.common.errors import UserError
from vft.common.files import digest
from vft.common.rules import VERSION
from vft.common.task import Task
from vft.config import run as configs
from vft.config.run import Config
from vft.data.dataset import Dataset
from vft.data.loader import Loader, Streams
from vft.data.packing import Cursor
from vft.data.quarantine import check_bad, write_quarantine
from vft.data.training_prompts import Asked
from vft.data.workers import WorkerPool
from vft.distributed.heartbeat import report_progress
from vft.distributed.process_group import (
    World,
    all_of,
    make_mesh,
    process_group,
    same_on_all_ranks,
    sum_over_ranks,
)
from vft.distributed.signals import Stopped, deferred, stop_if, stop_requested, stopped_by
from vft.inference.engine import Answerer
from vft.inference.evaluate import (
    Best,
    cut_off_warning,
    evaluate,
    keep_parts,
    questions_digest,
)
from vft.inference.generate import Sampling
from vft.models.flops import FlopCounter
from vft.parallel.parallelize import sync_gradients
from vft.preparation.documents import load_held_out, load_training, overlap_with_training, training_streams
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
    NotFinite,
    check_first_step,
    check_identity,
    check_output_dir,
    check_warmup,
    take_folder,
    tell_of_weights,
    warn_of_benchmarks,
)
from vft.training.export import export
from vft.training.losses import cross_entropy
from vft.training.optimizer import build_optimizer, learning_rate, scale_and_clip, set_learning_rate


def run(task: Task, config: Config, world: World, dry: bool = False) -> None:
    """Train, or go on where a run in the same folder stopped; `dry`: only try the longest row."""
    config.require_training()
    check_output_dir(config)
    require_boards(config)
    prepared = open_for_training(config)
    encoder = prepared.encoder(config.data)
    # Before the process group: the first scan of a large set may outlast any time-out of a collective.
    documents = load_training(task, config, encoder)
    held_out = load_held_out(task, config, encoder) if config.eval.every_steps else None
    overlap = overlap_with_training(task, config, held_out, documents) if held_out and world.is_main else ""
    if overlap:
        print(overlap, file=sys.stderr, flush=True)
    with (
        process_group(world, alone=config.parallel.offload != "none"),
        WorkerPool(config.data.workers, config.data.decode_timeout_s) as pool,
        training_streams(task, config, encoder, pool) as streams,
    ):
        trainer = Trainer(task, config, world, prepared, documents, streams, held_out, pool)
        if dry:
            trainer.memory_preflight()
        else:
            trainer.fit()


class Abandoned(Exception):
    """A signal came while a step waited for data that may be long in coming: in all processes, the step is left."""


class Trainer:
    """The state of a run; `fit` is the loop."""

    def __init__(
        self,
        task: Task,
        config: Config,
        world: World,
        prepared: PreparedModel,
        documents: Dataset,
        streams: Streams | None,
        held_out: Dataset | None,
        pool: WorkerPool,
    ) -> None:
        self.task, self.config, self.world, self.pool = task, config, world, pool
        self.prepared, self.checkpoint, self.model = prepared, prepared.pretrained, prepared.model
        self.documents, self.streams, self.held_out = documents, streams, held_out
        if streams is not None:
            documents.bad += [item for archives in streams.archives for item in archives.bad]
        self.folder = config.output_dir
        self.plan = documents.pack_plan(config.seed)
        self.max_steps = self.count_steps(0, Cursor())
        if not self.max_steps:
            raise UserError(f"train.epochs = {config.train.epochs}: by repeats no record comes in so few; raise either")
        check_warmup(config, self.max_steps)
        self.loader = Loader(
            documents=documents,
            plan=self.plan,
            pool=pool,
            ranks=world.size,
            rank=world.rank,
            packs_per_step=config.train.packs_per_step,
            prefetch_packs=config.data.prefetch_packs,
            last_epoch=None if config.train.epochs is None else config.train.epochs - 1,
            streams=streams,
        )
        self.monitor = Monitor(config, self.max_steps, world.is_main)
        self.profiler = Profiler.of(config.log, self.folder, world)
        self.not_finite = NotFinite(self.monitor.say)
        self.has_updated = False
        """Whether a step has changed the weights, in this process or before it."""
        self.step = self.saved = 0
        self.samples = 0
        """Trained on so far."""
        self.prepare_model()

    def count_steps(self, step: int, cursor: Cursor) -> int:
        """Steps of the whole run, of which `step` have been done and brought the data to `cursor`."""
        config = self.config.train
        if config.epochs is None:
            return config.max_steps or 0
        return step + math.ceil(self.plan.packs_left(cursor, config.epochs) / config.packs_per_step)

    # ------------------------------------------------------------------------------------------------ preparation

    def prepare_model(self) -> None:
        """Choose what is trained, shard, read weights, and pick up the newest checkpoint if there is one."""
        config, model = self.config, self.model
        shards = sum(len(one.shards) for one in self.streams.archives) if self.streams else 0
        self.about = describe_run(self.world, self.documents.num_samples, self.documents.lengths, shards)
        told = ", ".join(f"{name} {fact}" for name, fact in self.about.items() if name != "software")
        self.monitor.say(f"{told}, steps {self.max_steps}")
        tell_of_weights(config, self.monitor.say)
        warn_of_benchmarks(config, self.monitor.say)
        if self.world.is_main:
            STDERR.print(trainable_table(self.prepared.trainable, model))
        parallel, say, self.longest = config.parallel, self.monitor.say, longest_row(self.documents, self.plan)
        if parallel.memory_budget_gib is not None:
            parallel = resolve_checkpointing(parallel, model, cross_entropy, self.longest, self.world, say)
        self.flops = FlopCounter(model, parallel.activation_checkpointing)
        self.loader.costs = tuple(self.flops.row(*planned.work) for planned in self.documents.documents)
        load(self.prepared, self.world.device, make_mesh(self.world, config.parallel.shard), parallel)
        if not all_of(checkpoints.list_checkpoints(self.folder / "checkpoints"))[0]:  # else `resume` fills all of it
            start_adapters(self.prepared, config)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, config.train, self.model.components, config.lora)
        same_on_all_ranks("the configuration", digest(configs.dump(config)))
        same_on_all_ranks("the index of the data", self.identity["data"])
        same_on_all_ranks("the held-out samples", self.held_out.digest if self.held_out else "")

    def start_folder(self) -> None:
        """Write what the run is and which samples it leaves out."""
        if self.world.is_main:
            self.lock = take_folder(self.config, self.about)
            write_quarantine(self.folder, self.documents.bad)
        for archives in self.streams.archives if self.streams else ():
            if archives.warning:
                self.monitor.say(f"warning: {archives.name}: {archives.warning}")
        if self.documents.bad:
            self.monitor.say(f"{len(self.documents.bad)} samples can't be used: see {self.folder / 'quarantine.jsonl'}")

    def resume(self) -> None:
        """Load the newest whole checkpoint; every process takes the one that the first chose."""
        root = self.folder / "checkpoints"
        found = checkpoints.newest_good(root, self.world, self.monitor.say)
        if found is not None:
            state = checkpoints.load(found, self.model, self.optimizer)
            check_identity(found, state, self.identity)
            self.step, self.samples = state["step"], state["samples"]
            self.saved = self.step
            self.has_updated = True
            self.loader.restore(state)
            self.max_steps = self.count_steps(self.step, self.loader.cursor)
            self.write_bad()
            self.monitor.say(f"going on from {found}")
        elif self.world.is_main:
            (self.folder / "best.json").unlink(missing_ok=True)  # of a run that left nothing to go on from
        self.saver = AsyncCheckpointer(
            root, self.model, self.optimizer, self.config.checkpoint, self.world, self.monitor.say
        )
        self.saver.expect(self.max_steps - self.step)
        self.monitor.resume_at(self.step, self.max_steps)

    # ------------------------------------------------------------------------------------------------------ loop

    def fit(self) -> None:
        """Steps, evaluations and checkpoints up to `max_steps`, then the export."""
        self.start_folder()
        self.resume()
        self.memory_preflight()
        begun, stopped = self.step, False
        self.monitor.start(self.step)
        try:
            with deferred():
                try:
                    self.train()
                except Stopped:  # in all processes, after the same step
                    stopped = True
                if self.saved < self.step:
                    self.save()
                self.saver.wait()
                if stopped:
                    self.monitor.say(f"{stopped_by()}: stopped after step {self.step}; the same command goes on there")
                    return
        finally:
            self.saver.close()
            self.monitor.close()
        self.export()
        if self.world.is_main and (self.step > begun or not (self.folder / "report.html").exists()):
            self.monitor.say(f"wrote {write_report(self.folder, self.held_out, self.model.processor)}")

    def train(self) -> None:
        """The steps that are left. Stopped, in all processes alike, where one of them is to stop."""
        config, begun = self.config, self.step
        # Also where a kill came between a step's checkpoint and the end of its evaluation.
        due = self.evaluates() and (begun or config.eval.at_start)
        if due and not any(all_of(self.monitor.evaluated)):
            self.evaluate()
        while self.step < self.max_steps:
            self.step += 1
            try:
                stop = self.train_step()
            except Abandoned:
                self.step -= 1
                self.loader.leave_step()
                self.optimizer.zero_grad()
                stop_if(1)
            if config.checkpoint.every_steps and self.step % config.checkpoint.every_steps == 0:
                self.save()
            stop_if(stop)
            if self.evaluates():
                self.evaluate()

    def evaluates(self) -> bool:
        """Whether an evaluation belongs to this step: every so many, and the last."""
        every = self.config.eval.every_steps
        return every > 0 and (self.step % every == 0 or self.step == self.max_steps)

    def memory_preflight(self) -> None:
        """Try the longest row: what doesn't fit in memory shows now, not after hours."""
        if self.longest is not None:
            sync_gradients(self.model, last=True, adapters_only=self.config.lora is not None)
            self.monitor.say(memory_preflight(self.model, cross_entropy, self.longest, self.world.device))

    def train_step(self) -> int:
        """One optimizer step over `packs_per_step` packs of all processes together; how many of these are to stop."""
        if self.profiler is not None:
            self.profiler.before(self.step)
        watch = Stopwatch()
        rate = learning_rate(self.config.train, self.step, self.max_steps)
        set_learning_rate(self.optimizer, rate)
        result = self.forward_backward(watch)
        skipped = self.not_finite.skips(self.step, result.loss, result.grad_norm, result.sample_ids)
        if not skipped and result.counts["num_targets"]:  # without any, momentum alone would move the weights
            if not self.has_updated:
                had_media = result.counts["patches"] > 0
                check_first_step(self.model, result.loss, had_media, self.monitor.say)
            self.optimizer.step()
            self.has_updated = True
        self.optimizer.zero_grad()
        line = describe_step(result, watch, rate, self.world.device, self.world.size)
        self.monitor.step({"step": self.step, "epoch": self.loader.epoch, **line})
        if self.profiler is not None and self.profiler.after(self.step):
            self.monitor.say(f"wrote {self.profiler.file}")
        return result.counts["stop"]

    def forward_backward(self, watch: Stopwatch) -> StepResult:
        """Gradients of the mean loss over the step's supervised tokens, clipped."""
        device, world = self.world.device, self.world
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        tally, missing = Tally(), 0
        packs_left = self.config.train.packs_per_step // world.size
        packs = self.loader.step()
        while packs_left:
            since = time.perf_counter()
            report_progress(f"at step {self.step}, waiting for data")
            pack = next(packs)
            report_progress(f"at step {self.step}, computing")
            watch.waiting(since)
            packs_left -= 1
            missing += pack.is_missing
            tally.add(pack.batch, self.flops.count(pack.batch), pack.digest)
            batch = pack.batch.to(device)
            sync_gradients(self.model, last=packs_left == 0, adapters_only=self.config.lora is not None)
            # Dropout depends on the pack, not on the process that happens to run it.
            torch.manual_seed(int(digest(f"dropout:{self.config.seed}:{self.step}:{pack.slot}"), 16) >> 8)
            loss = cross_entropy(self.model, batch)
            loss.backward()
            loss_sum += loss.detach()
        next(packs, None)  # lets the loader note that the step is over
        found = {"bad": len(self.loader.found.bad), "found": len(self.loader.found), "missing": missing}
        tally.counts |= {**found, "failed_saves": int(self.saver.failed), "stop": stop_requested()}
        totals = sum_over_ranks(torch.tensor(list(tally.counts.values()), device=device))
        counts = dict(zip(tally.counts, totals.tolist(), strict=True))
        total_loss = float(sum_over_ranks(loss_sum))
        if counts["failed_saves"]:
            self.saver.wait()  # all processes raise at the same step
        if counts["missing"]:
            raise Abandoned
        self.samples += counts["samples"]
        if counts["found"] or not self.samples:
            self.gather_found()
        targets = max(counts["num_targets"], 1)
        # FSDP2 averages over the processes: their number makes it a sum again.
        norm = scale_and_clip(self.trainable, world.size / targets, self.config.train.max_grad_norm)
        return StepResult(total_loss / targets, counts, norm, tuple(tally.sample_ids))

    # --------------------------------------------------------------------------------------------- what is left

    def gather_found(self) -> None:
        """What any process found becomes known to all; too much that is bad ends the run, and a stream without
        anything."""
        loader, limit = self.loader, self.config.data.max_bad_fraction
        found = all_of(loader.found)
        fresh = loader.learn(found)
        if fresh:
            self.write_bad()
        for item in fresh:
            if item.reason == "archive":
                self.monitor.say(f"warning: {item.message}")
        for text in (text for one in found for text in one.notes):
            self.monitor.say(f"warning: {text}")
        known = list(loader.known_bad.values())
        if self.streams is None:
            bad = [*self.documents.bad, *known]
            check_bad(bad, self.documents.num_samples + len(self.documents.bad), limit)
            return
        exhausted = [source for one in found for source in one.exhausted]
        if not self.samples and self.step == self.max_steps:
            exhausted += (one.name for one in self.streams.archives)
        if exhausted:
            given = sum(all_of(loader.given[exhausted[0]]))
            raise self.streams.nothing_in(exhausted[0], known, given)
        loader.check_streams(self.samples, limit)

    def write_bad(self) -> None:
        """quarantine.jsonl: what reading and scanning left out, then what failed to decode."""
        if self.world.is_main:
            bad = [*self.documents.bad, *self.loader.known_bad.values()]
            write_quarantine(self.folder, bad)
            self.monitor.state.num_quarantined = len(bad)

    def evaluate(self) -> None:
        """Scores on held-out samples."""
        assert self.held_out is not None
        settings = self.config.eval
        report_progress(f"evaluating after step {self.step}", has_timeout=False)
        answerer = Answerer(
            self.model, self.documents.encoder, self.config.data, self.held_out.info, self.pool, self.world
        )
        sampling = Sampling(max_new_tokens=settings.max_new_tokens)
        answers = self.folder / "predictions" / f"step-{self.step:06d}.jsonl"
        scores = evaluate(
            self.task, answerer, self.held_out, sampling, settings.batch_size, settings.max_samples, answers
        )
        if self.world.is_main:
            keep_parts(self.folder / "scores" / f"step-{self.step:06d}.json", scores)
        if line := cut_off_warning(scores, settings.max_new_tokens):
            self.monitor.say(line)
        if settings.best_metric and self.step:
            best = Best.of(self.config, self.held_out, self.world, self.monitor.say)
            if best.is_beaten(scores):
                self.export(self.folder / "best")
                best.record(self.step, scores)
        self.monitor.evaluation(self.step, scores)  # last: a run that goes on takes the line for the whole of it

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of what a resumed run must find unchanged."""
        data = self.documents.digest
        if self.streams is not None:
            data = digest(f"{data}{[one.digest for one in self.streams.archives]}")
        found = {"data": data, "base": self.checkpoint.fingerprint}
        if self.held_out is not None:
            settings = self.config.eval.model_dump_json(include={"sources", "split"})
            found |= {"held_out": questions_digest(self.held_out), "held_out_settings": digest(settings)}
        return found

    def save(self) -> None:
        """A checkpoint to resume from."""
        loader = self.loader.state()
        loader["streams"] = {name: at for part in all_of(loader["streams"]) for name, at in part.items()}
        state = {"rules": VERSION, **self.identity, **loader, "samples": self.samples}
        self.saver.save(self.step, state)
        self.saved = self.step
        self.monitor.state.checkpoint = (self.step, time.monotonic())

    def asked(self) -> Asked:
        """What the records ask; of streams those that came since the start. Every process calls it."""
        asked = Asked()
        asked.add(self.documents.conversations)
        if self.streams is not None:
            for part in all_of(self.streams.context.asked):
                asked.update(part)
        return asked

    def export(self, folder: Path | None = None) -> None:
        """What others read, in `folder` or in the run's own."""
        target = folder or self.folder / ("model" if self.config.lora is None else "adapter")
        asked = self.asked().facts()
        export(self.model, self.checkpoint, self.config, self.task, asked, self.step, target, self.world.is_main)
        if self.world.is_main:
            write_card(self.folder, target, self.step, self.checkpoint)
        self.monitor.say(f"wrote {target}")
