"""Video-MMMU: what is learnt from 300 lectures, in three tracks of 300 questions (Hu et al. 2025, arXiv 2501.13826).

Layout, prompts and rules are those of lmms-eval (`tasks/videommmu`), which the authors point to. The picture that an
Adaptation question is about is the video's last frame. lmms-eval's versions up to 0.7.1, which made the figures on the
authors' page, know fewer ways to name a letter. An open answer that is empty is wrong, where lmms-eval leaves it out.
The figure is the mean over the tracks; `video_mmmu_question_only` asks what is known without the lecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vft.benchmarks import LETTERS, MultipleChoice, Place, as_id, choice, grouped, index_of, lettered, texts_of, written
from vft.common.scores import Interval
from vft.common.task import Answer
from vft.common.types import Sample
from vft.data.records.record import Record, RecordError, check_text
from vft.metrics import lmms_letter
from vft.metrics.mmmu import mmmu_is_right

SUBJECTS = {
    "Art": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
    "Mechanical_Engineering",
    "Humanities": "History Literature Sociology Psychology",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Science": "Biology Chemistry Geography Math Physics",
}
"""Of each discipline; its name is that of the videos' folder."""
TRACKS = ("Perception", "Comprehension", "Adaptation")
IGNORE = "\nPlease ignore the Quiz question in last frame of the video."
APPLY = (
    "You should watch and learn the video content. Then apply what you learned to answer the following {} question. "
    "The image for this question is at the end of the video.\n"
)


class VideoMMMU(MultipleChoice):
    """The Parquet files of `Perception/`, `Comprehension/` and `Adaptation/`, with videos in `Art/` and so on."""

    title, page = "Video-MMMU", "https://huggingface.co/datasets/lmms-eval/VideoMMMU"
    path, per_class, max_new_tokens = "VideoMMMU", "track", 1024
    alone: ClassVar[bool] = False
    """Whether the question is asked with its picture and without the lecture."""

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        track, name = place.file.parent.name, check_text(record.get("id"), "id")
        if track not in TRACKS:
            raise RecordError("", f"its folder is called {track}; put it in one called {', '.join(TRACKS)}")
        subject = name.partition("_")[2].rpartition("_")[0]
        folder = next((one for one, subjects in SUBJECTS.items() if subject in subjects.split()), None)
        if folder is None:
            raise RecordError("id", f"{name!r} names no subject of Video-MMMU, as in dev_Art_Theory_12; correct it")
        question, answer = check_text(record.get("question"), "question"), as_id(record.get("answer"), "answer")
        has_options = track != "Adaptation" or record.get("question_type") == "multiple-choice"
        options = texts_of(record.get("options"), "options") if has_options else ()
        has_letters = all(text.startswith(f"{LETTERS[i]}.") for i, text in enumerate(options))
        text = f"{question}\n{lettered(options, '{1}'.format if has_letters else '{}. {}'.format)}"
        file, groups = f"{folder}/{name}.mp4", {"discipline": folder, "track": track}
        if self.alone:
            file = f"question_only/{name}_image.mp4"
        elif track == "Adaptation":
            text = APPLY.format("multi-choice") + text if has_options else APPLY.format("open-ended") + question
        else:
            text += IGNORE
        asked = place.video(file, "id"), text
        if has_options:
            right = index_of(answer, tuple(LETTERS[: len(options)]), "answer")
            return [choice(f"{track}-{name}", asked, len(options), right, place, groups)]
        return [written(f"{track}-{name}", asked, [answer], place, groups)]

    def letter_of(self, text: str, options: int) -> str | None:
        """As `MultipleChoice.letter_of`."""
        return lmms_letter(text, LETTERS[:options])

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """As `MultipleChoice.score`, with the open answers in `accuracy`."""
        right = [float(self._is_right(one, one.question.references[0])) for one in answers]
        return super().score(answers) | grouped("accuracy", right, answers, self.per_class)

    def _is_right(self, answer: Answer, right: str) -> bool:
        return self.letter(answer) == right if answer.question.prompt.options else mmmu_is_right(answer.text, right)
