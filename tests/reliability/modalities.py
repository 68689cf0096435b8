"""The caption recipe in which each process writes down what its packs of each step hold; tests start it.

To the file MODALITIES with the process's rank behind it: a line a pack, `STEP KIND+KIND`, `text` where there are no
media and `empty` where there is nothing.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from vft.models.base import VideoLanguageModel
from vft.recipes.main import main
from vft.training import trainer as train

original_forward, original_step = VideoLanguageModel.forward, train.Trainer.train_step
current = 0


def train_step(trainer: train.Trainer) -> int:
    """Takes note of the step."""
    global current
    current = trainer.step
    stop = original_step(trainer)
    current = 0
    return stop


def forward(model: VideoLanguageModel, batch: Any, *arguments: Any, **options: Any) -> torch.Tensor:
    """The model's own."""
    if current:
        kinds = {plan.ref.kind for document in batch.documents for plan in document.media}
        what = "+".join(sorted(kinds)) or ("text" if batch.documents else "empty")
        with open(f"{os.environ['MODALITIES']}.{os.environ['RANK']}", "a") as file:
            file.write(f"{current} {what}\n")
    return original_forward(model, batch, *arguments, **options)


if __name__ == "__main__":
    train.Trainer.train_step = train_step  # type: ignore[method-assign]
    VideoLanguageModel.forward = forward  # type: ignore[method-assign]
    main("caption")
