"""Records as people have them, made to what `messages` reads: by a mapping of columns, or by the names that others use.

A record with turns (`messages`, `conversations`) stays as it is. Another has a medium, an answer and mostly a question
under keys of its own: tables, alpaca (`instruction`, `input`, `output`), ms-swift (`query`, `response`, `history`), TRL
(`prompt`, `completion`), exports of Label Studio. The names follow LLaMA-Factory's alpaca converter and ms-swift's
ResponsePreprocessor.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vft.common.errors import UserError
from vft.data.formats import label_studio
from vft.data.formats.media_options import LIST_OPTIONS, REAL_OPTIONS, meaning_of
from vft.data.formats.records import PICTURE_SUFFIXES, TURN_KEYS, RecordError, check_text, is_there, names_in, shown
from vft.data.formats.unread_keys import FILES, IMAGES, MEDIA_KEYS, VIDEOS

Record = dict[str, Any]

QUESTIONS = ("question", "query", "prompt", "instruction", "problem")
SYSTEMS = ("system", "system_prompt")
ANSWERS = (
    ("answer", "answers", "response", "output", "completion", "target", "solution"),
    ("caption", "captions", "description", "summary", "text"),
    ("label", "class", "category", "action", "choice"),
)
"""Names of the answer. Those of a later row count where a record has none of the rows before; the last are labels."""
LABELS = ANSWERS[-1]
LISTS = frozenset({*TURN_KEYS, *MEDIA_KEYS, "answers", "captions", "options", "history", "segments"})
"""Keys whose text in a cell of a table may be a list, in JSON or as Python writes it."""
METADATA = "metadata"
"""Name of the table that lies among the files that it is about."""
READ = "a record has 'messages' or 'conversations', or an answer, and a medium or a question"


@dataclass
class Shapes:
    """Makes the records of one source into those that `messages` reads."""

    root: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    """Keys of these records by the names that this module knows."""
    answered: bool = True
    """Whether a record needs an answer."""
    listed: Sequence[str] = ()
    """All labels, where a file says them."""
    labels: list[str] = field(default_factory=list)
    """Labels of the records read so far; records without a question hold this list itself as their `labels`."""
    keys: dict[str, None] = field(default_factory=dict)
    """All keys that records had."""
    addresses: dict[str, str] = field(default_factory=dict)
    """Of files whose address is not their path: the address, by the path."""

    def __call__(self, record: Record, file: Path) -> list[Record]:
        """One record of `file`, or several where it holds several answers or parts. RecordError names the field at
        fault."""
        record = self._located(record, file)
        found: list[Record] = []
        for said in label_studio.rows(record, self.root):
            self.keys.update(dict.fromkeys(said.row))
            row = {key: _cell(key, value) for key, value in self.renamed(said.row).items()}
            found += self._turned(row, said.controls, said.is_label)
        return found

    def as_named(self, record: Record, file: Path) -> list[Record]:
        """The record with mapped columns, its media's place and the values of cells alone."""
        record = self._located(record, file)
        self.keys.update(dict.fromkeys(record))
        return [{key: _cell(key, value) for key, value in self.renamed(record).items()}]

    def _located(self, record: Record, file: Path) -> Record:
        """The record with its files named from `root` on. A table called `metadata` names them from its own folder on:
        the layout of videofolder and imagefolder (https://huggingface.co/docs/datasets/video_dataset)."""
        if file.stem.lower() != METADATA:
            return record
        folder = os.path.relpath(os.path.realpath(file.parent), os.path.realpath(self.root))

        def below_root(name: Any) -> Any:
            beside = os.path.normpath(f"{folder}/{name}")
            is_text = isinstance(name, str) and name and "\0" not in name
            is_beside = is_text and (is_there(self.root, beside) or not is_there(self.root, name))
            return beside if is_beside and not beside.startswith("..") else name

        return {key: below_root(value) if key.endswith("file_name") else value for key, value in record.items()}

    def check_columns(self, path: Path) -> None:
        """UserError where a mapped column is in no record."""
        for role, column in self.columns.items():
            if self.keys and column not in self.keys:
                near = difflib.get_close_matches(column, self.keys, n=1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                has = ", ".join(map(shown, self.keys))
                raise UserError(f"{path}: columns.{role} = {column!r}: no record has it; they have {has:.300}{meant}")

    def renamed(self, row: Record) -> Record:
        """The row with mapped columns under their names here; what else had such a name is not meant."""
        rest = {key: value for key, value in row.items() if key not in (*self.columns, *self.columns.values())}
        return rest | {name: row[column] for name, column in self.columns.items() if column in row}

    def _turned(self, row: Record, controls: Sequence[str], is_label: bool) -> list[Record]:
        has_turns = any(row.get(key) is not None for key in TURN_KEYS)
        row = row if has_turns else self._with_media(row)
        row = {key: self._file(value, key) if key in MEDIA_KEYS else value for key, value in row.items()}
        if has_turns:
            return [row]
        names = _plain_names(row)
        asks = self._one(row, _known_in(names, QUESTIONS), "question")
        extra = names.get("input")
        answer = self._answer(row, names, controls)
        is_input = "input" in self.columns or asks in (None, names.get("instruction"))
        used = {asks, answer, names.get("history"), extra if is_input else None}
        rest = {key: value for key, value in row.items() if key not in used}
        if (system := self._one(row, _known_in(names, SYSTEMS), "system")) is not None:
            rest["system"] = rest.pop(system)
        if not any(rest.get(key) is not None for key in MEDIA_KEYS) and asks is None and used & set(row) <= {answer}:
            raise RecordError("messages", f"is missing; {READ}; it has {names_in(row)}")
        before = [*_history(row.get(names.get("history", ""))), *_asked(row, asks, extra if extra in used else None)]
        if answer is None:
            return [{**rest, "messages": before}]
        is_label = is_label or answer in (names.get(name) for name in LABELS) or "label" in self.columns
        answers = _answers(row[answer], answer)
        if is_label and not any(_text_of(turn) for turn in before):
            rest["labels"] = self._known(answers, answer)
        return [{**rest, "messages": [*before, *one]} for one in answers]

    def _one(self, row: Record, keys: Sequence[str], role: str) -> str | None:
        """The one key of these that says something; the first where none does. RecordError where several differ."""
        if role in self.columns:
            return role if role in row else None
        said = [key for key in keys if row[key] not in (None, "", [])]
        for key in said[1:]:
            if row[key] != row[said[0]]:
                what = f"may be the {role} as well as {said[0]!r}"
                raise RecordError(key, f'{what}; say which on the source: columns = {{ {role} = "{said[0]}" }}')
        return next(iter((*said, *keys)), None)

    def _answer(self, row: Record, names: Mapping[str, str], controls: Sequence[str]) -> str | None:
        """The key of the answer."""
        if role := next((role for role in ("answer", "label") if role in self.columns), None):
            tiers = [[role] if role in row else []]
        else:
            own = [key for key in controls if key in row and key not in _known_in(names, (*QUESTIONS, *SYSTEMS))]
            tiers = [own if len(own) == 1 else [], *(_known_in(names, tier) for tier in ANSWERS)]
        for keys in tiers:
            if keys:
                key = self._one(row, keys, "answer")
                assert key is not None
                if not self.answered and row[key] in (None, "", []):
                    return None
                return key
        if not self.answered:
            return None
        mend = f'{READ}; it has {names_in(row)}: say which it is on the source, columns = {{ answer = "..." }}'
        raise RecordError("answer", f"is missing; {mend}")

    def _with_media(self, row: Record) -> Record:
        """The row with its medium under `video` or `image`, found under other names too."""
        if any(row.get(key) is not None for key in MEDIA_KEYS):
            return row
        names = {name: key for name, key in _plain_names(row).items() if isinstance(row[key], str | dict)}
        found = {
            kind: self._one(row, _known_in(names, known), kind)
            for kind, known in (("video", ("video", "videos", *VIDEOS)), ("image", ("image", "images", *IMAGES)))
        }
        if not any(found.values()) and (key := self._one(row, _known_in(names, FILES), "video")):
            is_picture = isinstance(row[key], str) and Path(row[key]).suffix.lower() in PICTURE_SUFFIXES
            found = {"image" if is_picture else "video": key}
        rest = {key: value for key, value in row.items() if key not in found.values()}
        return rest | {kind: row[key] for kind, key in found.items() if key}

    def _file(self, value: Any, key: str) -> Any:
        """A medium's path: the hub's tables have it beside the file's content, Label Studio has addresses instead."""
        if isinstance(value, list):
            return [self._file(one, key) for one in value]
        if isinstance(value, dict) and "bytes" in value:
            if value["bytes"] is not None:
                raise RecordError(key, "holds the file itself rather than its path; write it to a file and name that")
            return value.get("path")
        if not isinstance(value, str):
            return value
        path = label_studio.local_path(self.root, value)
        if path != value and self.addresses.setdefault(path, value) != value:
            both = f"{shown(self.addresses[path])} and {shown(value)}"
            raise RecordError(key, f"{both} would both be {shown(path)}; keep the names that Label Studio gave them")
        return path

    def _known(self, answers: Iterable[Sequence[Record]], key: str) -> list[str]:
        """`labels`, with these among them. RecordError where one is not in the file that lists them."""
        for turns in answers:
            label = turns[-1]["content"]
            if self.listed and label not in self.listed:
                raise RecordError(key, f"{shown(label)} is no label of classes.txt; mend either")
            self.labels.append(label)
        return self.labels


def _plain_names(row: Record) -> dict[str, str]:
    """The keys of a row by their names in lower case with `_` for spaces and hyphens; of two equal ones the first."""
    return {key.strip().lower().replace(" ", "_").replace("-", "_"): key for key in reversed(row)}


def _known_in(names: Mapping[str, str], known: Iterable[str]) -> list[str]:
    """The keys, in the order of the `known` names, that a row has."""
    return [names[name] for name in known if name in names]


# ------------------------------------------------------------------------------------------------------------ values


def _cell(key: str, value: Any) -> Any:
    """A text of a table as what the key holds: a list, a number."""
    if not isinstance(value, str):
        return value
    meaning = meaning_of(key)
    is_list = key in LISTS or (meaning is not None and meaning.option in LIST_OPTIONS)
    if (is_list or meaning is not None) and value.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
    if meaning is not None and not is_list:
        try:
            return float(value) if meaning.option in REAL_OPTIONS else int(value)
        except ValueError:
            return value
    return value


def _text_of(turn: Record) -> bool:
    return turn["role"] != "system" and bool(turn["content"])


def _asked(row: Record, asks: str | None, extra: str | None) -> list[Record]:
    """The user's turn: the question, alpaca's `input` on a line after its `instruction`."""
    if asks is not None and isinstance(row[asks], list):
        return _turns(row[asks], asks)
    texts = [check_text(row[key], key) for key in (asks, extra) if key is not None and row[key] is not None]
    return [{"role": "user", "content": "\n".join(filter(None, texts))}]


def _history(value: Any) -> Iterator[Record]:
    """Earlier turns, pairs of a question and an answer."""
    if value is None or value == "":
        return
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise RecordError("history", f"{shown(value)} must be a list of pairs, a question and its answer")
    for i, pair in enumerate(value):
        yield {"role": "user", "content": check_text(pair[0], f"history[{i}][0]")}
        yield {"role": "assistant", "content": check_text(pair[1], f"history[{i}][1]")}


def _turns(value: list[Any], key: str) -> list[Record]:
    if not all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in value):
        raise RecordError(key, f"{shown(value)} must be a text, or a list of messages with 'role' and 'content'")
    return value


def _answers(value: Any, key: str) -> list[list[Record]]:
    """The turns of each different answer: a list of texts holds several right ones."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # as SQuAD has it
        value = value["text"]
    if isinstance(value, list) and value and all(isinstance(one, dict) and "role" in one for one in value):
        return [_turns(value, key)]
    many = value if isinstance(value, list) else [value]
    texts = []
    for i, one in enumerate(many):
        name = f"{key}[{i}]" if isinstance(value, list) else key
        if isinstance(one, dict) and "answer" in one:  # as VQA has it
            one = one["answer"]
        if isinstance(one, int) and not isinstance(one, bool):
            one = str(one)
        text = "" if one is None else check_text(one, name)
        if not text.strip():
            raise RecordError(name, "is empty; give the answer to learn")
        texts.append(text)
    if not texts:
        raise RecordError(key, "is empty; give the answer to learn")
    return [[{"role": "assistant", "content": text}] for text in dict.fromkeys(texts)]
