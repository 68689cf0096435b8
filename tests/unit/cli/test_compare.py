"""Runs laid side by side: what differs, how each went, on the terminal and as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.main import run_main
from tests.runs.commands import Result
from vft.cli.compare import main
from vft.common.scores import Samples
from vft.inference.evaluate import write_score_parts
from vft.metrics import mean_interval

SETTINGS = """task = "caption"
output_dir = "{folder}"
[model]
path = "some/base"
[lora]
rank = {rank}
targets = ["language_model.*"]
[[data.sources]]
format = "messages"
path = "train.jsonl"
"""


def run_folder(folder: Path, rank: int, losses: list[float], score: float) -> Path:
    """What a run leaves, by hand."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(SETTINGS.format(folder=folder, rank=rank))
    (folder / "run.json").write_text(json.dumps({"device": "Abacus", "processes": 2}))
    lines: list[dict[str, Any]] = [
        {
            **{"step": i, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "samples": 3, "tokens": 50, "step_time_s": 0.5},
            **{"data_wait_s": 0.125, "tokens_per_s": 100.0, "peak_memory_bytes": 3 << 30},
        }
        for i, loss in enumerate(losses, 1)
    ]
    intervals = {"cider_d": [score - 0.5, score + 0.5]}
    lines.append(
        {
            "step": len(losses),
            "eval_cider_d": score,
            "eval_intervals": intervals,
            "eval_tokenization": {"cider_d": "zh"},
        }
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The command, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "160")
    return partial(run_main, main, capsys)


def test_what_differs_and_how_it_went(compare: Callable[..., Result], tmp_path: Path) -> None:
    a = run_folder(tmp_path / "one" / "low", 4, [3.0, 2.0], 1.0)
    b = run_folder(tmp_path / "two" / "high", 64, [3.0, 2.0, 1.0], 2.5)
    done = compare(a, b, "--html", tmp_path / "page.html")
    assert done.status == 0, done.stderr
    rows = {
        cells[1]: cells[2:-1]
        for line in done.stdout.splitlines()
        if len(cells := [c.strip() for c in line.split("│")]) > 3
    }
    assert rows["lora.rank"] == ["4", "64"] and "model.path" not in rows and "output_dir" not in rows
    assert rows["steps"] == ["2", "3"] and rows["loss, mean of the last 10 steps"] == ["2.5000", "2.0000"]
    assert rows["tokens a second"] == ["100", "100"] and rows["waiting for data"] == ["25%", "25%"]
    assert rows["cider_d"] == ["1 [0.5, 1.5] (zh)", "2.5 [2, 3] (zh)"] and rows["device"] == ["2 x Abacus"] * 2
    assert "one/low" in done.stdout and "two/high" in done.stdout
    page = (tmp_path / "page.html").read_text()
    assert page.count("<polyline") >= 2 * 4 and "<script" not in page and "http://" not in page

    texts = re.findall(r">([^<>]+)<", page)
    assert {"lora.rank", "held-out cider_d", "loss"} <= {text.strip() for text in texts}


def test_scores_on_the_same_questions_are_compared_in_pairs(compare: Callable[..., Result], tmp_path: Path) -> None:
    """With the difference's own interval; nothing is said of runs that answered other questions, or kept nothing."""
    runs = [run_folder(tmp_path / name, 4, [1.0], 1.0) for name in ("a", "b", "c", "d")]
    base = [i % 5 / 2 for i in range(50)]
    for run, gain, prefix in zip(runs[:3], (0.0, 0.25, 0.25), ("q", "q", "other"), strict=True):
        samples = Samples(tuple(f"{prefix}{i}" for i in range(50)), tuple(i // 2 for i in range(50)))
        scores = [one + gain * (i % 2) for i, one in enumerate(base)]
        write_score_parts(run / "scores" / "step-000001.json", {"cider_d": mean_interval(scores, samples=samples)})
    done = compare(*runs).ok()
    table = done.stdout[done.stdout.index("Last evaluation, less that of a") :]
    (row,) = ([c.strip() for c in line.split("│")] for line in table.splitlines() if "cider_d" in line)
    assert row[2] == "" and row[3].startswith("+0.125") and row[4:6] == ["other questions", ""]
    assert "less that of" not in compare(runs[3], runs[0]).stdout


@pytest.mark.parametrize("case", ["none", "twice", "many"])
def test_mistakes_are_one_line(compare: Callable[..., Result], tmp_path: Path, case: str) -> None:
    runs = [run_folder(tmp_path / f"run-{i}", 4, [1.0], 1.0) for i in range(7 if case == "many" else 1)]
    done = compare(*{"none": [tmp_path], "twice": runs * 2, "many": runs}[case])
    says = {"none": f"{tmp_path}: no config.toml", "twice": "named twice", "many": "7 runs: at most 6"}[case]
    assert says in done.error
