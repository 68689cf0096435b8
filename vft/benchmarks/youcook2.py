"""YouCook2: 3,179 steps of cooking in 414 videos of the validation set, one sentence each (Zhou et al., AAAI 2018).

Questions are those of lmms-eval's data set, whose videos are cut to a step each; prompt and figure are those of
lmms-eval (`tasks/youcook2`): CIDEr within the steps of a video, averaged over the videos. CIDEr over all steps, which
papers with trained captioners give, stands beside it as `cider_coco`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from vft.benchmarks import Captioning, Place, captions_of, written
from vft.common.scores import Interval
from vft.common.task import Answer
from vft.common.types import Sample
from vft.data.records.record import Record, check_text


class YouCook2(Captioning):
    """`data/val-*.parquet`, with videos in `YouCookIIVideos/`."""

    title, page = "YouCook2", "https://huggingface.co/datasets/lmms-eval/YouCook2"
    path, media, main_metric = "YouCook2/data/val-*.parquet", ("YouCookIIVideos", "videos"), "cider_coco_grouped"
    prompt, per_group = "Provide a one-sentence caption for the provided video.", "video"

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        name = check_text(record.get("video_path"), "video_path")
        groups = {"video": check_text(record.get("youtube_id"), "youtube_id")}
        (sentence,) = captions_of([record.get("sentence")], "sentence")
        return [written(name, (place.video(name, "video_path"), self.prompt), [_ascii(sentence)], place, groups)]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """As `Captioning.score`; characters beyond ASCII are spaces, in references too."""
        return super().score([replace(one, text=_ascii(one.text)) for one in answers])


def _ascii(text: str) -> str:
    return re.sub(r"[^\x00-\x7f]", " ", text)
