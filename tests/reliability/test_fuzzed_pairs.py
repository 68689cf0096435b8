"""Damaged records of pairs and of labelled answers: every text and turn that the record has, or a line that names the
place.

The same inputs in every run; `--count N` tries N of each form.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.formats import read_messages, read_source, write
from tests.reliability.test_fuzzed_inputs import EDITS, check_samples, damaged, is_line
from vft.common.types import Sample
from vft.data.records.preferences import DESIRABLE, REJECTED

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "<video>What is it?"}
GOOD, BAD = {"role": "assistant", "content": "A cat."}, {"role": "assistant", "content": "A dog."}
TYPED_QUESTION = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}
TYPED_BAD = {"role": "assistant", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "dog."}]}
VIDEO = {"videos": ["a.mp4"]}
PAIRS: dict[str, dict[str, Any]] = {
    "TRL, texts": {"prompt": "<video>What is it?", "chosen": "A cat.", "rejected": "A dog.", **VIDEO},
    "TRL, conversational": {"prompt": [SYSTEM, TYPED_QUESTION], "chosen": [GOOD], "rejected": [TYPED_BAD], **VIDEO},
    "TRL, the prompt in both": {"chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD], **VIDEO},
    "LLaMA-Factory": {
        "conversations": [
            {"from": "human", "value": "<video>Where?"},
            {"from": "gpt", "value": "At home."},
            {"from": "human", "value": "What is it?"},
        ],
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
        **VIDEO,
    },
    "ms-swift": {"messages": [ASKED, GOOD], "rejected_response": "A dog.", **VIDEO},
    "ms-swift, messages": {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD], **VIDEO},
    "ms-swift, one message": {"messages": [ASKED, GOOD], "rejected_messages": [BAD], **VIDEO},
    "LLaVA-Hound": {
        "id": "v1_0",
        "video": "frames",
        "prompt": "<video>\nWhat is it?",
        "answer": "A cat on a sofa.",
        "chosen": "A cat.",
        "rejected": "A dog.",
        "chosen_score": 5,
    },
    "RLAIF-V": {
        "ds_name": "RLAIF-V",
        "image": "0.jpg",
        "question": "What is it?",
        "chosen": "A cat.",
        "rejected": "A dog.",
        "idx": "0",
    },
}
LABELLED: dict[str, dict[str, Any]] = {
    "TRL, label": {"prompt": [ASKED], "completion": [GOOD], "label": True, **VIDEO},
    "LLaMA-Factory, kto_tag": {"conversations": [{"from": "human", "value": "Why?"}, GOOD], "kto_tag": False},
    "ms-swift, label": {"messages": [ASKED, GOOD], "label": False, **VIDEO},
}
FORMS = PAIRS | LABELLED
QUESTIONS = ("messages", "conversations", "prompt", "question")
ANSWERS = ("chosen", "rejected", "rejected_response", "rejected_messages")
TEXT_KEYS = ("reasoning_content", "reasoning", "content", "value", "text")


def leaves(value: Any) -> Iterator[str]:
    """The texts in a turn, a part, or a list of them."""
    if isinstance(value, str):
        yield value
    for one in value if isinstance(value, list) else ():
        yield from leaves(one)
    for key in TEXT_KEYS if isinstance(value, dict) else ():
        yield from leaves(value.get(key))


def plain(text: str) -> str:
    """Without media's places, the tags of reasoning, and white space, which reading may change."""
    return re.sub(r"<video>|<image>|</?think>|\s", "", text)


def check_pair(record: dict[str, Any], sample: Sample) -> None:
    """Nothing of the record is lost, and nothing is there that the record lacks."""
    assert sample.turns[-1].role == "assistant" and sample.turns[-1].text.strip()
    asked = plain("".join(text for key in QUESTIONS if key not in sample.unread for text in leaves(record.get(key))))
    read = plain("".join(turn.text for turn in sample.turns))
    if record.get("system") and '"system"' not in json.dumps([record.get(key) for key in (*QUESTIONS, "chosen")]):
        read = read.removeprefix(plain(record["system"]))
    assert read == asked + plain("".join(leaves(record.get("completion" if DESIRABLE in sample.fields else "chosen"))))
    if DESIRABLE in sample.fields:
        assert sample.fields[DESIRABLE] is record.get("kto_tag", record.get("label"))
        return
    rejected = sample.fields[REJECTED]
    assert rejected.strip() and rejected.strip() != sample.turns[-1].text.strip()
    key = next(key for key in ANSWERS[1:] if record.get(key) is not None)
    given = plain("".join(leaves(record[key])))
    assert given.endswith(plain(rejected))
    assert read.startswith(given.removesuffix(plain(rejected)))


def printed(key: str) -> str:
    return key if key.isprintable() else ascii(key)


