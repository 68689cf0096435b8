"""What the tests of adapters share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.tiny import Media, Tiny, batch_of, every_logit, load_prepared, medium, talk
from vft.adapters.lora import fill, initialise, is_adapter, is_start
from vft.adapters.peft_format import export_adapter
from vft.adapters.targets import choose_trainable
from vft.common.types import Batch
from vft.config.run import LoraConfig
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained

VIDEO, VIDEO_INFO = medium("video", 4, 140, 150, fps=2.0)


def video_batch(tiny: Tiny) -> Batch:
    """A question about a video of several attention windows."""
    conversation = talk(("user", [VIDEO, "What happens?"]), ("assistant", "A dog runs."))
    return batch_of(tiny.encoder, ([conversation], Media.make(tiny.encoder.processor, [(VIDEO, VIDEO_INFO)])))


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Every logit of this project's model."""
    with torch.no_grad():
        return every_logit(model, batch)


def their_logits(model: Any, batch: Batch, tiny: Tiny) -> Tensor:
    """Every logit of transformers' or PEFT's."""
    with torch.no_grad():
        return model(**tiny.inputs(batch)).logits[0]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest."""
    return float((one - other).detach().abs().max())


def adapted(tiny: Tiny, lora: LoraConfig, seed: int = 0) -> tuple[VideoLanguageModel, Pretrained]:
    """The base with fresh adapters, as training makes them."""
    model, checkpoint = load_prepared(tiny.path, lambda it: choose_trainable(it, lora, ()))
    initialise(model, seed)
    return model, checkpoint


def disturb(model: nn.Module, seed: int = 0) -> None:
    """Random steps of what is trained in place of training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_adapter(name) and not is_start(name):
            fill(parameter, parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator))


def exported(tiny: Tiny, folder: Path, lora: LoraConfig) -> VideoLanguageModel:
    """An adapter in `folder`, as training leaves it, and the model that it came from."""
    model, checkpoint = adapted(tiny, lora)
    disturb(model)
    about = {"base_fingerprint": checkpoint.fingerprint, "task": "caption"}
    export_adapter(model, folder, lora, str(tiny.path), about, write=True)
    return model.eval()
