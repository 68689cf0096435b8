"""The tab Plan, without a browser: what is shown is what the planner says, and no process stays behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from vft.app import plan_tab
from vft.app.workspace import Workspace
from vft.common.errors import UserError

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "recipes/demo/caption.toml").read_text()
TRIED = {"settings": "none", "total_gib": 30.0, "gib": {"frozen weights": 16.0, "activations, gradients": 14.0}}
FOUND: dict[str, Any] = {
    "model": "<img src=x onerror=alert(1)>",
    "gpus": 1,
    "gpu": "4090",
    "gpu_memory_gib": 24.0,
    "usable_gib": 21.5,
    "row": {"tokens": 7113, "vision_tokens": 5760, "samples": 3},
    "fits": True,
    "verdict": ["fits with parallel.activation_checkpointing=full (checked)"],
    "best": 1,
    "tried": [
        {**TRIED, "fits": False, "host_gib": 0, "step_s": None},
        {**TRIED, "settings": "full", "fits": True, "total_gib": 20.0, "host_gib": 0, "step_s": 1.5},
    ],
    "proposals": [{"why": "needed", "set": {"parallel.activation_checkpointing": "full"}, "gpus": 1}],
    "run": {"step_s": 1.5, "share_of_peak": 0.4, "bound_by": "products", "tokens_per_s": 4742.0, "samples_per_s": 2.0}
    | {"steps": 2400, "hours": 1.0, "steps_are": "2,400 steps"},
}


def processes_with(text: str) -> list[str]:
    """Command lines of processes that hold a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        found += [line] if text in line else []
    return found


def test_a_plan_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    space = Workspace((tmp_path, ROOT))
    text = TEXT.replace('"tools/', f'"{ROOT}/tools/')
    running = plan_tab.planned(space, text, 1, "4090", 24.0, None)
    assert next(running) == (0, {})
    until = time.monotonic() + 10  # a process that has just begun has no command line for a moment
    while not processes_with(str(space.own)):
        assert time.monotonic() < until
    running.close()
    assert not processes_with(str(space.own)) and not list(space.own.iterdir())


def test_settings_that_the_page_refuses_are_not_planned(tmp_path: Path) -> None:
    for path in ("../base", "/etc", "no/such/folder"):
        text = TEXT.replace("tools/demo_world/base", path)
        with pytest.raises(UserError, match=f"model = '{path}'"):
            next(plan_tab.planned(Workspace((tmp_path,)), text, 1, "4090", 24.0, None))


def test_proposals_are_buttons() -> None:
    shown, found, *buttons = plan_tab._shown(3, FOUND)
    assert found is FOUND and shown == plan_tab.as_html(FOUND)
    assert [button.visible for button in buttons] == [True, False, False, False]
    assert buttons[0].value == "Take what fits: parallel.activation_checkpointing=full"
    assert "counting, 3 s" in plan_tab._shown(3, {})[0] and plan_tab._shown(0, {})[0] == ""


def test_what_is_shown() -> None:
    shown = plan_tab.as_html(FOUND)
    assert "<img" not in shown and "&lt;img src=x" in shown
    for text in ('<span class="good">fits</span>', "1.0 hours: 2,400 steps", "20.00 GiB of 24 (21.50 usable", "125%"):
        assert text in shown, text
    short = plan_tab.as_html({**FOUND, "run": {**FOUND["run"], "hours": 0.005}})
    assert "18 seconds: 2,400 steps" in short
    worse = plan_tab.as_html({**FOUND, "fits": False, "best": 0, "run": None})
    assert '<span class="bad">does not fit</span>' in worse and "hours" not in worse
    assert 'style="width: 53.33%"' in worse  # 16 of 30 GiB: the bar ends with what is too much
