"""Optimizer, learning rate schedule, and gradient clipping."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vft.adapters.lora import LORA_B, MAGNITUDE
from vft.config.run import LoraConfig, TrainConfig
from vft.distributed.process_group import full_tensor
from vft.models.base import component_of


def build_optimizer(
    model: nn.Module,
    config: TrainConfig,
    components: Mapping[str, tuple[str, ...]] | None = None,
    lora: LoraConfig | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters. Vectors (norms, biases, DoRA's magnitudes) have no weight decay.

    The learning rate of a group is its `share` of the main one. The share depends on the component, and with LoRA+
    (Hayou et al. 2024, arXiv 2402.12354) on the matrix of the adapter; magnitudes count as B, as in PEFT's
    `create_loraplus_optimizer`. The state is made here, so that a checkpoint has it for every parameter, even for those
    that the first steps do not use.
    """
    rates: Mapping[Any, float] = config.component_learning_rates
    main_rate, groups = config.learning_rate, defaultdict[tuple[float, bool], list[nn.Parameter]](list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = rates.get(component_of(name, components or {}), main_rate) / main_rate if rates else 1.0
            if lora is not None and name.endswith((LORA_B, MAGNITUDE)):
                share *= lora.loraplus_ratio
            groups[share, parameter.dim() > 1].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "share": share, "weight_decay": config.weight_decay if decayed else 0.0}
            for (share, decayed), members in groups.items()
        ],
        lr=main_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for parameter in chain.from_iterable(groups.values()):
        state = optimizer.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group to its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def learning_rate(config: TrainConfig, step: int, max_steps: int) -> float:
    """Learning rate of step `step` (from 1): linear warm-up to `train.learning_rate`, then the schedule down to 0."""
    warmup = config.warmup(max_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup - 1) / max(1, max_steps - warmup)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.learning_rate * left


def scale_gradients(parameters: Iterable[nn.Parameter], scale: float) -> tuple[list[Tensor], Tensor]:
    """Multiply gradients by `scale`. Returns them and their norm, a scalar on their device: nothing waits for it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, scale)
    return gradients, full_tensor(torch.nn.utils.get_total_norm(gradients))  # a DTensor if the gradients are sharded


def clip(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Shorten gradients of this norm to `max_norm` (0: no clipping)."""
    if max_norm and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
