"""What the converters share: the command line, annotations checked, media found by name, the file that they write."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import av

from vft.common.console import progress_bar, user_errors
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.common.types import MediaInfo
from vft.data.budget import SLACK_S, fault
from vft.data.records.files import read_json
from vft.data.records.paths import PICTURE_SUFFIXES, VIDEO_SUFFIXES, is_stray

Item = TypeVar("Item")


@dataclass(frozen=True)
class Conversion:
    """One run of a converter."""

    annotations: Path
    root: Path
    folder: Path
    """Of the media, relative to the root."""
    by_stem: dict[str, list[str]]
    """Paths of the media relative to the root, by name without suffix."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records, or segments of one, that are not written, by reason."""

    def records(self, name: str, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """The objects in the file. UserError if one does not have the `keys` of the set called `name`."""
        for line, record in read_json(self.annotations):
            self.check(record, name, keys, line)
            yield record

    def check(self, record: Any, name: str, keys: tuple[str, ...], line: int = 1) -> None:
        """UserError if `record` is not an object with these keys."""
        has = ", ".join(map(repr, list(record)[:8])) if isinstance(record, dict) else repr(record)[:40]
        if not isinstance(record, dict) or not set(keys) <= set(record):
            raise UserError(f"{self.annotations}:{line}: {has}: an entry of {name} has {', '.join(map(repr, keys))}")

    def each(self, items: Sequence[Item]) -> Iterator[Item]:
        """The items, with a progress bar: opening the video of each takes time."""
        with progress_bar(len(items), "reading lengths", "video") as bar:
            for item in items:
                yield item
                bar.update()

    def find_all(self, *stems: str) -> list[str]:
        """The files with the first of these names that exists."""
        return next((self.by_stem[stem] for stem in stems if stem in self.by_stem), [])

    def find(self, *stems: str, length_s: Any = None) -> str | None:
        """The file with the first of these names that exists. Of several, the one that is `length_s` seconds long.

        None if there is no such file, or more than one; counts these.
        """
        files = self.find_all(*stems)
        if len(files) > 1 and isinstance(length_s, int | float):
            infos = [(name, read_header(self.root / name)) for name in files]
            files = [name for name, info in infos if info and abs(info.duration_s - length_s) <= SLACK_S] or files
        if len(files) != 1:
            reason = "video: several of that name in" if files else "video not in"
            self.left_out[f"{reason} {self.folder}"] += 1
            return None
        return files[0]

    def segments(self, video: str, times: Any, texts: list[str], length_s: Any = None) -> list[dict[str, Any]]:
        """Segments of texts and their [start, end] in seconds; counts those that cannot be used.

        They must lie in the video as it is and, if the set says its length, in `length_s` seconds.
        """
        if not isinstance(times, list) or len(times) != len(texts):
            self.left_out["segments: not as many times as texts"] += len(texts)
            return []
        info = read_header(self.root / video)
        stated = MediaInfo("video", 0, 0, duration_s=length_s) if isinstance(length_s, int | float) else None
        lengths = [one for one in (info, stated) if one is not None and one.duration_s > 0]
        segments: list[dict[str, Any]] = []
        for span, text in zip(times, texts, strict=True):
            if not text or not _is_span(span):
                self.left_out["segments: empty, or end not after start"] += 1
            elif not lengths:
                self.left_out["segments: the video's length can't be read"] += 1
            elif any(fault(span[0], span[1], one) for one in lengths):
                self.left_out["segments: not in the video"] += 1
            else:
                end_s = span[1] if info is None or span[1] <= info.duration_s else round(info.duration_s, 3)
                segments.append({"start_s": span[0], "end_s": end_s, "text": text})
        return segments


def find_media(folder: Path, root: Path, suffixes: frozenset[str]) -> dict[str, list[str]]:
    """All files of `root / folder`, at any depth, by their name without suffix. UserError if there are none."""
    if not (root / folder).resolve().is_relative_to(root.resolve()):
        raise UserError(f"{root / folder}: lies outside --root = {root}, where records may not point; move either")
    by_stem: dict[str, list[str]] = {}
    for path in sorted((root / folder).rglob("*")):
        if path.suffix.lower() in suffixes and not is_stray(path.relative_to(root / folder).as_posix()):
            by_stem.setdefault(path.stem, []).append(Path(os.path.relpath(path, root)).as_posix())
    if not by_stem:
        kinds = ", ".join(sorted(suffixes))
        raise UserError(f"{root / folder}: no files of {kinds} there; name the folder of the media below --root")
    return by_stem


@cache
def read_header(file: Path) -> MediaInfo | None:
    """Length and rate of a video as its header states them. None if it cannot be opened or states none.

    Training checks the segments against the frames that exist; to count these here would read every file.
    """
    try:
        with av.open(str(file), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or 0)
            length_s = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
            length_s = length_s or (container.duration or 0) / av.time_base
            frames = stream.frames or round(length_s * fps)
            return MediaInfo("video", stream.height, stream.width, frames, fps, duration_s=length_s)
    except (av.FFmpegError, IndexError, OSError):
        return None


def run(description: str, option: str, convert: Callable[[Conversion], Iterator[dict[str, Any]]]) -> None:
    """The command line of a converter: reads, converts, writes, and prints what was left out by reason."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("annotations", type=Path, help="JSON file of the set")
    help_media = "folder of the media, relative to --root; the folders in it are searched too"
    parser.add_argument(option, dest="media", type=Path, required=True, metavar="FOLDER", help=help_media)
    parser.add_argument("--root", type=Path, default=Path("data"), help="data.root of the configuration (data)")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write, for sources of format story")
    arguments = parser.parse_args()
    with user_errors():
        suffixes = PICTURE_SUFFIXES if option == "--media" else VIDEO_SUFFIXES
        media = find_media(arguments.media, arguments.root, suffixes)
        conversion = Conversion(arguments.annotations, arguments.root, arguments.media, media)
        records = list(convert(conversion))
        reasons = "".join(f"\nleft out {count:,}: {reason}" for reason, count in (+conversion.left_out).most_common())
        if not records:
            raise UserError(f"{arguments.annotations}: nothing to write{reasons.replace(chr(10), '; ')}")
        replace_text(arguments.output, "".join(json.dumps(one) + "\n" for one in records))
        segments = sum(len(one.get("segments", [])) for one in records)
        print(f"wrote {len(records):,} records with {segments:,} segments to {arguments.output}{reasons}")


def clean(texts: Any) -> list[str]:
    """The texts of a list, each on one line with single spaces. An entry that is not a text is empty."""
    return [" ".join(text.split()) if isinstance(text, str) else "" for text in texts or []]


def _is_span(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or any(type(one) not in (int, float) for one in value):
        return False
    return bool(0 <= value[0] < value[1])
