"""Records of other trainers and tools are read; what can't be used is refused with a mend that works."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.parity.cases.conftest import Case


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("swift.jsonl", "Something moves."),
        ("alpaca.jsonl", "Something moves."),
        ("rows.csv", "A, b"),
        ("rows.tsv", "A b"),
        ("labelstudio.json", "Run"),
        ("backslash_ok.jsonl", "ok"),
    ],
)
def test_what_is_read(case: Callable[[str], Case], name: str, answer: str) -> None:
    look = case("22_foreign_records").look(name)
    look.result.ok()
    assert look.supervised() == [[f"{answer}<|im_end|>"]] and len(look.greys()) == len(look.frame_times()) > 0
    if name == "labelstudio.json":  # frames 1 to 40 at 10 a second
        assert min(look.frame_times()) >= 0 and max(look.frame_times()) <= 3.9


def test_empty_answers_and_drives_are_refused(case: Callable[[str], Case]) -> None:
    folder = case("22_foreign_records")
    look = folder.look("null.jsonl")
    assert look.result.status == 2 and "null.jsonl:1: messages[1]" in look.result.stderr
    assert "2 of 3 samples" in look.result.stderr
    look = folder.look("windows.jsonl")
    assert look.result.status == 2 and "windows.jsonl:2: videos[0]" in look.result.stderr
    assert "1 of 2 samples" in look.result.stderr  # the first is found with '/'
    mend = look.result.stderr.partition("write '")[2].partition("'")[0]
    lines = (folder.folder / "data/windows.jsonl").read_text().splitlines()
    record = json.loads(lines[1])
    record["videos"] = [mend]
    (folder.folder / "data/mended.jsonl").write_text(f"{lines[0]}\n{json.dumps(record)}\n")
    mended = folder.look("mended.jsonl")
    mended.result.ok()
    assert len(mended.supervised()) == 2
