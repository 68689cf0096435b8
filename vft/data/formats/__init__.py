"""Dataset formats: one module each, all read by `read`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vft.common.types import Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import (
    folders,
    kinetics,
    llava_instruct,
    llava_video,
    messages,
    pe_video,
    ssv2,
    story,
    ucf101,
    video_mme,
)
from vft.data.formats.records import BadRecord, spelt

Records = tuple[list[Sample], list[BadRecord]]
"""The samples of a source, and the records that can't be used."""

FORMATS: dict[str, Callable[[SourceConfig, DataConfig], Records]] = {
    "messages": lambda source, data: messages.read(spelt(data.root, source.path), data.root, source.columns),
    "llava_video": lambda source, data: llava_video.read(spelt(data.root, source.path), data.root),
    "llava_instruct": lambda source, data: llava_instruct.read(spelt(data.root, source.path), data.root, source.media),
    "video_mme": lambda source, data: video_mme.read(
        locate(source.path, data.root), data.root, source.media, source.subtitles
    ),
    "ucf101": lambda source, data: ucf101.read(spelt(data.root, source.path), data.root, source.media),
    "kinetics": lambda source, data: kinetics.read(spelt(data.root, source.path), data.root, source.media),
    "ssv2": lambda source, data: ssv2.read(spelt(data.root, source.path), data.root, source.media),
    "folders": lambda source, data: folders.read(spelt(data.root, source.path), data.root),
    "story": lambda source, data: story.read(spelt(data.root, source.path), data.root, source.columns),
    "pe_video": lambda source, data: pe_video.unpack(locate(source.path, data.root), source.take, data.cache_path),
}
"""By name. Archives read as they come, `stream = true`, are the matter of `vft.data.streaming.stream`."""

__all__ = ["FORMATS", "BadRecord", "Records", "locate", "read"]


def read(source: SourceConfig, data: DataConfig) -> Records:
    """The samples of a source, and the records there that can't be used, both with their place below `data.root`. Media
    are looked for there alone.

    Raises:
        UserError: a file that can't be read or is not in the source's format; names file and line.
    """
    samples, bad = FORMATS[source.format](source, data)
    samples = [replace(one, origin=_placed(source.path, one.origin)) for one in samples]
    return samples, [replace(one, origin=_placed(source.path, one.origin)) for one in bad]


def _placed(path: str, origin: str) -> str:
    """`train.json:12` of a source `a/train.json` as `a/train.json:12`: files of one name in two folders are two."""
    folder, _, name = path.rstrip("/").rpartition("/")
    has_name = origin.startswith(name) and origin[len(name) :][:1] in (":", "/")
    if has_name or "*" in name:  # the files that a pattern fits lie in its folder
        return f"{folder}/{origin}" if folder else origin
    return f"{path.rstrip('/')}/{origin}"


def locate(path: str, root: Path) -> str:
    """A path below `root`, or a URL as it is."""
    return path if path.startswith("hf://") else str(spelt(root, path))
