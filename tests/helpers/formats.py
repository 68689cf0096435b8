"""Reading a file as a source of a format: `read_NAME(path, root, media=...)`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from vft.config.data import DataConfig, SourceConfig
from vft.data import formats
from vft.data.records.record import Records


def read_source(format: str, path: Path | str, root: Path, cache: Path | None = None, **settings: Any) -> Records:
    """What the format makes of the file or folder at `path`; origins are its own, not relative to `root`."""
    source = SourceConfig(format=format, path=str(path), **settings)
    return formats.find(format).read(source, DataConfig(root=root, cache_dir=str(cache or "")))


read_folders = partial(read_source, "folders")
read_kinetics = partial(read_source, "kinetics")
read_llava_instruct = partial(read_source, "llava_instruct")
read_llava_video = partial(read_source, "llava_video")
read_messages = partial(read_source, "messages")
read_pe_video = partial(read_source, "pe_video")
read_ssv2 = partial(read_source, "ssv2")
read_story = partial(read_source, "story")
read_ucf101 = partial(read_source, "ucf101")
read_video_mme = partial(read_source, "video_mme")
