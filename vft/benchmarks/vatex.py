"""VATEX: videos of 10 seconds from YouTube, each with 10 English captions (Wang et al. 2019, arXiv 1904.03493).

Questions are the 4,478 of the public test whose videos lmms-eval's data set has. Prompt, with its captions of other
videos, and figure are those of lmms-eval (`tasks/vatex`, task `vatex_test`).
"""

from __future__ import annotations

from collections.abc import Sequence

from vft.benchmarks import Captioning, Place, captions_of, written
from vft.common.types import Sample
from vft.data.records.record import Record, check_text


class VATEX(Captioning):
    """The Parquet files of `vatex_test`, or the authors' JSON file of the test (`--path`); videos in `videos/`."""

    title, page = "VATEX", "https://huggingface.co/datasets/lmms-eval/VATEX"
    path, media = "VATEX/vatex_test", ("videos", "test", "vatex_test")
    prompt = (
        "Provide a brief single-sentence caption for the last video below. Do not give any reasoning, just the "
        "caption. You must follow the captioning style of the preceding videos. Do not start your response with "
        '"Output:", just provide the caption.\n'
        "[video1] output: A man picks up a can of shoe paste, a towel, and brush from a table.\n"
        "[video2] output: A person places the frying pan on the stove and then another person flips over the food that "
        "is in it.\n"
        "[video3] output: A woman describes and demonstrates how to create a colorful cross stitch design.\n"
        "[video4] output: A little girl uses the grass in her yard as well as a blue mat to do flips.\n"
    )

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """As `Benchmark.ask`."""
        name = check_text(record.get("videoID"), "videoID")
        captions = captions_of(record.get("enCap"), "enCap")
        video = place.video([f"{name}.mp4", f"{name}.MP4", f"{name}.mkv"], "videoID")
        return [written(name, (video, self.prompt), captions, place)]
