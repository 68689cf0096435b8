"""Optimizer, schedule, and what a step does with the summed gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from vft.config import TrainConfig
from vft.distributed import whole


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (norms, biases) are not decayed.

    The state is made at once, so that a checkpoint holds every parameter's whatever the first steps used.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for parameter in trainable:
        state = optimizer.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(config: TrainConfig, step: int, max_steps: int) -> float:
    """Rate of optimizer step `step` (from 1): a line up to the peak over the warm-up, then the schedule down to 0."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps - 1) / max(1, max_steps - config.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.learning_rate * left


def scale_and_clip(parameters: Iterable[nn.Parameter], scale: float, max_norm: float) -> float:
    """Multiply all gradients by `scale`, then shorten them to `max_norm` (0: never). Returns the norm before that."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, scale)
    norm = float(whole(torch.nn.utils.get_total_norm(gradients)))  # of sharded gradients it is sharded too
    if max_norm and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm
