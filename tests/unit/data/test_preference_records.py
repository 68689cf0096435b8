"""Pairs of answers in the forms of other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import read_messages, write
from vft.common.errors import UserError
from vft.common.types import Conversation, Turn
from vft.data.dataset import add_answers_of_others
from vft.data.records.preferences import DESIRABLE, REJECTED, with_preference
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
    found = with_preference({"videos": ["a.mp4"], "score": 3, **FORMS[name]})
    assert found == {"videos": ["a.mp4"], "score": 3, **WANTED}


def test_sharegpt() -> None:
    record = {"conversations": [{"from": "human", "value": "What?"}], "chosen": "Good.", "rejected": "Bad."}
    found = with_preference(record)
    assert found["conversations"] == [*record["conversations"], {"role": "assistant", "content": "Good."}]
    assert found[REJECTED] == "Bad."


def test_reasoning_is_part_of_an_answer() -> None:
    chosen, rejected = ({"role": "assistant", "content": "A.", "reasoning_content": why} for why in ("So.", "Hm."))
    found = with_preference({"prompt": "?", "chosen": chosen, "rejected": rejected})
    assert found["messages"][-1]["content"] == "<think>\nSo.\n</think>\n\nA."
    assert found[REJECTED] == "<think>\nHm.\n</think>\n\nA."
    by_swift = with_preference({"messages": [ASKED, chosen], "rejected_messages": [ASKED, rejected]})
    assert by_swift == {"messages": [ASKED, chosen], REJECTED: found[REJECTED]}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "<video>What?", "completion": "Good.", "label": False},
        {"prompt": [ASKED], "completion": [{"role": "assistant", "content": "Good."}], "label": False},
        {"messages": [ASKED], "completion": "Good.", "label": False},
        {"messages": WANTED["messages"], "label": False},
        {"messages": WANTED["messages"], "kto_tag": False},
    ],
)
def test_labelled_answers(record: dict[str, Any]) -> None:
    found = with_preference({"videos": ["a.mp4"], **record})
    assert found == {"videos": ["a.mp4"], "messages": WANTED["messages"], DESIRABLE: False}
    key = "kto_tag" if "kto_tag" in record else "label"
    assert with_preference({**record, key: True})[DESIRABLE] is True


@pytest.mark.parametrize(
    "record",
    [
        {"video": "a.mp4", "label": True},
        {"messages": WANTED["messages"], "label": "good"},
        {"messages": WANTED["messages"], "label": 3},
        {"messages": WANTED["messages"], "label": ["good"]},
    ],
)
def test_other_labels_are_no_preferences(record: dict[str, Any]) -> None:
    assert with_preference(record) is record


@pytest.mark.parametrize(
    "record", [{"messages": [ASKED]}, {"chosen": "Good."}, {"prompt": "What?", "completion": "Good."}]
)
def test_records_without_two_answers_stay_as_they_are(record: dict[str, Any]) -> None:
    assert with_preference(record) is record


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
        ({"prompt": "?", "completion": "A", "label": 1}, "label", "1 must be true"),
        ({"messages": WANTED["messages"], "kto_tag": 0}, "kto_tag", "0 must be true"),
        ({"prompt": "?", "completion": " ", "label": True}, "completion", "empty"),
        ({"messages": [ASKED], "label": True}, "messages", "ends with a turn of 'user'"),
        ({"completion": "A", "label": True}, "completion", "has none"),
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
        with_preference(record)
    assert caught.value.field == field


def conversation(question: str, answer: str, desirable: bool | None = True) -> Conversation:
    turns = Turn("user", (question,)), Turn("assistant", (answer,))
    return Conversation(question, turns, "x.jsonl:1", desirable=desirable)


def test_answers_of_others() -> None:
    """Each stands beside the answer to another prompt, always the same, and no answer is used by all."""
    asked = [(conversation(f"What is {n // 2}?", f"{n // 2}{'.' * (n % 2)}", n % 2 == 0), 1.0) for n in range(40)]
    sources = [[*asked[:30]], [*asked[30:], (conversation("Hm?", "No label.", None), 2.0)]]
    add_answers_of_others(sources)
    made = [one for source in sources for one, _ in source]
    *labelled, plain = made
    assert plain.rejected is None and sources[1][-1][1] == 2.0
    assert [one.turns for one in labelled] == [one.turns for one, _ in asked]
    own = {one.id: {other.turns[-1].text for other, _ in asked if other.id == one.id} for one in labelled}
    assert all(one.rejected and one.rejected not in own[one.id] for one in labelled)
    assert len({one.rejected for one in labelled}) > 30
    again = [[*asked]]
    add_answers_of_others(again)
    assert [one.rejected for one, _ in again[0]] == [one.rejected for one in labelled]


def test_no_answer_of_another() -> None:
    same = [(conversation("What?", f"Answer {n}.", n == 0), 1.0) for n in range(3)]
    with pytest.raises(UserError, match=r"x.jsonl:1: no record has another answer to another prompt"):
        add_answers_of_others([same])


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": [{"role": "robot", "content": "?"}], "chosen": "A", "rejected": "B"}, "prompt[0].role"),
        ({"prompt": " ", "chosen": "A", "rejected": "B"}, "prompt"),
        ({"chosen": [ASKED, {"role": "user"}, "A"], "rejected": [ASKED, {"role": "user"}, "B"]}, "chosen[1].content"),
        ({"messages": [{"role": "robot", "content": "?"}, "A"], REJECTED: "B"}, "messages[0].role"),
        ({"prompt": "?", "chosen": "A <video>", "rejected": "B", "videos": ["a.mp4"]}, "prompt"),
        ({"prompt": [{"role": "user", "content": 3}], "completion": "A", "label": True}, "prompt[0].content"),
    ],
)
def test_a_field_has_the_name_that_the_record_gives_it(tmp_path: Path, record: dict[str, Any], field: str) -> None:
    _, (bad,) = read_messages(write(tmp_path / "r.json", [record]), tmp_path)
    assert (bad.origin, bad.field) == ("r.json:2", field)


def test_alpaca() -> None:
    """As LLaMA-Factory has it: instruction and input on two lines, earlier turns in pairs."""
    asked = {
        "instruction": "<video>What?",
        "input": "In a word.",
        "history": [["Hi.", "Hello."]],
        "system": "Be brief.",
    }
    turns = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "<video>What?\nIn a word."},
    ]
    answer = {"role": "assistant", "content": "Good."}
    found = with_preference({**asked, "chosen": "Good.", "rejected": "Bad."})
    assert found == {"system": "Be brief.", "messages": [*turns, answer], REJECTED: "Bad."}
    found = with_preference({**asked, "output": "Good.", "kto_tag": False})
    assert found == {"system": "Be brief.", "messages": [*turns, answer], DESIRABLE: False}
    plain = {"instruction": "What?", "output": "Good."}
    assert with_preference(plain) is plain
    with pytest.raises(RecordError, match="'x' must be a list of pairs"):
        with_preference({**asked, "history": "x", "chosen": "Good.", "rejected": "Bad."})
