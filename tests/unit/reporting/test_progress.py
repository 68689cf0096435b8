"""The live view: what it shows, on terminals of any size, beside what others print."""

from __future__ import annotations

import io
import sys
import time
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from vft.common.console import progress_bar
from vft.common.scores import Interval
from vft.reporting.progress import BLOCKS, POINTS, SHARE, Course, LiveView

STEP: dict[str, Any] = {
    **{"loss": 0.5, "lr": 1e-4, "grad_norm": 1.0, "tokens_per_s": 1234.0, "samples_per_s": 5.0, "frames_per_s": 7.0},
    **{"mfu": 0.4, "hfu": 0.5, "step_time_s": 2.0, "data_wait_s": 0.5, "peak_memory_bytes": 3 << 30},
}


def screen(width: int = 100, height: int = 30) -> Console:
    """A terminal whose output is kept."""
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height)


def view_of(console: Console, steps: int = 120) -> LiveView:
    """In the middle of a run of 200 steps."""
    view = LiveView("caption: runs/here", 200, console)
    for step in range(1, steps + 1):
        view.step({**STEP, "step": step, "loss": 10.0 / step})
        view.mark(2.0 * step)
    view.scores(100, {"rouge_l": Interval(0.75, 0.7, 0.8), "top1/cat": Interval(1, 1, 1)})
    view.checkpoint, view.quarantined = (100, time.monotonic() - 42), 3
    return view


def plain(view: LiveView) -> list[str]:
    """The same without colours and frame."""
    console = Console(file=io.StringIO(), width=view.console.width, height=view.console.height)
    view.console = console
    console.print(view)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_everything_is_shown() -> None:
    text = "\n".join(plain(view_of(screen())))
    for part in (
        *("step 120/200", "60%", "0:02:40 left", "0.0833", "1.00e-04", "1,234 tokens/s", "5.00 samples/s"),
        *("waiting for data 25%", "memory 3.0 GiB", "MFU 40.0%", "HFU 50.0%", "step 100: rouge_l 0.75"),
        *("step 100, 0:00:42 ago", "3 clips: see quarantine.jsonl", "caption: runs/here"),
    ):
        assert part in text, part
    assert "top1/cat" not in text


@pytest.mark.parametrize("width", [1, 8, 20, 59, 60, 200])
@pytest.mark.parametrize("height", [1, 2, 5, 13, 14, 50])
def test_it_fits_any_terminal(width: int, height: int) -> None:
    for steps in (0, 1, 120):
        lines = plain(view_of(screen(width, height), steps))
        assert len(lines) <= max(1, height - 1) and max(map(len, lines)) <= width
    assert width < 8 or lines[0].strip("╭─ ")


def test_a_step_that_is_no_number_and_a_run_without_an_end() -> None:
    view = LiveView("", 0, screen())
    view.step({**STEP, "step": 3, "loss": None})
    text = "\n".join(plain(view))
    assert "not finite, skipped" in text and "step 3  ━" in text and "left" not in text


def test_a_course_keeps_its_means_and_its_shape() -> None:
    course, values = Course(), [float(i % 7) for i in range(10_000)]
    for value in values:
        course.add(value)
    assert len(course.means) < 2 * POINTS and course.each * len(course.means) <= 10_000
    for place, mean in enumerate(course.means):
        part = values[place * course.each : (place + 1) * course.each]
        assert mean == pytest.approx(sum(part) / len(part))
    falling = Course()
    for i in range(1000):
        falling.add(-float(i))
    spark = falling.spark(30)
    assert len(spark) == 30 and spark[0] == BLOCKS[-1] and spark[-1] == BLOCKS[0]
    assert all(BLOCKS.index(a) >= BLOCKS.index(b) for a, b in pairwise(spark))
    assert Course().spark(30) == ""


def test_others_may_print_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of others come out whole, bars are a line of the view, and the terminal is left as it was."""
    console = screen()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    view = view_of(console)
    view.start()
    before = sys.stdout
    print("a line of somebody else's")
    with progress_bar(10, "answering", "question") as bar:
        bar.delay = bar.start_t = 0
        bar.update(4)
        bar.refresh()
        assert "answering" in view.bar and "4/10" in view.bar
        assert any("answering" in row.plain for row in view.rows(90))
    view.stop()
    assert sys.stdout is not before and view.bar == ""
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a line of somebody else's\n" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0
    with progress_bar(10, "answering", "question") as bar:
        assert bar.fp is not console.file and not isinstance(bar.fp, io.StringIO)


def test_drawing_takes_its_share_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow it is: here 20 ms of a core each time."""
    view, drawn = view_of(screen()), []
    rows = LiveView.rows

    def slow(self: LiveView, *arguments: Any) -> Any:
        drawn.append(time.thread_time())
        while time.thread_time() < drawn[-1] + 0.02:
            pass
        return rows(self, *arguments)

    monkeypatch.setattr(LiveView, "rows", slow)
    view.start()
    time.sleep(2.0)
    view.stop()
    # At the start, by the thread, at the end: the next one would come after 0.02 s / SHARE = 4 s.
    assert 0.02 / SHARE == 4.0 and len(drawn) <= 4
