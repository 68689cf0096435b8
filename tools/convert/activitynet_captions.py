#!/usr/bin/env python
"""ActivityNet Captions to stories: {video: {duration, timestamps, sentences}}, a sentence for each pair of seconds.

Each sentence becomes a segment; the text is all of them in the order of the file. Videos are v_{id}.mp4, .mkv or .webm.
Segments that are not in the video, by its own length or by `duration`, are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converter import Work, clean, run


def convert(work: Work) -> Iterator[dict[str, Any]]:
    """A record for each video that is there."""
    for document in work.records("ActivityNet Captions", ()):
        for name, entry in work.each(list(document.items())):
            work.check(entry, "ActivityNet Captions", ("timestamps", "sentences"))
            yield from describe(work, name, entry["timestamps"], entry["sentences"], entry.get("duration"))


def describe(work: Work, name: str, timestamps: Any, sentences: Any, length_s: Any) -> Iterator[dict[str, Any]]:
    """The record of one ActivityNet video, if it is there and anything is said about it."""
    bare, texts = name.removeprefix("v_"), clean(sentences)
    video = work.find(f"v_{bare}", bare, length_s=length_s)
    if video is None:
        return
    if not any(texts):
        work.left_out["no text"] += 1
        return
    segments = work.segments(video, timestamps, texts, length_s)
    yield {"id": name, "video": video, "segments": segments, "text": " ".join(filter(None, texts))}


if __name__ == "__main__":
    run(__doc__, "--videos", convert)
