"""Records of other layouts, made into those that `messages` reads: with renamed columns, or by the usual other names.

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
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from vft.common.errors import UserError
from vft.common.files import cannot_write, partial_of
from vft.data.media.errors import MediaError
from vft.data.records.inputs import note
from vft.data.records.media_options import LIST_OPTIONS, REAL_OPTIONS, key_meaning
from vft.data.records.paths import PICTURE_SUFFIXES, path_exists, resolve_media
from vft.data.records.record import TURN_KEYS, Record, RecordError, check_text, list_keys, read_history, short_repr
from vft.data.records.unread_keys import FILES, IMAGES, MEDIA_KEYS, VIDEOS

QUESTIONS = ("question", "query", "prompt", "instruction", "problem")
SYSTEMS = ("system", "system_prompt")
ANSWERS = (
    ("answer", "answers", "response", "output", "completion", "target", "solution"),
    ("caption", "captions", "description", "summary", "text"),
    ("label", "class", "category", "action", "choice"),
)
"""Names of the answer. A later row counts if a record has no name of an earlier one; the last row are labels."""
LABELS = ANSWERS[-1]
LISTS = frozenset({*TURN_KEYS, *MEDIA_KEYS, "answers", "captions", "options", "history", "segments"})
"""Keys whose cell in a table may be the text of a list, in JSON or as Python writes it."""
METADATA = "metadata"
"""Name of a table that is among the files it describes."""
EXPECTED = "a record has 'messages' or 'conversations', or an answer, and a medium or a question"


class Normalizer:
    """Makes the records of one source into those that `messages` reads.

    Args:
        root: `data.root`.
        columns: Keys of these records, by the names that this module knows.
        needs_answer: Whether a record without an answer is refused.
        classes: All labels, if a file lists them.
        unpacked: Folder to which the videos and pictures that a table itself holds are written; None refuses them.
    """

    def __init__(
        self,
        root: Path,
        columns: Mapping[str, str],
        needs_answer: bool = True,
        classes: Sequence[str] = (),
        unpacked: Path | None = None,
    ) -> None:
        self.root, self.columns, self.needs_answer, self.classes = root, columns, needs_answer, classes
        self.unpacked = unpacked
        self.labels: list[str] = []
        """Labels of the records so far; a record with a label and no question has this list itself as its `labels`."""
        self.keys: dict[str, None] = {}
        """All keys of the records so far."""
        self.addresses: dict[str, str] = {}
        """Files that a record names by an address instead of a path: the address, by the path."""

    def normalize(self, record: Record, file: Path) -> list[Record]:
        """One record of `file`; or several, if it has several answers or parts. RecordError names the field that is
        wrong."""
        normalized: list[Record] = []
        for row in annotated_rows(self._located(record, file), self.root, self.needs_answer):
            normalized += self._with_turns(self._renamed(row.record), row.controls, row.is_label)
        return normalized

    def rename(self, record: Record, file: Path) -> list[Record]:
        """The one record, with only its columns renamed, its media located, and the values of its cells read."""
        return [self._renamed(self._located(record, file))]

    def rename_columns(self, record: Record) -> Record:
        """The record with the keys that `columns` names under our names. Another key of such a name is dropped."""
        rest = {key: value for key, value in record.items() if key not in (*self.columns, *self.columns.values())}
        return rest | {name: record[column] for name, column in self.columns.items() if column in record}

    def check_columns(self, path: Path) -> None:
        """UserError if no record had a column that `columns` names."""
        for name, column in self.columns.items():
            if self.keys and column not in self.keys:
                near = difflib.get_close_matches(column, self.keys, n=1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                keys = f"{', '.join(map(short_repr, self.keys)):.300}"
                raise UserError(f"{path}: columns.{name} = {column!r}: no record has it; they have {keys}{meant}")

    def _located(self, record: Record, file: Path) -> Record:
        """The record with its files named from `root`. A table called `metadata` names them from its own folder: the
        layout of videofolder and imagefolder (https://huggingface.co/docs/datasets/video_dataset)."""
        if file.stem.lower() != METADATA:
            return record
        folder = os.path.relpath(os.path.realpath(file.parent), os.path.realpath(self.root))

        def below_root(name: Any) -> Any:
            if not isinstance(name, str) or not name or "\0" in name:
                return name
            beside = os.path.normpath(f"{folder}/{name}")
            is_beside = path_exists(self.root, beside) or not path_exists(self.root, name)
            return beside if is_beside and not beside.startswith("..") else name

        return {key: below_root(value) if key.endswith("file_name") else value for key, value in record.items()}

    def _renamed(self, record: Record) -> Record:
        """The record with renamed columns and the values of its cells read."""
        self.keys.update(dict.fromkeys(record))
        return {key: _read_cell(key, value) for key, value in self.rename_columns(record).items()}

    def _with_turns(self, row: Record, controls: Sequence[str], is_label: bool) -> list[Record]:
        """A record with `messages` for each answer of the row."""
        has_turns = any(row.get(key) is not None for key in TURN_KEYS)
        row = row if has_turns else self._with_media_keys(row)
        row = {key: self._media_path(value, key) if key in MEDIA_KEYS else value for key, value in row.items()}
        if any(isinstance(row.get(key), Path) for key in MEDIA_KEYS):  # a path beside is where the file came from
            row = {key: value for key, value in row.items() if key not in (*VIDEOS, *IMAGES, *FILES)}
        if has_turns:
            return [row]
        names = _plain_names(row)
        question = self._choose(row, _known_in(names, QUESTIONS), "question")
        answer = self._answer_key(row, names, controls)
        extra = names.get("input")
        if "input" not in self.columns and question not in (None, names.get("instruction")):
            extra = None  # only alpaca's `input` belongs to the question
        used = {question, answer, names.get("history"), extra}
        rest = {key: value for key, value in row.items() if key not in used}
        if (system := self._choose(row, _known_in(names, SYSTEMS), "system")) is not None:
            rest["system"] = rest.pop(system)
        has_media = any(rest.get(key) is not None for key in MEDIA_KEYS)
        if not has_media and question is None and used & set(row) <= {answer}:
            raise RecordError("messages", f"is missing; {EXPECTED}; it has {list_keys(row)}")
        before = [*read_history(row.get(names.get("history", ""))), *_user_messages(row, question, extra)]
        if answer is None:
            return [{**rest, "messages": before}]
        is_label = is_label or answer in (names.get(name) for name in LABELS) or "label" in self.columns
        answers = _answers(row[answer], answer)
        if is_label and not any(turn["role"] != "system" and turn["content"] for turn in before):
            for turns in answers:
                label = turns[-1]["content"]
                if self.classes and label not in self.classes:
                    raise RecordError(answer, f"{short_repr(label)} is no label of classes.txt; correct one of them")
                self.labels.append(label)
            rest["labels"] = self.labels
        return [{**rest, "messages": [*before, *turns]} for turns in answers]

    def _choose(self, row: Record, keys: Sequence[str], role: str) -> str | None:
        """The key among these that has a value; the first if none has. RecordError if several have different ones."""
        if role in self.columns:
            return role if role in row else None
        filled = [key for key in keys if row[key] not in (None, "", [])]
        for key in filled[1:]:
            if row[key] != row[filled[0]]:
                what = f"may be the {role} as well as {filled[0]!r}"
                raise RecordError(key, f'{what}; say which on the source: columns = {{ {role} = "{filled[0]}" }}')
        return next(iter((*filled, *keys)), None)

    def _answer_key(self, row: Record, names: Mapping[str, str], controls: Sequence[str]) -> str | None:
        """The key of the answer."""
        if role := next((role for role in ("answer", "label") if role in self.columns), None):
            tiers = [[role] if role in row else []]
        else:
            own = [key for key in controls if key in row and key not in _known_in(names, (*QUESTIONS, *SYSTEMS))]
            tiers = [own if len(own) == 1 else [], *(_known_in(names, tier) for tier in ANSWERS)]
        for keys in filter(None, tiers):
            key = self._choose(row, keys, "answer")
            assert key is not None
            if not self.needs_answer and row[key] in (None, "", []):
                return None
            return key
        if not self.needs_answer:
            return None
        is_about = any(row.get(key) is not None for key in MEDIA_KEYS) or _known_in(names, QUESTIONS)
        for key, value in () if is_about else row.items():
            if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
                what = "holds a list, as if of records; the file must be that list, or one record a line"
                raise RecordError(key, what)
        if len(row) > 1 and all(isinstance(value, dict) for value in row.values()):
            raise RecordError(next(iter(row)), "records by name; the file must be a list of them, or one a line")
        missing = 'answer = "..."' if is_about else 'video = "...", answer = "..."'
        fix = f"{EXPECTED}; it has {list_keys(row)}: say which it is on the source, columns = {{ {missing} }}"
        raise RecordError("answer", f"is missing; {fix}")

    def _with_media_keys(self, row: Record) -> Record:
        """The row with its medium under `video` or `image`, found under other names too."""
        if any(row.get(key) is not None for key in MEDIA_KEYS):
            return row
        names = {name: key for name, key in _plain_names(row).items() if isinstance(row[key], str | dict)}
        media = {
            kind: self._choose(row, _known_in(names, known), kind)
            for kind, known in (("video", ("video", "videos", *VIDEOS)), ("image", ("image", "images", *IMAGES)))
        }
        if not any(media.values()) and (key := self._choose(row, _known_in(names, FILES), "video")):
            is_picture = isinstance(row[key], str) and Path(row[key]).suffix.lower() in PICTURE_SUFFIXES
            media = {"image" if is_picture else "video": key}
        rest = {key: value for key, value in row.items() if key not in media.values()}
        return rest | {kind: row[key] for kind, key in media.items() if key}

    def _media_path(self, value: Any, key: str) -> Any:
        """A medium's path: the hub's tables have it beside the file's content, Label Studio has addresses instead."""
        if isinstance(value, list):
            return [self._media_path(one, key) for one in value]
        if isinstance(value, dict) and "bytes" in value:
            return value.get("path") if value["bytes"] is None else self._unpack(value["bytes"], key)
        if not isinstance(value, str):
            return value
        path = local_path(self.root, value)
        if path != value and self.addresses.setdefault(path, value) != value:
            both = f"{short_repr(self.addresses[path])} and {short_repr(value)}"
            fix = "keep the names that Label Studio gave them"
            raise RecordError(key, f"{both} would both be {short_repr(path)}; {fix}")
        return path

    def _unpack(self, content: Any, key: str) -> Path:
        """The file that a table holds, written once under the name of its hash: equal pictures of several rows are one.

        UserError if it cannot be written.
        """
        if self.unpacked is None or not isinstance(content, bytes):
            raise RecordError(key, "holds the file itself rather than its path; write it to a file and name that")
        path = self.unpacked / f"{sha256(content).hexdigest()}{'.jpg' if key.startswith('image') else '.mp4'}"
        if not path.is_file() or path.stat().st_size != len(content):
            partial = partial_of(path).with_suffix(f".{os.getpid()}")  # other processes may write the same file
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(content)
                partial.replace(path)
            except OSError as error:
                raise cannot_write(path, error, "free space, or name another data.cache_dir") from error
        return path


def _plain_names(row: Record) -> dict[str, str]:
    """The keys of a row by their names in lower case with `_` for spaces and hyphens. Of two equal ones the first."""
    return {key.strip().lower().replace(" ", "_").replace("-", "_"): key for key in reversed(row)}


def _known_in(names: Mapping[str, str], known: Iterable[str]) -> list[str]:
    """The keys that a row has, in the order of the `known` names."""
    return [names[name] for name in known if name in names]


# ------------------------------------------------------------------------------------------------------------ values


def _read_cell(key: str, value: Any) -> Any:
    """The text of a cell as what the key holds: a list, a number."""
    if not isinstance(value, str):
        return value
    meaning = key_meaning(key)
    is_list = key in LISTS or (meaning is not None and meaning.option in LIST_OPTIONS)
    readers: list[Callable[[str], Any]] = []
    if (is_list or meaning is not None) and value.lstrip()[:1] in ("[", "{"):
        readers += [json.loads, ast.literal_eval]
    if meaning is not None and not is_list:
        readers.append(float if meaning.option in REAL_OPTIONS else int)
    for read in readers:
        with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return read(value)
    return value


def _user_messages(row: Record, question: str | None, extra: str | None) -> list[Record]:
    """The user's turn: the question, and alpaca's `input` on a line after its `instruction`."""
    if question is not None and isinstance(row[question], list):
        return _messages(row[question], question)
    texts = [check_text(row[key], key) for key in (question, extra) if key is not None and row[key] is not None]
    return [{"role": "user", "content": "\n".join(filter(None, texts))}]


def _messages(value: list[Any], key: str) -> list[Record]:
    if not all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in value):
        what = f"{short_repr(value)} must be a text, or a list of messages with 'role' and 'content'"
        raise RecordError(key, what)
    return value


