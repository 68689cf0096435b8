"""Near-right captions score alike in scripts with and without spaces."""

from __future__ import annotations

import ast
from collections.abc import Callable

from tests.parity.cases.conftest import Case


def test_unspaced_bleu(case: Callable[[str], Case]) -> None:
    one = case("16_unspaced_bleu")
    lines = one.run(str(one.folder / "score.py")).ok().stdout.splitlines()
    found = {line[:2]: [ast.literal_eval(part.strip()) for part in line[2:].split("| qa")] for line in lines}
    assert found.keys() == {"en", "zh", "ja"}
    for caption, qa in found.values():
        assert caption["bleu4"] >= 60 and caption["cider_d"] > 5 and qa["open_token_f1"] > 0.8
