"""What a run tells: one line a step in `metrics.jsonl`, a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from vft.attention import attended_pairs
from vft.distributed import World
from vft.lora import TrainableRow
from vft.metrics import Interval
from vft.types import Batch, UserError

PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "MI250X": 191.5e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets (MI250X: one of its two dies)."""


class FlopCounter:
    """Model FLOPs of a batch: products that the step needs, recomputation and padding not counted.

    A multiply-add is 2 FLOPs. A frozen weight costs a token 4 FLOPs (forward, gradient of the input), a trained one 6;
    attention 12 x width x layers for each query-key pair; the head counts supervised tokens only; a frozen tower runs
    forward only (2 a weight).
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        decoder = dict(model.model.layers.named_parameters())
        frozen = sum(p.numel() for n, p in decoder.items() if p.dim() == 2 and not p.requires_grad)
        trained = sum(p.numel() for n, p in decoder.items() if p.dim() == 2 and p.requires_grad)
        self.token = 4 * frozen + 6 * trained
        self.pair = 12 * config.heads * config.head_width * config.layers
        head = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
        self.target = (6 if head.requires_grad else 4) * config.vocabulary * config.width
        tower, merger = [*model.visual.patch_embed.parameters(), *model.visual.blocks.parameters()], model.visual.merger
        patch, passes = _passes(tower)
        merged, _ = _passes(list(merger.parameters()), fed=passes > 1)
        self.patch = patch + merged // config.vision.merge**2
        full = len(config.vision.full_attention_blocks)
        self.tower_pairs = {
            "frame": passes * 4 * config.vision.width * full,
            "window": passes * 4 * config.vision.width * (config.vision.blocks - full),
        }

    def count(self, batch: Batch) -> float:
        """FLOPs of forward and backward."""
        total = float(self.token * batch.num_tokens + self.pair * attended_pairs(batch.plan))
        total += self.target * batch.num_targets + self.patch * batch.pixels_PD.shape[0]
        if batch.layout is not None:
            total += sum(self.tower_pairs[kind] * attended_pairs(plan) for kind, plan in batch.layout.plans.items())
        return total


def _passes(weights: Sequence[nn.Parameter], fed: bool = False) -> tuple[int, int]:
    """FLOPs of one input through `weights`, and how many forward passes its attention costs.

    2 a weight where nothing is trained; else 4 a frozen and 6 a trained one, attention three passes. `fed`: what comes
    in needs a gradient, so even frozen weights are passed backwards.
    """
    counts = {True: 0, False: 0}
    for weight in weights:
        counts[weight.requires_grad] += weight.numel() if weight.dim() >= 2 else 0
    backward = fed or counts[True] > 0
    return (4 if backward else 2) * counts[False] + 6 * counts[True], 3 if backward else 1


def describe_device(device: torch.device) -> str:
    """What the run computes on, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def describe_run(world: World, samples: int, documents: int, archives: int) -> dict[str, Any]:
    """What is at work on what, for run.json and the first line on the screen."""
    facts: dict[str, Any] = {"device": describe_device(world.device), "processes": world.size}
    facts |= {name: count for name, count in (("samples", samples), ("documents", documents)) if count}
    facts |= {"archives": archives} if archives else {}
    return {**facts, "started": datetime.now(UTC).isoformat(timespec="seconds")}


