"""Writing files of records, and reading them as a source of a format: `read_NAME(path, root, media=...)`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vft.common.errors import UserError
from vft.common.types import Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats
from vft.data.records.record import BadRecord, Records


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


def write(path: Path, content: Any = "x") -> Path:
    """Bytes, a text, or anything else as JSON with a line for each record; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content, indent=1)).encode()
    path.write_bytes(content)
    return path


def read_error(call: Callable[[], Any], *words: str) -> str:
    """The one line of the UserError that a call ends with, in which all these words occur."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def sample_of(records: Records) -> Sample:
    """The first sample of records of which none is bad."""
    samples, bad = records
    assert not bad, str(bad[0])
    return samples[0]


def error_of(records: Records) -> BadRecord:
    """The one bad record, and no sample."""
    samples, (bad,) = records
    assert not samples and "\n" not in str(bad)
    return bad
