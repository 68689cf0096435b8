"""The live view of a run on a terminal: some lines that a thread draws anew, below all that is printed meanwhile."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from vft.common.console import show_bars_in
from vft.common.scores import Interval

PERIOD_S = 0.5
"""Between two drawings, at least."""
SHARE = 0.005
"""Of a core's time that drawing may take: on a slow machine it comes less often."""
POINTS = 256
"""Of a course, at most twice as many; then each two become one."""
BLOCKS = "▁▂▃▄▅▆▇█"
HEIGHT, WIDTH = 14, 60
"""Of the smallest terminal on which the view has a frame."""


class Course:
    """A figure over the whole run, in a bounded number of means; `log` of those that are all above 0."""

    def __init__(self, log: bool = False) -> None:
        self.log = log
        self.means: list[float] = []
        self.each = 1
        """Values in a mean."""
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """One more value."""
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count == self.each:
            self.means.append(self._sum / self.each)
            self._sum, self._count = 0.0, 0
            if len(self.means) == 2 * POINTS:
                pairs = zip(self.means[::2], self.means[1::2], strict=True)
                self.means, self.each = [(a + b) / 2 for a, b in pairs], 2 * self.each

    def spark(self, width: int) -> str:
        """All of it as at most `width` blocks, from its least value to its largest."""
        means, parts = list(self.means), min(width, len(self.means))
        if parts < 2:
            return ""
        ends = [i * len(means) // parts for i in range(parts + 1)]
        heights = [sum(means[a:b]) / (b - a) for a, b in pairwise(ends)]
        if self.log and min(heights) > 0:
            heights = [math.log(h) for h in heights]
        low, high = min(heights), max(heights)
        return "".join(BLOCKS[int((h - low) / ((high - low) or 1.0) * 7.999)] for h in heights)


class LiveView:
    """What is shown; the thread that shows it runs from `start` to `stop`."""

    def __init__(self, title: str, max_steps: int, console: Console) -> None:
        """`max_steps` 0: nobody knows."""
        self.title, self.max_steps, self.console = title, max_steps, console
        self.line: Mapping[str, Any] = {"step": 0}
        """The newest step's."""
        self.loss, self.rate = Course(log=True), Course()
        self.evaluation = self.bar = ""
        self.quarantined = 0
        self.checkpoint: tuple[int, float] | None = None
        """Step and time of the last one."""
        self.begun_s = time.monotonic()
        self.marks: deque[tuple[float, int]] = deque(maxlen=200)
        """Time and step, lately: evaluations and checkpoints are a part of what is left."""
        self._live: Live | None = None
        self._ended = threading.Event()

    # ------------------------------------------------------------------------------------------------- what is told

    def step(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        for course, value in ((self.loss, line["loss"]), (self.rate, line["lr"])):
            if value is not None:
                course.add(value)
        self.line = line

    def scores(self, step: int, scores: Mapping[str, Interval]) -> None:
        """Of an evaluation."""
        self.evaluation = f"step {step}: {said(scores)}"

    def mark(self, now_s: float) -> None:
        """The newest step was done at `now_s`."""
        self.marks.append((now_s, self.line["step"]))

    # ------------------------------------------------------------------------------------------------ what is shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many lines as the terminal has room for, the most important ones first."""
        framed = options.max_width >= WIDTH and console.height >= HEIGHT
        rows = self.rows(options.max_width - 4 * framed, options.ascii_only)[: max(1, console.height - 2 - 2 * framed)]
        text = Text("\n").join(rows)
        text.no_wrap, text.overflow = True, "crop" if options.ascii_only else "ellipsis"
        yield Panel(text, title=Text(self.title), title_align="left", border_style="dim") if framed else text

    def rows(self, width: int, ascii_only: bool = False) -> list[Text]:
        """One line each."""
        line, room = self.line, width - 11
        rows = [self._progress(width, ascii_only)]
        if "loss" in line:
            for label, value, course in (("loss", loss_of(line), self.loss), ("lr", f"{line['lr']:.2e}", self.rate)):
                spark = "" if ascii_only else course.spark(min(60, room - max(8, len(value)) - 2))
                rows.append(_row(label, f"{value:<8}", (f"  {spark}", "cyan")))
            rows.append(_row("speed", speed(line)))
            rows.append(_row("", share(line)))
        if self.evaluation:
            rows.append(_row("scores", self.evaluation))
        if self.checkpoint is not None:
            ago = timedelta(seconds=round(time.monotonic() - self.checkpoint[1]))
            rows.append(_row("saved", f"step {self.checkpoint[0]}, {ago} ago"))
        if self.quarantined:
            rows.append(_row("left out", (f"{self.quarantined:,} clips: see quarantine.jsonl", "yellow")))
        return [*rows, Text(self.bar)] if self.bar else rows

    def _progress(self, width: int, ascii_only: bool) -> Text:
        step, most = self.line["step"], self.max_steps
        (first_s, first), (last_s, last) = (self.marks[0], self.marks[-1]) if self.marks else ((0.0, 0), (0.0, 0))
        since = timedelta(seconds=round(time.monotonic() - self.begun_s))
        told = f"  {since} gone"
        if last > first and most:
            told += f", {timedelta(seconds=round((last_s - first_s) / (last - first) * (most - step)))} left"
        head = f"step {step:,}/{most:,}  {step / most:.0%}  " if most else f"step {step:,}  "
        room = max(0, min(60, width - len(head) - len(told)))
        done, mark = round(room * min(1.0, step / max(most, 1))), "#" if ascii_only else "━"
        rest = ("-" if ascii_only else "━") * (room - done)
        return Text.assemble((head, "bold"), (mark * done, "green"), (rest, "bright_black"), told)

    # ------------------------------------------------------------------------------------------------------ drawing

    def start(self) -> None:
        """Begin to draw. Bars of `console.progress_bar` are a line of the view until `stop`."""
        self.begun_s = time.monotonic()
        self._live = Live(self, console=self.console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()
        self.console.show_cursor(True)  # hidden, it would stay so where the process is killed
        show_bars_in(self._show_bar)
        threading.Thread(target=self._draw, name="live-view", daemon=True).start()

    def stop(self) -> None:
        """Draw once more, and leave the terminal as it was."""
        self._ended.set()
        show_bars_in(None)
        if self._live is not None:
            self._live.stop()

    def _show_bar(self, text: str) -> None:
        self.bar = text

    def _draw(self) -> None:
        pause_s = 0.0
        while not self._ended.wait(pause_s):
            since_s = time.thread_time()
            assert self._live is not None
            self._live.refresh()
            pause_s = max(PERIOD_S, (time.thread_time() - since_s) / SHARE)


def said(scores: Mapping[str, Interval]) -> str:
    """Scores in a line, with how their texts were cut, without those of groups."""
    return "  ".join(f"{name} {one.value:.4g}{one.how_cut}" for name, one in scores.items() if "/" not in name)


def loss_of(line: Mapping[str, Any]) -> str:
    """A step's loss, or that there is none."""
    if line.get("num_targets") == 0:
        return "none, no samples"
    return "not finite, skipped" if line["loss"] is None or line["grad_norm"] is None else f"{line['loss']:.4f}"


def speed(line: Mapping[str, Any]) -> str:
    """How fast a step was, in a line."""
    return (
        f"{line['tokens_per_s']:,.0f} tokens/s  {line['samples_per_s']:.2f} samples/s  "
        f"{line['frames_per_s']:,.0f} frames/s"
    )


def share(line: Mapping[str, Any]) -> str:
    """What the step's time went into, and its memory."""
    waiting = line["data_wait_s"] / max(line["step_time_s"], 1e-9)
    text = f"waiting for data {waiting:.0%}  memory {line['peak_memory_bytes'] / 2**30:.1f} GiB"
    return text if line["mfu"] is None else f"{text}  MFU {line['mfu']:.1%}  HFU {line['hfu']:.1%}"


def _row(label: str, *parts: str | tuple[str, str]) -> Text:
    return Text.assemble((f"{label:<10} ", "dim"), *parts)
