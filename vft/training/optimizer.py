"""Optimizer, schedule, and what a step does with the summed gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vft.adapters.lora import LORA_B, MAGNITUDE
from vft.adapters.targets import component_of
from vft.config.run import LoraConfig, TrainConfig
from vft.distributed.process_group import full_tensor


def build_optimizer(
    model: nn.Module,
    config: TrainConfig,
    components: Mapping[str, tuple[str, ...]] | None = None,
    lora: LoraConfig | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (norms, biases, DoRA's magnitudes) are not decayed.

    A group's `share` is what its learning rate is of the main one: by its component, and with LoRA+ (Hayou et al. 2024,
    arXiv 2402.12354) by what it is of an adapter; magnitudes go with B, as in PEFT's `create_loraplus_optimizer`.
    The state is made at once, so that a checkpoint holds every parameter's whatever the first steps used.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = _share_of_component(name, config, components or {})
            if lora is not None and name.endswith((LORA_B, MAGNITUDE)):
                share *= lora.loraplus_ratio
            groups.setdefault((share, parameter.dim() > 1), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "share": share, "weight_decay": config.weight_decay if decayed else 0.0}
            for (share, decayed), members in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for parameter in (one for members in groups.values() for one in members):
        state = optimizer.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return optimizer


def _share_of_component(name: str, config: TrainConfig, components: Mapping[str, tuple[str, ...]]) -> float:
    rates: Mapping[Any, float] = config.component_learning_rates
    return rates.get(component_of(name, components), config.learning_rate) / config.learning_rate if rates else 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """`rate` for the main group, and its share of it for each other."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


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
    norm = float(full_tensor(torch.nn.utils.get_total_norm(gradients)))  # of sharded gradients it is sharded too
    if max_norm and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm
