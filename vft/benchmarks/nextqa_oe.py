"""NExT-QA, open answers: the questions of `nextqa` without options (Xiao et al. 2021, arXiv 2105.08276).

Layout and prompt are those of lmms-eval (`tasks/nextqa`, the data set's configuration OE); the score is WUPS as in the
authors' `eval_oe.py`: the better of two right answers where there are two, and for yes or no (DB) and counts (DC)
whether the words are the same. lmms-eval takes the second answer at threshold 0 in either case.
"""

from __future__ import annotations

from collections.abc import Sequence

from vft.benchmarks import Benchmark, Place, as_id, grouped, written
from vft.benchmarks.nextqa import VIDEOS, about
from vft.common.scores import Interval
from vft.common.task import Answer
from vft.common.types import Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data.records.record import Record, Records
from vft.metrics import wups


class NExTQAOpen(Benchmark):
    """The files `OE/test-*.parquet`, with videos in `NExTVideo/`."""

    title, page = "NExT-QA, open", "https://huggingface.co/datasets/lmms-eval/NExTQA"
    path, media, max_new_tokens = "NExTQA/OE/test-*.parquet", VIDEOS, 64
    main_metric = "wups_0.0"

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`; also UserError if the score can't be computed here."""
        wups.nltk()
        return super().read(source, data)

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        video, question, name, groups = about(record, place)
        second = record.get("additional_ref_answer")
        answers = [as_id(record.get("answer"), "answer")]
        answers += [] if second in (None, "") else [as_id(second, "additional_ref_answer")]
        text = f"{question}\nAnswer a question using a short phrase or sentence."
        return [written(name, (video, text), answers, place, groups)]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """`wups_0.0` and `wups_0.9`, 0 to 1: with no threshold and with one of 0.9."""
        return {
            name: score
            for threshold in (0.0, 0.9)
            for name, score in grouped(f"wups_{threshold}", [_wups(one, threshold) for one in answers], answers).items()
        }


def _wups(answer: Answer, threshold: float) -> float:
    text, *right = map(wups.content_words, (answer.text, *answer.question.references))
    if answer.question.prompt.facts["groups"]["kind"] in ("DB", "DC"):
        return float(text in right)
    return max(wups.wups_score(text, one, threshold) for one in right)
