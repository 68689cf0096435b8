"""NF4: frozen weights in 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), unpacked where they are used.

Each row of a weight is divided into blocks of 64. A block stores its largest absolute value (absmax) in float32, and
for each weight a code: the nearest of 16 quantiles of a normal distribution, relative to absmax. A packed row has first
the codes, two in a byte, and then absmax of its blocks. So a packed weight is a uint8 matrix with the rows of the
weight: it is sharded and gathered like any other, and no mixed-precision policy casts it. A weight takes 9/16 byte.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64
BLOCK_BYTES = BLOCK // 2 + 4
CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Appendix E of the paper. They include zero, and the ends are +- a block's absmax."""
MIDPOINTS = torch.tensor([(low + high) / 2 for low, high in pairwise(CODES)])
"""Bounds between the codes."""
PAIRS = torch.tensor([(CODES[byte >> 4], CODES[byte & 15]) for byte in range(256)])
"""The two weights of a byte, the first in its upper four bits."""
_pairs_on: dict[torch.device, Tensor] = {}
"""Its copies on devices."""


def is_packed(weight: Tensor) -> bool:
    """Whether a parameter is an NF4 weight."""
    return weight.dtype == torch.uint8


def pack(weight: Tensor) -> Tensor:
    """A weight [..., out, in] of any floating type to bytes [..., out, 36 x blocks]. The last block of a row may be
    short."""
    blocks = F.pad(weight.float(), (0, -weight.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    absmax = blocks.abs().amax(-1)
    scaled = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    codes = torch.bucketize(scaled.flatten(-2), MIDPOINTS.to(weight.device), out_int32=True).to(torch.uint8)
    return torch.cat([codes[..., 0::2] << 4 | codes[..., 1::2], absmax.view(torch.uint8)], dim=-1)


def prepare_unpacking(device: torch.device) -> None:
    """Copy the table of `unpack` to a device, so that it need not be copied, with a wait, for every matrix."""
    _pairs_on[device] = PAIRS.to(device)


def unpack(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Bytes of `pack` to the weight [..., out, columns]: codes times absmax in float32, rounded once to `dtype`."""
    blocks = packed.shape[-1] // BLOCK_BYTES
    codes, absmax = packed.split([blocks * BLOCK // 2, blocks * 4], dim=-1)
    table = _pairs_on.get(packed.device)
    pairs = F.embedding(codes.int(), PAIRS.to(packed.device) if table is None else table)
    weight = pairs.view(*packed.shape[:-1], blocks, BLOCK)
    weight.mul_(absmax.contiguous().view(torch.float32).unsqueeze(-1))
    return weight.to(dtype).flatten(-2)[..., :columns]


def dense(weight: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """A weight [out, columns] in `dtype`, unpacked if it is packed."""
    return unpack(weight, columns, dtype) if is_packed(weight) else weight.to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in x's dtype, [..., in] to [..., out]. The weight has any floating type, or is packed and frozen."""
    bias = None if bias is None else bias.to(x.dtype)
    if is_packed(weight):
        return _PackedLinear.apply(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), bias)


class _PackedLinear(torch.autograd.Function):
    """Saves the bytes for the backward pass and unpacks them again; autograd would save the full matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] to [..., out]."""
        ctx.save_for_backward(packed)
        ctx.columns = x.shape[-1]
        return F.linear(x, unpack(packed, x.shape[-1], x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the input only: weight and bias are frozen."""
        (grad,) = grads
        (packed,) = ctx.saved_tensors
        return grad @ unpack(packed, ctx.columns, grad.dtype), None, None


def matrices(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes [..., out, in] of a module's own parameters that can be packed. A module that is no linear layer
    has them in an attribute of this name."""
    if isinstance(module, nn.Linear):
        return {"weight": (module.out_features, module.in_features)}
    named: dict[str, tuple[int, ...]] = getattr(module, "matrices", {})
    return named


def quantize(layers: nn.Module) -> None:
    """Replace every matrix in `layers`, on the meta device, by a packed one without values.

    `vft.models.weights.load_weights` packs the weights that it reads.
    """
    for module in layers.modules():
        for name, (*rows, columns) in matrices(module).items():
            shape = (*rows, -(-columns // BLOCK) * BLOCK_BYTES)
            empty = torch.empty(shape, dtype=torch.uint8, device=module.get_parameter(name).device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def true_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name. For a packed parameter it is the shape of the unpacked weight."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        packed = {leaf: shape for leaf, shape in matrices(module).items() if is_packed(module.get_parameter(leaf))}
        shapes |= {f"{name}.{leaf}": shape for leaf, shape in packed.items()}
    return shapes
