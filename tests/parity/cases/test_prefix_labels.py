"""A label that begins another wins only where the model ends its answer there."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.parity.cases.conftest import Case
from tests.runs.commands import metrics


def test_prefix_labels(case: Callable[[str], Case]) -> None:
    """What is said exactly is ranked first, at every evaluation of the run."""
    one = case("01_prefix_labels")
    one.run("vft.recipes.classify", "config.toml", "data.workers=0", f"model.path={one.tiny}").ok()
    run = one.folder / "out" / "run"
    said = 0
    for file in sorted((run / "predictions").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if row["prediction"] in row["option_scores"]:
                said += 1
                assert row["choice"] == row["prediction"], row
    assert said >= 30, f"{said} answers were labels: the run shows nothing"
    last = [line for line in metrics(run) if "eval_top1" in line][-1]
    assert last["eval_top1"] >= last["eval_exact_match"] - 0.02
