"""The live view of a run: a few lines at the bottom of a terminal, drawn by a thread. Messages appear above it."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from vft.common.console import show_bars_in
from vft.common.scores import Interval

PERIOD_S = 0.5
"""Between two drawings, at least."""
MAX_CPU_SHARE = 0.005
"""Share of a core's time that drawing may take: on a slow machine the view is drawn less often."""
BLOCKS = "▁▂▃▄▅▆▇█"
PREFERENCES = {"reward_accuracy": "accuracy", "margin": "margin", "likelier_chosen": "likelier", "kl": "kl"}
"""Figures of objectives of preferences that are shown, with their labels."""
MIN_WIDTH, MIN_HEIGHT = 60, 14
"""Characters and lines of the smallest terminal on which the view has a frame."""


def sparkline(values: Sequence[float], width: int, log: bool = False) -> str:
    """A figure over the whole run as at most `width` blocks; the lowest is its least value, the highest its largest."""
    parts = min(width, len(values))
    if parts < 2:
        return ""
    ends = [i * len(values) // parts for i in range(parts + 1)]
    heights = [fmean(values[a:b]) for a, b in pairwise(ends)]
    if log and min(heights) > 0:
        heights = [math.log(h) for h in heights]
    low, high = min(heights), max(heights)
    return "".join(BLOCKS[int((h - low) / ((high - low) or 1.0) * 7.999)] for h in heights)


@dataclass(eq=False)
class RunState:
    """What the live view shows. The training loop writes it, the drawing thread reads it."""

    title: str
    max_steps: int
    """0 if unknown."""
    begin_s: float = field(default_factory=time.monotonic)
    line: Mapping[str, Any] = field(default_factory=lambda: {"step": 0})
    """The newest step's line of metrics.jsonl."""
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    step_ends: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=200))
    """Time and number of the latest steps. The time that is left is estimated from these, pauses included."""
    evaluation: str = ""
    checkpoint: tuple[int, float] | None = None
    """Step and time of the newest one."""
    num_quarantined: int = 0
    bar: str = ""
    """A progress bar of other code."""
    ended: str = ""
    """Instead of the time that is left: why there is none."""

    def add_step(self, line: Mapping[str, Any], end_s: float | None = None) -> None:
        """A step's line of metrics.jsonl, and when the step ended; None for steps of an earlier start of the run."""
        self.losses += [] if line["loss"] is None else [line["loss"]]
        self.rates.append(line["lr"])
        self.line = line
        if end_s is not None:
            self.step_ends.append((end_s, line["step"]))

    def add_scores(self, step: int, scores: Mapping[str, Interval]) -> None:
        """The scores of an evaluation."""
        self.evaluation = f"step {step}: {scores_text(scores)}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many lines as fit on the terminal, the most important ones first."""
        framed = options.max_width >= MIN_WIDTH and console.height >= MIN_HEIGHT
        rows = self.rows(options.max_width - 4 * framed, options.ascii_only)[: max(1, console.height - 2 - 2 * framed)]
        text = Text("\n").join(rows)
        text.no_wrap, text.overflow = True, "crop" if options.ascii_only else "ellipsis"
        yield Panel(text, title=Text(self.title), title_align="left", border_style="dim") if framed else text

    def rows(self, width: int, ascii_only: bool = False) -> list[Text]:
        """The lines, for a terminal of `width` characters."""
        line = self.line
        rows = [self._progress(width, ascii_only)]
        if "loss" in line:
            curves = ("loss", loss_text(line), self.losses), ("lr", f"{line['lr']:.2e}", self.rates)
            for label, value, values in curves:
                free = 0 if ascii_only else width - 11 - max(8, len(value)) - 2
                rows.append(
                    _row(label, f"{value:<8}", (f"  {sparkline(values, min(60, free), label == 'loss')}", "cyan"))
                )
            if pairs := pairs_text(line):
                rows.append(_row("pairs", pairs))
            rows.append(_row("speed", speed_text(line)))
            rows.append(_row("", resources_text(line)))
        if self.evaluation:
            rows.append(_row("scores", self.evaluation))
        if self.checkpoint is not None:
            ago = timedelta(seconds=round(time.monotonic() - self.checkpoint[1]))
            rows.append(_row("saved", f"step {self.checkpoint[0]}, {ago} ago"))
        if self.num_quarantined:
            rows.append(_row("left out", (f"{self.num_quarantined:,} clips: see quarantine.jsonl", "yellow")))
        return [*rows, Text(self.bar)] if self.bar else rows

    def _progress(self, width: int, ascii_only: bool) -> Text:
        step, max_steps = self.line["step"], self.max_steps
        times = f"  {timedelta(seconds=round(time.monotonic() - self.begin_s))} gone"
        if self.ended:
            times = f"  {self.ended}"
        elif max_steps and self.step_ends and self.step_ends[-1][1] > self.step_ends[0][1]:
            (first_s, first), (last_s, last) = self.step_ends[0], self.step_ends[-1]
            times += f", {timedelta(seconds=round((last_s - first_s) / (last - first) * (max_steps - step)))} left"
        head = f"step {step:,}/{max_steps:,}  {step / max_steps:.0%}  " if max_steps else f"step {step:,}  "
        free = max(0, min(60, width - len(head) - len(times)))
        done = round(free * min(1.0, step / max(max_steps, 1)))
        full, empty = ("#", "-") if ascii_only else ("━", "━")
        return Text.assemble((head, "bold"), (full * done, "green"), (empty * (free - done), "bright_black"), times)


