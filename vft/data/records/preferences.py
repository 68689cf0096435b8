"""Records of preferences in the forms of other trainers, brought to one: the turns, the last of which is the chosen
answer, and `rejected_response`, a text (ms-swift's form).

    TRL            prompt, chosen, rejected: messages or texts; or chosen and rejected with the prompt in both
    LLaMA-Factory  conversations (or messages) up to the question; chosen and rejected, a message each
    ms-swift       messages with the chosen answer; rejected_response, or rejected_messages
    LLaVA-Hound    video, prompt, chosen, rejected (texts)
    RLAIF-V        image, question, chosen, rejected (texts)
"""

from __future__ import annotations

from typing import Any

from vft.data.records.record import TURN_KEYS, Record, RecordError, check_text, short_repr

REJECTED = "rejected_response"
PROMPTS = ("prompt", "question")


def with_rejected_response(record: Record) -> Record:
    """The record in the one form; one without two answers is as it was.

    Raises:
        RecordError: the answers are equal, empty, or to two different prompts.
    """
    given = {key: value for key, value in record.items() if value is not None}
    if {"chosen", "rejected"} <= given.keys():
        turns, chosen, rejected = _two_answers(given)
        key = next((key for key in TURN_KEYS if key in given), "messages")
        record = {name: value for name, value in record.items() if name not in ("chosen", "rejected", *PROMPTS)}
        record |= {key: [*turns, {"role": "assistant", "content": chosen}], REJECTED: rejected}
    elif REJECTED in given:
        chosen, rejected = _last_answer(given), check_text(given[REJECTED], REJECTED)
    elif "rejected_messages" in given:
        chosen = _last_answer(given)
        *_, rejected = _answer(given["rejected_messages"], "rejected_messages")
        record = {name: value for name, value in record.items() if name != "rejected_messages"} | {REJECTED: rejected}
    else:
        return record
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise RecordError(name, "is an empty answer; give it a text or take the record out")
    if chosen.strip() == rejected.strip():
        raise RecordError("rejected", f"{short_repr(rejected)} is the chosen answer too; take the record out")
    return record


def _two_answers(record: Record) -> tuple[list[Any], str, str]:
    """The turns before the answers, and both."""
    before, chosen = _answer(record["chosen"], "chosen")
    before_rejected, rejected = _answer(record["rejected"], "rejected")
    if before != before_rejected:
        raise RecordError("rejected", "has other turns before its answer than chosen; both must answer one prompt")
    keys = [key for key in (*TURN_KEYS, *PROMPTS) if key in record]
    if len(keys) + bool(before) != 1:
        found = ", ".join(keys) or "none"
        raise RecordError("chosen", f"needs one prompt: messages, prompt or question; the record has {found}")
    if before:
        return before, chosen, rejected
    prompt = record[keys[0]]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise RecordError(keys[0], f"{short_repr(prompt)} must be a text or a list of messages")
    return prompt, chosen, rejected


def _answer(value: Any, field: str) -> tuple[list[Any], str]:
    """The turns before an answer, and its text, of a text, a message, or messages."""
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise RecordError(field, "[] has no answer; give one")
    *before, last = entries
    if isinstance(last, dict):
        role, content = last.get("role", last.get("from")), last.get("content", last.get("value"))
        if role not in ("assistant", "gpt", None):
            raise RecordError(field, f"ends with a turn of {short_repr(role)}; it must end with the assistant's answer")
        if isinstance(content, list):  # typed parts
            content = "".join(
                check_text(part.get("text") if isinstance(part, dict) else part, field) for part in content
            )
        last = content
    return before, check_text(last, field)


def _last_answer(record: Record) -> str:
    key = next((key for key in TURN_KEYS if key in record), None)
    if key is None:
        raise RecordError("messages", "is missing; give the prompt and the chosen answer there")
    return _answer(record[key], key)[1]
