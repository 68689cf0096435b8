"""Moments: a sentence about a video, and the seconds between which it happens. The layouts in which sets are published:

| set                                      | a record                                                              |
|------------------------------------------|-----------------------------------------------------------------------|
| Charades-STA (jiyanggao/TALL)            | a line of .txt, `VIDEO START END##SENTENCE`                           |
| QVHighlights (jayleicn/moment_detr)      | `vid`, `query`, `relevant_windows`                                    |
| DiDeMo (LisaAnne/LocalizingMoments)      | `video`, `description`, `times` of several annotators, chunks of 5 s  |
| ActivityNet Captions (densevid_eval)     | `{VIDEO: {duration, timestamps, sentences}}`                          |
| your own                                 | `video`, `query`, `spans`; or `video`, `timestamps`, `sentences`      |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vft.common.event_times import Event, Span, write_moment
from vft.common.types import MediaRef, Sample, Turn
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format
from vft.data.records.files import read_lines, read_records
from vft.data.records.media_options import MAX_S
from vft.data.records.paths import VIDEO_SUFFIXES, find_path, first_present, media_folders
from vft.data.records.record import RecordError, Records, as_object, check_text, make_samples, record_id, short_repr

FOLDERS = ("videos", "video", "Charades_v1_480", "Charades_v1")
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")
"""Of a video whose record has none, or has that of the upload (DiDeMo)."""
CHUNK_S = 5.0
"""Length of DiDeMo's chunks."""
KEYS = frozenset(
    {"id", "qid", "annotation_id", "vid", "video", "query", "description", "relevant_windows", "times", "spans"}
    | {"duration", "timestamps", "sentences", "relevant_clip_ids", "saliency_scores", "num_segments", "dl_link"}
)
_CHARADES = re.compile(r"(\S+)\s+([0-9.]+)\s+([0-9.]+)\s*##\s*(\S.*)")


class Moments(Format):
    """A question for each sentence. Videos are looked for in `media`, else in `videos` and the like beside the list.

    Fields: `query`, and `spans`, which holds the spans that each annotator gave.
    """

    settings = frozenset({"media"})
    notes_inputs = True

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`."""
        path = find_path(data.root, source.path)
        folders = media_folders(path, data.root, source.media, *FOLDERS, "")
        rows = (
            (f"{name}:{place}", record)
            for file, name in self.files(path)
            for place, entry in _entries(file)
            for record in self.records(entry)
        )

        def parse(record: Any, origin: str) -> list[Sample]:
            record = as_object(record)
            key = "vid" if record.get("vid") is not None else "video"
            video = check_text(record.get(key), key)
            bare = Path(video).stem if Path(video).suffix.lower() in VIDEO_SUFFIXES else video
            stems = dict.fromkeys((bare, bare.removeprefix("v_")))
            names = [f"{folder}/{stem}{suffix}" for folder in folders for stem in stems for suffix in SUFFIXES]
            names = [*(f"{folder}/{video}" for folder in folders if bare != video), *names]
            ref = MediaRef("video", first_present(data.root, names, key), field=key)
            asked, answer, fields = self.ask(record)
            turns = Turn("user", (ref, *asked)), Turn("assistant", (answer,))
            unread = tuple(name for name in record if name not in KEYS)
            numbered = record.get("qid", record.get("annotation_id"))
            return [Sample(record_id({"id": numbered, **record}, Path(video).stem), turns, origin, fields, unread)]

        return make_samples(rows, parse)

    def records(self, entry: Any) -> Iterator[Any]:
        """The records in an entry of a file: one for each sentence of ActivityNet Captions."""
        if not isinstance(entry, dict) or "sentences" not in entry:
            yield entry
            return
        try:
            for start_s, end_s, text in events_of(entry):
                yield {"video": entry.get("video"), "query": text, "spans": [[start_s, end_s]]}
        except RecordError as error:
            yield error

    def ask(self, record: dict[str, Any]) -> tuple[Sequence[str], str, dict[str, Any]]:
        """The question of a record without its video, the answer, and the sample's fields."""
        key = "description" if "description" in record else "query"
        query = " ".join(check_text(record.get(key), key).split())
        if not query:
            raise RecordError(key, "is empty; say what happens")
        if "times" in record:  # each annotator's first and last chunk
            chunks = [_span(one, f"times[{i}]", 0.0) for i, one in enumerate(_listed(record, "times"))]
            spans: tuple[tuple[Span, ...], ...] = tuple(
                ((first * CHUNK_S, (last + 1) * CHUNK_S),) for first, last in chunks
            )
        else:
            key = "relevant_windows" if "vid" in record else "spans"
            spans = (tuple(_span(one, f"{key}[{i}]") for i, one in enumerate(_listed(record, key))),)
        answer = write_moment(max(spans, key=spans.count))
        return [query], answer, {"query": query, "spans": spans}


def events_of(record: dict[str, Any]) -> tuple[Event, ...]:
    """The events of a record with `timestamps` and `sentences`, by their starts. RecordError names what is wrong."""
    times, texts = _listed(record, "timestamps"), _listed(record, "sentences")
    if len(times) != len(texts):
        raise RecordError("timestamps", f"{len(times)} beside {len(texts)} sentences; give one span for each")
    spans = [_span(one, f"timestamps[{i}]") for i, one in enumerate(times)]
    told = [" ".join(check_text(one, f"sentences[{i}]").split()) for i, one in enumerate(texts)]
    if "" in told:
        raise RecordError(f"sentences[{told.index('')}]", "is empty; say what happens")
    return tuple(sorted(((*span, text) for span, text in zip(spans, told, strict=True)), key=lambda one: one[:2]))


def _entries(file: Path) -> Iterator[tuple[object, Any]]:
    """The entries of a file, each with its line; those of an object of videos with the video's name."""
    if file.suffix.lower() == ".txt":
        yield from ((line, _charades(text)) for line, text in read_lines(file))
        return
    for line, value in read_records(file):
        if isinstance(value, dict) and value and not KEYS & value.keys():
            for name, entry in value.items():
                yield name, {"video": name, **entry} if isinstance(entry, dict) else entry
        else:
            yield line, value


def _charades(line: str) -> Any:
    match = _CHARADES.fullmatch(line)
    try:
        video, start_s, end_s, query = match.groups() if match else ("", "", "", "")
        return {"video": video, "query": query, "spans": [[float(start_s), float(end_s)]]}
    except ValueError:
        return RecordError("", f"{short_repr(line)} must be VIDEO START END##SENTENCE, with times in seconds")


def _listed(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        missing = (
            "is missing, as in a list to test on" if value is None else f"{short_repr(value)} is no list, or empty"
        )
        raise RecordError(key, f"{missing}; give at least one entry")
    return value


def _span(value: Any, field: str, least: float = 1e-6) -> Span:
    """Two numbers of which the second is greater by `least`. RecordError if it is something else."""
    pair = value if isinstance(value, list) else []
    if len(pair) != 2 or any(type(one) not in (int, float) or not 0 <= one < MAX_S for one in pair):
        raise RecordError(field, f"{short_repr(value)} must be two numbers, start and end, from 0")
    if pair[1] - pair[0] < least:
        raise RecordError(field, f"{short_repr(value)}: the end is not after the start; give the start first")
    return float(pair[0]), float(pair[1])
