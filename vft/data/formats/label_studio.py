"""Exports of Label Studio, JSON and JSON-MIN, as rows: the task's data, and under each control's name what was said.

A task has `data` and `annotations`, of which each has a `result`: a list of what each control (`from_name`) holds. In
JSON-MIN these stand beside the data. See https://labelstud.io/guide/export and .../tags/timelinelabels.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from vft.data.formats.records import RecordError, is_there, resolve_media, shown
from vft.data.formats.unread_keys import FILES, IMAGES, VIDEOS
from vft.data.media.errors import MediaError

Row = dict[str, Any]


class Said(NamedTuple):
    """One row of a task: its data with what was said, which keys hold that, and whether it was chosen from a list."""

    row: Row
    controls: tuple[str, ...] = ()
    is_label: bool = False


ABOUT = frozenset({"annotator", "annotation_id", "created_at", "updated_at", "lead_time"})
"""Keys of JSON-MIN that say how a record came about."""
VALUES = {"choices": "choices", "textarea": "text", "taxonomy": "taxonomy", "number": "number", "rating": "rating"}
"""Where a control's result says what was chosen or written, by its type."""
SPANS = ("timelinelabels", "labels")
RATES = ("frameRate", "framerate", "frame_rate", "fps")
"""Keys of a task's data for the `frameRate` of its Video tag."""
MEDIA = ("video", *VIDEOS, "image", *IMAGES, *FILES)
_UPLOADED = re.compile(r"/data/upload/((?:\d+/)?([0-9a-f]{8}-)?(.+))")
_LOCAL = "/data/local-files/?d="


def rows(record: Row, root: Path) -> list[Said]:
    """The rows of a task; a record that is no task is one as it is.

    A label of a part of a video is a row of its own, with `video_start` and `video_end`.

    Raises:
        RecordError: nothing annotated, or nothing that can be read.
    """
    data, annotations = record.get("data"), record.get("annotations")
    if isinstance(data, dict) and isinstance(annotations, list):
        base = {"id": record["id"], **data} if record.get("id") is not None else dict(data)
        kept = [one for one in annotations if isinstance(one, dict) and not one.get("was_cancelled")]
        if not kept:
            raise RecordError("annotations", "is empty; export annotated tasks alone")
        return [row for one in kept for row in _annotated(base, one, root)]
    if {"annotator", "annotation_id"} <= set(record):
        base = {key: value for key, value in record.items() if key not in ABOUT}
        controls = [key for key in base if key not in ("id", *MEDIA, *RATES)]
        said = {key: base.pop(key) for key in controls}
        chosen = {key for key, value in said.items() if isinstance(value, dict) and "choices" in value}
        return list(_rows(base, {key: _minimal(value) for key, value in said.items()}, chosen, root))
    return [Said(record)]


def _annotated(base: Row, annotation: Mapping[str, Any], root: Path) -> Iterator[Said]:
    said: dict[str, list[Any]] = {}
    chosen: set[str] = set()
    types: dict[str, None] = {}
    results = annotation.get("result")
    for one in results if isinstance(results, list) else ():
        kind, value = (one.get("type"), one.get("value")) if isinstance(one, dict) else (None, None)
        if isinstance(value, dict) and kind in (*VALUES, *SPANS):
            name, found = str(one.get("from_name")), value if kind in SPANS else value.get(VALUES[kind])
            said.setdefault(name, []).extend(found if isinstance(found, list) else [found])
            chosen.update({name} if kind in ("choices", "taxonomy") else ())
        else:
            types[str(kind)] = None
    if not said:
        read = ", ".join((*VALUES, *SPANS))
        what = f"hold {', '.join(types)} alone" if types else "hold nothing"
        raise RecordError("annotations", f"{what}; read are {read}")
    yield from _rows(base, {name: _minimal(value) for name, value in said.items()}, chosen, root)


def _minimal(value: Any) -> Any:
    """What a control holds: a text, a list of texts, or a list of spans. A path of a taxonomy stands for its end."""
    if isinstance(value, dict) and isinstance(value.get("choices"), list):
        value = value["choices"]
    if isinstance(value, list):
        value = [one[-1] if isinstance(one, list) and one else one for one in value]
        return value[0] if len(value) == 1 and not isinstance(value[0], dict) else value
    return value


def _rows(base: Row, said: Mapping[str, Any], chosen: Collection[str], root: Path) -> Iterator[Said]:
    """One row for what holds of the whole medium, or one for each labelled part of it."""
    spans = {
        name: one
        for name, one in said.items()
        if isinstance(one, list) and one and all(isinstance(span, dict) for span in one)
    }
    whole = {name: one for name, one in said.items() if name not in spans}
    if not spans:
        yield Said({**base, **whole}, tuple(whole), bool(whole) and set(whole) <= set(chosen))
        return
    kept = {key: value for key, value in base.items() if key not in RATES}
    for name, found in spans.items():
        for span in found:
            labels = next((span[key] for key in SPANS if isinstance(span.get(key), list)), None)
            if not labels:
                raise RecordError(
                    name, f"{shown(span)} has none of {', '.join(SPANS)}; take it out, or map another control"
                )
            for start_s, end_s in _seconds(span, base, root, name):
                times = {"video_start": start_s, "video_end": end_s}
                yield Said({**kept, **whole, **times, name: labels}, (name,), is_label=True)


def _rate(base: Row, root: Path) -> float:
    """Frames per second by which a task counts frames: of its data where that says it, else of the file."""
    for key in RATES:
        if base.get(key) is not None:
            try:
                return float(base[key])
            except (TypeError, ValueError):
                raise RecordError(key, f"{shown(base[key])} must be a number of frames per second") from None
    key = next((key for key in MEDIA if isinstance(base.get(key), str)), "")
    if not key:
        raise RecordError("data", f"has no video under {', '.join(MEDIA)}, whose frames are counted; rename its key")
    path = resolve_media(root, local_path(root, base[key]), key)
    from vft.data.media.scan import scan_file  # with torchcodec, which few who read records need

    try:
        return scan_file("video", path, headers=True).fps
    except MediaError as error:
        raise RecordError(key, str(error)) from None


def _seconds(span: Mapping[str, Any], base: Row, root: Path, name: str) -> list[tuple[float, float]]:
    """Starts and ends of a span: `ranges` count frames from 1, `start` and `end` seconds."""
    try:
        if isinstance(span.get("ranges"), list):
            fps = _rate(base, root)
            frames = [(float(one["start"]), float(one["end"])) for one in span["ranges"]]
            return [((start - 1) / fps, (end - 1) / fps) for start, end in frames]
        return [(float(span["start"]), float(span["end"]))]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise RecordError(name, f"{shown(span)} has no 'start' and 'end' that are numbers; export it again") from None


def local_path(root: Path, value: str) -> str:
    """Where under `root` a file lies that Label Studio names by its own address; other names as they are.

    `/data/local-files/?d=PATH` is PATH. `/data/upload/7/3f2a1b4c-NAME` is looked for under that name and `upload/7`,
    then as NAME, which is what it was called before it was uploaded.
    """
    if value.startswith(_LOCAL):
        return unquote(value.removeprefix(_LOCAL))
    match = _UPLOADED.fullmatch(value)
    if match is None:
        return value
    inner, mark, name = unquote(match[1]), match[2] or "", unquote(match[3])
    places = (f"upload/{inner}", inner, f"{mark}{name}", name)
    return next((place for place in places if is_there(root, place)), name)
