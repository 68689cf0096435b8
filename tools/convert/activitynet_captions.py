#!/usr/bin/env python
"""ActivityNet Captions to stories: {video: {duration, timestamps, sentences}}, a sentence for each pair of seconds.

Each sentence becomes a segment; the text is all of them in the order of the file. Videos are v_{id}.mp4, .mkv or .webm.
Segments that are not in the video, by its own length or by `duration`, are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import in_venv  # noqa: F401
from converter import Conversion, clean, run


def convert(conversion: Conversion) -> Iterator[dict[str, Any]]:
    """A record for each video that exists."""
    for document in conversion.records("ActivityNet Captions", ()):
        for name, entry in conversion.each(list(document.items())):
            conversion.check(entry, "ActivityNet Captions", ("timestamps", "sentences"))
            yield from describe(conversion, name, entry["timestamps"], entry["sentences"], entry.get("duration"))


def describe(
    conversion: Conversion, name: str, timestamps: Any, sentences: Any, length_s: Any
) -> Iterator[dict[str, Any]]:
    """The record of one ActivityNet video, if it exists and has a text."""
    bare, texts = name.removeprefix("v_"), clean(sentences)
    video = conversion.find(f"v_{bare}", bare, length_s=length_s)
    if video is None:
        return
    if not any(texts):
        conversion.left_out["no text"] += 1
        return
    segments = conversion.segments(video, timestamps, texts, length_s)
    yield {"id": name, "video": video, "segments": segments, "text": " ".join(filter(None, texts))}


if __name__ == "__main__":
    run(__doc__, "--videos", convert)
