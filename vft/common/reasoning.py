"""Reasoning before an answer, in `<think>...</think>` as in the templates of Qwen3 and DeepSeek-R1."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def split_reasoning(text: str, opened: bool = False) -> tuple[str | None, str]:
    """The reasoning at the start of a text, and the answer after it; None and the whole text if there is no reasoning.

    `opened`: the prompt ends with the opening tag, so everything up to the closing tag is reasoning. Line breaks next
    to the tags are removed (the rule of Qwen3's template).
    """
    begins = text.lstrip().startswith(OPEN)
    if (begins or opened) and CLOSE in text:
        reasoning, _, answer = text.partition(CLOSE)
        if begins:
            reasoning = reasoning.partition(OPEN)[2]
        return reasoning.strip("\n"), answer.lstrip("\n")
    return None, text


def answer_in(text: str, opened: bool = False) -> str:
    """The answer in a generated text: what follows the reasoning; empty if the reasoning was not finished.

    `opened` as in `split_reasoning`.
    """
    if CLOSE not in text and (opened or text.lstrip().startswith(OPEN)):
        return ""
    return split_reasoning(text, opened)[1]
