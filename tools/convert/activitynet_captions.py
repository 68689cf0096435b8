#!/usr/bin/env python
"""ActivityNet Captions to stories: {video: {duration, timestamps, sentences}}, a sentence for each pair of seconds.

Each sentence becomes a segment; the text is all of them in the order of the file. Videos are v_{id}.mp4, .mkv or .webm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converter import Work, clean, run


def convert(work: Work) -> Iterator[dict[str, Any]]:
    """A record for each video that is there."""
    for document in work.records("ActivityNet Captions", ()):
        for name, entry in document.items():
            work.check(entry, "ActivityNet Captions", ("timestamps", "sentences"))
            yield from describe(work, name, entry["timestamps"], entry["sentences"])


def describe(work: Work, name: str, timestamps: Any, sentences: Any) -> Iterator[dict[str, Any]]:
    """The record of one ActivityNet video, if it is there and anything is said about it."""
    bare = name.removeprefix("v_")
    video, texts = work.media.find(f"v_{bare}", bare), clean(sentences)
    if video is None:
        work.left_out[f"video not in {work.media.folder}"] += 1
    elif not any(texts):
        work.left_out["no text"] += 1
    else:
        segments = work.segments(timestamps, texts)
        yield {"id": name, "video": video, "segments": segments, "text": " ".join(filter(None, texts))}


if __name__ == "__main__":
    run(__doc__, "--videos", convert)