def check_records(path: Path, root: Path, records: list[dict[str, Any]], media: str = "") -> None:
    samples, bad = read_source("messages", path, root, media=media)
    check_samples(samples, root)
    assert len(samples) + len(bad) >= len(records)
    for error in bad:
        assert is_line(str(error)) and error.message, error
        assert re.fullmatch(rf"{re.escape(path.name)}:[0-9]+", error.origin), error
        record = records[int(error.origin.rpartition(":")[2]) - 1]
        is_absent = any(word in error.message for word in ("is missing", "needs either", "listed"))
        assert is_absent or error.field.startswith(tuple(map(printed, record))), error
    for sample in samples:
        if isinstance(sample.fields.get(REJECTED), str) or DESIRABLE in sample.fields:
            check_pair(records[int(sample.origin.rpartition(":")[2]) - 1], sample)


def swapped(record: dict[str, Any]) -> None:
    if isinstance(record.get("chosen"), bytes):
        return
    text = json.dumps(record).replace('"assistant"', '"other"').replace('"user"', '"assistant"')
    text = text.replace('"gpt"', '"human"') if "other" not in text else text.replace('"other"', '"user"')
    record.update(json.loads(text))


def behind(record: dict[str, Any]) -> None:
    for key in (*ANSWERS, "messages"):
        if isinstance(record.get(key), list):
            record[key].append(dict(ASKED))


def in_answer(part: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["rejected"] = {"role": "assistant", "content": [part, {"type": "text", "text": "A dog."}]}

    return change


CHANGES: list[Callable[[dict[str, Any]], Any]] = [
    swapped,
    behind,
    in_answer({"type": "video", "video": "a.mp4"}),
    in_answer({"type": "image", "text": "a picture"}),
    in_answer({"text": "Perhaps. "}),
    lambda record: record.update(rejected_response="A bird."),
    lambda record: record.update(rejected_messages=[{"role": "user", "content": "Who?"}, BAD]),
    lambda record: record.update(chosen="A fish.", rejected="A bird."),
    lambda record: record.update(chosen=[dict(ASKED), dict(GOOD)]),
    lambda record: record.update(messages=[dict(ASKED), dict(GOOD)]),
    lambda record: record.update(prompt="What?"),
    lambda record: record.update(prompt=[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]),
    lambda record: record.update(rejected={**GOOD, "reasoning_content": "Hm. A dog?"}),
    lambda record: record.update(rejected=" A cat.\n"),
    lambda record: record.update(rejected="<video><|im_end|> A <image> dog."),
    lambda record: record.update(rejected="dog " * 50_000),
    lambda record: record.update(rejected=None),
    lambda record: record.update(label=1),
    lambda record: record.update(completion="A mouse.", label=False),
    lambda record: record.update(kto_tag=True),
    lambda record: record.update(chosen=[]),
    lambda record: record.update(rejected=[[BAD]]),
    lambda record: record.update(chosen={"content": "A cat.", "value": "A lion."}),
    lambda record: record.update(chosen=b"A cat."),
    lambda record: record.update(chosen=float("nan")),
    lambda record: record.update(system="Be kind."),
    lambda record: record.update(video=["a.mp4", "a.mp4"]),
]
CHANGED = st.tuples(st.lists(st.sampled_from(CHANGES), max_size=2), EDITS | st.just([]))


def changed(record: dict[str, Any], drawn: Any) -> Any:
    changes, edits = drawn
    record = copy.deepcopy(record)
    for change in changes:
        change(record)
    found = damaged([record], edits)
    return found[0] if found else None


@pytest.mark.parametrize("form", FORMS)
def test_damaged_pairs(tmp_path: Path, count: Callable[[int], int], form: str) -> None:
    for name in ("a.mp4", "0.jpg", "frames/1.jpg", "frames/2.jpg"):
        write(tmp_path / name)

    @settings(
        max_examples=count(80),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn=CHANGED)
    def run(drawn: Any) -> None:
        record = changed(FORMS[form], drawn)
        if not isinstance(record, dict):
            return
        try:
            text = json.dumps(record)
        except TypeError:  # bytes, which only tables hold
            in_table(tmp_path, record)
            return
        if "NaN" not in text and "Infinity" not in text:
            write(tmp_path / "r.jsonl", f"{text}\n{text}")
            check_records(tmp_path / "r.jsonl", tmp_path, [json.loads(text)] * 2)
        in_table(tmp_path, record)

    run()


def in_table(root: Path, record: dict[str, Any]) -> None:
    try:
        pq.write_table(pa.Table.from_pylist([record]), root / "r.parquet")
        rows = pq.read_table(root / "r.parquet").to_pylist()
    except (pa.ArrowException, OverflowError, ValueError, TypeError, KeyError):
        return  # what Parquet cannot hold is no danger
    check_records(root / "r.parquet", root, rows)


@pytest.mark.parametrize("form", PAIRS)
def test_the_pairs_as_they_are(tmp_path: Path, form: str) -> None:
    for name in ("a.mp4", "0.jpg", "frames/1.jpg", "frames/2.jpg"):
        write(tmp_path / name)
    write(tmp_path / "r.jsonl", json.dumps(PAIRS[form]))
    (sample,), bad = read_messages(tmp_path / "r.jsonl", tmp_path)
    assert not bad and sample.fields[REJECTED] == "A dog." and sample.turns[-1].text == "A cat."
    check_pair(PAIRS[form], sample)
