"""A mixture of experts in the place of an MLP: a router sends every row to a few of many gated MLPs.

Rows are sorted by their expert, so that each projection is one grouped product, whose group sizes stay on the device.
Suffixes, beside those of `vft.common.types`: R pairs of a row and one of its experts, sorted by expert; G experts;
I and O inputs and outputs of a product.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vft.common.errors import UserError, first_line
from vft.models.layers import GatedMLP, Linear
from vft.models.quantization import is_packed, unpack

ALIGNED_BYTES = 16
"""Rows of matrices must begin at multiples of it in torch's grouped product."""
MATRICES = ("gate_up_proj", "down_proj")
"""Names of the parameters with the matrices of experts, here as [in, out]; some programs save them as [out, in]."""
EXPERT_MATRICES = tuple(f".mlp.experts.{name}" for name in MATRICES)
"""Endings of their names in a model."""
UNPACKED_AT_ONCE = 1 << 25
"""Weights that are unpacked at a time, which takes 300 MB of working memory."""


class Router(nn.Module):
    """Scores of the experts. It is no `nn.Linear`, so that it is neither adapted nor packed with those."""

    def __init__(self, width: int, experts: int, chosen: int, normalise: bool) -> None:
        super().__init__()
        self.chosen, self.normalise = chosen, normalise
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, E] to the numbers of each row's experts and their shares, both [T, chosen], and the sums of the experts'
        probabilities over the rows [G]. Shares are probabilities among all experts, or with `normalise` among the
        chosen ones: computed in float32, given in x's dtype."""
        probabilities_TG = F.linear(x_TE, self.weight.to(x_TE.dtype)).softmax(-1, dtype=torch.float32)
        shares, numbers = probabilities_TG.topk(self.chosen)
        if self.normalise:
            shares = shares / shares.sum(-1, keepdim=True)
        return numbers, shares.to(x_TE.dtype), probabilities_TG.sum(0)


class ExpertWeights(nn.Module):
    """The matrices of all experts, as released checkpoints hold them: [G, width, 2 x hidden] and [G, hidden, width]."""

    def __init__(self, width: int, hidden: int, experts: int, active_share: float) -> None:
        super().__init__()
        self.active_share = active_share
        """Share of the experts that work for a row."""
        self.matrices = dict(zip(MATRICES, ((experts, width, 2 * hidden), (experts, hidden, width)), strict=True))
        """Names and shapes of its parameters; they can be packed (`vft.models.quantization`)."""
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.empty(shape)) for shape in self.matrices.values())
        self.adapters = nn.ModuleDict()
        """By the name of a matrix, what is added to its product (`vft.adapters.lora.LoRAExperts`)."""

    def forward(self, x_RE: Tensor, shares_R: Tensor, ends_G: Tensor) -> Tensor:
        """Rows [R, E], sorted by expert, to their expert's output times their share."""
        hidden = _SharedGate.apply(self._product("gate_up_proj", x_RE, ends_G), shares_R)
        return self._product("down_proj", hidden, ends_G)

    def _product(self, name: str, x_RI: Tensor, ends_G: Tensor) -> Tensor:
        product = grouped_linear(x_RI, self.get_parameter(name), ends_G, self.matrices[name][-1])
        is_adapted = name in self.adapters and not self.adapters[name].is_off
        return product + self.adapters[name](x_RI, ends_G) if is_adapted else product


