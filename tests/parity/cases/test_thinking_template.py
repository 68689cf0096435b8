"""Answers with reasoning under a template that opens it for the model, and under one that does not."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.cases.conftest import Case
from tests.runs.commands import REPOSITORY

LOOK, AGAIN = "I look.\n</think>\n\nOne.<|im_end|>", "Again.\n</think>\n\nTwo.<|im_end|>"
OPENED = {
    "cot": [[LOOK]],
    "cot_tight": [[LOOK]],
    "cot_multi": [[LOOK], [AGAIN]],
    "plain": [["\n</think>\n\nOne.<|im_end|>"], ["\n</think>\n\nTwo.<|im_end|>"]],
    "trim": [["\n</think>\n\none<|im_end|>"]],
}
PLAIN = {"cot_multi": [[f"<think>\n{LOOK}", f"<think>\n{AGAIN}"]]}


def test_thinking_and_instruct(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    there = case("20_thinking_template")
    monkeypatch.setenv("VFT", str(REPOSITORY))
    monkeypatch.chdir(there.folder)
    Path("out").mkdir(exist_ok=True)
    runpy.run_path("make.py")
    for model, wanted in (("q3", PLAIN), ("q3_think", OPENED)):
        records = [(there.folder / "data" / f"{name}.jsonl").read_text() for name in wanted]
        (there.folder / "data" / f"of_{model}.jsonl").write_text("".join(records))
        look = there.look(f"of_{model}.jsonl", model=there.folder / "out" / model)
        look.result.ok()
        runs = sorted(run for records in wanted.values() for run in records)
        assert sorted(filter(None, look.supervised())) == runs  # a trunk has none
    assert any(time >= 6.0 for time in look.frame_times())  # of trim.jsonl
    # What the model says goes on behind the tag: without its end, it is a thought and no answer.
    asked = ("--prompt", "First?", "--json", "--max-new-tokens", 4, "data/c10.mp4")
    result = there.run("tools/predict.py", "--model", there.folder / "out" / "q3_think", *asked).ok()
    answer = json.loads(result.stdout)
    assert answer["prediction"] == "" and answer["cut_off"] and "1 of 1 answers were cut off" in result.stderr
