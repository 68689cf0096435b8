"""Pairs of answers in the forms of other trainers."""

from __future__ import annotations

from typing import Any

import pytest

from vft.data.records.preferences import REJECTED, with_rejected_response
from vft.data.records.record import RecordError

ASKED = {"role": "user", "content": "<video>What?"}
PICTURE = {"type": "image", "image": "a.jpg", "text": "A picture."}
WANTED = {"messages": [ASKED, {"role": "assistant", "content": "Good."}], REJECTED: "Bad."}
FORMS: dict[str, dict[str, Any]] = {
    "TRL, texts": {"prompt": "<video>What?", "chosen": "Good.", "rejected": "Bad."},
    "TRL, conversational": {
        "prompt": [ASKED],
        "chosen": [{"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "Bad."}]}],
    },
    "TRL, the prompt in both": {
        "chosen": [ASKED, {"role": "assistant", "content": "Good."}],
        "rejected": [ASKED, {"role": "assistant", "content": "Bad."}],
    },
    "LLaMA-Factory": {
        "messages": [ASKED],
        "chosen": {"role": "assistant", "content": "Good."},
        "rejected": {"from": "gpt", "value": "Bad."},
    },
    "ms-swift": WANTED,
    "ms-swift, messages": {
        "messages": WANTED["messages"],
        "rejected_messages": [ASKED, {"role": "assistant", "content": "Bad."}],
    },
    "RLAIF-V": {"question": "<video>What?", "chosen": "Good.", "rejected": "Bad.", "messages": None},
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    found = with_rejected_response({"videos": ["a.mp4"], "score": 3, **FORMS[name]})
    assert found == {"videos": ["a.mp4"], "score": 3, **WANTED}


def test_sharegpt() -> None:
    record = {"conversations": [{"from": "human", "value": "What?"}], "chosen": "Good.", "rejected": "Bad."}
    found = with_rejected_response(record)
    assert found["conversations"] == [*record["conversations"], {"role": "assistant", "content": "Good."}]
    assert found[REJECTED] == "Bad."


def test_reasoning_is_part_of_an_answer() -> None:
    chosen, rejected = ({"role": "assistant", "content": "A.", "reasoning_content": why} for why in ("So.", "Hm."))
    found = with_rejected_response({"prompt": "?", "chosen": chosen, "rejected": rejected})
    assert found["messages"][-1]["content"] == "<think>\nSo.\n</think>\n\nA."
    assert found[REJECTED] == "<think>\nHm.\n</think>\n\nA."
    by_swift = with_rejected_response({"messages": [ASKED, chosen], "rejected_messages": [ASKED, rejected]})
    assert by_swift == {"messages": [ASKED, chosen], REJECTED: found[REJECTED]}


@pytest.mark.parametrize(
    "record", [{"messages": [ASKED]}, {"chosen": "Good."}, {"prompt": "What?", "completion": "Good."}]
)
def test_records_without_two_answers_stay_as_they_are(record: dict[str, Any]) -> None:
    assert with_rejected_response(record) is record


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        ({"prompt": "?", "chosen": "A", "rejected": "A"}, "rejected", "chosen answer too"),
        ({"prompt": "?", "chosen": "", "rejected": "A"}, "chosen", "empty"),
        ({"prompt": "?", "chosen": "A", "rejected": "\n"}, "rejected", "empty"),
        ({"prompt": "?", "chosen": "A", "rejected": []}, "rejected", r"\[\] has no answer"),
        ({"prompt": "?", "chosen": 1, "rejected": "A"}, "chosen", "of type int"),
        ({"prompt": "?", "chosen": [ASKED], "rejected": "A"}, "chosen", "ends with a turn of 'user'"),
        ({"prompt": [], "chosen": "B", "rejected": "A"}, "prompt", r"\[\] must be a text or a list"),
        ({"prompt": "?", "messages": [ASKED], "chosen": "B", "rejected": "A"}, "chosen", "messages, prompt"),
        ({"chosen": "B", "rejected": "A"}, "chosen", "has none"),
        ({"chosen": [ASKED, "B"], "rejected": [ASKED, ASKED, "A"]}, "rejected", "other turns"),
        ({REJECTED: "A"}, "messages", "is missing"),
        ({"messages": WANTED["messages"], REJECTED: 3}, REJECTED, "of type int"),
        ({**WANTED, REJECTED: "Good."}, REJECTED, "chosen answer too"),
        ({**WANTED, "chosen": "A", "rejected": "B"}, REJECTED, "stands beside 'chosen'"),
        ({**WANTED, "rejected_messages": [ASKED, "C"]}, "rejected_messages", f"stands beside '{REJECTED}'"),
        ({"messages": WANTED["messages"], "rejected_messages": ["Why?", "C"]}, "rejected_messages", "other turns"),
        ({"prompt": WANTED["messages"], "chosen": "B", "rejected": "A"}, "prompt", "ends with an answer"),
        ({"prompt": ["?"], "chosen": "B", "rejected": "A"}, "prompt", "list of messages"),
        ({"prompt": "?", "chosen": {"content": "B", "value": "C"}, "rejected": "A"}, "chosen", "either 'content'"),
        ({"prompt": "?", "chosen": "B", "rejected": [{"content": [PICTURE]}]}, "rejected", "type 'image' in an answer"),
        ({"messages": WANTED["messages"], "rejected_messages": "x" * 3 + "\ud800"}, "rejected_messages", "surrogate"),
    ],
)
def test_what_is_wrong(record: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        with_rejected_response(record)
    assert caught.value.field == field
