"""Video-MME: 2,700 multiple-choice questions about 900 videos, as Parquet; an evaluation, no training set.

The dataset's card is the source of the columns and of the layout: `data/{videoID}.mp4` (or `.MP4`, `.mkv`) and
`subtitle/{videoID}.srt`. The prompts are the official ones of both settings, without and with subtitles.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pyarrow.parquet as pq

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample, Turn
from vft.data.formats.records import BadRecord, RecordError, check_text, gather, shown
from vft.data.formats.tables import first_present, media_folders, read_text
from vft.data.media.subtitles import Line, Subtitles, parse_srt
from vft.data.streaming.tar import list_files, opened_file

MAX_ROWS = 1_000_000
"""A file of a few kilobytes may announce any number, and they are held in memory."""
GROUPS = ("duration", "domain", "sub_category", "task_type")
TEXTS = ("videoID", "question_id", "question", "answer", *GROUPS)
CARD = frozenset({*TEXTS, "options", "video_id", "url"})
"""Columns that the dataset's card names."""
SUFFIXES = (".mp4", ".MP4", ".mkv")
PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video{and_subtitles}. "
    "Respond with only the letter ({letters}) of the correct option.\n{question}\n{options}\nThe best answer is:"
)
_OPTION = re.compile(r"([A-Z])\. *\S.*", re.DOTALL)


def read(
    path: Path | str, root: Path, media: str = "", subtitles: bool = False
) -> tuple[list[Sample], list[BadRecord]]:
    """The questions of a Parquet file, of those in a folder, or of `hf://datasets/OWNER/NAME/...`, and the bad ones.

    Files are looked for in `media` and in `root`; without `media`, beside the Parquet file and one above it too. With
    `subtitles`, those that overlap the sampled frames stand before the question; a video without a subtitle file (most
    have one) is asked about without.

    Raises:
        UserError: nothing found, not to be reached, not Parquet, or other columns.
    """
    folders = media_folders(Path(path), root, media, "") + ([os.path.realpath(root)] if media else [])
    rows = (
        (f"{file.rpartition('/')[2]}:{number}", row)
        for file in list_files(str(path), (".parquet",))
        for number, row in enumerate(_load(file), 1)
    )
    return gather(rows, _Reader(root, folders, subtitles).samples)


def _load(file: str) -> list[dict[str, Any]]:
    from datasets import load_dataset  # takes seconds to import, and few runs need it

    try:
        with opened_file(file) as opened:
            count = pq.read_metadata(opened).num_rows
        if count > MAX_ROWS:
            raise ValueError(f"{count} rows, more than {MAX_ROWS}")
        # Streaming reads the file where it is; without it a copy would be written to the user's cache.
        table = load_dataset("parquet", data_files=glob.escape(file), split="train", streaming=True)
        rows, columns = list(table), table.column_names or []
    except UserError:
        raise
    except Exception as error:  # of datasets, pyarrow, the hub's client or its network library: no class in common
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{file}: can't be read ({reason}); download it again, or check the network") from None
    if missing := [column for column in (*TEXTS, "options") if column not in columns]:
        raise UserError(f"{file}: no column {', '.join(missing)}; found {str(columns)[:300]}; name Video-MME's files")
    return rows


@dataclass
class _Reader:
    """Makes samples of rows; keeps the subtitles of each video, which has three questions."""

    root: Path
    folders: list[str]
    subtitles: bool
    kept: dict[str, tuple[Line, ...]] = field(default_factory=dict)

    def samples(self, row: Mapping[str, Any], origin: str) -> list[Sample]:
        """The one sample of a row. RecordError names the column."""
        texts = {key: check_text(row[key], key) for key in TEXTS}
        for key in ("videoID", "question_id", "question"):
            if not texts[key].strip():
                raise RecordError(key, "is empty; give a text")
        letters = _letters(row["options"])
        if texts["answer"] not in letters:
            raise RecordError(
                "answer", f"{shown(texts['answer'])} is none of the options {', '.join(letters)}; mend it"
            )
        video = texts["videoID"]
        names = [f"{folder}/data/{video}{suffix}" for folder in self.folders for suffix in SUFFIXES]
        ref = MediaRef("video", first_present(self.root, names, "videoID"), field="videoID")
        lines = self.lines(video) if self.subtitles else ()
        prompt = PROMPT.format(
            and_subtitles=" and the subtitles" if lines else "",
            letters=f"{', '.join(letters[:-1])}, or {letters[-1]}",
            question=texts["question"],
            options="\n".join(row["options"]),
        )
        user = (ref, Subtitles(lines), prompt) if lines else (ref, prompt)
        fields = {
            "options": letters,
            "groups": {key: texts[key] for key in GROUPS},
            "question_id": texts["question_id"],
        }
        turns = (Turn("user", user), Turn("assistant", (texts["answer"],)))
        unread = tuple(key for key in row if key not in CARD)
        return [Sample(texts["question_id"], turns, origin, fields, unread)]

    def lines(self, video: str) -> tuple[Line, ...]:
        """The subtitles of a video; none where it has no file."""
        if video not in self.kept:
            names = [f"{folder}/subtitle/{video}.srt" for folder in self.folders]
            file = first_present(self.root, names, "videoID")
            try:
                self.kept[video] = parse_srt(read_text(file), str(file)) if os.path.isfile(file) else ()
            except UserError as error:
                raise RecordError("subtitles", str(error)) from None
        return self.kept[video]


def _letters(options: object) -> tuple[str, ...]:
    """The letters of options `A. ...`, `B. ...`, in their order."""
    if not isinstance(options, list) or len(options) < 2:
        raise RecordError("options", f"{shown(options)} must be a list of at least two texts")
    matches = [_OPTION.fullmatch(check_text(option, f"options[{i}]")) for i, option in enumerate(options)]
    letters = tuple(match[1] for match in matches if match)
    if letters != tuple(ascii_uppercase[: len(options)]):
        raise RecordError("options", f"{shown(options)} must begin with 'A. ', 'B. ' and so on, each with a text")
    return letters
