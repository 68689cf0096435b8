"""What tests of several folders share: reference cases, real clips, a small checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.helpers.tiny import Tiny

# The helpers import transformers, which takes seconds: tests that need no model shall not wait for it.


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--count N`, for the rows of docs/develop/reliability.md."""
    parser.addoption("--count", type=int, help="repetitions of a row of tests/reliability (short without it)")


@pytest.fixture(scope="session")
def count(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """How often a row of tests/reliability is repeated: as `--count` says, else the short number given."""
    asked = request.config.getoption("--count")
    return lambda short: short if asked is None else int(asked)


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference cases."""
    path = os.environ.get("VFT_REFERENCE", "")
    if not path or not Path(path).is_dir():
        pytest.skip("VFT_REFERENCE names no folder of reference cases")
    return Path(path)


@pytest.fixture(scope="session")
def reference_today() -> Path:
    """The folder of later reference cases: VFT_REFERENCE_TODAY, else the one beside VFT_REFERENCE."""
    named, beside = (os.environ.get(name, "") for name in ("VFT_REFERENCE_TODAY", "VFT_REFERENCE"))
    path = Path(named) if named else Path(beside).parent / "reference_today"
    if not (named or beside) or not path.is_dir():
        pytest.skip("neither VFT_REFERENCE_TODAY nor VFT_REFERENCE leads to a folder of later reference cases")
    return path


@pytest.fixture(scope="session")
def videos() -> Path:
    """The folder of real clips: VFT_VIDEOS, else the one beside VFT_REFERENCE."""
    named = os.environ.get("VFT_VIDEOS", "")
    beside = os.environ.get("VFT_REFERENCE", "")
    path = Path(named) if named else Path(beside).parent / "videos"
    if not (named or beside) or not path.is_dir():
        pytest.skip("neither VFT_VIDEOS nor VFT_REFERENCE leads to a folder of clips")
    return path


FAMILIES = (
    "qwen2_5_vl",
    "llava_next_video",
    "llava_next_video_mistral",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
)
"""Keys of tests.helpers.families.FAMILIES, which takes seconds to import."""
KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False, "max_shard_size": "100KB", "seed": 1},
    "bf16": {"dtype": "bfloat16", "max_shard_size": "100KB", "seed": 2},
}
"""Checkpoints of a family: a tied head in one file; a head of its own, in several files; weights as released."""


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Tiny]:
    """A small random checkpoint of a family and of one of KINDS, the same each time."""

    @cache
    def make(family: str, kind: str) -> Tiny:
        import torch

        from tests.helpers import families
        from tests.helpers.tiny import Tiny

        assert tuple(families.FAMILIES) == FAMILIES
        options = dict(KINDS[kind])
        if "dtype" in options:
            options["dtype"] = getattr(torch, options["dtype"])
        folder = tmp_path_factory.mktemp(f"{family}-{kind}") / "base"
        tiny = Tiny(families.FAMILIES[family].save(folder, **options), families.FAMILIES[family])
        assert len(list(folder.glob("*.safetensors"))) > 2 or kind == "tied"
        return tiny

    return make


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


@pytest.fixture(scope="session")
def each_tiny(family: str, make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    """A small random model of each family with a tied head."""
    return make_tiny(family, "tied")


@pytest.fixture(scope="session")
def each_untied(family: str, make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    """The same with a head of its own, in several weight files."""
    return make_tiny(family, "untied")


@pytest.fixture(scope="session")
def each_bf16(family: str, make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    """Weights in bfloat16, as released, in several files."""
    return make_tiny(family, "bf16")


@pytest.fixture(scope="session")
def tiny(make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    """A Qwen2.5-VL, for tests to which the family makes no difference."""
    return make_tiny("qwen2_5_vl", "tied")


@pytest.fixture(scope="session")
def tiny_untied(make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    """The same with a head of its own, in several weight files."""
    return make_tiny("qwen2_5_vl", "untied")


@pytest.fixture(scope="session")
def tiny_bf16(make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    """Weights in bfloat16, as released, in several files."""
    return make_tiny("qwen2_5_vl", "bf16")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile knows no graph yet, and its counters are at zero."""
    import torch

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
