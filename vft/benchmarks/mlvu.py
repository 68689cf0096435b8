"""MLVU: seven tasks of questions with four options about long videos, the dev set (Zhou et al. 2024, arXiv 2406.04264).

Questions and how they are written are the authors' (`multiple_choice_evaluation/choice_bench.py`). They leave the rest
of the prompt to each model's template, so the words after the question and the rule for letters are those of lmms-eval
(`tasks/mlvu`). The figure is M-avg, the mean over the tasks. The two tasks that are answered in sentences are not
asked. As with the authors, the last of equal options is the right one, and where the right answer is none of the
options (two questions) every letter is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vft.benchmarks import LETTERS, MultipleChoice, Place, choice, lettered, texts_of
from vft.common.types import Sample, Turn
from vft.data.records.files import json_files
from vft.data.records.record import Record, check_text
from vft.metrics import lmms_letter

OPEN_TASKS = "8_sub_scene", "9_summary"


class MLVU(MultipleChoice):
    """The files `json/NUMBER_TASK.json`, with videos in `video/NUMBER_TASK/`."""

    title, page = "MLVU, dev", "https://huggingface.co/datasets/MLVU/MVLU"
    path, media, per_class = "MLVU/MLVU/json", ("video",), "task"

    def files(self, path: Path) -> list[tuple[Path, str]]:
        """The JSON files of a folder, or one of them; none of the open tasks."""
        return [(file, name) for file, name in json_files(path) if file.stem not in OPEN_TASKS]

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        task = place.file.stem
        options = texts_of(record.get("candidates"), "candidates")
        answer = check_text(record.get("answer"), "answer")
        right = max((i for i, option in enumerate(options) if option == answer), default=-1)
        video = place.video(f"{task}/{check_text(record.get('video'), 'video')}", "video")
        listed = lettered(options, "({}) {}".format)
        asked = f"Question: {check_text(record.get('question'), 'question')}\nOptions:\n{listed}".rstrip()
        text = f"{asked}\nOnly give the best option.\nBest option: ("
        groups = {"task": task.partition("_")[2]}
        sample = choice(f"{task}-{place.number}", (video, text), len(options), right, place, groups)
        return [
            sample if right >= 0 else replace(sample, turns=(sample.turns[0], Turn("assistant", (f"(@) {answer}",))))
        ]

    def letter_of(self, text: str, options: int) -> str | None:
        """As `lmms_letter`."""
        return lmms_letter(text, LETTERS[:options])
