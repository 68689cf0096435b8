"""Video-MME: 2,700 multiple-choice questions about 900 videos, as Parquet; an evaluation, not a training set.

The data set's card is the source of the columns and of the layout: `data/{videoID}.mp4` (or `.MP4`, `.mkv`) and
`subtitle/{videoID}.srt`. The prompts are the official ones, without and with subtitles.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from string import ascii_uppercase

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample, Turn
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format, locate
from vft.data.media.timed_text import Line, Subtitles, parse_srt
from vft.data.records.files import read_columnar, read_text
from vft.data.records.paths import first_present, media_folders
from vft.data.records.record import Record, RecordError, Records, check_text, make_samples, short_repr
from vft.data.streaming.archives import list_files

MAX_ROWS = 1_000_000
"""A file of a few kilobytes may announce any number, and rows are held in memory."""
GROUPS = ("duration", "domain", "sub_category", "task_type")
TEXTS = ("videoID", "question_id", "question", "answer", *GROUPS)
CARD = frozenset({*TEXTS, "options", "video_id", "url"})
"""Columns that the data set's card names."""
SUFFIXES = (".mp4", ".MP4", ".mkv")
PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video{and_subtitles}. "
    "Respond with only the letter ({letters}) of the correct option.\n{question}\n{options}\nThe best answer is:"
)
_OPTION = re.compile(r"([A-Z])\. *\S.*", re.DOTALL)


class VideoMME(Format):
    """The questions of a Parquet file, of those in a folder, or of `hf://datasets/OWNER/NAME/...`.

    Files are looked for in `media` and in `data.root`; without `media`, also beside the Parquet file and one level
    above it. With `subtitles`, those that overlap the sampled frames come before the question; a video without a
    subtitle file (most have one) is asked about without.
    """

    settings = frozenset({"media", "subtitles"})

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`. UserError also for other columns."""
        path = locate(source.path, data.root)
        folders = media_folders(Path(path), data.root, source.media, "")
        folders += [os.path.realpath(data.root)] if source.media else []

        @cache  # a video has three questions
        def subtitles_of(video: str) -> tuple[Line, ...]:
            file = first_present(data.root, [f"{folder}/subtitle/{video}.srt" for folder in folders], "videoID")
            try:
                return parse_srt(read_text(file), str(file)) if os.path.isfile(file) else ()
            except UserError as error:
                raise RecordError("subtitles", str(error)) from None

        def parse(row: Record, origin: str) -> list[Sample]:
            texts = {key: check_text(row[key], key) for key in TEXTS}
            for key in ("videoID", "question_id", "question"):
                if not texts[key].strip():
                    raise RecordError(key, "is empty; give a text")
            letters = _letters(row["options"])
            if texts["answer"] not in letters:
                what = f"{short_repr(texts['answer'])} is none of the options {', '.join(letters)}"
                raise RecordError("answer", f"{what}; correct it")
            video = texts["videoID"]
            names = [f"{folder}/data/{video}{suffix}" for folder in folders for suffix in SUFFIXES]
            ref = MediaRef("video", first_present(data.root, names, "videoID"), field="videoID")
            lines = subtitles_of(video) if source.subtitles else ()
            prompt = PROMPT.format(
                and_subtitles=" and the subtitles" if lines else "",
                letters=f"{', '.join(letters[:-1])}, or {letters[-1]}",
                question=texts["question"],
                options="\n".join(row["options"]),
            )
            user = (ref, Subtitles(lines), prompt) if lines else (ref, prompt)
            groups = {key: texts[key] for key in GROUPS}
            fields = {"options": letters, "groups": groups, "question_id": texts["question_id"]}
            turns = (Turn("user", user), Turn("assistant", (texts["answer"],)))
            return [Sample(texts["question_id"], turns, origin, fields, tuple(key for key in row if key not in CARD))]

        rows = (
            (f"{file.rpartition('/')[2]}:{number}", row)
            for file in list_files(path, (".parquet",))
            for number, row in enumerate(read_columnar(file, (*TEXTS, "options"), MAX_ROWS), 1)
        )
        return make_samples(rows, parse)


def _letters(options: object) -> tuple[str, ...]:
    """The letters of options `A. ...`, `B. ...`, in their order."""
    if not isinstance(options, list) or len(options) < 2:
        raise RecordError("options", f"{short_repr(options)} must be a list of at least two texts")
    matches = [_OPTION.fullmatch(check_text(option, f"options[{i}]")) for i, option in enumerate(options)]
    letters = tuple(match[1] for match in matches if match)
    if letters != tuple(ascii_uppercase[: len(options)]):
        raise RecordError("options", f"{short_repr(options)} must begin with 'A. ', 'B. ' and so on, each with a text")
    return letters