def _answers(value: Any, key: str) -> list[list[Record]]:
    """The turns of each different answer: a list of texts holds several right ones."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # as SQuAD has it
        value = value["text"]
    if isinstance(value, list) and value and all(isinstance(one, dict) and "role" in one for one in value):
        return [_messages(value, key)]
    texts = []
    for i, one in enumerate(value if isinstance(value, list) else [value]):
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


# ------------------------------------------------------------------------------------------------------ Label Studio

# Exports, JSON and JSON-MIN, as rows: a task's data, and the annotations under their controls' names. A task has `data`
# and `annotations`, each with a `result`: a list of what each control (`from_name`) holds. In JSON-MIN the controls are
# keys beside the data. See https://labelstud.io/guide/export and .../tags/timelinelabels.

ABOUT = frozenset({"annotator", "annotation_id", "created_at", "updated_at", "lead_time"})
"""Keys of JSON-MIN about the annotation itself."""
VALUES = {"choices": "choices", "textarea": "text", "taxonomy": "taxonomy", "number": "number", "rating": "rating"}
"""Which key of a control's result holds its value, by the control's type."""
SPANS = ("timelinelabels", "labels")
RATES = ("frameRate", "framerate", "frame_rate", "fps")
"""Keys of a task's data for the `frameRate` of its Video tag."""
MEDIA = ("video", *VIDEOS, "image", *IMAGES, *FILES)
_UPLOADED = re.compile(r"/data/upload/((?:\d+/)?([0-9a-f]{8}-)?(.+))")
_LOCAL = "/data/local-files/?d="


