"""What tests of several folders share: reference cases, real clips, a small checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers import Tiny

# The helpers import transformers, which takes seconds: tests that need no model shall not wait for it.


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A small random Qwen2.5-VL with a tied head."""
    from tests.helpers import Tiny, save_checkpoint

    return Tiny(save_checkpoint(tmp_path_factory.mktemp("tied") / "base"))


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The same with a head of its own, in several weight files."""
    from tests.helpers import Tiny, save_checkpoint

    folder = tmp_path_factory.mktemp("untied") / "base"
    tiny = Tiny(save_checkpoint(folder, tied=False, max_shard_size="100KB", seed=1))
    assert len(list(folder.glob("*.safetensors"))) > 2
    return tiny


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Weights in bfloat16, as released, in several files."""
    import torch

    from tests.helpers import Tiny, save_checkpoint

    folder = tmp_path_factory.mktemp("bf16") / "base"
    return Tiny(save_checkpoint(folder, dtype=torch.bfloat16, max_shard_size="100KB", seed=2))
