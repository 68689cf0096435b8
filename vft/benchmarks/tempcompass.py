"""TempCompass: action, direction, speed, order and change in short videos, asked in four ways (Liu et al. 2024, arXiv
2403.00476).

Questions are those of lmms-eval's data set; prompts and rules are the same there (`tasks/tempcompass`) and in the
authors' `eval_*.py`. Both let ChatGPT judge texts that no rule matches; here they are wrong, as with the authors'
`--disable_llm`, and `no_letter` counts them. Captions are judged by ChatGPT alone: answers of all four ways are written
in the form of the authors' `predictions/`, which those scripts read. The figure is the mean over the other three.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from vft.benchmarks import MultipleChoice, Place, index_of
from vft.common.task import Answer
from vft.common.types import Sample, Turn
from vft.data.records.record import Record, check_text

PROMPTS = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
    "captioning": "",
}
NAME = re.compile(r"^ *([A-D](?=\.)|\w+ \w(?=: ))", re.MULTILINE)
"""The name of an option in `A. running` and in `Sentence A: The man runs.`"""
CAPTION = re.compile(r"^((\w+ (\w)): (.*))$", re.MULTILINE)


class TempCompass(MultipleChoice):
    """The Parquet files in a folder for each way of asking, with videos in `videos/`."""

    title, page = "TempCompass", "https://huggingface.co/datasets/lmms-eval/TempCompass"
    path, max_new_tokens, per_class = "TempCompass", 128, "task"

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        task = tuple(PROMPTS)[index_of(place.file.parent.name, tuple(PROMPTS), "folder")]
        name, question, answer, dim = (check_text(record.get(k), k) for k in ("video_id", "question", "answer", "dim"))
        options = {"yes_no": ("yes", "no"), "captioning": ()}.get(task, tuple(NAME.findall(question)))
        right = answer if task == "captioning" else next(iter(NAME.findall(answer)), answer)
        index_of(right, (answer,) if task == "captioning" else options, "answer")
        asked = place.video(f"{name}.mp4", "video_id"), question + PROMPTS[task]
        facts = {"task": task, "video": name, "dim": dim, "asked": {"question": question, "answer": answer}}
        fields = {"options": options, "groups": {"task": task, "dim": dim, task: dim}, **facts}
        turns = Turn("user", asked), Turn("assistant", (right,))
        return [Sample(f"{task}-{place.number}", turns, place.origin, fields)]

    def letter(self, answer: Answer) -> str | None:
        """The option that a text names; in caption matching also by its sentence, or by the last word of its name."""
        facts, text = answer.question.prompt.facts, answer.text.strip()
        if facts["task"] != "caption_matching":
            found = re.match("yes|no", text.lower()) or re.match("[A-D](?=[.)]|$)", text)
            return found[0] if found and found[0] in answer.question.prompt.options else None
        bare, behind = text.replace(".", ""), text.split(") ")[1] if ") " in text else text
        for line, name, short, sentence in CAPTION.findall(facts["asked"]["question"]):
            if text == line or sentence in (text, behind) or {name, short} & {text, bare}:
                return str(name)
        return None

    def submission(self, answers: Sequence[Answer]) -> Mapping[str, str]:
        """A file for each way of asking: by video and dimension, a list of question, answer and prediction."""
        files: dict[str, dict[str, dict[str, list[object]]]] = {}
        for one in answers:
            facts = one.question.prompt.facts
            by_dim = files.setdefault(f"{facts['task']}.json", {}).setdefault(facts["video"], {})
            by_dim.setdefault(facts["dim"], []).append({**facts["asked"], "prediction": one.text})
        return {file: json.dumps(content, indent=4) for file, content in files.items()}
