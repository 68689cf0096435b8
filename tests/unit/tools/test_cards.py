"""The README's table of cards is what the tool makes."""

from __future__ import annotations

from pathlib import Path

import cards
import pytest

README = Path(__file__).parents[3] / "README.md"


@pytest.mark.parametrize(
    ("model", "card", "tokens"),
    [
        ("Qwen/Qwen3.5-2B", (1, 24), cards.TOKENS),
        ("Qwen/Qwen2.5-VL-7B-Instruct", (1, 48), cards.TOKENS),
        ("Qwen/Qwen2.5-VL-3B-Instruct", (1, 8), cards.FEW_TOKENS),
    ],
)
def test_a_cell_of_the_readme(model: str, card: tuple[int, int], tokens: int) -> None:
    table = [line.strip("|").split("|") for line in README.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    head = next(cells for cells in table if f" {card[0]} x {card[1]} GiB " in cells)
    name, cell = cards.lines([model], (card,), tokens)[0].strip("|").split("|")
    row = next(cells for cells in table if cells[0] == name and len(cells) == len(head))
    assert row[head.index(f" {card[0]} x {card[1]} GiB ")] == cell


def test_the_readme_has_every_model_and_card() -> None:
    text = README.read_text(encoding="utf-8")
    assert all(f"{gpus} x {gib} GiB" in text for gpus, gib in (*cards.CARDS, *cards.SMALL_CARDS))
    assert all(cards.short(model) in text for model in cards.MODELS)
