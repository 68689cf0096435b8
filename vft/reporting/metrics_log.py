"""What a run tells: one line a step in `metrics.jsonl`, a live view on a terminal, plain lines elsewhere, boards."""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from vft.adapters.lora import TrainableRow
from vft.common.console import STDERR
from vft.common.device_specs import peak_flops
from vft.common.files import append_text, replace_text
from vft.common.scores import Interval
from vft.common.types import Batch
from vft.config.run import Config, LogConfig
from vft.distributed.process_group import World
from vft.models.flops import Flops
from vft.models.quantization import true_shapes
from vft.reporting.loggers import Board, open_boards
from vft.reporting.progress import LiveView, loss_of, said, share, speed

logger = logging.getLogger(__name__)


def describe_device(device: torch.device) -> str:
    """What the run computes on, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def describe_run(world: World, samples: int, lengths: Sequence[int], archives: int) -> dict[str, Any]:
    """What is at work on what, for run.json and the first line on the screen; `lengths`: tokens of each document."""
    facts: dict[str, Any] = {"device": describe_device(world.device), "processes": world.size}
    facts |= {name: count for name, count in (("samples", samples), ("documents", len(lengths))) if count}
    if lengths:
        facts["tokens"] = f"{sum(lengths):,} in an epoch; {min(lengths):,} to {max(lengths):,} in a document"
    facts |= {"archives": archives} if archives else {}
    software = [f"{name} {version(name)}" for name in ("vft", "torch", "transformers", "torchcodec")]
    kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "Python": platform.python_version()}
    software += [f"{name} {number}" for name, number in kinds.items() if number]
    facts["software"] = ", ".join([*software, f"{platform.system()} {platform.machine()}"])
    return {**facts, "started": datetime.now(UTC).isoformat(timespec="seconds")}


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: by torch on a GPU, by the whole process (its resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Monitor:
    """Writes and shows; silent on all processes but the first."""

    def __init__(self, config: Config, max_steps: int, main: bool) -> None:
        self.config, self.main, self.max_steps = config, main, max_steps
        self.file = config.output_dir / "metrics.jsonl"
        self.view = LiveView(f"{config.task}: {config.output_dir}", max_steps, STDERR)
        self.drawn = False
        self.boards: list[Board] = []
        self.evaluated = False
        """Whether the scores of the step that the run goes on from are on record."""

    def say(self, text: str) -> None:
        """One line to the person in front."""
        logger.info(text)

    def table_of_trainable(self, rows: Sequence[TrainableRow], model: nn.Module) -> None:
        """What is trained, as a table, with its share of all parameters."""
        if not self.main:
            return
        total = sum(map(math.prod, true_shapes(model).values()))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        table = Table(title=f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})")
        for column in ("what", "modules", "parameters", "first of them"):
            table.add_column(column, justify="right" if column in ("modules", "parameters") else "left")
        for row in rows:
            table.add_row(row.what, f"{row.modules:,}", f"{row.parameters:,}", row.example)
        STDERR.print(table)

    def resume_at(self, step: int) -> None:
        """Drop the lines of steps that will be done again."""
        if not self.main or not self.file.exists():
            return
        before = self.file.read_text(encoding="utf-8").splitlines() if step else []  # at 0 all begins anew
        lines = [line for line in before if _step_of(line) <= step]
        for line in map(json.loads, lines):
            if "loss" in line:
                self.view.step(line)
        replace_text(self.file, "".join(f"{line}\n" for line in lines))
        self.evaluated = any(_step_of(line) == step and '"eval_' in line for line in lines)

    def start(self, step: int) -> None:
        """Begin the live view after `step`, and the boards."""
        if not self.main:
            return
        self.boards = open_boards(self.config, step)
        if STDERR.is_terminal and not STDERR.is_dumb_terminal:
            self.view.max_steps, self.drawn = self.max_steps, True
            self.view.start()

    def step(self, line: Mapping[str, Any]) -> None:
        """Record one step, and show it if its turn has come."""
        if not self.main:
            return
        self._record(line)
        self.view.step(line)
        self.view.mark(time.monotonic())
        every = self.config.log.every_steps
        if not self.drawn and (line["step"] % every == 0 or line["step"] == self.max_steps):
            told = f"loss {loss_of(line)}  lr {line['lr']:.2e}  {speed(line)}  {share(line)}"
            logger.info("step %d/%d  %s", line["step"], self.max_steps, told)

    def evaluation(self, step: int, scores: Mapping[str, Interval]) -> None:
        """Record scores of an evaluation under `eval_` keys, beside them their 95 % intervals (`eval_intervals`) and
        how their texts were cut (`eval_tokenization`)."""
        if self.main:
            line: dict[str, Any] = {"step": step, **{f"eval_{name}": one.value for name, one in scores.items()}}
            line["eval_intervals"] = {name: [one.low, one.high] for name, one in scores.items() if one.low < one.high}
            if cut := {name: one.tokenization for name, one in scores.items() if one.tokenization}:
                line["eval_tokenization"] = cut
            self._record(line)
            self.view.scores(step, scores)
            logger.info("step %d  %s", step, said(scores))

    def close(self) -> None:
        """End the live view and the boards."""
        if self.drawn:
            self.view.stop()
        for board in self.boards:
            board.close()

    def _record(self, line: Mapping[str, Any]) -> None:
        append_text(self.file, json.dumps(line) + "\n")
        for board in self.boards:
            board.log(line["step"], {key: value for key, value in line.items() if isinstance(value, int | float)})


class Tally:
    """What a process's packs of one step come to."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTED, 0)
        self.sample_ids: list[str] = []

    def add(self, batch: Batch, flops: Flops, digest: int) -> None:
        """Count one pack."""
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
        }.items():
            self.counts[name] += count


