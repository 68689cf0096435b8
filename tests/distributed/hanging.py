"""The caption recipe where something takes long; the tests start it.

With HANGS = "step" the third step never gets its data, as from a dead disk; with "write" a checkpoint takes SECONDS.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from vft import checkpoint, train
from vft.data.loader import LoadedPack, Loader
from vft.recipes.caption import Caption

SECONDS = 5.0
original_step, original_save = Loader.step, checkpoint.save_file
steps = 0


def step(loader: Loader) -> Iterator[LoadedPack]:
    """The loader's own, but for the third time."""
    global steps
    steps += 1
    while steps == 3:
        time.sleep(1)
    yield from original_step(loader)


def save_file(*arguments: Any) -> None:
    """As on a slow disk."""
    time.sleep(SECONDS)
    original_save(*arguments)


if __name__ == "__main__":
    if os.environ["HANGS"] == "step":
        Loader.step = step  # type: ignore[method-assign]
    else:
        checkpoint.save_file = save_file
    train.main(Caption())
