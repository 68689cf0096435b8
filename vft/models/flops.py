"""Floating-point operations of a step: those of the model, and those of the hardware with recomputation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from vft.common.types import Batch
from vft.models.attention import attended_pairs
from vft.models.base import VideoLanguageModel, component_of
from vft.models.decoder import head_width
from vft.models.experts import ExpertWeights
from vft.models.quantization import true_shapes

RECOMPUTED = {"none": 0.0, "selective": 0.5, "mlp": 0.0, "full": 1.0}
"""By mode, from the fastest to the slowest: share of a layer's forward products that the backward pass repeats. With
`mlp` they are those of the MLP, most of a layer's."""


class Flops(NamedTuple):
    """FLOPs of forward and backward pass."""

    model: float
    """FLOPs that the step needs."""
    hardware: float
    """FLOPs with those that activation checkpointing repeats."""


class FlopCounter:
    """Counts the FLOPs of batches. There is no padding to leave out.

    A multiply-add is 2 FLOPs. For each token, a frozen weight takes 4 FLOPs (forward, gradient of the input) and a
    trained one 6; of a layer's experts only those count that work for it. Attention takes 12 x width x layers for each
    query-key pair. The head is computed for supervised tokens only, and a frozen encoder only forward (2 FLOPs for each
    weight).
    """

    def __init__(self, model: VideoLanguageModel, checkpointing: str = "none") -> None:
        config = model.config
        products = {name: p for name, p in model.decoder.layers.named_parameters() if p.dim() >= 2}
        size = {name: math.prod(shape) for name, shape in true_shapes(model.decoder.layers).items() if name in products}
        for name, module in model.decoder.layers.named_modules():
            if isinstance(module, ExpertWeights):
                active = (f"{name}.{leaf}" for leaf, _ in module.named_parameters())
                size |= {one: round(size[one] * module.active_share) for one in active}
        cost = {name: (6 if p.requires_grad else 4) * size[name] for name, p in products.items()}
        decoder, layers = model.decoder, config.num_hidden_layers
        recurrence, its_backward = decoder.recurrence_flops
        self.recurrence = 3 * recurrence
        self.token = sum(cost.values()) + self.recurrence
        self.pair = 12 * config.num_attention_heads * head_width(config) * decoder.attention_layers
        share = RECOMPUTED[checkpointing]
        again = {n: 2 * (float(".mlp." in n) if checkpointing == "mlp" else share) * size[n] for n in products}
        self.recurrence_again = its_backward - 2 * recurrence + (recurrence if checkpointing == "full" else 0)
        self.token_again = sum(again.values()) + self.recurrence_again
        # What follows the last layer's attention is computed for supervised tokens only.
        behind = (".mlp.", ".o_proj.", ".out_proj.")
        last = [n for n in products if n.startswith(f"{layers - 1}.") and any(part in n for part in behind)]
        last = [] if decoder.routing_weight else last
        self.last, self.last_again = sum(cost[n] for n in last), sum(again[n] for n in last)
        self.pair_again = self.pair / 3 if checkpointing == "full" else 0.0
        head = model.decoder.embed_tokens.weight if model.output_head is None else model.output_head.weight
        self.target = (6 if head.requires_grad else 4) * config.vocab_size * config.hidden_size
        vision, tables = model.vision, {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        parts: dict[str, list[nn.Parameter]] = {"vision_encoder": [], "projector": []}
        for name, p in model.named_parameters():
            if p.dim() >= 2 and id(p) not in tables:
                parts.setdefault(component_of(name, model.components), []).append(p)
        patch, passes = _passes(parts["vision_encoder"])
        self.merged, _ = _passes(parts["projector"], fed=passes > 1)
        self.patches_per_row = vision.patches_per_row
        self.patch = patch + self.merged // self.patches_per_row
        self.encoder_pairs = {kind: passes * 4 * width for kind, width in vision.pair_widths.items()}

    def count(self, batch: Batch) -> Flops:
        """FLOPs of forward and backward."""
        pairs = attended_pairs(batch.plan.segments, causal=True)
        total = self.row(batch.num_tokens, pairs, batch.pixels_PD.shape[0]) + self.target * batch.num_targets
        total -= self.last * (batch.num_tokens - batch.num_targets)
        if batch.layout is not None:
            usual = batch.pixels_PD.shape[0] // self.patches_per_row
            total += self.merged * (batch.layout.projector_rows - usual)
            for kind, plan in batch.layout.plans.items():
                total += self.encoder_pairs[kind] * attended_pairs(plan.segments, causal=False)
        again = self.token_again * batch.num_tokens + self.pair_again * pairs
        return Flops(total, total + again - self.last_again * (batch.num_tokens - batch.num_targets))

    def row(self, tokens: int, pairs: int, patches: int) -> float:
        """Model FLOPs of a row with these counts, without the head and the encoder's attention."""
        return float(self.token * tokens + self.pair * pairs + self.patch * patches)


def _passes(weights: Sequence[nn.Parameter], fed: bool = False) -> tuple[int, int]:
    """FLOPs of matrices for one input, and the passes that attention takes, in forward passes.

    If nothing is trained, a weight takes 2 FLOPs; else a frozen one takes 4 and a trained one 6, and attention three
    passes. With `fed` the input needs a gradient, so frozen weights have a backward pass too.
    """
    counts = {True: 0, False: 0}
    for weight in weights:
        counts[weight.requires_grad] += weight.numel()
    backward = fed or counts[True] > 0
    return (4 if backward else 2) * counts[False] + 6 * counts[True], 3 if backward else 1