class AnnotatedRow(NamedTuple):
    """One row of a task: its data with its annotations."""

    record: Record
    controls: tuple[str, ...] = ()
    """Keys that hold annotations."""
    is_label: bool = False
    """Whether these were chosen from a list."""


def annotated_rows(record: Record, root: Path, needs_answer: bool = True) -> list[AnnotatedRow]:
    """The rows of a task; none if it was skipped. A record that is not a task is its own row. A label of a part of a
    video is a row with `video_start` and `video_end`. A task without annotations is a row if it `needs_answer` not.

    Raises:
        RecordError: nothing is annotated, or nothing that can be read.
    """
    data, annotations = record.get("data"), record.get("annotations")
    if isinstance(data, dict) and isinstance(annotations, list):
        base = {"id": record["id"], **data} if record.get("id") is not None else dict(data)
        valid = [one for one in annotations if isinstance(one, dict) and one.get("was_cancelled") is not True]
        if not valid and not needs_answer:
            return [AnnotatedRow(base)]
        if not annotations:
            raise RecordError("annotations", "is empty; export annotated tasks alone")
        if not all(isinstance(one, dict) for one in annotations):
            raise RecordError("annotations", f"{short_repr(annotations)}: must be a list of objects")
        return [row for annotation in valid for row in _rows(base, *_controls_of(annotation), root)]
    if {"annotator", "annotation_id"} <= set(record):
        base = {key: value for key, value in record.items() if key not in ABOUT}
        values = {key: base.pop(key) for key in [*base] if key not in ("id", *MEDIA, *RATES)}
        chosen = {key for key, value in values.items() if isinstance(value, dict) and "choices" in value}
        return list(_rows(base, values, chosen, root))
    return [AnnotatedRow(record)]


