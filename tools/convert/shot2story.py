#!/usr/bin/env python
"""Shot2Story to stories: a list of {video, whole_caption, whole_ASR, video_names, captions, audio_captions, ASR}.

The text is `whole_caption`, the speech `whole_ASR`. A shot's name ends in its first and last frame
(`MVq8Q9tKdfU.23_79_485.mp4`), which the video's average frame rate turns into seconds for the segment of its caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from converter import Work, clean, run

from vft.console import progress_bar

SHOT = re.compile(r"_([0-9]+)_([0-9]+)\.[A-Za-z0-9]+\Z")


def convert(work: Work) -> Iterator[dict[str, Any]]:
    """A record for each video that is there."""
    records = list(work.records("Shot2Story", ("video", "whole_caption")))
    with progress_bar(len(records), "reading frame rates", "video") as bar:
        for record in records:
            bar.update()
            name = Path(str(record["video"])).stem
            video = work.media.find(name)
            text, speech = clean([record["whole_caption"], record.get("whole_ASR")])
            if video is None:
                work.left_out[f"video not in {work.media.folder}"] += 1
            elif not text:
                work.left_out["no text"] += 1
            else:
                made = {"id": name, "video": video, "segments": shots(work, record, work.media.root / video)}
                yield {**made, "text": text, **({"speech": speech} if speech else {})}


def shots(work: Work, record: dict[str, Any], video: Path) -> list[dict[str, Any]]:
    """The segments of a record; none where shots have no frames in their names or the video can't be opened."""
    names, captions = record.get("video_names") or [], clean(record.get("captions"))
    found = [SHOT.search(str(name)) for name in names]
    rate = frame_rate(video) if captions and any(found) else 0.0
    if not all(found) or not rate:
        work.left_out["segments: no frames in the shot's name, or no frame rate in the video"] += len(captions)
        return []
    times = [[int(match[1]) / rate, (int(match[2]) + 1) / rate] for match in found if match]
    return work.segments([[round(second, 3) for second in pair] for pair in times], captions)


def frame_rate(video: Path) -> float:
    """Frames per second on average; 0 where the file can't be opened."""
    try:
        with av.open(str(video)) as container:
            return float(container.streams.video[0].average_rate or 0)
    except (av.FFmpegError, IndexError):
        return 0.0


if __name__ == "__main__":
    run(__doc__, "--videos", convert)
