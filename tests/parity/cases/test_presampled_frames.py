"""A video that is a list of pictures shows all of them, at its own times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.cases.conftest import Case


@pytest.mark.parametrize(
    ("records", "times", "seconds"),
    [
        ("train.jsonl", [0.0, 1.0, 2.0], 2.0),
        ("times.jsonl", [0.0, 1.5, 4.0], 4.0),
        ("toplevel.jsonl", [0.0, 2.0, 4.0], 4.0),
        ("seven.jsonl", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], 1.0),
        ("dense.jsonl", [i / 8 for i in range(16)], 0.25),
    ],
)
def test_all_pictures(case: Callable[[str], Case], records: str, times: list[float], seconds: float) -> None:
    look = case("14_presampled_frames").look(records)
    look.result.ok()
    assert look.frame_times() == pytest.approx(times, abs=1e-3)
    assert look.batch["seconds_per_grid"].tolist() == pytest.approx([seconds])
    greys = look.greys()
    assert len(greys) == -(-len(times) // 2) * 2
    assert len(set(greys)) == len(times) and greys == sorted(greys)
    if len(times) % 2:
        assert greys[-1] == greys[-2]
