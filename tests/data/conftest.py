"""Real clips, where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference cases."""
    path = os.environ.get("VFT_REFERENCE", "")
    if not path or not Path(path).is_dir():
        pytest.skip("VFT_REFERENCE names no folder of reference cases")
    return Path(path)


@pytest.fixture(scope="session")
def videos() -> Path:
    """The folder of real clips: VFT_VIDEOS, else the one beside VFT_REFERENCE."""
    named = os.environ.get("VFT_VIDEOS", "")
    beside = os.environ.get("VFT_REFERENCE", "")
    path = Path(named) if named else Path(beside).parent / "videos"
    if not (named or beside) or not path.is_dir():
        pytest.skip("neither VFT_VIDEOS nor VFT_REFERENCE leads to a folder of clips")
    return path
