"""tools/live.py: what a run shows, seen from elsewhere."""

from __future__ import annotations

import os
import re
import time
import xml.etree.ElementTree as ET
from datetime import timedelta
from pathlib import Path

import pytest

from tests.runs.commands import Commands, metrics
from tests.runs.world import World
from vft.cli import live
from vft.reporting.progress import RunState

TOOL = "tools/live.py"


def test_a_picture_of_a_run_and_a_look_at_it(world: World, commands: Commands, tmp_path: Path) -> None:
    settings = {"train": {"max_steps": 3}, "eval": {"every_steps": 3, "max_new_tokens": 4}}
    folder = commands.train(world.config(tmp_path / "run.toml", settings))
    picture = tmp_path / "live.svg"
    assert commands.run(TOOL, folder, "--svg", picture, "--step", 3).ok().stdout == f"wrote {picture}\n"
    text = " ".join("".join(ET.parse(picture).getroot().itertext()).replace("\xa0", " ").split())
    last = metrics(folder)[-2]
    assert (
        "finished" in text
        and "left" not in text
        and "step 3/3" in text
        and f"{last['loss']:.4f}" in text
        and "step 3: cider_d" in text
        and "saved" in text
    )
    links = re.findall(r"https?://[^\"') ]*", picture.read_text())
    assert set(links) <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}, "a comment and the namespace"
    scores, step, end = commands.run(TOOL, folder).ok().stdout.splitlines()  # it is done, so it ends
    assert scores.startswith("step 3: cider_d") and f"loss {last['loss']:.4f}" in step and end == "finished"
    (folder / ".ended").write_text("failed: no space left\n")
    assert commands.run(TOOL, folder).ok().stdout.splitlines()[-1] == "failed: no space left"
    assert commands.run(TOOL, tmp_path).error == f"error: {tmp_path}: no run.json; name the output_dir of a run"


@pytest.mark.parametrize(
    ("ages", "step_s", "said"),
    [
        ({"metrics.jsonl": timedelta(minutes=1)}, 1.0, ""),
        ({"metrics.jsonl": timedelta(minutes=12)}, 1.0, "no sign of life for 12 min; last step 1,040"),
        ({"metrics.jsonl": timedelta(minutes=12)}, 90.0, ""),  # of a slow run
        ({"metrics.jsonl": timedelta(hours=9), "config.toml": timedelta(minutes=1)}, 1.0, ""),  # resumed just now
        ({"metrics.jsonl": timedelta(hours=9)}, 1.0, "no sign of life for 9 h; last step 1,040"),
        ({"metrics.jsonl": timedelta(hours=9), "report.html": timedelta(hours=9)}, 1.0, live.FINISHED),  # by epochs
        ({"metrics.jsonl": timedelta(hours=1), "report.html": timedelta(hours=9)}, 1.0, "no sign of life for 60 min"),
    ],
)
def test_no_time_is_left_of_a_run_that_is_silent(
    tmp_path: Path, ages: dict[str, timedelta], step_s: float, said: str
) -> None:
    now = time.time()
    for name, age in ({"config.toml": timedelta(hours=20)} | ages).items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now, now - age.total_seconds()))
    state = RunState("", 0, line={"step": 1040, "step_time_s": step_s})
    state.step_ends.extend([(0.0, 1), (1.0, 2)])
    state.ended = live.ending(state, tmp_path)
    assert said in state.ended and bool(said) == bool(state.ended)
    assert state.ended in state.rows(200)[0].plain and ("gone" in state.rows(200)[0].plain) != bool(said)
