"""The caption recipe in a process that hangs at its third step, as one that waits for a dead disk."""

from __future__ import annotations

import time
from collections.abc import Iterator

from vft import train
from vft.data.loader import Loader
from vft.recipes.caption import Caption

original = Loader.step
steps = 0


def step(loader: Loader) -> Iterator[object]:
    """The loader's own, but for the third time."""
    global steps
    steps += 1
    if steps == 3:
        yield from hang()
    yield from original(loader)


def hang() -> Iterator[object]:
    """Nothing, ever."""
    while True:
        time.sleep(1)
    yield


if __name__ == "__main__":
    Loader.step = step  # type: ignore[method-assign, assignment]
    train.main(Caption())
