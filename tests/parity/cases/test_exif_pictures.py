"""A phone's picture is seen upright."""

from __future__ import annotations

from collections.abc import Callable

from tests.parity.cases.conftest import Case


def test_the_bright_half_is_on_top(case: Callable[[str], Case]) -> None:
    look = case("09_exif_pictures").look("train.jsonl")
    look.result.ok()
    assert look.grids() == [[1, 12, 6]]
    rows = look.batch["pixels_PD"].view(6, 3, 4, -1).mean(dim=(1, 2, 3))  # pairs of rows of patches, from the top
    assert rows[:3].min() > rows[3:].max()