class Experts(nn.Module):
    """The MLP: for each row the sum of a few experts' outputs, times their shares."""

    def __init__(self, width: int, hidden: int, experts: int, chosen: int, normalise: bool) -> None:
        """`hidden` is the width inside one of the `experts`, of which `chosen` work for each row. Raises UserError if
        there are not so many."""
        super().__init__()
        if not 1 <= chosen <= experts:
            what = f"config.json: text_config.num_experts_per_tok = {chosen}"
            raise UserError(f"{what}: must be between 1 and num_experts = {experts}")
        self.gate = Router(width, experts, chosen, normalise)
        self.experts = ExpertWeights(width, hidden, experts, chosen / experts)

    def forward(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """[T, E] to [T, E], and how rows were routed [2, G]: for each expert the number of its rows, and the sum of its
        probabilities over all rows. It is given back, not kept, so that rows that are computed again count once."""
        numbers, shares, probabilities_G = self.gate(x_TE)
        sorted_R, order_R = numbers.flatten().sort(stable=True)
        ends_G = torch.searchsorted(
            sorted_R, torch.arange(len(self.gate.weight), device=x_TE.device), right=True, out_int32=True
        )
        place_R = order_R.argsort()
        x_RE = _Spread.apply(x_TE, order_R, place_R, self.gate.chosen)
        out_RE = self.experts(x_RE, shares.flatten()[order_R], ends_G)
        rows_G = ends_G.diff(prepend=ends_G.new_zeros(1)).to(probabilities_G.dtype)
        return _Collect.apply(out_RE, order_R, place_R, self.gate.chosen), torch.stack([rows_G, probabilities_G])


def add_mlp(x_TE: Tensor, out: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """The residual sum of a layer and its MLP's output, with what `Experts` give back besides."""
    return x_TE + out if isinstance(out, Tensor) else (x_TE + out[0], out[1])


def routing_loss(routed_L2G: Tensor) -> Tensor:
    """The loss by which routers learn to spread rows evenly (Switch Transformer, arXiv 2101.03961, equations 4 to 6),
    from what `Experts` of L layers give back.

    As in transformers' `load_balancing_loss_func` rows of all layers are counted together: experts x sum over the
    experts of their rows times their probabilities, each over the number of all rows. Even is `chosen`, the least.
    """
    rows_G, probabilities_G = routed_L2G.sum(0)
    total = probabilities_G.detach().sum().clamp(min=1)  # the probabilities of a row have the sum 1
    return len(rows_G) * (rows_G @ probabilities_G) / total**2


def expert_loads(rows_LG: Tensor) -> Tensor:
    """Of the numbers of rows of experts in each layer: the largest and the smallest, in times of an even share, and how
    many are zero [3]."""
    loads_LG = rows_LG / rows_LG.mean(-1, keepdim=True).clamp(min=torch.finfo(rows_LG.dtype).tiny)
    return torch.stack([loads_LG.max(), loads_LG.min(), (rows_LG == 0).sum()])


class ExpertsAndShared(Experts):
    """Beside them one MLP that works for every row, times the sigmoid of a gate."""

    def __init__(self, width: int, shared: int, hidden: int, experts: int, chosen: int) -> None:
        """`shared` is the width inside that MLP; the others as of `Experts`."""
        super().__init__(width, hidden, experts, chosen, normalise=True)
        self.shared_expert = GatedMLP(width, shared, bias=False)
        self.shared_expert_gate = Linear(width, 1, bias=False)

    def forward(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Experts`, which alone are routed to."""
        out_TE, routed = super().forward(x_TE)
        return out_TE + self.shared_expert_gate(x_TE).sigmoid() * self.shared_expert(x_TE), routed


class _Spread(torch.autograd.Function):
    """Rows [T, E] to one copy for each of their experts [R, E]. With `_Collect` it does, forward and backward, without
    sums at changing places, whose order varies on a GPU."""

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, order_R: Tensor, place_R: Tensor, chosen: int) -> Tensor:
        """Copies, sorted by expert."""
        ctx.save_for_backward(place_R)
        ctx.chosen = chosen
        return x_TE[order_R // chosen]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Sum over the copies of a row."""
        (place_R,) = ctx.saved_tensors
        return grads[0][place_R].unflatten(0, (-1, ctx.chosen)).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    """The sum over the experts of a row: [R, E] to [T, E]."""

    @staticmethod
    def forward(ctx: Any, x_RE: Tensor, order_R: Tensor, place_R: Tensor, chosen: int) -> Tensor:
        """In the order of the rows."""
        ctx.save_for_backward(order_R)
        ctx.chosen = chosen
        return x_RE[place_R].unflatten(0, (-1, chosen)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One copy for each expert."""
        (order_R,) = ctx.saved_tensors
        return grads[0][order_R // ctx.chosen], None, None, None


class _SharedGate(torch.autograd.Function):
    """silu(gate) * up * share. The share stands before the second projection, which is linear, because there is less to
    save there. The backward pass computes silu(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, shares_R: Tensor) -> Tensor:
        """[R, 2 x hidden] to [R, hidden]."""
        ctx.save_for_backward(gate_up, shares_R)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up * shares_R[:, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up, and of the shares."""
        (grad,) = grads
        gate_up, shares_R = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        inner = grad * F.silu(gate)
        grad_shares = (inner * up).sum(-1, dtype=torch.float32).to(shares_R.dtype)
        share_R1 = shares_R[:, None]
        grad_gate = torch.ops.aten.silu_backward(grad * share_R1 * up, gate)
        return torch.cat([grad_gate, inner * share_R1], dim=-1), grad_shares


def grouped_linear(x_RI: Tensor, weight: Tensor, ends_G: Tensor, columns: int) -> Tensor:
    """Rows [R, I] times the matrix [I, O] of their group, in x's dtype. Group g ends before row `ends_G[g]`.

    The weight [G, I, O] has any floating type, or is packed and frozen; `columns` is its O.
    """
    return _GroupedLinear.apply(x_RI, weight if is_packed(weight) else weight.to(x_RI.dtype), ends_G, columns)


class _GroupedLinear(torch.autograd.Function):
    """Does and keeps nothing for the gradient of a frozen weight. Packed ones are unpacked again for the backward
    pass."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight: Tensor, ends_G: Tensor, columns: int) -> Tensor:
        """[R, I] to [R, O]."""
        ctx.save_for_backward(x_RI if ctx.needs_input_grad[1] else None, weight, ends_G)
        ctx.columns = columns
        return grouped_product(x_RI, _matrices(weight, columns, x_RI.dtype), ends_G)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weight."""
        grad = grads[0].contiguous()
        x_RI, weight, ends_G = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_product(grad, _matrices(weight, ctx.columns, grad.dtype).mT, ends_G)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_outer(x_RI, grad, ends_G)
        return grad_x, grad_weight, None, None


def _matrices(weight: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """A weight [G, I, O] in `dtype`. A packed one is unpacked a few experts at a time."""
    if not is_packed(weight):
        return weight
    at_once = max(1, UNPACKED_AT_ONCE // (weight.shape[1] * columns))
    return torch.cat([unpack(part, columns, dtype) for part in weight.split(at_once)])


@torch.library.custom_op("vft::grouped_product", mutates_args=())
def grouped_product(x_RI: Tensor, weight_GIO: Tensor, ends_G: Tensor) -> Tensor:
    """Rows [R, I] times the matrix of their group, [R, O].

    torch's own operator serves neither every dtype and width, nor float32 tensors without values. As an operator of its
    own the product is planned, counted and compiled alike everywhere.
    """
    is_served = _is_aligned(x_RI, weight_GIO) and _has_grouped(x_RI.device, x_RI.dtype)
    return (torch._grouped_mm if is_served else _products)(x_RI, weight_GIO, ends_G)


@grouped_product.register_fake
def _empty_product(x_RI: Tensor, weight_GIO: Tensor, ends_G: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_GIO.shape[2])


@torch.library.custom_op("vft::grouped_outer", mutates_args=())
def grouped_outer(x_RI: Tensor, y_RO: Tensor, ends_G: Tensor) -> Tensor:
    """Sum of the outer products of each group's rows [R, I] and [R, O], [G, I, O]; zero for a group without rows."""
    is_served = _is_aligned(x_RI, y_RO) and _has_grouped(x_RI.device, x_RI.dtype)
    return torch._grouped_mm(x_RI.T, y_RO, ends_G) if is_served else _outers(x_RI, y_RO, ends_G)


@grouped_outer.register_fake
def _empty_outer(x_RI: Tensor, y_RO: Tensor, ends_G: Tensor) -> Tensor:
    return x_RI.new_empty(len(ends_G), x_RI.shape[1], y_RO.shape[1])


PRODUCTS = (torch.ops.vft.grouped_product, torch.ops.vft.grouped_outer)
"""The operators of this module, for counts of products."""


def _products(x_RI: Tensor, weight_GIO: Tensor, ends_G: Tensor) -> Tensor:
    """As `grouped_product`, one product for each group that has rows."""
    out_RO = x_RI.new_empty(len(x_RI), weight_GIO.shape[2])
    start = 0
    for weight_IO, end in zip(weight_GIO, ends_G.tolist(), strict=True):
        if end > start:
            torch.mm(x_RI[start:end], weight_IO, out=out_RO[start:end])
        start = end
    return out_RO


def _outers(x_RI: Tensor, y_RO: Tensor, ends_G: Tensor) -> Tensor:
    """As `grouped_outer`, one product for each group that has rows."""
    out_GIO = x_RI.new_zeros(len(ends_G), x_RI.shape[1], y_RO.shape[1])
    start = 0
    for out_IO, end in zip(out_GIO, ends_G.tolist(), strict=True):
        if end > start:
            torch.mm(x_RI[start:end].T, y_RO[start:end], out=out_IO)
        start = end
    return out_GIO


def _is_aligned(*inputs: Tensor) -> bool:
    """Whether rows begin where torch's grouped product wants them, and there are any."""
    return all(len(x) > 0 and x.shape[-1] * x.element_size() % ALIGNED_BYTES == 0 for x in inputs)


@cache
def _has_grouped(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product runs there, and gives what single products give. If not, a warning says so for a
    GPU in half precision."""
    generator = torch.Generator().manual_seed(0)
    shapes = (40, 16), (3, 16, 32), (40, 32)
    x, weight, y = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    ends = torch.tensor([13, 13, 40], dtype=torch.int32, device=device)
    pairs = [(x, weight, _products(x, weight, ends)), (y, weight.mT, _products(y, weight.mT, ends))]
    trouble = None
    try:
        for left, right, expected in (*pairs, (x.T, y, _outers(x, y, ends))):
            # Tolerates rounding to 8 bits. NaN is no number below it.
            if not float((torch._grouped_mm(left, right, ends) - expected).abs().max()) <= 0.05 * expected.abs().max():
                trouble = "gives other results than single products"
    except Exception as error:  # NotImplementedError, or whatever a driver raises
        trouble = f"can't run ({first_line(error):.200})"
    if trouble is not None and device.type == "cuda" and dtype is torch.bfloat16:
        warnings.warn(f"torch._grouped_mm {trouble}: experts take the slower path", stacklevel=2)
    return trouble is None