def require_tensorboard() -> None:
    """UserError where the extra isn't installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("log.tensorboard = true: not installed; pip install 'vft[tensorboard]', or leave it out")


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device, None where it isn't known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: by torch on a GPU, by the whole process (its resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Monitor:
    """Writes and shows; silent on all processes but the first."""

    def __init__(self, folder: Path, max_steps: int, every_steps: int, main: bool, tensorboard: bool = False) -> None:
        self.console = Console(stderr=True, quiet=not main)
        self.every_steps = every_steps
        self.main = main
        self.max_steps = max_steps
        self.file = folder / "metrics.jsonl"
        self.live: Progress | None = None
        self.board: Any = None
        self.board_folder = folder / "tensorboard" if main and tensorboard else None

    def say(self, text: str) -> None:
        """One line to the person in front."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def table_of_trainable(self, rows: Sequence[TrainableRow], model: nn.Module) -> None:
        """What is trained, as a table, with its share of all parameters."""
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        table = Table(title=f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})")
        for column in ("what", "modules", "parameters", "first of them"):
            table.add_column(column, justify="right" if column in ("modules", "parameters") else "left")
        for row in rows:
            table.add_row(row.what, f"{row.modules:,}", f"{row.parameters:,}", row.example)
        self.console.print(table)

    def resume_at(self, step: int) -> None:
        """Drop the lines of steps that will be done again."""
        if not self.main or not self.file.exists():
            return
        before = self.file.read_text(encoding="utf-8").splitlines() if step else []  # at 0 all begins anew
        lines = [line for line in before if _step_of(line) <= step]
        partial = self.file.with_name(".partial-metrics.jsonl")
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.replace(self.file)

    def start(self, step: int) -> None:
        """Begin the live view after `step`."""
        if self.board_folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.board_folder), purge_step=step + 1)
        if self.main and self.console.is_terminal:
            columns = [
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            ]
            self.live = Progress(*columns, TextColumn("{task.description}"), console=self.console)
            self.live.start()
            self.live.add_task("", total=self.max_steps, completed=step)

    def step(self, line: Mapping[str, Any]) -> None:
        """Record one step, and show it if its turn has come."""
        if not self.main:
            return
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self.board is not None:
            for key, value in line.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(key, value, line["step"])
        shown = self._sentence(line)
        if self.live is not None:
            self.live.update(self.live.task_ids[0], completed=line["step"], description=shown)
        elif line["step"] % self.every_steps == 0 or line["step"] == self.max_steps:
            self.say(f"step {line['step']}/{self.max_steps}  {shown}")

    def evaluation(self, step: int, scores: Mapping[str, Interval]) -> None:
        """Record scores of an evaluation under `eval_` keys, their 95 % intervals under `eval_intervals`."""
        if self.main:
            line: dict[str, Any] = {"step": step, **{f"eval_{name}": one.value for name, one in scores.items()}}
            line["eval_intervals"] = {name: [one.low, one.high] for name, one in scores.items() if one.low < one.high}
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            shown = "  ".join(f"{name} {one.value:.4g}" for name, one in scores.items() if "/" not in name)
            self.say(f"step {step}  {shown}")

    def close(self) -> None:
        """End the live view."""
        if self.live is not None:
            self.live.stop()
        if self.board is not None:
            self.board.close()

    @staticmethod
    def _sentence(line: Mapping[str, Any]) -> str:
        waiting = line["data_wait_s"] / max(line["step_time_s"], 1e-9)
        text = (
            f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['tokens_per_s']:,.0f} tokens/s  "
            f"{line['samples_per_s']:.2f} samples/s  waiting for data {waiting:.0%}  "
            f"memory {line['peak_memory_bytes'] / 2**30:.1f} GiB"
        )
        return text if line["mfu"] is None else f"{text}  MFU {line['mfu']:.1%}"


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


def describe_step(
    result: StepResult, watch: Stopwatch, rate: float, device: torch.device, processes: int
) -> dict[str, Any]:
    """What a step's line of metrics.jsonl says of it."""
    counts, seconds, peak = result.counts, watch.elapsed_s, peak_flops(device)
    return {
        "loss": result.loss,
        "num_targets": counts["num_targets"],
        "tokens": counts["tokens"],
        "samples": counts["samples"],
        "grad_norm": result.grad_norm,
        "lr": rate,
        "step_time_s": seconds,
        "data_wait_s": watch.waited_s,
        "tokens_per_s": counts["tokens"] / seconds,
        "samples_per_s": counts["samples"] / seconds,
        "mfu": None if peak is None else counts["flops"] / seconds / peak / processes,
        "peak_memory_bytes": peak_memory_bytes(device),
        "sample_digest": f"{counts['digest']:x}",
    }


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut off by a kill: drop it
