"""Exports of Label Studio, JSON and JSON-MIN, as rows: a task's data, and the annotations under their controls' names.

A task has `data` and `annotations`, each with a `result`: a list of what each control (`from_name`) holds. In JSON-MIN
the controls are keys beside the data. See https://labelstud.io/guide/export and .../tags/timelinelabels.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from vft.data.media.errors import MediaError
from vft.data.records.paths import path_exists, resolve_media
from vft.data.records.record import Record, RecordError, short_repr
from vft.data.records.unread_keys import FILES, IMAGES, VIDEOS


class AnnotatedRow(NamedTuple):
    """One row of a task: its data with its annotations."""

    record: Record
    controls: tuple[str, ...] = ()
    """Keys that hold annotations."""
    is_label: bool = False
    """Whether these were chosen from a list."""


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


def annotated_rows(record: Record, root: Path) -> list[AnnotatedRow]:
    """The rows of a task. A record that is not a task is its own row. A label of a part of a video is a row with
    `video_start` and `video_end`.

    Raises:
        RecordError: nothing is annotated, or nothing that can be read.
    """
    data, annotations = record.get("data"), record.get("annotations")
    if isinstance(data, dict) and isinstance(annotations, list):
        base = {"id": record["id"], **data} if record.get("id") is not None else dict(data)
        valid = [one for one in annotations if isinstance(one, dict) and not one.get("was_cancelled")]
        if not valid:
            raise RecordError("annotations", "is empty; export annotated tasks alone")
        return [row for annotation in valid for row in _rows_of_annotation(base, annotation, root)]
    if {"annotator", "annotation_id"} <= set(record):
        base = {key: value for key, value in record.items() if key not in ABOUT}
        controls = [key for key in base if key not in ("id", *MEDIA, *RATES)]
        values = {key: base.pop(key) for key in controls}
        chosen = {key for key, value in values.items() if isinstance(value, dict) and "choices" in value}
        return list(_rows(base, {key: _simplify(value) for key, value in values.items()}, chosen, root))
    return [AnnotatedRow(record)]


def _rows_of_annotation(base: Record, annotation: Mapping[str, Any], root: Path) -> Iterator[AnnotatedRow]:
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
    yield from _rows(base, {name: _simplify(value) for name, value in values.items()}, chosen, root)


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
    from vft.data.media.scan import scan_file  # imports torchcodec, which few readers of records need

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
