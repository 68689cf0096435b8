"""Clips made for tests: each frame's grey level says which one it is."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def level(index: int) -> int:
    """The grey of frame `index`: told apart after lossy coding."""
    return 20 + (index * 37) % 200


def make_clip(
    path: Path,
    ticks: Sequence[int],
    fps: int = 10,
    ticks_per_frame: int = 1,
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    **container_options: Any,
) -> Path:
    """A clip whose frame i is shown at `ticks[i] / (fps * ticks_per_frame)` seconds; `size` is width, height.

    `options` are the encoder's; `container_options` those of `av.open`, such as `format` and `options`.
    """
    with av.open(str(path), "w", **container_options) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, fps * ticks_per_frame)
        for i, tick in enumerate(ticks):
            pixels = np.full((size[1], size[0], 3), level(i), np.uint8)
            pixels[:8, : size[0] // 2] = 255 - level(i)  # the upper left corner, to see rotation
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
