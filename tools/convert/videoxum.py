#!/usr/bin/env python
"""VideoXum to stories: a list of {video_id, duration, sampled_frames, timestamps, tsum, vsum, vsum_onehot}.

Each text of `tsum` summarises the segment at the same place of `timestamps` (seconds); the text is all of them. `vsum`
and `vsum_onehot` say which frames workers chose, which is no text, and are not taken. Videos are ActivityNet's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import in_venv  # noqa: F401
from activitynet_captions import describe
from converter import Conversion, run


def convert(conversion: Conversion) -> Iterator[dict[str, Any]]:
    """A record for each video that exists."""
    for record in conversion.each(list(conversion.records("VideoXum", ("video_id", "timestamps", "tsum")))):
        name, length_s = str(record["video_id"]), record.get("duration")
        yield from describe(conversion, name, record["timestamps"], record["tsum"], length_s)


if __name__ == "__main__":
    run(__doc__, "--videos", convert)
