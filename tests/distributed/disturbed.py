"""The caption recipe where something goes wrong; the tests start it.

With HANGS = "step" the third step never gets its data, as from a dead disk; with "write" a checkpoint takes SECONDS. In
the steps of NOT_FINITE process NOT_FINITE_ON loses its loss.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from vft.data.loader import LoadedPack, Loader
from vft.models.base import VideoLanguageModel
from vft.recipes.main import main
from vft.training import checkpoint as saving
from vft.training.trainer import Trainer

SECONDS = 5.0
HANGS = os.environ.get("HANGS")
NOT_FINITE = {int(step) for step in os.environ.get("NOT_FINITE", "").split(",") if step}
VALUE = float(os.environ.get("VALUE", "nan"))
loader_step, write, forward, train_step = (
    Loader.step,
    saving.write_parts,
    VideoLanguageModel.forward,
    Trainer.train_step,
)
current = 0


def step_that_hangs(loader: Loader, is_last: bool = False) -> Iterator[LoadedPack]:
    """The loader's own, but for the third time."""
    while current == 3:
        time.sleep(1)
    yield from loader_step(loader, is_last)


def write_slowly(*arguments: Any) -> Any:
    """As on a slow disk."""
    time.sleep(SECONDS)
    return write(*arguments)


def note_step(trainer: Trainer) -> int:
    """Takes note of the step."""
    global current
    current = trainer.step
    return train_step(trainer)


def forward_or_not(model: VideoLanguageModel, *arguments: Any, **options: Any) -> torch.Tensor:
    """The model's own, or no number, with gradients that are none."""
    mine = os.environ.get("RANK", "0") == os.environ.get("NOT_FINITE_ON", "0")
    return forward(model, *arguments, **options) * (VALUE if mine and current in NOT_FINITE else 1)


if __name__ == "__main__":
    Trainer.train_step = note_step  # type: ignore[method-assign]
    VideoLanguageModel.forward = forward_or_not  # type: ignore[method-assign]
    if HANGS == "step":
        Loader.step = step_that_hangs  # type: ignore[method-assign]
    elif HANGS == "write":
        saving.write_parts = write_slowly
    main("caption")
