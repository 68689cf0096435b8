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

import in_venv  # noqa: F401
from converter import Conversion, clean, read_header, run

SHOT = re.compile(r"_([0-9]+)_([0-9]+)\.[A-Za-z0-9]+\Z")


def convert(conversion: Conversion) -> Iterator[dict[str, Any]]:
    """A record for each video that exists."""
    for record in conversion.each(list(conversion.records("Shot2Story", ("video", "whole_caption")))):
        name = Path(str(record["video"])).stem
        video = conversion.find(name)
        text, speech = clean([record["whole_caption"], record.get("whole_ASR")])
        if video is None:
            continue
        if not text:
            conversion.left_out["no text"] += 1
            continue
        story = {"id": name, "video": video, "segments": shots(conversion, record, video)}
        yield {**story, "text": text, **({"speech": speech} if speech else {})}


def shots(conversion: Conversion, record: dict[str, Any], video: str) -> list[dict[str, Any]]:
    """The segments of a record; none if shots have no frames in their names, or the video cannot be opened."""
    names, captions = record.get("video_names") or [], clean(record.get("captions"))
    matches = [SHOT.search(str(name)) for name in names]
    info = read_header(conversion.root / video)
    if not all(matches) or info is None or info.fps <= 0:
        conversion.left_out["segments: no frames in the shot's name, or no frame rate in the video"] += len(captions)
        return []
    times = [[int(match[1]) / info.fps, (int(match[2]) + 1) / info.fps] for match in matches if match]
    return conversion.segments(video, [[round(second, 3) for second in pair] for pair in times], captions)


if __name__ == "__main__":
    run(__doc__, "--videos", convert)
