"""MSR-VTT: 2,990 test videos of 10 to 30 seconds with 20 captions each (Xu et al., CVPR 2016).

Questions are the authors' own file, with their split of 6,513, 497 and 2,990 videos. The prompt is EvalScope's
(`benchmarks/msr_vtt/utils.py`): lmms-eval has no such task, and the models of the authors had no prompt. The figure is
CIDEr over all captions, those that come twice included, as in papers on video captioning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vft.benchmarks import Captioning, Place, as_id, captions_of, written
from vft.common.errors import UserError
from vft.common.types import Sample
from vft.data.records.files import read_records
from vft.data.records.record import Record


class MSRVTT(Captioning):
    """`test_videodatainfo.json`, or another file of its form with a split `test`; videos in `TestVideo/`."""

    title, page = "MSR-VTT", "https://huggingface.co/datasets/AlexZigma/msr-vtt"
    path, media = "MSR-VTT/test_videodatainfo.json", ("TestVideo", "videos/all", "all", "videos")
    prompt = "Describe the video in one concise sentence."

    def records(self, file: Path) -> Iterator[tuple[int, Any]]:
        """The test's videos, each with its number and captions; the file is one object with lists of both."""
        found = next((one for _, one in read_records(file)), None)
        videos, sentences = (found.get(key) if isinstance(found, dict) else None for key in ("videos", "sentences"))
        if not isinstance(videos, list) or not isinstance(sentences, list):
            raise UserError(
                f"{file}: needs an object with the lists `videos` and `sentences`, as the authors' files have"
            )
        captions: dict[Any, list[Any]] = {}
        for one in sentences:
            sentence = one if isinstance(one, dict) else {}
            captions.setdefault(str(sentence.get("video_id")), []).append(sentence.get("caption"))
        for number, video in enumerate(videos, 1):
            if not isinstance(video, dict):
                yield number, video
            elif video.get("split", "test") == "test":
                yield number, {**video, "captions": captions.get(str(video.get("video_id")))}

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        name = as_id(record.get("video_id"), "video_id")
        captions = captions_of(record.get("captions"), "captions")
        return [written(name, (place.video(f"{name}.mp4", "video_id"), self.prompt), captions, place)]
