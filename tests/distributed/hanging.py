"""The caption recipe where something takes long; the tests start it.

With HANGS = "step" the third step never gets its data, as from a dead disk; with "write" a checkpoint takes SECONDS.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from vft.data.loader import LoadedPack, Loader
from vft.recipes.main import main
from vft.training import checkpoint_writer as saving

SECONDS = 5.0
original_step, original_write = Loader.step, saving.write_parts
steps = 0


def step(loader: Loader) -> Iterator[LoadedPack]:
    """The loader's own, but for the third time."""
    global steps
    steps += 1
    while steps == 3:
        time.sleep(1)
    yield from original_step(loader)


def write_parts(*arguments: Any) -> Any:
    """As on a slow disk."""
    time.sleep(SECONDS)
    return original_write(*arguments)


if __name__ == "__main__":
    if os.environ["HANGS"] == "step":
        Loader.step = step  # type: ignore[method-assign]
    else:
        saving.write_parts = write_parts
    main("caption")
