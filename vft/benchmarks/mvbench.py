"""MVBench: 20 tasks of 200 multiple-choice questions about short videos (Li et al. 2024, arXiv 2311.17005).

Prompt, folders of the videos and the rule for letters are those of lmms-eval (`tasks/mvbench/utils.py`); the authors'
code asks with a longer system text. The figure is the mean over the tasks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vft.benchmarks import MultipleChoice, Place, choice, index_of, lettered, texts_of
from vft.common.types import Sample
from vft.data.records.files import json_files
from vft.data.records.record import Record, RecordError, check_text

FOLDERS = {
    "object_interaction": ("star/Charades_segment", "star/Charades_v1_480"),
    "action_sequence": ("star/Charades_segment", "star/Charades_v1_480"),
    "action_prediction": ("star/Charades_segment", "star/Charades_v1_480"),
    "action_localization": ("sta/sta_video_segment", "sta/sta_video"),
    "moving_count": ("clevrer/video_validation",),
    "fine_grained_pose": ("nturgbd_convert", "nturgbd"),
    "character_order": ("perception/videos",),
    "object_shuffle": ("perception/videos",),
    "egocentric_navigation": ("vlnqa",),
    "moving_direction": ("clevrer/video_validation",),
    "episodic_reasoning": ("tvqa/video_fps3_hq_segment", "tvqa/frames_fps3_hq"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",),
    "scene_transition": ("scene_qa/video",),
    "state_change": ("perception/videos",),
    "moving_attribute": ("clevrer/video_validation",),
    "action_antonym": ("ssv2_video_mp4", "ssv2_video"),
    "unexpected_action": ("FunQA_test/test",),
    "counterfactual_inference": ("clevrer/video_validation",),
    "object_existence": ("clevrer/video_validation",),
    "action_count": ("perception/videos",),
}
"""Where the videos of a task lie below `video/`. Those of a `..._segment` folder are cut already; of the others the
record's `start` and `end` (seconds) are shown."""
_WITH_TEXT = re.compile(r"([A-E])\.\s*.+", re.IGNORECASE)
_ALONE = re.compile(r"\b[A-E]\b", re.IGNORECASE)
_MARKS = ';/[]"{}()=+\\_-><@`,?!'


class MVBench(MultipleChoice):
    """The files `json/TASK.json`, with videos below `video/`."""

    title, page = "MVBench", "https://huggingface.co/datasets/OpenGVLab/MVBench"
    path, frames, per_class = "MVBench/json", 16, "task"
    media = "video", "video/data0613"  # which replaces videos of questions that were there twice

    def files(self, path: Path) -> list[tuple[Path, str]]:
        """The JSON files of a folder, or one of them."""
        return json_files(path)

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        task = place.file.stem
        if task not in FOLDERS:
            raise RecordError("", f"{place.file.name} is no task of MVBench; there are {', '.join(FOLDERS)}")
        options = texts_of(record.get("candidates"), "candidates")
        right = index_of(record.get("answer"), options, "answer")
        name = check_text(record.get("video"), "video")
        whole, *cut = FOLDERS[task][::-1]
        video = place.video([f"{folder}/{name}" for folder in cut or [whole]], "video")
        if cut and not video.files[0].exists():
            video = place.video(f"{whole}/{name}", "video", record.get("start"), record.get("end"))
        question = check_text(record.get("question"), "question")
        listed = lettered(options, "({}) {}".format)
        text = f"Question:{question}\nOption:\n{listed}\nOnly give the best option.\n"
        return [choice(f"{task}-{place.number}", (video, text), len(options), right, place, {"task": task})]

    def letter_of(self, text: str, options: int) -> str | None:
        """The letter before a period at the start, else the first single letter up to E, of either case, once marks are
        taken out: a mark with a space beside it anywhere in the text is removed, another one becomes a space."""
        text = text.strip()
        if opening := _WITH_TEXT.fullmatch(text):
            return opening[1].upper()
        text = text.replace("\n", " ").replace("\t", " ")
        joins = bool(re.search(r"\d,\d", text))
        kept = text
        for mark in _MARKS:
            is_spaced = f"{mark} " in text or f" {mark}" in text
            kept = kept.replace(mark, "" if is_spaced or joins else " ")
        found = _ALONE.search(re.sub(r"\.(?!\d)", "", kept, count=32).strip("'\"()").strip())
        return found[0].upper() if found else None
