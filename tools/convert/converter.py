"""What the converters share: the command line, annotations checked, media found by name, the file that they write."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vft.console import user_errors
from vft.data.sources.records import PICTURE_SUFFIXES, VIDEO_SUFFIXES, read_json
from vft.files import replace_text
from vft.types import UserError


@dataclass(frozen=True)
class Media:
    """Files of a folder by their name without suffix, as paths relative to the root."""

    folder: Path
    root: Path
    by_stem: dict[str, str]

    @staticmethod
    def scan(folder: Path, root: Path, suffixes: frozenset[str]) -> Media:
        """All of `root / folder` and the folders in it. UserError where there is nothing."""
        if not (root / folder).resolve().is_relative_to(root.resolve()):
            raise UserError(f"{root / folder}: lies outside --root = {root}, where records may not point; move either")
        found: dict[str, str] = {}
        for path in sorted((root / folder).rglob("*")):
            if path.suffix.lower() in suffixes:
                found.setdefault(path.stem, Path(os.path.relpath(path, root)).as_posix())
        if not found:
            kinds = ", ".join(sorted(suffixes))
            raise UserError(f"{root / folder}: no files of {kinds} there; name the folder of the media below --root")
        return Media(folder, root, found)

    def find(self, *stems: str) -> str | None:
        """The file with the first of these names that there is."""
        return next((self.by_stem[stem] for stem in stems if stem in self.by_stem), None)


@dataclass(frozen=True)
class Work:
    """One run of a converter."""

    annotations: Path
    media: Media
    left_out: Counter[str]
    """Records, or segments of one, that are not written, by reason."""

    def records(self, name: str, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """The file's objects. UserError where one is not as in the set called `name`."""
        for line, record in read_json(self.annotations):
            self.check(record, name, keys, line)
            yield record

    def check(self, record: Any, name: str, keys: tuple[str, ...], line: int = 1) -> None:
        """UserError where `record` is no object with these keys."""
        has = ", ".join(map(repr, list(record)[:8])) if isinstance(record, dict) else repr(record)[:40]
        if not isinstance(record, dict) or not set(keys) <= set(record):
            raise UserError(f"{self.annotations}:{line}: {has}: an entry of {name} has {', '.join(map(repr, keys))}")

    def segments(self, times: Any, texts: list[str]) -> list[dict[str, Any]]:
        """Segments of texts and their [start, end] in seconds; counts those that can't be used."""
        if not isinstance(times, list) or len(times) != len(texts):
            self.left_out["segments: not as many times as texts"] += len(texts)
            return []
        pairs = [(span, text) for span, text in zip(times, texts, strict=True) if text and _is_span(span)]
        if len(pairs) < len(texts):
            self.left_out["segments: empty, or end not after start"] += len(texts) - len(pairs)
        return [{"start_s": start_s, "end_s": end_s, "text": text} for (start_s, end_s), text in pairs]


def run(description: str, option: str, convert: Callable[[Work], Iterator[dict[str, Any]]]) -> None:
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
        work = Work(arguments.annotations, Media.scan(arguments.media, arguments.root, suffixes), Counter())
        records = list(convert(work))
        reasons = "".join(f"\nleft out {count:,}: {reason}" for reason, count in (+work.left_out).most_common())
        if not records:
            raise UserError(f"{arguments.annotations}: nothing to write{reasons.replace(chr(10), '; ')}")
        replace_text(arguments.output, "".join(json.dumps(one) + "\n" for one in records))
        segments = sum(len(one.get("segments", [])) for one in records)
        print(f"wrote {len(records):,} records with {segments:,} segments to {arguments.output}{reasons}")


def clean(texts: Any) -> list[str]:
    """The texts of a list, each on one line with single spaces; empty where an entry is none."""
    return [" ".join(text.split()) if isinstance(text, str) else "" for text in texts or []]


def _is_span(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(one, int | float) for one in value)
    return is_pair and 0 <= value[0] < value[1]
