"""Records of preferences in the forms of other trainers, brought to two.

Pairs become the turns, the last of which is the chosen answer, and `rejected_response`, a text (ms-swift's form):

    TRL            prompt, chosen, rejected: messages or texts; or chosen and rejected with the prompt in both
    LLaMA-Factory  conversations (or messages) up to the question; chosen and rejected, a message each; or instruction,
                   input, history with chosen and rejected, texts
    ms-swift       messages with the chosen answer; rejected_response, or rejected_messages
    LLaVA-Hound    video, prompt, chosen, rejected (texts)
    RLAIF-V        image, question, chosen, rejected (texts)

Single answers that are desirable or not become the turns and `desirable`, true or false:

    TRL            prompt, completion: messages or texts; label
    LLaMA-Factory  conversations (or messages) with the answer, or instruction, input, history, output; kto_tag
    ms-swift       messages with the answer; label
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vft.data.records.record import (
    TURN_KEYS,
    Record,
    RecordError,
    check_text,
    list_keys,
    read_history,
    read_reasoning,
    short_repr,
)

REJECTED = "rejected_response"
DESIRABLE = "desirable"
PROMPTS = ("prompt", "question")
CONTENTS = ("content", "value")
ANSWERING = ("assistant", "gpt")
"""Roles of who answers."""
LABELS = ("kto_tag", "label")
EMPTY = "is an empty answer; give it a text or take the record out"


def with_preference(record: Record) -> Record:
    """The record in one of the two forms; one without a preference is as it was.

    Raises:
        RecordError: an answer is empty, or those of a pair are equal, to different prompts, or there in two forms.
    """
    given = {key: value for key, value in record.items() if value is not None}
    if "instruction" in given and given.keys() & {"chosen", "rejected", "kto_tag"}:
        record = given = _from_alpaca(given)
    keys = [key for key in ("chosen", "rejected", REJECTED, "rejected_messages") if key in given]
    if keys == ["chosen", "rejected"]:
        turns, chosen, rejected = _two_answers(given)
        key = next((key for key in TURN_KEYS if key in given), "messages")
        record = {name: value for name, value in record.items() if name not in (*keys, *PROMPTS)}
        record |= {key: [*turns, {"role": "assistant", "content": chosen}], REJECTED: rejected}
    elif len(keys) > 1:
        raise RecordError(keys[-1], f"stands beside {keys[0]!r}; keep one form of the two answers")
    elif keys in ([REJECTED], ["rejected_messages"]):
        key = next((key for key in TURN_KEYS if key in given), "messages")
        if key not in given:
            raise RecordError(key, "is missing; give the prompt and the chosen answer there")
        before, chosen = _answer(given[key], key)
        before_rejected, rejected = _answer(given[keys[0]], keys[0])
        if before_rejected and before_rejected != before:
            raise RecordError(keys[0], f"has other turns before its answer than {key}; both must answer one prompt")
        record = {name: value for name, value in record.items() if name not in keys} | {REJECTED: rejected}
        keys = [key, *keys]
    else:
        return _labelled(record, given)
    check_answers(keys, chosen, rejected)
    return record


def given_field(record: Record, field: str) -> str:
    """What a record calls a `field` of the turns made of it: `prompt[0].content` for `messages[0].content`."""
    place = re.fullmatch(r"messages(?:\[(\d+)\](.*))?", field)
    answer = next((key for key in ("chosen", "completion") if record.get(key) is not None), "")
    if place is None or not answer or any(record.get(key) is not None for key in TURN_KEYS):
        return field
    prompt = next((key for key in (*PROMPTS, "instruction") if record.get(key) is not None), answer)
    number = int(place[1] or 0)
    if place[1] and isinstance(record[prompt], list) and number < len(record[prompt]):
        return f"{prompt}[{number}]{place[2]}"
    return answer if number else prompt


def _from_alpaca(record: Record) -> Record:
    """Alpaca's keys as prompt and completion. A line break joins instruction and input, as in LLaMA-Factory."""
    asked = [check_text(record[key], key) for key in ("instruction", "input") if record.get(key)]
    turns = [*read_history(record.get("history")), {"role": "user", "content": "\n".join(asked)}]
    kept = {key: value for key, value in record.items() if key not in ("instruction", "input", "history", "output")}
    return {**kept, "prompt": turns} | ({"completion": record["output"]} if "output" in record else {})


