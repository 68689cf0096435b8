"""MSVD: 670 test clips of about 10 seconds from YouTube, each with about 41 English captions (Chen, Dolan, ACL 2011).

Questions are those of the data set `VLM2Vec/MSVD`, a copy of `friedrichor/MSVD`: the usual split of 1,200, 100 and 670
clips, captions of the authors. The prompt is EvalScope's (`benchmarks/msvd/utils.py`): lmms-eval has no such task, and
the models of the authors had no prompt. The figure is CIDEr over all captions, those that come twice included.
"""

from __future__ import annotations

from collections.abc import Sequence

from vft.benchmarks import Captioning, Place, captions_of, written
from vft.common.types import Sample
from vft.data.records.record import Record, check_text


class MSVD(Captioning):
    """`msvd_test.json`, with videos in `raw_videos/`."""

    title, page = "MSVD", "https://huggingface.co/datasets/VLM2Vec/MSVD"
    path, media = "MSVD/msvd_test.json", ("raw_videos", "YouTubeClips", "videos")
    prompt = "Describe the video in one concise sentence."

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        name = check_text(record.get("video_id"), "video_id")
        captions = captions_of(record.get("caption"), "caption")
        return [written(name, (place.video(f"{name}.avi", "video_id"), self.prompt), captions, place)]
