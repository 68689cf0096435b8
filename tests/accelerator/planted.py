"""Mistakes that only a device shows, each of which the pretend device must find."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from vft.common import types
from vft.common.types import Batch
from vft.models import layers
from vft.models.base import VideoLanguageModel
from vft.models.decoder import DecoderLayer
from vft.training.checkpoint import AsyncCheckpointer

FAULTS: dict[str, Callable[[ExitStack], object]] = {}


def fault(function: Callable[[ExitStack], object]) -> Callable[[ExitStack], object]:
    """Make it known by its name."""
    FAULTS[function.__name__] = function
    return function


@fault
def host_read_in_forward(stack: ExitStack) -> None:
    """The host looks at a value in every layer."""
    forward = DecoderLayer.forward

    def planted(self: DecoderLayer, x: Tensor, *rest: Any) -> Tensor:
        assert float(x.detach().abs().max()) < 1e9
        return forward(self, x, *rest)

    stack.enter_context(patch.object(DecoderLayer, "forward", planted))


@fault
def host_read_in_backward(stack: ExitStack) -> None:
    """The same in the backward pass, which runs in a thread of autograd's."""
    backward = layers._Gate.backward

    def planted(ctx: Any, *grads: Tensor) -> Any:
        assert not grads[0].isnan().any()
        return backward(ctx, *grads)

    stack.enter_context(patch.object(layers._Gate, "backward", staticmethod(planted)))


@fault
def index_by_mask(stack: ExitStack) -> None:
    """How many rows there are has to be known by the host."""
    normalise = VideoLanguageModel.normalise

    def planted(self: VideoLanguageModel, pixels: Tensor) -> Tensor:
        out = normalise(self, pixels)
        return out[out[:, 0] > -9]

    stack.enter_context(patch.object(VideoLanguageModel, "normalise", planted))


@fault
def index_on_the_host(stack: ExitStack) -> None:
    """An index that was never moved."""
    forward = DecoderLayer.forward

    def planted(self: DecoderLayer, x: Tensor, *rest: Any) -> Tensor:
        return forward(self, x, *rest)[torch.arange(x.shape[0])]

    stack.enter_context(patch.object(DecoderLayer, "forward", planted))


@fault
def stride_0_pin(stack: ExitStack) -> None:
    """Blank pixels that are one row, seen many times, cannot be pinned as they are."""
    move = types.move

    def planted(self: Batch, device: torch.device) -> Batch:
        blank = self.pixels_PD[:1].expand_as(self.pixels_PD).pin_memory()
        return replace(move(self, device), pixels_PD=blank.to(device, non_blocking=True))

    stack.enter_context(patch.object(Batch, "to", planted))


@fault
def pageable_copy(stack: ExitStack) -> None:
    """A copy to the device from memory that is not pinned waits, whatever it is told."""
    move = types.move

    def planted(self: Batch, device: torch.device) -> Batch:
        return replace(move(self, device), target_ids_N=self.target_ids_N.to(device, non_blocking=True))

    stack.enter_context(patch.object(Batch, "to", planted))


@fault
def pinned_buffer_reused(stack: ExitStack) -> None:
    """Pinned memory is written again while it is still being copied."""
    move = types.move

    def planted(self: Batch, device: torch.device) -> Batch:
        pixels_PD = self.pixels_PD.contiguous().pin_memory()
        moved = replace(move(self, device), pixels_PD=pixels_PD.to(device, non_blocking=True))
        pixels_PD.add_(1)
        return moved

    stack.enter_context(patch.object(Batch, "to", planted))


@fault
def save_without_synchronize(stack: ExitStack) -> None:
    """The thread that writes begins before the copies have arrived."""
    stack.enter_context(patch.object(AsyncCheckpointer, "_copied", planted_copies))


def planted_copies(self: AsyncCheckpointer, parts: Any) -> Any:
    """AsyncCheckpointer._copied without its wait."""
    copies = {
        name: torch.empty(part.rows.shape, dtype=part.rows.dtype, pin_memory=True) for name, part in parts.items()
    }
    for name, part in parts.items():
        copies[name].copy_(part.rows, non_blocking=True)
    return {name: replace(part, rows=copies[name]) for name, part in parts.items()}
