"""EgoSchema: 5,031 questions with five options about first-person videos of 3 minutes (Mangalam et al. 2023, arXiv
2308.09126).

The right answers to 500 of them are public and scored; `--path EgoSchema/GENERATION` asks all and writes the file that
the authors' server takes. Questions are those of lmms-eval's data set, and so are prompt and rule for letters
(`tasks/egoschema/utils.py`); the authors publish neither. Where lmms-eval draws a letter at random, the score counts
none, and the file has the likeliest one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vft.benchmarks import LETTERS, MultipleChoice, Place, choice, number_of, texts_of
from vft.common.task import Answer
from vft.common.types import Sample
from vft.data.records.record import Record, check_text


class EgoSchema(MultipleChoice):
    """The Parquet files of `Subset` or `GENERATION`, with videos in `videos/`."""

    title, page = "EgoSchema", "https://huggingface.co/datasets/lmms-eval/egoschema"
    path = "EgoSchema/Subset"

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        name = check_text(record.get("video_idx"), "video_idx")
        question = check_text(record.get("question"), "question")
        options = texts_of(record.get("option"), "option")  # each begins with its letter: "A. ..."
        right = number_of(record.get("answer"), len(options), "answer")
        text = "\n".join([question, *options, "Answer with the option's letter from the given choices directly."])
        video = place.video(f"{name}.mp4", "video_idx")
        return [choice(name, (video, text), len(options), right, place, texts=options)]

    def letter(self, answer: Answer) -> str | None:
        """Of all letters in brackets or before a space or period, the one whose last occurrence comes first; in a text
        of more than five words without any, likewise of the options that it repeats."""
        text = answer.text
        for mark in ",.!?;:'":
            text = text.strip(mark)
        prompt, text = answer.question.prompt, f" {text} "
        forms = {form: letter for letter in prompt.options for form in (f"({letter})", f"{letter} ", f"{letter}.")}
        if not any(form in text for form in forms) and len(text.split()) > 5:
            text = text.lower()
            forms = {option.strip().lower(): LETTERS[i] for i, option in enumerate(prompt.facts["texts"])}
        found = [form for form in forms if form in text]
        return forms[min(found, key=text.rfind)] if found else None

    def submission(self, answers: Sequence[Answer]) -> Mapping[str, str]:
        """The number of the option by question, as `validate.py` of the authors sends it."""
        if not any("withheld" in one.question.prompt.facts for one in answers):
            return {}
        letters = {one.question.id: self.letter(one) or LETTERS[one.choice or 0] for one in answers}
        return {"egoschema.json": json.dumps({name: LETTERS.index(letter) for name, letter in letters.items()})}
