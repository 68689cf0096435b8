"""The LoRA layer (Hu et al. 2021, arXiv 2106.09685), with DoRA and PiSSA, and its initial values.

Adapter weights are float32 beside frozen weights of any dtype. They compute in the dtype of their input.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vft.common.console import progress_bar
from vft.config.run import LoraConfig
from vft.distributed.process_group import broadcast, full_tensor, local_part, local_rows, place, sharded_like
from vft.models.experts import ExpertWeights, grouped_linear
from vft.models.quantization import dense, is_packed, linear, unpack

LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_change"
"""Endings of the names of an adapter's trained parameters."""
START = (".lora_A0", ".lora_B0")
"""Endings of the names of PiSSA's initial A and B, which are stored beside the trained ones and stay fixed."""
OF_EXPERTS = ".adapters."
"""Stands in an adapter's name before the matrix of experts that it changes."""


class LoRALinear(nn.Linear):
    """y = x W^T + b + scale * dropout(x) A^T B^T. It replaces a linear layer and keeps its W and b.

    PiSSA (Meng et al. 2024, arXiv 2404.02948) initialises A and B to the principal part of W and subtracts that part
    from W. Here W does not change. The initial A0 and B0 are stored and their product is subtracted in the forward
    pass. The result is the same, before the first step it equals the base to the last bit, and the exported adapter
    fits the original base.

    DoRA (Liu et al. 2024, arXiv 2402.09353) also trains the length m of each row of W + scale * B A. The parameter is
    the change of m, zero at first: rounded to bfloat16 for a step, m itself would move every row by up to 0.2 %.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig, rank: int, alpha: float) -> None:
        """`rank` and `alpha` are the layer's own, in place of those of `config`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.scale = rank, alpha, lora_scale(rank, alpha, config.rslora)
        self.dropout, self.init = config.dropout, config.init
        kind: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, self.rank, bias=False, **kind)
        self.lora_B = nn.Linear(self.rank, base.out_features, bias=False, **kind)
        self.lora_A0 = self.lora_B0 = self.lora_magnitude_change = None
        if config.init != "kaiming":
            self.lora_A0, self.lora_B0 = (
                nn.Parameter(torch.empty(matrix.weight.shape, **kind), requires_grad=False)
                for matrix in (self.lora_A, self.lora_B)
            )
        if config.dora:
            self.lora_magnitude_change = nn.Parameter(torch.empty(base.out_features, **kind))
        self._gain: Tensor | None = None
        self.is_off = False
        """Whether the layer computes as if it had no adapter."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        (out,) = LoRALinear.together([self], x)
        return out

    @staticmethod
    def together(layers: Sequence[LoRALinear], x: Tensor) -> list[Tensor]:
        """Outputs of several layers with the same input [..., in], which is multiplied once with the As of all."""
        if any(layer.is_off for layer in layers):
            return [layer.base(x) for layer in layers]
        if not all(layer.is_plain for layer in layers):
            return [layer._alone(x) for layer in layers]
        # The scale goes to the smallest of the tensors.
        downs = [layer.lora_A.weight * layer.scale for layer in layers]
        down = (torch.cat(downs) if len(downs) > 1 else downs[0]).to(x.dtype)
        ups = [layer.lora_B.weight.to(x.dtype) for layer in layers]
        frozen = [part for layer in layers for part in (layer.weight, layer.bias)]
        return list(_Adapted.apply(x, down, len(layers), *ups, *frozen))

    @property
    def is_plain(self) -> bool:
        """Whether the adapter is nothing but its two products: no dropout, DoRA or PiSSA."""
        changes = self.lora_magnitude_change is not None or self.lora_A0 is not None
        return not changes and not (self.training and self.dropout > 0)

    def _alone(self, x: Tensor) -> Tensor:
        base, up = self.base(x), self.lora_B.weight.to(x.dtype)
        if self.lora_magnitude_change is not None:
            return self._with_magnitude(x, base, up)
        down = self.lora_A.weight.to(x.dtype)
        dropped = self.training and self.dropout > 0
        low = _DropoutLinear.apply(x, down, self.dropout) if dropped else F.linear(x, down)
        low = low * self.scale  # [..., rank]: the product with B is as wide as the layer's output
        if self.lora_A0 is not None and self.lora_B0 is not None:
            # Subtract from the update, not from the base: before the first step the difference is exactly zero.
            low0 = F.linear(x, self.lora_A0.to(x.dtype)) * self.scale
            return base + (F.linear(low, up) - F.linear(low0, self.lora_B0.to(x.dtype)))
        return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.T).view_as(base)

    def base(self, x: Tensor) -> Tensor:
        """Output of the layer without its adapter."""
        return linear(x, self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        """W [out, in], unpacked if it is NF4. It is a sharded tensor unless it is gathered for a forward pass."""
        if not is_packed(self.weight):
            return self.weight
        packed = self.weight.detach()
        return sharded_like(packed, unpack(local_part(packed), self.in_features, torch.float32))

    def row_lengths(self) -> Tensor:
        """2-norm of each row of W [out] in float32, sharded if W is. This is DoRA's magnitude before training."""
        return _row_lengths(self.dense_weight().detach())

    def _with_magnitude(self, x: Tensor, base: Tensor, up: Tensor) -> Tensor:
        """b + gain * (W + scale B A) x. As in PEFT, only `base` sees the input without dropout. Everything that the
        adapter adds to it, including the changed length of W's rows, is computed from the dropped input."""
        product = base
        if self.training and self.dropout > 0:
            x = F.dropout(x, self.dropout)
            product = self.base(x)
        if self.bias is not None:
            product = product - self.bias.to(x.dtype)
        update = F.linear(F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scale, up)
        # Round the small difference from 1 instead of the gain.
        return base + update + (self.gain(x.dtype) - 1).to(x.dtype) * (product + update)

    def gain(self, dtype: torch.dtype) -> Tensor:
        """m / |W + scale B A| of each row [out] in float32, with products computed in `dtype`.

        The length is a constant in the backward pass (section 4.3 of the paper). Weights do not change between
        `eval()` and `train()`, so the gain is cached: otherwise every token of an answer would compute it again.
        """
        assert self.lora_magnitude_change is not None
        if self._gain is not None:
            return self._gain
        with torch.no_grad():
            # |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b for each row w of W and b of B. This needs no
            # matrix of W's size, and gives exactly |w|^2 when B is zero.
            weight = self.dense_weight()
            lengths = _row_lengths(weight)
            a, b = self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype).float()
            across, among = F.linear(weight.to(dtype), a).float(), a.float() @ a.float().T
            squares = lengths.square() + self.scale * (b * (2 * across + self.scale * (b @ among))).sum(dim=1)
        gain = (lengths + self.lora_magnitude_change.float()) / squares.sqrt()
        if not self.training and not torch.is_grad_enabled():
            self._gain = gain
        return gain

    def train(self, mode: bool = True) -> LoRALinear:
        """As for any module. Also drops the cached gain, which holds for the weights at that time."""
        self._gain = None
        return super().train(mode)