def _controls_of(annotation: Mapping[str, Any]) -> tuple[dict[str, list[Any]], set[str]]:
    """What each control holds, and those of which a value is chosen from a list."""
    values: dict[str, list[Any]] = {}
    chosen: set[str] = set()
    other_kinds: dict[str, None] = {}
    results = annotation.get("result")
    for result in results if isinstance(results, list) else ():
        kind, value = (result.get("type"), result.get("value")) if isinstance(result, dict) else (None, None)
        if isinstance(value, dict) and kind in (*VALUES, *SPANS):
            name, content = str(result.get("from_name")), value if kind in SPANS else value.get(VALUES[kind])
            values.setdefault(name, []).extend(content if isinstance(content, list) else [content])
            chosen.update({name} if kind in ("choices", "taxonomy") else ())
        else:
            other_kinds[str(kind)] = None
    if not values:
        what = f"hold {', '.join(other_kinds)} alone" if other_kinds else "hold nothing"
        raise RecordError("annotations", f"{what}; read are {', '.join((*VALUES, *SPANS))}")
    return values, chosen


def _simplify(value: Any) -> Any:
    """The value of a control: a text, a list of texts, or a list of spans. A path in a taxonomy becomes its end."""
    if isinstance(value, dict) and isinstance(value.get("choices"), list):
        value = value["choices"]
    if isinstance(value, list):
        value = [one[-1] if isinstance(one, list) and one else one for one in value]
        return value[0] if len(value) == 1 and not isinstance(value[0], dict) else value
    return value


