"""Video-MME without subtitles: 2,700 questions about 900 videos (Fu et al. 2024, arXiv 2405.21075).

Prompt and layout are those of `vft/data/formats/video_mme.py`, the authors' prompt; letters are read as by their script
`eval_your_results.py`. lmms-eval speaks of subtitles in either case and looks for a letter in more ways.
"""

from __future__ import annotations

from typing import ClassVar

from vft.benchmarks import LETTERS, MultipleChoice
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats.video_mme import VideoMME
from vft.data.records.record import Records
from vft.metrics import official_letter


class VideoMMEQuestions(MultipleChoice):
    """The Parquet files of `videomme/`, with videos in `data/`."""

    title, page = "Video-MME", "https://huggingface.co/datasets/lmms-eval/Video-MME"
    path, notes_inputs = "Video-MME/videomme", VideoMME.notes_inputs
    subtitles: ClassVar[bool] = False
    """Whether those of `subtitle/` that are on screen at a sampled frame are shown."""

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`."""
        return VideoMME().read(source.model_copy(update={"subtitles": self.subtitles}), data)

    def letter_of(self, text: str, options: int) -> str | None:
        """As `MultipleChoice.letter_of`."""
        return official_letter(text, LETTERS[:options])
