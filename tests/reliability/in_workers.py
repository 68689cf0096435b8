"""What the tests have worker processes run; these import it by its name, which a test module does not have."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vft.common.types import MediaInfo, MediaKind
from vft.data.media.errors import MediaError
from vft.data.media.video import scan_file


def measured(function: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """What a function returns or why it fails, seconds, and MiB of memory at the most over those at the start."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = _status_mib("VmRSS"), time.monotonic()
    try:
        result = function(*args)
    except MediaError as error:
        result = error
    return result, time.monotonic() - start, _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def import_all() -> None:
    """What the tests' tasks need, before their deadline begins."""
    importlib.import_module("tests.helpers.patches")


def scan_or_hang(kind: MediaKind, path: Path, headers: bool) -> MediaInfo:
    """As a decoder that never returns."""
    while path.name.startswith("hangs"):
        time.sleep(1)
    return scan_file(kind, path, headers)