class LiveView:
    """Draws the state of a run on a terminal, in a thread that runs from `start` to `stop`."""

    def __init__(self, state: RunState, console: Console) -> None:
        self.state, self.console = state, console
        self._live = Live(state, console=console, auto_refresh=False, vertical_overflow="crop")
        self._ended = threading.Event()

    @property
    def is_drawn(self) -> bool:
        """Whether the view is on the terminal."""
        return self._live.is_started

    def start(self) -> None:
        """Begin to draw. Until `stop`, progress bars are a line of the view."""
        self.state.begin_s = time.monotonic()
        self._live.start()
        self.console.show_cursor(True)  # a hidden one would stay hidden if the process is killed
        show_bars_in(partial(setattr, self.state, "bar"))
        threading.Thread(target=self._draw, name="live-view", daemon=True).start()

    def stop(self) -> None:
        """Draw once more, and leave the terminal as it was."""
        self._ended.set()
        show_bars_in(None)
        self._live.stop()

    def _draw(self) -> None:
        pause_s = 0.0
        while not self._ended.wait(pause_s):
            begin_s = time.thread_time()
            self._live.refresh()
            pause_s = max(PERIOD_S, (time.thread_time() - begin_s) / MAX_CPU_SHARE)


def scores_text(scores: Mapping[str, Interval]) -> str:
    """Scores in a line, without those of groups. Scores of texts say how the texts were cut into words."""
    return "  ".join(f"{name} {one.value:.4g}{one.how_cut}" for name, one in scores.items() if "/" not in name)


def step_text(line: Mapping[str, Any]) -> str:
    """A step in a line of the log."""
    loss = f"loss {loss_text(line)}  lr {line['lr']:.2e}"
    return "  ".join(filter(None, (loss, pairs_text(line), speed_text(line), resources_text(line))))


def loss_text(line: Mapping[str, Any]) -> str:
    """A step's loss, or why there is none."""
    if line.get("num_targets") == 0:
        return "none, no samples"
    return "not finite, skipped" if line["loss"] is None or line["grad_norm"] is None else f"{line['loss']:.4f}"


def pairs_text(line: Mapping[str, Any]) -> str:
    """A step's figures of preferences that are known, log-probabilities as chosen / rejected; empty if it has none."""
    known = [f"{label} {line[name]:.3g}" for name, label in PREFERENCES.items() if line.get(name) is not None]
    chosen, rejected = line.get("log_p_chosen"), line.get("log_p_rejected")
    known += [] if chosen is None or rejected is None else [f"log p {chosen:.1f} / {rejected:.1f}"]
    return "  ".join(known)


def speed_text(line: Mapping[str, Any]) -> str:
    """How fast a step was."""
    return (
        f"{line['tokens_per_s']:,.0f} tokens/s  {line['samples_per_s']:.2f} samples/s  "
        f"{line['frames_per_s']:,.0f} frames/s"
    )


def resources_text(line: Mapping[str, Any]) -> str:
    """How much of a step's time went into waiting for data, its memory, and the use of the GPU."""
    waiting = line["data_wait_s"] / max(line["step_time_s"], 1e-9)
    text = f"waiting for data {waiting:.0%}  memory {line['peak_memory_bytes'] / 2**30:.1f} GiB"
    return text if line["mfu"] is None else f"{text}  MFU {line['mfu']:.1%}  HFU {line['hfu']:.1%}"


def _row(label: str, *parts: str | tuple[str, str]) -> Text:
    return Text.assemble((f"{label:<10} ", "dim"), *parts)
