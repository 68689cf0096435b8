"""Video-MMMU's Adaptation questions with their picture alone: what is known before the lecture.

The authors' measure of what a lecture adds is (after - before) / (1 - before), where `before` is this accuracy and
`after` that of `video_mmmu` for the track Adaptation.
"""

from __future__ import annotations

from vft.benchmarks.video_mmmu import VideoMMMU


class VideoMMMUQuestionOnly(VideoMMMU):
    """The videos of `question_only/` last two seconds and show the picture."""

    title, path, alone = "Video-MMMU, question only", "VideoMMMU/Adaptation", True
