"""Video-MME with subtitles: as `video_mme`, with those that are on screen at the sampled frames before the question."""

from __future__ import annotations

from vft.benchmarks.video_mme import VideoMMEQuestions


class VideoMMEWithSubtitles(VideoMMEQuestions):
    """Also the subtitles of `subtitle/`; a video without any is asked about without."""

    title, subtitles = "Video-MME, subtitles", True
