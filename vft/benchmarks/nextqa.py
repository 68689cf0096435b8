"""NExT-QA, multiple choice: questions of five options about why, when and what (Xiao et al. 2021, arXiv 2105.08276).

Layout and prompt are those of lmms-eval (`tasks/nextqa`, the data set's configuration MC); a letter is read by MMMU's
rule, as there, but an answer that names none is wrong, not drawn at random. Kinds of questions as in the authors'
`eval_mc.py`: causal (C), temporal (T) and descriptive (D) ones, where those about the previous and the next event (TP,
TN) are one. The authors' own `test.csv` has the same columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from vft.benchmarks import MultipleChoice, Place, as_id, choice, lettered, number_of
from vft.common.task import Answer
from vft.common.types import MediaRef, Sample
from vft.data.records.record import Record, RecordError, check_text, short_repr
from vft.metrics.mmmu import mmmu_letter

KINDS = {"TP": "TN"} | {kind: kind for kind in ("CW", "CH", "TN", "TC", "DB", "DC", "DL", "DO")}
"""Why, how, before and after, when, yes or no, count, where, other."""
VIDEOS = ("NExTVideo", "videos", "video")


def about(record: Record, place: Place) -> tuple[MediaRef, str, str, dict[str, str]]:
    """Video, question, id and groups of a record."""
    video, kind = as_id(record.get("video"), "video"), check_text(record.get("type"), "type")
    if kind not in KINDS:
        raise RecordError("type", f"{short_repr(kind)} is none of {', '.join(KINDS)}; correct it")
    ref = place.video([f"{video}.mp4", video], "video")
    groups = {"kind": KINDS[kind], "type": kind[0]}
    question = check_text(record.get("question"), "question").strip()
    return ref, question, f"{video}-{as_id(record.get('qid'), 'qid')}", groups


class NExTQA(MultipleChoice):
    """The files `MC/test-*.parquet`, with videos in `NExTVideo/`."""

    title, page = "NExT-QA", "https://huggingface.co/datasets/lmms-eval/NExTQA"
    path, media, max_new_tokens = "NExTQA/MC/test-*.parquet", VIDEOS, 64

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        texts = [as_id(record.get(f"a{i}"), f"a{i}").strip() for i in range(5)]
        right = number_of(record.get("answer"), 5, "answer")
        video, question, name, groups = about(record, place)
        text = f"{question}\n{lettered(texts, '{}. {}'.format)}"
        return [choice(name, (video, text), 5, right, place, groups, texts=texts)]

    def letter(self, answer: Answer) -> str | None:
        """As `MultipleChoice.letter`."""
        return mmmu_letter(answer.text, answer.question.prompt.facts["texts"])
