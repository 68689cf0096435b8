"""A placeholder that is meant as text is learnt as text, or refused with what to write instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.cases.conftest import Case

RIGHT = {
    "answer": ["Use <video> with a src, inside <figure>.<|im_end|>"],
    "parts": ["Write <image>, or <video>.<|im_end|>"],
    "html": [
        "<p>A &amp; B</p><br/>\n<b>done</b> <|endoftext|><|im_end|>",
        "<p>A &amp; B</p><br/>\n<b>done</b><|im_end|>",
    ],
}


@pytest.mark.parametrize("name", RIGHT)
def test_is_learnt_as_text(case: Callable[[str], Case], name: str) -> None:
    look = case("06_literal_placeholders").look(f"{name}.jsonl")
    look.result.ok()
    assert sorted(run for branch in look.supervised() for run in branch) == sorted(RIGHT[name])
    ids = look.batch["input_ids_T"].tolist()
    assert look.tokenizer.convert_tokens_to_ids("<|endoftext|>") not in ids
    assert len(look.grids()) == 1


@pytest.mark.parametrize("name", ["question", "text"])
def test_is_refused_with_a_fix(case: Callable[[str], Case], name: str) -> None:
    """parts.jsonl is what it asks for."""
    look = case("06_literal_placeholders").look(f"{name}.jsonl")
    assert look.result.status == 2 and "typed parts" in look.result.error and f"{name}.jsonl:1" in look.result.error
