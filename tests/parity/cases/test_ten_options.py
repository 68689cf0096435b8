"""The letter of a sentence is that of its answer, where I is an option too."""

from __future__ import annotations

from collections.abc import Callable

from tests.parity.cases.conftest import Case


def test_ten_options(case: Callable[[str], Case]) -> None:
    one = case("28_ten_options")
    lines = one.run(str(one.folder / "score.py")).ok().stdout.splitlines()
    right = {line.split(" -> ")[0] for line in lines if line.endswith(" 1.0")}
    assert {"'C'", "'C. maple'", "'It is C.'", "'I think it is C'", "'Judging by the leaves, C'"} <= right
