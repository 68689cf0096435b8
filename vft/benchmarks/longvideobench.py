"""LongVideoBench: questions of two to five options that refer to a moment of a long video (Wu et al. 2024, arXiv
2407.15754).

Files are the authors'; prompt and rule for letters are those of lmms-eval for video models (`longvideobench_val_v`),
which show no subtitles: figures of video models are mostly given so. (The authors' own loader writes each frame as a
picture with the subtitles between.) A text without a letter counts as wrong; lmms-eval draws one. Answers of the test
split (`--path LongVideoBench/lvb_test_wo_gt.json`) are withheld: its texts are written as lmms-eval writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from vft.benchmarks import MultipleChoice, Place, choice, lettered, number_of, texts_of
from vft.common.task import Answer
from vft.common.types import Sample
from vft.data.records.record import Record, check_text

_ANNOUNCED = re.compile("Best (?:answer|option):")
"""Of the phrases that lmms-eval takes out, those that hold a letter."""


class LongVideoBench(MultipleChoice):
    """`lvb_val.json`, or the Parquet files of the same page, with videos in `videos/`."""

    title, page = "LongVideoBench", "https://huggingface.co/datasets/longvideobench/LongVideoBench"
    path, frames, max_new_tokens = "LongVideoBench/lvb_val.json", 64, 32

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        columns = [record.get(f"option{i}") for i in range(5)]  # of Parquet
        named = record.get("candidates", [option for option in columns if option not in (None, "N/A")])
        options = texts_of(named, "candidates")
        right = number_of(record.get("correct_choice"), len(options), "correct_choice")
        video = place.video(check_text(record.get("video_path"), "video_path"), "video_path")
        listed = lettered(options, "{}. {}".format)
        text = (
            f"{check_text(record.get('question'), 'question')}\n{listed}\n"
            "Answer with the option's letter from the given choices directly.\n"
        )
        groups = {key: str(record[key]) for key in ("duration_group", "question_category") if record.get(key)}
        return [choice(check_text(record.get("id"), "id"), (video, text), len(options), right, place, groups)]

    def letter_of(self, text: str, options: int) -> str | None:
        """The first capital letter up to E, also within a word, once phrases that announce an answer are taken out."""
        found = re.search("[A-E]", _ANNOUNCED.sub("", text))
        return found[0] if found else None

    def submission(self, answers: Sequence[Answer]) -> Mapping[str, str]:
        """The texts by question."""
        texts = {one.question.id: one.text for one in answers if "withheld" in one.question.prompt.facts}
        return {"longvideobench_test_for_submission.json": json.dumps(texts)} if texts else {}