def check_answers(keys: Sequence[str], chosen: str, rejected: str) -> None:
    """RecordError if one of two answers, which are under these keys, is empty, or if they are equal."""
    for name, text in zip(keys, (chosen, rejected), strict=True):
        if not text.strip():
            raise RecordError(name, EMPTY)
    if chosen.strip() == rejected.strip():
        raise RecordError(keys[1], f"{short_repr(rejected)} is the chosen answer too; take the record out")


def _labelled(record: Record, given: Record) -> Record:
    """A single answer, with its label under DESIRABLE; a record without a label is as it was."""
    label = next((given[key] for key in LABELS if key in given), None)
    if ("completion" in given and isinstance(label, int)) or "kto_tag" in given:
        if not isinstance(label, bool):
            field = "kto_tag" if "kto_tag" in given else "label"
            raise RecordError(field, f"{short_repr(label)} must be true, for a desirable answer, or false")
    elif not isinstance(label, bool) or not given.keys() & set(TURN_KEYS):
        return record  # a label of another kind
    key = next((key for key in TURN_KEYS if key in given), "messages")
    read = (*LABELS, *PROMPTS, "completion") if "completion" in given else LABELS
    kept = {name: value for name, value in given.items() if name not in read}
    if "completion" not in given and key not in given:
        raise RecordError(key, "is missing; give the prompt and the answer there")
    if "completion" in given:
        turns, answer = _answer(given["completion"], "completion")
        kept[key] = [*_prompt(given, turns, "completion"), {"role": "assistant", "content": answer}]
    if not _answer(kept[key], key)[1].strip():
        raise RecordError("completion" if "completion" in given else key, EMPTY)
    return kept | {DESIRABLE: label}


def _two_answers(record: Record) -> tuple[list[Any], str, str]:
    """The turns before the answers, and both."""
    before, chosen = _answer(record["chosen"], "chosen")
    before_rejected, rejected = _answer(record["rejected"], "rejected")
    if before != before_rejected:
        raise RecordError("rejected", "has other turns before its answer than chosen; both must answer one prompt")
    return _prompt(record, before, "chosen"), chosen, rejected


def _prompt(record: Record, before: list[Any], field: str) -> list[Any]:
    """The turns before an answer: those that stand before it in its `field`, or those of the record."""
    keys = [key for key in (*TURN_KEYS, *PROMPTS) if key in record]
    if len(keys) + bool(before) != 1:
        found = ", ".join(keys) or "none"
        raise RecordError(field, f"needs one prompt: messages, prompt or question; the record has {found}")
    if before:
        return before
    prompt = record[keys[0]]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt or not all(isinstance(turn, dict) for turn in prompt):
        raise RecordError(keys[0], f"{short_repr(prompt)} must be a text or a list of messages")
    if prompt[-1].get("role", prompt[-1].get("from")) in ANSWERING:
        raise RecordError(keys[0], f"ends with an answer, beside {field}; it must end with the question")
    return prompt


def _answer(value: Any, field: str) -> tuple[list[Any], str]:
    """The turns before an answer, and its text with its reasoning, of a text, a message, or messages."""
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise RecordError(field, "[] has no answer; give one")
    *before, last = entries
    if not isinstance(last, dict):
        return before, check_text(last, field)
    role, contents = last.get("role", last.get("from")), [v for k in CONTENTS if (v := last.get(k)) is not None]
    if role not in (*ANSWERING, None):
        raise RecordError(field, f"ends with a turn of {short_repr(role)}; it must end with the assistant's answer")
    if len(contents) != 1:
        raise RecordError(field, f"needs either 'content' or 'value'; it has {list_keys(last)}")
    (content,) = contents
    thought = read_reasoning(last, "assistant", content, field)
    return before, thought + "".join(
        _text_of(part, field) for part in (content if isinstance(content, list) else [content])
    )


def _text_of(part: Any, field: str) -> str:
    """A text, or the text of a typed part."""
    if isinstance(part, dict) and part.get("type", "text") != "text":
        raise RecordError(
            field, f"a part of type {short_repr(part['type'])} in an answer; media belong in the question"
        )
    return check_text(part.get("text") if isinstance(part, dict) else part, field)
