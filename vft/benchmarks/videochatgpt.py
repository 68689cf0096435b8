"""VideoChatGPT's generative benchmark: questions about 500 videos of ActivityNet, answered in sentences (Maaz et al.
2023, arXiv 2306.05424): about anything (Generic), the order of events (Temporal), and in two wordings (Consistency).

A judge scores the answers, 0 to 5, for correctness, detail and context (Generic), time, and consistency. None is asked
here: the answers are written in the form that the judge of lmms-eval (`tasks/videochatgpt/utils.py`,
`videochatgpt_gpt_eval`) and the authors' scripts (`quantitative_evaluation/`) read. Questions are lmms-eval's, without
any prompt around them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vft.benchmarks import Benchmark, Place, written
from vft.common.scores import Interval
from vft.common.task import Answer
from vft.common.types import Sample
from vft.data.records.record import Record, RecordError, check_text

PARTS = "Generic", "Temporal", "Consistency"


class VideoChatGPT(Benchmark):
    """The Parquet files of the folders `Generic`, `Temporal` and `Consistency`, with videos in `Test_Videos/`."""

    title, page = "VideoChatGPT", "https://huggingface.co/datasets/lmms-eval/VideoChatGPT"
    path, media, max_new_tokens, main_metric = "VideoChatGPT", ("Test_Videos",), 1024, "by a judge"

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        part = next((name.lower() for name in place.file.parts[::-1] if name in PARTS), None)
        if part is None:
            raise RecordError("", f"{place.file.name} is in none of the folders {', '.join(PARTS)}")
        name = check_text(record.get("video_name"), "video_name")
        # One of both questions is the text "None"; the other stands in a row of its own.
        field = "question" if part != "consistency" else f"question_{1 + (record.get('question_1') in (None, 'None'))}"
        question, answer = (check_text(record.get(key), key) for key in (field, "answer"))
        video = place.video([f"{name}.mp4", f"{name}.MP4", f"{name}.mkv"], "video_name")
        asked = {"part": part, "video_name": name, "question": question, "number": field[len("question_") :]}
        return [written(f"{part}-{place.number}", (video, question), [answer], place, judged=asked)]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """None: what a judge is for."""
        return {}

    def submission(self, answers: Sequence[Answer]) -> Mapping[str, str]:
        """`generic.json`, `temporal.json` and `consistency.json`, where the two questions of a video are one entry."""
        files: dict[str, list[dict[str, str]]] = {part.lower(): [] for part in PARTS}
        for one in answers:
            asked = one.question.prompt.facts["judged"]
            number, name, entries = asked["number"], asked["video_name"], files[asked["part"]]
            halves = (e for e in entries if number and e["video_name"] == name and f"Q{number}" not in e)
            if (entry := next(halves, None)) is None:
                entries.append(entry := {"video_name": name, "A": one.question.references[0]})
            entry |= {f"Q{number}": asked["question"], f"pred{number}": one.text}
        files["consistency"] = [e for e in files["consistency"] if e.keys() >= {"Q1", "Q2"}]
        return {f"{part}.json": json.dumps(entries, indent=1) for part, entries in files.items() if entries}
