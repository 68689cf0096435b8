"""A run as it happens: the facts of `run.json`, `metrics.jsonl`, boards, a live view or log lines, and traces."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from rich.table import Table
from torch import nn

from vft.adapters.targets import TrainableRow
from vft.common.console import make_table, stderr_console
from vft.common.device_specs import peak_flops
from vft.common.errors import UserError, first_line
from vft.common.files import append_text, digest, replace_text
from vft.common.scores import Interval
from vft.common.types import Batch
from vft.config.run import Config
from vft.distributed.process_group import World
from vft.models.flops import Flops
from vft.models.quantization import true_shapes
from vft.reporting.pair_checks import PairChecks
from vft.reporting.progress import LiveView, RunState, scores_text, step_text

logger = logging.getLogger(__name__)

Board = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]
"""How the figures of a step are logged to a service that shows them, and how it is closed."""

# ------------------------------------------------------------------------------------------------ what the run is


def describe_run(world: World, samples: int, lengths: Sequence[int], archives: int) -> dict[str, Any]:
    """Facts for run.json and the first message: device, processes, data, software.

    `lengths`: tokens of each document. `archives`: tar files that are streamed.
    """
    name = f"CPU ({torch.get_num_threads()} threads)"
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    facts: dict[str, Any] = {"device": name, "processes": world.size}
    facts |= {name: count for name, count in (("samples", samples), ("documents", len(lengths))) if count}
    if lengths:
        facts["tokens"] = f"{sum(lengths):,} in an epoch; {min(lengths):,} to {max(lengths):,} in a document"
    facts |= {"archives": archives} if archives else {}
    software = [f"{name} {version(name)}" for name in ("vft", "torch", "transformers", "torchcodec")]
    kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "Python": platform.python_version()}
    software += [f"{name} {number}" for name, number in kinds.items() if number]
    facts["software"] = ", ".join([*software, f"{platform.system()} {platform.machine()}"])
    return {**facts, "started": datetime.now(UTC).isoformat(timespec="seconds")}


def trainable_table(rows: Sequence[TrainableRow], model: nn.Module) -> Table:
    """What is trained, with its share of all parameters."""
    total = sum(map(math.prod, true_shapes(model).values()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    title = f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})"
    cells = [(row.what, f"{row.modules:,}", f"{row.parameters:,}", row.example) for row in rows]
    return make_table(title, ("what", "modules", "parameters", "first of them"), cells)


# ------------------------------------------------------------------------------------------------ what a step was


class Tally:
    """Counts of this process's packs of one step, and its time."""

    def __init__(self, device: torch.device) -> None:
        self.counts: dict[str, int] = {}
        self.sample_ids: list[str] = []
        self.begin_s = time.perf_counter()
        self._device = device
        self._waits: list[tuple[float, list[torch.cuda.Event]]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In it the host waits for data."""
        events, begin_s = [self._event()], time.perf_counter()
        yield
        events.append(self._event())
        self._waits.append((time.perf_counter() - begin_s, [event for event in events if event is not None]))

    def _event(self) -> torch.cuda.Event | None:
        """The device has done the work that it was given so far."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @property
    def waited_s(self) -> float:
        """Seconds in which the host waited for data and the device had nothing to do. Read it at the end of the step,
        when the device has done its work."""
        return sum(
            min(host_s, *(a.elapsed_time(b) / 1000 for a, b in pairwise(events))) if events else host_s
            for host_s, events in self._waits
        )

    def add(self, batch: Batch, flops: Flops, digest: int, weight: int) -> None:
        """Count one pack. `weight` is what the objective's sum is divided by."""
        self.sample_ids += batch.sample_ids
        for name, count in {
            "num_targets": batch.num_targets,
            "tokens": batch.num_tokens,
            "samples": len(batch.sample_ids),
            "frames": sum(len(media.frame_indices) for document in batch.documents for media in document.media),
            "patches": batch.pixels_PD.shape[0],
            "flops": int(flops.model),
            "hardware_flops": int(flops.hardware),
            "digest": digest,
            "weight": weight,
        }.items():
            self.counts[name] = self.counts.get(name, 0) + count


ROUTING = ("routing_loss", "expert_load_max", "expert_load_min", "experts_unused")
"""Figures of a step of a model with experts; docs/use/choosing.md says what they are."""


def describe_step(
    loss: float,
    grad_norm: float,
    rate: float,
    counts: Mapping[str, int],
    tally: Tally,
    world: World,
    dtype: torch.dtype,
    figures: Mapping[str, float],
) -> dict[str, Any]:
    """The line of a step in metrics.jsonl, without its number and epoch.

    `loss` is the mean over what the objective counts, `grad_norm` that before clipping, `rate` the learning rate;
    `counts` are of all processes, the model computes in `dtype`, and `figures` has the objective's, and ROUTING if the
    model has experts.
    """
    seconds, peak, processes = time.perf_counter() - tally.begin_s, peak_flops(world.device, dtype), world.size
    return {
        "loss": finite(loss) if counts["weight"] else None,
        "num_targets": counts["num_targets"],
        "tokens": counts["tokens"],
        "samples": counts["samples"],
        "grad_norm": finite(grad_norm),
        "lr": rate,
        "step_time_s": seconds,
        "data_wait_s": tally.waited_s,
        "tokens_per_s": counts["tokens"] / seconds,
        "samples_per_s": counts["samples"] / seconds,
        "frames_per_s": counts["frames"] / seconds,
        "tflops": counts["flops"] / seconds / processes / 1e12,
        "mfu": None if peak is None else counts["flops"] / seconds / peak / processes,
        "hfu": None if peak is None else counts["hardware_flops"] / seconds / peak / processes,
        "peak_memory_bytes": peak_memory_bytes(world.device),
        "sample_digest": f"{counts['digest']:x}",
        **{name: finite(value) for name, value in figures.items()},
    }


def finite(value: float) -> float | None:
    """`value`, or None if it is infinite or not a number: JSON has no such numbers."""
    return value if math.isfinite(value) else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: by torch on a GPU; on a CPU by the whole process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------------ where it is shown


def require_boards(config: Config) -> None:
    """Raise UserError if the package of a configured board is not installed."""
    for name in ("tensorboard", "wandb"):
        found = importlib.util.find_spec(name) if getattr(config.log, name) else None
        # Without an origin it is a folder of that name in the current folder.
        if getattr(config.log, name) and (found is None or found.origin is None):
            raise UserError(f"log.{name} = true: not installed; pip install 'vft[{name}]', or leave it out")


def open_boards(config: Config, step: int) -> list[Board]:
    """The configured boards: TensorBoard and Weights & Biases. Figures of steps after `step` are logged again."""
    boards: list[Board] = []
    folder = config.output_dir
    if config.log.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

        def add_scalars(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        boards.append((add_scalars, writer.close))
    if config.log.wandb:
        import wandb

        try:
            run = wandb.init(
                project=config.log.wandb_project,
                name=config.log.wandb_run or folder.absolute().name,
                # run.json holds the time of the start: a resumed run goes on with the same one here, a new run makes
                # another.
                id=digest((folder / "run.json").read_text(encoding="utf-8")),
                resume="allow",
                dir=str(folder),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off"),  # it would record the live view
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"log.wandb = true: {first_line(error)}; `wandb login`, or WANDB_MODE=offline to upload later"
            ) from None
        boards.append((lambda step, values: run.log(values, step=step), run.finish))
    return boards


class Monitor:
    """Records and shows each step and evaluation. Does nothing in processes other than the main one."""

    def __init__(self, config: Config, max_steps: int, is_main: bool) -> None:
        self.config, self.is_main = config, is_main
        self.file = config.output_dir / "metrics.jsonl"
        """A JSON object a line, one for each step and each evaluation."""
        self.state = RunState(f"{config.task}: {config.output_dir}", max_steps)
        self.view = LiveView(self.state, stderr_console())
        self.checks = PairChecks(config.objective)
        self.boards: list[Board] = []
        self.evaluated = False
        """Whether metrics.jsonl has the scores of the step that the run resumes from."""

    def resume_at(self, step: int, max_steps: int) -> None:
        """Remove the lines of later steps, which will be done again, and show those that stay."""
        self.state.max_steps = max_steps
        if not self.is_main or not self.file.exists():
            return
        written = self.file.read_text(encoding="utf-8")
        texts = written.splitlines() if step else []  # at step 0 the run starts anew
        texts = [text for text in texts if _step_of(text) <= step]
        kept = "".join(f"{text}\n" for text in texts)
        if kept != written:  # a file that stays keeps its time, which reports show
            replace_text(self.file, kept)
        for line in map(json.loads, texts):
            if "loss" in line:
                self.state.add_step(line)
                self.checks.add(line)
            self.evaluated = self.evaluated or (line["step"] == step and any(key.startswith("eval_") for key in line))

    def start(self, step: int) -> None:
        """Open the boards, and on a terminal the live view. `step` is the last one that is done."""
        if self.is_main:
            self.boards = open_boards(self.config, step)
            if self.view.console.is_terminal and not self.view.console.is_dumb_terminal:
                self.view.start()

    def step(self, line: Mapping[str, Any]) -> None:
        """Record a step, and show it if it is its turn. Warnings that become true with it are logged, and stand in its
        line."""
        if not self.is_main:
            return
        if warnings := self.checks.add(line):
            line = {**line, "warnings": warnings}
        for text in warnings:
            logger.warning("step %d: %s", line["step"], text)
        self._record(line)
        self.state.add_step(line, time.monotonic())
        step, max_steps = line["step"], self.state.max_steps
        if not self.view.is_drawn and (step % self.config.log.every_steps == 0 or step == max_steps):
            logger.info("step %d/%d  %s", step, max_steps, step_text(line))

    def evaluation(self, step: int, scores: Mapping[str, Interval]) -> None:
        """Record and show the scores of an evaluation.

        The line has them under `eval_` keys, their 95 % intervals under `eval_intervals`, and how texts were cut into
        words under `eval_tokenization`.
        """
        if not self.is_main:
            return
        line: dict[str, Any] = {"step": step, **{f"eval_{name}": score.value for name, score in scores.items()}}
        line["eval_intervals"] = {name: [one.low, one.high] for name, one in scores.items() if one.low < one.high}
        if tokenization := {name: score.tokenization for name, score in scores.items() if score.tokenization}:
            line["eval_tokenization"] = tokenization
        self._record(line)
        self.state.add_scores(step, scores)
        logger.info("step %d  %s", step, scores_text(scores))

    def close(self) -> None:
        """Close the live view and the boards."""
        if self.view.is_drawn:
            self.view.stop()
        for _, close in self.boards:
            close()

    def _record(self, line: Mapping[str, Any]) -> None:
        append_text(self.file, json.dumps(line) + "\n")
        for log, _ in self.boards:
            log(line["step"], {key: value for key, value in line.items() if isinstance(value, int | float)})


def _step_of(text: str) -> int:
    try:
        return int(json.loads(text)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # the process was killed while it wrote this line: remove it


class Profiler:
    """`log.profile_steps`: a trace of some steps by torch.profiler, for chrome://tracing or Perfetto."""

    def __init__(self, config: Config, rank: int) -> None:
        self.first, self.last = config.log.profile_steps or (0, 0)
        self.file = config.output_dir / "profile" / f"rank-{rank}.json.gz"
        self.profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Call before each step."""
        if step == self.first:
            self.profile = torch.profiler.profile()  # of the CPU, and of the GPU if there is one
            self.profile.start()

    def after(self, step: int) -> None:
        """Call after each step. Writes the trace after the last one."""
        if self.profile is not None and step >= self.last:
            self.profile.stop()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.profile.export_chrome_trace(str(self.file))
            self.profile = None
            logger.info("wrote %s", self.file)
