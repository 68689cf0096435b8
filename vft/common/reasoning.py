"""What a model thinks aloud before its answer: `<think>...</think>`, as Qwen3's and DeepSeek-R1's templates have it."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def split_reasoning(text: str, opened: bool = False) -> tuple[str | None, str]:
    """The reasoning that a text begins with, and the answer behind it; None and the whole text where it has none.

    With `opened` the prompt has written the opening tag already, so that all up to the closing one is reasoning.
    Line breaks beside the tags belong to neither (the rule of Qwen3's template).
    """
    begins = text.lstrip().startswith(OPEN)
    if (begins or opened) and CLOSE in text:
        reasoning, _, answer = text.partition(CLOSE)
        if begins:
            reasoning = reasoning.partition(OPEN)[2]
        return reasoning.strip("\n"), answer.lstrip("\n")
    return None, text


def answer_in(text: str, opened: bool = False) -> str:
    """The answer in what a model said: what stands behind the reasoning; nothing where that was not finished.

    `opened` as in `split_reasoning`.
    """
    if CLOSE not in text and (opened or text.lstrip().startswith(OPEN)):
        return ""
    return split_reasoning(text, opened)[1]
