"""A clip with several right labels is right by any of them, in whatever order its records stand."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.parity.cases.conftest import Case


def test_multi_label(case: Callable[[str], Case]) -> None:
    one = case("02_multi_label")
    found = []
    for name in ("train", "swapped"):
        source = f'data.sources=[{{format="messages",path="{name}.jsonl"}}]'
        arguments = (f"model.path={one.tiny}", "eval.max_new_tokens=2", "data.workers=0", source)
        one.run("tools/evaluate.py", "config.toml", *arguments, f"output_dir=out/{name}").ok()
        folder = one.folder / "out" / name / "predictions"
        (row,) = (json.loads(line) for line in (folder / "base.jsonl").read_text().splitlines())
        scores = {
            name: score["value"] for name, score in json.loads((folder / "scores.json").read_text())["base"].items()
        }
        right = float(row["choice"] in ("eating", "sitting on a sofa"))
        assert scores["top1"] == scores["top1/eating"] == scores["top1/sitting on a sofa"] == right
        assert sorted(row["references"]) == ["eating", "sitting on a sofa"]
        found.append({metric: score for metric, score in scores.items() if metric != "loss"})
    assert found[0] == found[1]
    printed = one.run(str(one.folder / "score.py")).ok().stdout
    assert printed.count("'top1': 1.0") == printed.count("'choice_accuracy': 1.0") == 2, printed
