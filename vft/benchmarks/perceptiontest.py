"""Perception Test, multiple choice: three options, about what is seen, remembered and to be expected (Patraucean et al.
2023, arXiv 2305.13786).

Layout, prompt and the rule for letters are those of lmms-eval (`tasks/perceptiontest/val`). Answers of the test split
are withheld (`--path PerceptionTest/mc_question`): `perceptiontest.json` has the form that the challenge takes, by
video a list of `id`, `answer_id` and `answer`, and names the likeliest option where the text names none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from vft.benchmarks import LETTERS, MultipleChoice, Place, as_id, choice, lettered, number_of, texts_of
from vft.common.task import Answer
from vft.common.types import Sample
from vft.data.records.record import Record, check_text

_ALONE = re.compile(r"\b[A-D]\b")


class PerceptionTest(MultipleChoice):
    """The Parquet files of `mc_question_val/`, with videos in `videos/`."""

    title, page = "Perception Test", "https://huggingface.co/datasets/lmms-eval/PerceptionTest_Val"
    path = "PerceptionTest_Val/mc_question_val"

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        texts = texts_of(record.get("options"), "options")
        right = number_of(record.get("answer_id"), len(texts), "answer_id")
        name, number = as_id(record.get("video_name"), "video_name"), as_id(record.get("question_id"), "question_id")
        groups = {key: check_text(record[key], key) for key in ("area", "reasoning") if record.get(key)}
        listed = lettered(texts, "{}. {}".format)
        text = (
            f"{check_text(record.get('question'), 'question')}\n{listed}\n"
            "Answer with the option's letter from the given choices directly."
        )
        asked = place.video(f"{name}.mp4", "video_name"), text
        facts = {"video": name, "number": number, "texts": texts}
        return [choice(f"{name}-{number}", asked, len(texts), right, place, groups, **facts)]

    def letter_of(self, text: str, options: int) -> str | None:
        """The first capital letter up to D that is a word of its own."""
        found = _ALONE.search(text)
        return found[0] if found else None

    def submission(self, answers: Sequence[Answer]) -> Mapping[str, str]:
        """As `Benchmark.submission`."""
        by_video: dict[str, list[dict[str, object]]] = {}
        for one in answers:
            facts = one.question.prompt.facts
            if "withheld" in facts:
                place = LETTERS.index(self.letter(one) or "Z")
                place = place if place < len(facts["texts"]) else one.choice or 0
                number = int(facts["number"]) if facts["number"].isdecimal() else facts["number"]
                line = {"id": number, "answer_id": place, "answer": facts["texts"][place]}
                by_video.setdefault(facts["video"], []).append(line)
        return {"perceptiontest.json": json.dumps(by_video, indent=1) + "\n"} if by_video else {}
