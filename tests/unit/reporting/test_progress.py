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
from vft.reporting.progress import BLOCKS, MAX_CPU_SHARE, LiveView, RunState, sparkline

STEP: dict[str, Any] = {
    **{"loss": 0.5, "lr": 1e-4, "grad_norm": 1.0, "tokens_per_s": 1234.0, "samples_per_s": 5.0, "frames_per_s": 7.0},
    **{"mfu": 0.4, "hfu": 0.5, "step_time_s": 2.0, "data_wait_s": 0.5, "peak_memory_bytes": 3 << 30},
}


def screen(width: int = 100, height: int = 30) -> Console:
    """A terminal whose output is kept."""
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height)


def run_state(steps: int = 120) -> RunState:
    """In the middle of a run of 200 steps."""
    state = RunState("caption: runs/here", 200)
    for step in range(1, steps + 1):
        state.add_step({**STEP, "step": step, "loss": 10.0 / step}, end_s=2.0 * step)
    state.add_scores(100, {"rouge_l": Interval(0.75, 0.7, 0.8), "top1/cat": Interval(1, 1, 1)})
    state.checkpoint, state.num_quarantined = (100, time.monotonic() - 42), 3
    return state


def plain(state: RunState, width: int = 100, height: int = 30) -> list[str]:
    """What a terminal shows, without colours."""
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(state)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_everything_is_shown() -> None:
    text = "\n".join(plain(run_state()))
    for part in (
        *("step 120/200", "60%", "0:02:40 left", "0.0833", "1.00e-04", "1,234 tokens/s", "5.00 samples/s"),
        *("waiting for data 25%", "memory 3.0 GiB", "MFU 40.0%", "HFU 50.0%", "step 100: rouge_l 0.75"),
        *("step 100, 0:00:42 ago", "3 clips: see quarantine.jsonl", "caption: runs/here"),
    ):
        assert part in text, part
    assert "top1/cat" not in text


def test_pairs_of_answers() -> None:
    """A row of their own, with the figures that the objective has."""
    pairs = {"reward_accuracy": 0.9375, "likelier_chosen": 0.75, "log_p_chosen": -12.34, "log_p_rejected": -101.0}
    state = RunState("", 200)
    state.add_step({**STEP, "step": 3, **pairs, "margin": 2.345})
    (row,) = [line for line in plain(state, width=80) if "pairs" in line]
    assert "pairs      accuracy 0.938  margin 2.35  likelier 0.75  log p -12.3 / -101.0 " in row
    state.add_step({**STEP, "step": 4, "reward_accuracy": 0.5, "margin": None, "log_p_chosen": -1.0})
    assert any("pairs      accuracy 0.5 " in line and "log p" not in line for line in plain(state))
    state.add_step({**STEP, "step": 5, "kl": 0.125, "log_p_chosen": -1.0, "log_p_rejected": -2.0})
    assert any("pairs      kl 0.125  log p -1.0 / -2.0 " in line for line in plain(state))
    state.add_step({**STEP, "step": 6})
    assert not [line for line in plain(state) if "pairs" in line]


@pytest.mark.parametrize("width", [1, 8, 20, 59, 60, 200])
@pytest.mark.parametrize("height", [1, 2, 5, 13, 14, 50])
def test_it_fits_any_terminal(width: int, height: int) -> None:
    for steps in (0, 1, 120):
        lines = plain(run_state(steps), width, height)
        assert len(lines) <= max(1, height - 1) and max(map(len, lines)) <= width
    assert width < 8 or lines[0].strip("╭─ ")


def test_a_step_that_is_no_number_and_a_run_without_an_end() -> None:
    state = RunState("", max_steps=0)
    state.add_step({**STEP, "step": 3, "loss": None})
    text = "\n".join(plain(state))
    assert "not finite, skipped" in text and "step 3  ━" in text and "left" not in text


def test_a_sparkline_has_the_shape_of_its_values() -> None:
    blocks = sparkline([-float(i) for i in range(1000)], 30)
    assert len(blocks) == 30 and blocks[0] == BLOCKS[-1] and blocks[-1] == BLOCKS[0]
    assert all(BLOCKS.index(a) >= BLOCKS.index(b) for a, b in pairwise(blocks))
    assert sparkline([1.0, 3.0, 1.0, 3.0, 4.0, 4.0], 3) == BLOCKS[0] * 2 + BLOCKS[-1]  # means of parts
    assert sparkline([], 30) == sparkline([1.0], 30) == ""


def test_others_may_print_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of others come out whole, bars are a line of the view, and the terminal is left as it was."""
    console = screen()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    state = run_state()
    view = LiveView(state, console)
    view.start()
    before = sys.stdout
    print("a line of somebody else's")
    with progress_bar(10, "answering", "question") as bar:
        bar.delay = bar.start_t = 0
        bar.update(4)
        bar.refresh()
        assert "answering" in state.bar and "4/10" in state.bar
        assert any("answering" in row.plain for row in state.rows(90))
    view.stop()
    assert sys.stdout is not before and state.bar == ""
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a line of somebody else's\n" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0
    with progress_bar(10, "answering", "question") as bar:
        assert bar.fp is not console.file and not isinstance(bar.fp, io.StringIO)


def test_drawing_takes_its_share_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow it is: here 20 ms of a core each time."""
    view, drawn = LiveView(run_state(), screen()), []
    rows = RunState.rows

    def slow(self: RunState, *arguments: Any) -> Any:
        drawn.append(time.thread_time())
        while time.thread_time() < drawn[-1] + 0.02:
            pass
        return rows(self, *arguments)

    monkeypatch.setattr(RunState, "rows", slow)
    view.start()
    time.sleep(2.0)
    view.stop()
    # At the start, by the thread, at the end: the next one would come after 0.02 s / MAX_CPU_SHARE = 4 s.
    assert 0.02 / MAX_CPU_SHARE == 4.0 and len(drawn) <= 4