COUNTED = ("num_targets", "tokens", "samples", "frames", "patches", "flops", "hardware_flops", "digest", "bad")
"""Of a step, summed over its packs and processes; `bad`: clips that were found unreadable."""


class Profiler:
    """Records the steps of `log.profile_steps` with torch.profiler: a trace for chrome://tracing or Perfetto."""

    def __init__(self, file: Path, first: int, last: int) -> None:
        self.file, self.first, self.last = file, first, last
        self.profile: torch.profiler.profile | None = None

    @staticmethod
    def asked_for(config: LogConfig, folder: Path, world: World) -> Profiler | None:
        """Of this process; None where no steps are to be recorded."""
        steps = config.profile_steps
        return None if steps is None else Profiler(folder / "profile" / f"rank-{world.rank}.json.gz", *steps)

    def before(self, step: int) -> None:
        """Begin where `step` is the first to be recorded."""
        if step == self.first:
            self.profile = torch.profiler.profile()  # of the CPU, and of the GPU where there is one
            self.profile.start()

    def after(self, step: int) -> bool:
        """End where `step` was the last one; whether a trace has been written."""
        if self.profile is None or step < self.last:
            return False
        self.profile.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(self.file))
        self.profile = None
        return True


class Stopwatch:
    """Seconds of a step, and how many of them went by waiting for data."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.waited_s = 0.0

    def waiting(self, since: float) -> None:
        """Count the time from `since` until now as waiting."""
        self.waited_s += time.perf_counter() - since

    @property
    def elapsed_s(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self.begin


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step, summed over all processes."""

    loss: float
    """Mean over the supervised tokens."""
    counts: dict[str, int]
    grad_norm: float
    """Before clipping."""
    sample_ids: tuple[str, ...]
    """This process's alone."""


def finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def describe_step(
    result: StepResult, watch: Stopwatch, rate: float, device: torch.device, processes: int
) -> dict[str, Any]:
    """What a step's line of metrics.jsonl says of it."""
    counts, seconds, peak = result.counts, watch.elapsed_s, peak_flops(device)
    return {
        "loss": finite(result.loss) if counts["num_targets"] else None,
        "num_targets": counts["num_targets"],
        "tokens": counts["tokens"],
        "samples": counts["samples"],
        "grad_norm": finite(result.grad_norm),
        "lr": rate,
        "step_time_s": seconds,
        "data_wait_s": watch.waited_s,
        "tokens_per_s": counts["tokens"] / seconds,
        "samples_per_s": counts["samples"] / seconds,
        "frames_per_s": counts["frames"] / seconds,
        "tflops": counts["flops"] / seconds / processes / 1e12,
        "mfu": None if peak is None else counts["flops"] / seconds / peak / processes,
        "hfu": None if peak is None else counts["hardware_flops"] / seconds / peak / processes,
        "peak_memory_bytes": peak_memory_bytes(device),
        "sample_digest": f"{counts['digest']:x}",
    }


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut off by a kill: drop it