def _rows(base: Record, values: Mapping[str, Any], chosen: Collection[str], root: Path) -> Iterator[AnnotatedRow]:
    """One row if the annotations are about the whole medium, or one for each labelled part of it."""
    values = {name: _simplify(value) for name, value in values.items()}
    spans = {
        name: value
        for name, value in values.items()
        if isinstance(value, list) and value and all(isinstance(span, dict) for span in value)
    }
    of_medium = {name: value for name, value in values.items() if name not in spans}
    if not spans:
        yield AnnotatedRow({**base, **of_medium}, tuple(of_medium), bool(of_medium) and set(of_medium) <= set(chosen))
        return
    data = {key: value for key, value in base.items() if key not in RATES}
    for name, of_control in spans.items():
        for span in of_control:
            labels = next((span[key] for key in SPANS if isinstance(span.get(key), list)), None)
            if not labels:
                what = f"{short_repr(span)} has none of {', '.join(SPANS)}"
                raise RecordError(name, f"{what}; take it out, or map another control")
            for start_s, end_s in _ranges_s(span, base, root, name):
                times = {"video_start": start_s, "video_end": end_s}
                yield AnnotatedRow({**data, **of_medium, **times, name: labels}, (name,), is_label=True)


def _ranges_s(span: Mapping[str, Any], base: Record, root: Path, name: str) -> list[tuple[float, float]]:
    """Starts and ends of a span. `ranges` count frames from 1; `start` and `end` are seconds."""
    try:
        if isinstance(span.get("ranges"), list):
            fps = _frame_rate(base, root)
            frames = [(float(one["start"]), float(one["end"])) for one in span["ranges"]]
            return [((start - 1) / fps, (end - 1) / fps) for start, end in frames]
        return [(float(span["start"]), float(span["end"]))]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        what = f"{short_repr(span)} has no 'start' and 'end' that are numbers"
        raise RecordError(name, f"{what}; export it again") from None


def _frame_rate(base: Record, root: Path) -> float:
    """Frames per second by which a task counts frames: what its data says, else the file's."""
    for key in RATES:
        if base.get(key) is not None:
            try:
                return float(base[key])
            except (TypeError, ValueError):
                what = f"{short_repr(base[key])} must be a number of frames per second"
                raise RecordError(key, what) from None
    key = next((key for key in MEDIA if isinstance(base.get(key), str)), "")
    if not key:
        raise RecordError("data", f"has no video under {', '.join(MEDIA)}, whose frames are counted; rename its key")
    path = resolve_media(root, local_path(root, base[key]), key)
    note(path)
    from vft.data.media.video import scan_file  # imports torchcodec, which few readers of records need

    try:
        return scan_file("video", path, headers=True).fps
    except MediaError as error:
        raise RecordError(key, str(error)) from None


def local_path(root: Path, value: str) -> str:
    """Where under `root` the file is that Label Studio names by its own address. Other names stay as they are.

    `/data/local-files/?d=PATH` is PATH. `/data/upload/7/3f2a1b4c-NAME` is looked for under that name and `upload/7`,
    then as NAME, which is what it was called before it was uploaded.
    """
    if value.startswith(_LOCAL):
        return unquote(value.removeprefix(_LOCAL))
    match = _UPLOADED.fullmatch(value)
    if match is None:
        return value
    inner, prefix, name = unquote(match[1]), match[2] or "", unquote(match[3])
    places = (f"upload/{inner}", inner, f"{prefix}{name}", name)
    return next((place for place in places if path_exists(root, place)), name)
