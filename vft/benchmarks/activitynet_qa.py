"""ActivityNet-QA: 8,000 questions about 800 videos of ActivityNet, answered in a word or phrase (Yu et al., AAAI 2019).

The figure of video language models is that of a judge. None is asked here: the answers are written in the form that the
judge of lmms-eval (`tasks/activitynetqa/utils.py`, `activitynetqa_gpt_eval`) reads, and that of Video-ChatGPT. The
authors' own figure, the fraction of right answers by question type and by answer type, is computed, but case and
punctuation don't count here. Questions and prompt are lmms-eval's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vft.benchmarks import Benchmark, Place, as_id, grouped, written
from vft.common.scores import Interval
from vft.common.task import Answer
from vft.common.types import Sample
from vft.data.records.record import Record, RecordError, check_text
from vft.metrics import exact_match_scores

TYPES = ("motion", "spatial", "temporal", "yes_no", "color", "object", "location", "number", "other")
"""By `type`; from the third on they are types of answers to free questions."""


class ActivityNetQA(Benchmark):
    """`data/test-*.parquet`, with videos in `all_test/`."""

    title, page = "ActivityNet-QA", "https://huggingface.co/datasets/lmms-eval/ActivityNetQA"
    path, media, max_new_tokens = "ActivityNetQA/data/test-*.parquet", ("all_test",), 64
    main_metric = "exact_match"

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        name, question = (check_text(record.get(key), key) for key in ("video_name", "question"))
        answer, kind = (as_id(record.get(key), key) for key in ("answer", "type"))
        if kind not in map(str, range(len(TYPES))):
            raise RecordError("type", f"{kind!r} is none of the types 0 to 8; correct it")
        named = TYPES[int(kind)]
        groups = {"question": named} if int(kind) < 3 else {"question": "free", "answer": named}
        text = f"{question.capitalize()}? Answer the question using a single word or phrase."
        video = place.video([f"v_{name}.{suffix}" for suffix in ("mp4", "webm", "mkv")], "video_name")
        identity = as_id(record.get("question_id"), "question_id")
        facts = {"video_name": name, "Q": question, "A": answer, "question_id": identity, "type": kind}
        return [written(identity, (video, text), [answer], place, groups, judged=facts)]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """`exact_match`, 0 to 1, over all questions, by type of question, and of free ones by type of answer."""
        said, right = [one.text for one in answers], [one.question.references for one in answers]
        return grouped("exact_match", exact_match_scores(said, right), answers)

    def submission(self, answers: Sequence[Answer]) -> Mapping[str, str]:
        """Questions, right and given answers."""
        entries = [{**one.question.prompt.facts["judged"], "pred": one.text} for one in answers]
        return {"activitynet_qa.json": json.dumps(entries, indent=1)}
