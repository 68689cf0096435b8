"""Words that differ in a mark differ; composed and decomposed texts are the same."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.parity.cases.conftest import Case


def test_combining_marks(case: Callable[[str], Case]) -> None:
    one = case("15_combining_marks")
    one.run("vft.recipes.qa", "config.toml", "data.workers=0", f"model.path={one.tiny}").ok()
    (line,) = [
        line
        for line in map(json.loads, (one.folder / "out/run/metrics.jsonl").read_text().splitlines())
        if "eval_loss" in line
    ]
    answers = (one.folder / "out/run/predictions/step-000050.jsonl").read_text().splitlines()
    # Learnt by heart: in each a word that differs from the right one in its marks alone.
    assert [(row["prediction"], row["reference"]) for row in map(json.loads, answers)] == [
        ("दिन", "दान"),
        ("ข้าว", "ข่าว"),
    ]
    assert line["eval_accuracy"] == line["eval_open_exact_match"] == 0 and line["eval_open_token_f1"] < 1
    assert line["eval_tokenization"]["open_token_f1"] == "words+characters"
    lines = one.run(str(one.folder / "score.py")).ok().stdout.splitlines()
    different, same = (
        [text for text in lines if "token_f1" in text],
        [text for text in lines if "rouge_l 1.000" in text],
    )
    assert len(different) == 7 and all("exact_match 0.0" in text for text in different)
    assert len(same) == 4 and all("exact_match 1.0" in text for text in same)
