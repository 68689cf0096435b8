"""Layers that the model families share.

Every layer casts its parameters to the dtype of its input, so frozen bf16 weights and trainable fp32 ones can be mixed.
If FSDP2 has cast them already, the cast does nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vft.common.types import AttentionPlan
from vft.models.attention import attend
from vft.models.processor import VisionProcessor
from vft.models.quantization import linear

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine [T, K] of each row's rotary angles."""


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype. A frozen weight may be NF4 (`vft.models.quantization`)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return linear(x, self.weight, self.bias)


def apply_all(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """Outputs of several linear layers with the same input. A kind that has `together` computes all at once."""
    kinds = {type(layer) for layer in layers}
    together = getattr(kinds.pop(), "together", None) if len(kinds) == 1 else None
    return [layer(x) for layer in layers] if together is None else together(layers, x)


class LayerNorm(nn.LayerNorm):
    """A layer norm that computes in its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """RMS norm: normalises in float32 and scales in the input's dtype, as the reference model does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        return _Normalise.apply(x, self.weight.to(x.dtype), self.eps)


class OffsetRMSNorm(RMSNorm):
    """RMS norm that multiplies by 1 + weight, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        return _Normalise.apply(x, 1.0 + self.weight.float(), self.eps)


class _Normalise(torch.autograd.Function):
    """Saves its input for the backward pass, where autograd would save a float32 copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalised, then scaled."""
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (weight * (x32 * scale).to(weight.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input and weight."""
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        x32, inner = x.float(), (grad * weight).float()
        grad_x = inner * scale - x32 * scale.pow(3) * (inner * x32).mean(-1, keepdim=True)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (x32 * scale).to(weight.dtype)).sum(dim=tuple(range(x.dim() - 1)))
        return grad_x.to(x.dtype), grad_weight, None


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        return self.down_proj(_Gate.apply(*apply_all([self.gate_proj, self.up_proj], x)))


class _Gate(torch.autograd.Function):
    """silu(gate) * up. The backward pass computes silu(gate) again, which saves a third of an MLP's activations for one
    operation an element."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Both [..., hidden] to [..., hidden]."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        (grad,) = grads
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class VisionAttention(nn.Module):
    """Self-attention of patches in the Qwen vision encoders, by a plan (windows or frames)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_PE: Tensor, rotary: Rotary, plan: AttentionPlan) -> Tensor:
        """[P, E] to [P, E]."""
        q, k, v = self.qkv(x_PE).unflatten(-1, (3, self.heads, -1)).unbind(1)
        out = attend(rotate(q, rotary), rotate(k, rotary), v, plan)
        return self.proj(out.flatten(1))


class VisionBlock(nn.Module):
    """One block of a Qwen vision encoder. The families differ in norm and MLP."""

    def __init__(self, width: int, heads: int, norm: Callable[..., nn.Module], mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = norm(width, eps=1e-6)
        self.norm2 = norm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.mlp = mlp

    def forward(self, x_PE: Tensor, rotary: Rotary, plan: AttentionPlan) -> Tensor:
        """[P, E] to [P, E]."""
        x_PE = x_PE + self.attn(self.norm1(x_PE), rotary, plan)
        return x_PE + self.mlp(self.norm2(x_PE))


class PatchEmbed(nn.Module):
    """The released Conv3d, computed as a matrix product: Conv3d is slow or broken on some GPUs."""

    def __init__(self, width: int, processor: VisionProcessor, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, (processor.temporal, processor.patch, processor.patch), bias=bias)

    def forward(self, x_PD: Tensor) -> Tensor:
        """[P, D], flattened in the order of the weight, to [P, E]."""
        return linear(x_PD, self.proj.weight.flatten(1), self.proj.bias)


def two_linears(
    names: tuple[str, str], widths: tuple[int, int, int], activation: nn.Module, bias: bool = True
) -> nn.Sequential:
    """Two linear layers, under their released names, with an activation between them."""
    first, second = (Linear(width, out, bias=bias) for width, out in pairwise(widths))
    return nn.Sequential(OrderedDict([(names[0], first), ("act", activation), (names[1], second)]))


def graph_of(parameters: Iterable[nn.Parameter]) -> torch.set_grad_enabled:
    """Context in which a graph is built only if one of these parameters is trained."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in parameters))


def inverse_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """Rotary frequencies 1 / theta^(2i / width), float32, [width / 2].

    They are computed where they are used, because a buffer would stay unset after construction on the meta device.
    """
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def rotate(x_THK: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of the pairs (i, i + K/2), in the dtype of cosine and sine. If these are narrower than a head,
    only its first elements are rotated."""
    cos_TK, sin_TK = rotary
    width = cos_TK.shape[-1]
    if width < x_THK.shape[-1]:
        return torch.cat([rotate(x_THK[..., :width], rotary), x_THK[..., width:]], dim=-1)
    x = x_THK.to(cos_TK.dtype)
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x * cos_TK.unsqueeze(-2) + rotated * sin_TK.unsqueeze(-2)).to(x_THK.dtype)


def rotary_2d(positions_P2: Tensor, width: int) -> Rotary:
    """Cosine and sine [P, K] for heads of `width`, in float32 as in the reference models: half of the frequencies
    rotate with the row of a patch, half with its column."""
    frequencies = inverse_frequencies(width // 2, 10000.0, positions_P2.device)
    angles_PK = (positions_P2[:, :, None] * frequencies).flatten(1).repeat(1, 2)
    return angles_PK.cos(), angles_PK.sin()
