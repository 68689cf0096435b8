"""The caption recipe in which process NOT_FINITE_ON loses its loss in the steps of NOT_FINITE; tests start it."""

from __future__ import annotations

import os
from typing import Any

import torch

from vft.models.base import VideoLanguageModel
from vft.recipes.main import main
from vft.training import trainer as train

STEPS = {int(step) for step in os.environ["NOT_FINITE"].split(",")}
VALUE = float(os.environ.get("VALUE", "nan"))
original_forward, original_step = VideoLanguageModel.forward, train.Trainer.train_step
current = 0


def train_step(trainer: train.Trainer) -> int:
    """Takes note of the step."""
    global current
    current = trainer.step
    return original_step(trainer)


def forward(model: VideoLanguageModel, *arguments: Any, **options: Any) -> torch.Tensor:
    """The model's own, or no number, with gradients that are none."""
    loss = original_forward(model, *arguments, **options)
    mine = os.environ.get("RANK", "0") == os.environ.get("NOT_FINITE_ON", "0")
    return loss * VALUE if mine and current in STEPS else loss


if __name__ == "__main__":
    train.Trainer.train_step = train_step  # type: ignore[method-assign]
    VideoLanguageModel.forward = forward  # type: ignore[method-assign]
    main("caption")
