"""Files with odd names are read as they are."""

from __future__ import annotations

from collections.abc import Callable

from tests.parity.cases.conftest import Case


def test_spaces_and_accents(case: Callable[[str], Case]) -> None:
    look = case("22_foreign_records").look("spaces.jsonl")
    look.result.ok()
    assert look.supervised() and len(look.greys()) == len(look.frame_times())