def _row_lengths(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


class LoRAExperts(nn.Module):
    """scale * x A^T B^T with a pair of matrices for each expert, which is added to one of the experts' products.

    They lie in two matrices as in PEFT's `peft.tuners.lora.layer.ParamWrapper`: A [experts * rank, in] has the rows of
    an expert together, B [out, rank * experts] the columns of a rank.
    """

    lora_A0 = lora_B0 = lora_magnitude_change = None
    init = "kaiming"

    def __init__(self, experts: ExpertWeights, matrix: str, config: LoraConfig, rank: int, alpha: float) -> None:
        """`rank` and `alpha` are the adapter's own, in place of those of `config`."""
        super().__init__()
        self.experts, self.in_features, self.out_features = experts.matrices[matrix]
        self.rank, self.alpha, self.scale = rank, alpha, lora_scale(rank, alpha, config.rslora)
        kind: dict[str, Any] = {"device": experts.get_parameter(matrix).device, "dtype": torch.float32}
        self.lora_A = nn.Linear(self.in_features, self.experts * rank, bias=False, **kind)
        self.lora_B = nn.Linear(rank * self.experts, self.out_features, bias=False, **kind)
        self.is_off = False
        """Whether the experts compute as if they had no adapter."""

    def forward(self, x_RI: Tensor, ends_G: Tensor) -> Tensor:
        """Rows [R, in], sorted by expert, to [R, out]. Group g ends before row `ends_G[g]`."""
        a, b = self.pairs()
        if extra := -self.rank % 8:  # torch's grouped product wants rows of a multiple of 16 bytes
            a, b = F.pad(a, (0, 0, 0, extra)), F.pad(b, (0, extra))
        low = grouped_linear(x_RI, (a * self.scale).to(x_RI.dtype).mT, ends_G, self.rank + extra)
        return grouped_linear(low, b.to(x_RI.dtype).mT.contiguous(), ends_G, self.out_features)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """A [experts, rank, in] and B [experts, out, rank]."""
        return expert_pairs(self.lora_A.weight, self.lora_B.weight, self.rank)


def expert_pairs(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [experts * rank, in] and B [out, rank * experts] to [experts, rank, in] and [experts, out, rank]."""
    return a.unflatten(0, (-1, rank)), b.unflatten(1, (rank, -1)).permute(2, 0, 1)


class _Adapted(torch.autograd.Function):
    """Linear layers with adapters and one input: x W^T + b + (x A^T) B^T of each, with the rows of all A in one matrix.

    Autograd would multiply the input with each A, and add up the gradients of the input in as many passes over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, count: int, *matrices: Any) -> tuple[Tensor, ...]:
        """[..., in] to [..., out] of each. `matrices`: B of each, then W and b of each, which are frozen."""
        ups, weights, biases = matrices[:count], matrices[count::2], matrices[count + 1 :: 2]
        low = F.linear(x, down)
        ctx.save_for_backward(x, down, low, *ups, *weights)
        lows = low.split([up.shape[1] for up in ups], dim=-1)
        outs = []
        for part, up, weight, bias in zip(lows, ups, weights, biases, strict=True):
            base = linear(x, weight, bias)
            outs.append(torch.addmm(base.flatten(0, -2), part.flatten(0, -2), up.T).view_as(base))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, of A and of each B."""
        x, down, low, *matrices = ctx.saved_tensors
        count = len(grads)
        ups, weights = matrices[:count], matrices[count:]
        flat = [grad.flatten(0, -2) for grad in grads]
        lows = [grad @ up for grad, up in zip(flat, ups, strict=True)]
        grad_low = torch.cat(lows, dim=-1) if count > 1 else lows[0]
        parts = low.flatten(0, -2).split([up.shape[1] for up in ups], dim=-1)
        grad_ups = [grad.T @ part for grad, part in zip(flat, parts, strict=True)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ down
            for grad, weight in zip(flat, weights, strict=True):
                grad_x = grad_x.addmm_(grad, dense(weight, x.shape[-1], grad.dtype))
            grad_x = grad_x.view_as(x)
        grad_down = grad_low.T @ x.flatten(0, -2)
        return grad_x, grad_down, None, *grad_ups, *[None] * (2 * count)


class _DropoutLinear(torch.autograd.Function):
    """dropout(x) W^T. It saves x, which neighbouring layers save too, and a mask of bytes; autograd would also save
    the dropped input of each adapter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dropout: float) -> Tensor:
        """[..., in] to [..., out]."""
        dropped, mask = torch.native_dropout(x, dropout, True)
        ctx.save_for_backward(x, mask, weight)
        ctx.dropout = dropout
        return F.linear(dropped, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """Gradients of input and weight."""
        (grad,) = grads
        x, mask, weight = ctx.saved_tensors
        factor = (mask * (1 / (1 - ctx.dropout))).to(x.dtype)
        grad_x = grad @ weight * factor if ctx.needs_input_grad[0] else None
        return grad_x, grad.flatten(0, -2).T @ (x * factor).flatten(0, -2), None


def lora_scale(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / rank; with rsLoRA (arXiv 2312.03732) alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def adapted_layers(model: nn.Module) -> list[tuple[str, LoRALinear | LoRAExperts]]:
    """Linear layers with an adapter, and adapters of experts, with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear | LoRAExperts)]


def target_of(name: str) -> str:
    """The linear layer, or the parameter of experts, that the adapter of this name (of `adapted_layers`) changes."""
    return name.replace(OF_EXPERTS, ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, so that the base's files do not have it."""
    return name.endswith((LORA_A, LORA_B, MAGNITUDE, *START))


def is_start(name: str) -> bool:
    """Whether a parameter is PiSSA's initial A or B: part of an adapter, but not trained."""
    return name.endswith(START)


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy this process's rows of `values` (the full tensor) into a parameter, which may be sharded."""
    with torch.no_grad():
        local_part(parameter).copy_(values[local_rows(parameter)])


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """W + scale * B A, computed in float32, in W's dtype. DoRA's `magnitude` sets the lengths of its rows."""
    changed = weight.float() + scale * (b.float() @ a.float())
    if magnitude is not None:
        changed *= (magnitude.float() / torch.linalg.vector_norm(changed, dim=1))[:, None]
    return changed.to(weight.dtype)


def merged_experts(weight: Tensor, a: Tensor, b: Tensor, scale: float, is_turned: bool) -> Tensor:
    """`merged` for the matrices [experts, in, out] of experts, or if they `is_turned`, [experts, out, in]."""
    pairs = zip(*expert_pairs(a, b, len(a) // len(weight)), strict=True)
    changed = [merged(one, *pair, scale) for one, pair in zip(weight if is_turned else weight.mT, pairs, strict=True)]
    return torch.stack([one if is_turned else one.T for one in changed])


def merged_expert(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, expert: int, experts: int, place: int, parts: int
) -> Tensor:
    """`merged` for the rows [out / parts, in] of one expert's matrix, the ones at this place."""
    a_GRI, b_GOR = expert_pairs(a, b, len(a) // experts)
    return merged(weight, a_GRI[expert], b_GOR[expert].chunk(parts)[place], scale)


def initialise(model: nn.Module, seed: int) -> None:
    """Initialise all adapters of `model` so that it computes what its base does.

    With "kaiming", A is uniform in +-1/sqrt(in), and B and DoRA's changes of magnitude are zero. PiSSA's A and B are
    computed from the base's weights, which must be loaded. Each layer has its own generator, seeded by its name, so
    sharding and the order of layers change nothing.
    """
    layers = adapted_layers(model)
    for name, layer in layers:
        if layer.init == "kaiming":
            bound = 1 / math.sqrt(layer.in_features)
            generator = torch.Generator().manual_seed(_layer_seed(seed, name))
            fill(
                layer.lora_A.weight, torch.empty(layer.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
            )
            fill(layer.lora_B.weight, torch.zeros(layer.lora_B.weight.shape))
            if layer.lora_magnitude_change is not None:
                fill(layer.lora_magnitude_change, torch.zeros(layer.out_features))
    linears = [(name, layer) for name, layer in layers if isinstance(layer, LoRALinear)]
    _initialise_pissa([(name, layer) for name, layer in linears if layer.init != "kaiming"], seed)


def _initialise_pissa(layers: Sequence[tuple[str, LoRALinear]], seed: int) -> None:
    """In each round every process decomposes one matrix and broadcasts the result."""
    rank, processes = place()
    with progress_bar(len(layers), "decomposing weights", "matrix", rank == 0 and bool(layers)) as bar:
        for first in range(0, len(layers), processes):
            batch = layers[first : first + processes]
            mine: tuple[Tensor, ...] = ()
            for source, (name, layer) in enumerate(batch):
                weight = full_tensor(layer.dense_weight().detach())  # all processes gather it, one uses it
                if source == rank:
                    mine = principal_part(weight, layer.rank, layer.scale, layer.init, _layer_seed(seed, name))
                del weight
            for source, (_, layer) in enumerate(batch):
                assert layer.lora_A0 is not None and layer.lora_B0 is not None
                pairs = (layer.lora_A.weight, layer.lora_A0), (layer.lora_B.weight, layer.lora_B0)
                for number, (trained, start) in enumerate(pairs):
                    empty = torch.empty(trained.shape, device=local_part(trained).device)
                    values = broadcast(mine[number] if source == rank else empty, source)
                    fill(trained, values)
                    fill(start, values)
                bar.update()


def principal_part(weight: Tensor, rank: int, scale: float, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] such that scale * B A is the best approximation of W [out, in] of this rank, with
    the singular values shared evenly (arXiv 2404.02948, section 3).

    `init` is "pissa", or "pissa_niter_N" for a randomised decomposition with N power iterations.
    """
    weight = weight.float()
    if init == "pissa":
        u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            u, values, v = torch.svd_lowrank(weight, q=rank, niter=int(init.removeprefix("pissa_niter_")))
            vh = v.T
    roots = (values[:rank] / scale).sqrt()
    return (roots[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * roots).contiguous()


def _layer_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """In it the model computes as its base."""
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear | LoRAExperts)]
    for adapter in adapters:
        adapter.is_off = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_off = False
