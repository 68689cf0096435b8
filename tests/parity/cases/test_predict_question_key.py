"""predict asks what the record asks, under whatever key."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.parity.cases.conftest import Case


def test_each_record_s_own_question(case: Callable[[str], Case]) -> None:
    one = case("26_predict_question_key")
    output = one.folder / "answers.jsonl"
    asked = ("--model", one.tiny, "--max-new-tokens", 3, "--output", output, "data/ask.jsonl")
    told = one.run("tools/predict.py", *asked).ok().stderr
    assert "not read" not in told and "ask nothing" not in told
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["id"], line["prompt"]) for line in lines] == [
        ("q1", "What colour is it?"),
        ("q2", "Is it dark?"),
        ("q3", "Is it a cat?"),
    ]
    assert [line.get("reference") for line in lines] == [None, "no", None]
