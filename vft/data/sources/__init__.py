"""Dataset formats: one module each, all read by `read`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vft.data.sources import llava_video, messages
from vft.data.sources.records import BadRecord
from vft.types import Sample, UserError

FORMATS: dict[str, Callable[[Path, Path], tuple[list[Sample], list[BadRecord]]]] = {
    "messages": messages.read,
    "llava_video": llava_video.read,
}
"""By name: reads a path, with the media under a root."""

__all__ = ["FORMATS", "BadRecord", "read"]


def read(format: str, path: Path, root: Path) -> tuple[list[Sample], list[BadRecord]]:
    """The samples at `path`, and the records there that can't be used. Media are looked for under `root` alone.

    Raises:
        UserError: unknown format, or a file that can't be read or isn't JSON; names file and line.
    """
    if format not in FORMATS:
        raise UserError(f"data.sources: unknown format {format!r}; allowed are {', '.join(sorted(FORMATS))}")
    return FORMATS[format](path, root)
