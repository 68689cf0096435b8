"""LoRA (Hu et al. 2021, arXiv 2106.09685), DoRA and PiSSA on a frozen base, and the choice of what is trained at all.

Adapters are float32 beside frozen weights of any dtype and compute in the dtype of their input.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.config.run import LoraConfig
from vft.distributed.process_group import broadcast, full_tensor, local_part, local_rows, place, sharded_like
from vft.models.base import VideoLanguageModel
from vft.models.quantization import is_packed, linear, unpack

LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_change"
"""How the names of an adapter's trained parameters end."""
START = (".lora_A0", ".lora_B0")
"""The same for where PiSSA's A and B began: kept beside them, never trained."""

T = TypeVar("T")


class LoRALinear(nn.Linear):
    """y = x W^T + b + scale * dropout(x) A^T B^T, with W and b those of the layer it takes the place of.

    PiSSA (Meng et al. 2024, arXiv 2404.02948) starts A and B at the principal part of W and trains them beside what is
    left of W. Here W stays as it is: the start, A0 and B0, is kept and its product subtracted, which gives the same
    sums, to the last bit those of the base before the first step, and an adapter that fits the base as it was.

    DoRA (Liu et al. 2024, arXiv 2402.09353) also trains the length m of each row of W + scale * B A. What is kept is
    the change of m, zero at first: rounded to bfloat16 for a step, m itself would move every row by up to 0.2 %.
    """

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, dropout: float, dora: bool = False, init: str = "kaiming"
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout, self.init = scale, dropout, init
        kind: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **kind)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **kind)
        start = [(rank, base.in_features), (base.out_features, rank)] if init != "kaiming" else [None, None]
        self.lora_A0, self.lora_B0 = (
            None if shape is None else nn.Parameter(torch.empty(shape, **kind), requires_grad=False) for shape in start
        )
        self.lora_magnitude_change = nn.Parameter(torch.empty(base.out_features, **kind)) if dora else None
        self._gain: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        base, up = self.base(x), self.lora_B.weight.to(x.dtype)
        if self.lora_magnitude_change is not None:
            return self._with_magnitude(x, base, up)
        down = self.lora_A.weight.to(x.dtype)
        dropped = self.training and self.dropout > 0
        low = _DropoutLinear.apply(x, down, self.dropout) if dropped else F.linear(x, down)
        update = F.linear(low, up)
        if self.lora_A0 is not None and self.lora_B0 is not None:
            # Subtracted here, not from the base: at the start nothing is left but zeros.
            update = update - F.linear(F.linear(x, self.lora_A0.to(x.dtype)), self.lora_B0.to(x.dtype))
        return base + update * self.scale

    def base(self, x: Tensor) -> Tensor:
        """What the layer would give without its adapter."""
        return linear(x, self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        """W [out, in], read back where it is packed; a sharded tensor unless it is gathered for a forward pass."""
        if not is_packed(self.weight):
            return self.weight
        packed = self.weight.detach()
        return sharded_like(packed, unpack(local_part(packed), self.in_features, torch.float32))

    def row_lengths(self) -> Tensor:
        """2-norm of each row of W [out] in float32, sharded where W is: DoRA's magnitude before training."""
        return _row_lengths(self.dense_weight().detach())

    def _with_magnitude(self, x: Tensor, base: Tensor, up: Tensor) -> Tensor:
        """b + gain * (W + scale B A) x. With dropout `base` alone sees the whole input, as in PEFT: what the adapter
        adds to it, the change of length of the base's part among it, is computed from the dropped one."""
        product = base
        if self.training and self.dropout > 0:
            x = F.dropout(x, self.dropout)
            product = self.base(x)
        if self.bias is not None:
            product = product - self.bias.to(x.dtype)
        update = F.linear(F.linear(x, self.lora_A.weight.to(x.dtype)), up) * self.scale
        # The small difference from 1 is what is rounded, not the gain.
        return base + update + (self.gain(x.dtype) - 1).to(x.dtype) * (product + update)

    def gain(self, dtype: torch.dtype) -> Tensor:
        """m / |W + scale B A| of each row [out] in float32, its products computed in `dtype`.

        The length is a constant to the backward pass (section 4.3 of the paper). Between `eval()` and `train()`
        weights don't change: an answer's every token would compute it again.
        """
        assert self.lora_magnitude_change is not None
        if self._gain is not None:
            return self._gain
        with torch.no_grad():
            # |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b for each row w of W, b of B: nothing of W's size is
            # made, and with B at zero it is |w|^2 exactly.
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
        """As any module's; what was kept of the weights as they were is forgotten."""
        self._gain = None
        return super().train(mode)


def _row_lengths(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


class _DropoutLinear(torch.autograd.Function):
    """dropout(x) W^T. It keeps x, which the layer's neighbours keep too, and a mask of bytes; autograd would keep the
    dropped input of each adapter besides."""

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
        kept = mask * (1 / (1 - ctx.dropout))
        grad_x = grad @ weight * kept.to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad.flatten(0, -2).T @ (x * kept.to(x.dtype)).flatten(0, -2)
        return grad_x, grad_weight, None


def lora_scale(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / rank; with rsLoRA (arXiv 2312.03732) alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class TrainableRow:
    """One line of the table of what is trained."""

    what: str
    modules: int
    parameters: int
    example: str


def component_of(name: str, components: Mapping[str, tuple[str, ...]]) -> str:
    """The part of the model that a parameter or module belongs to; the first prefix that fits counts."""
    for component, prefixes in components.items():
        if f"{name}.".startswith(prefixes):  # the dot: "lm_head" is a module of the prefix "lm_head."
            return component
    raise AssertionError(f"{name} belongs to no component of {list(components)}")


def match_targets(
    model: VideoLanguageModel, patterns: Sequence[str], setting: str = "lora.targets"
) -> dict[str, list[str]]:
    """Linear layers that each pattern names, all of them in the component before the first dot.

    What follows the dot is a glob against the layer's last name or its path within the model. The output head is
    taken only where it is named. UserError, about `setting`, for a pattern that matches nothing.
    """
    components = model.components
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched: dict[str, list[str]] = {}
    for pattern in patterns:
        component, _, glob = pattern.partition(".")
        if component not in components or not glob:
            raise UserError(
                f"{setting} = {pattern!r}: must be COMPONENT.PATTERN with a component of {', '.join(components)}, "
                'such as "language_model.*" or "language_model.q_proj"'
            )
        matched[pattern] = [
            name
            for name in linears
            if component_of(name, components) == component
            and (fnmatchcase(name.rsplit(".", 1)[-1], glob) or fnmatchcase(name, glob))
            and (name.rsplit(".", 1)[-1] != "lm_head" or glob == "lm_head")
        ]
        if not matched[pattern]:
            leaves = sorted(
                {name.rsplit(".", 1)[-1] for name in linears if component_of(name, components) == component}
            )
            raise UserError(f"{setting} = {pattern!r}: matches no linear layer; {component} has {', '.join(leaves)}")
    return matched


def by_pattern(
    model: VideoLanguageModel, modules: Sequence[str], values: Mapping[str, T], setting: str
) -> dict[str, T]:
    """What `values` has for some of the adapted `modules`; of several patterns the first that fits counts, as in PEFT.

    UserError for a pattern that decides nothing.
    """
    chosen: dict[str, T] = {}
    for pattern, names in match_targets(model, list(values), setting).items():
        adapted = [name for name in names if name in modules]
        new = [name for name in adapted if name not in chosen]
        if not new:
            reason = (
                "patterns before it match all of its layers; put it before them"
                if adapted
                else "none of its layers is among lora.targets; add them there, or take it out"
            )
            raise UserError(f"{setting} = {pattern!r}: {reason}")
        chosen |= dict.fromkeys(new, values[pattern])
    return chosen


def add_adapters(model: nn.Module, layers: Mapping[str, tuple[int, float]], config: LoraConfig) -> None:
    """Put a LoRALinear in the place of each named layer, with its own rank and alpha and all else by `config`."""
    for name, (rank, alpha) in layers.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear), f"{name} is {type(base).__name__}"
        if config.init != "kaiming" and rank > min(base.in_features, base.out_features):
            raise UserError(
                f'lora.rank = {rank} with lora.init = "{config.init}": {name} is {base.out_features} x '
                f"{base.in_features} and has no more singular vectors than the smaller of the two; lower the rank"
            )
        scale = lora_scale(rank, alpha, config.rslora)
        model.set_submodule(name, LoRALinear(base, rank, scale, config.dropout, config.dora, config.init))


def choose_trainable(model: VideoLanguageModel, lora: LoraConfig | None, train: Sequence[str]) -> list[TrainableRow]:
    """Freeze everything, then thaw adapters, or without `lora` the named components. Trainable ones are float32.

    Returns the table to print. Call it on the meta device, before weights are read.
    """
    rows = []
    components = model.components
    if lora is not None:
        matched = match_targets(model, lora.targets)
        modules = list(dict.fromkeys(name for names in matched.values() for name in names))
        ranks = by_pattern(model, modules, lora.ranks, "lora.ranks")
        alphas = by_pattern(model, modules, lora.alphas, "lora.alphas")
        layers = {name: (ranks.get(name, lora.rank), alphas.get(name, lora.alpha)) for name in modules}
        add_adapters(model, layers, lora)
        for pattern, names in matched.items():
            prefixes = tuple(f"{name}.lora_" for name in names)
            count = sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes) and not is_start(n))
            rows.append(TrainableRow(f"{kind_of(lora)} {pattern}", len(names), count, names[0]))
    for name, parameter in model.named_parameters():
        thawed = (
            is_adapter(name) and not is_start(name) if lora is not None else component_of(name, components) in train
        )
        parameter.requires_grad_(thawed)
        if thawed:
            parameter.data = parameter.data.float()
    if lora is None:
        for component in train:
            names = [
                n for n, p in model.named_parameters() if p.requires_grad and component_of(n, components) == component
            ]
            count = sum(model.get_parameter(n).numel() for n in names)
            rows.append(TrainableRow(f"full {component}", len(names), count, names[0]))
    return rows


def kind_of(lora: LoraConfig) -> str:
    """What an adapter is called."""
    return "DoRA" if lora.dora else "LoRA" if lora.init == "kaiming" else "PiSSA"


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's: not in the base's files."""
    return name.endswith((LORA_A, LORA_B, MAGNITUDE, *START))


def is_start(name: str) -> bool:
    """Whether it is where PiSSA began: an adapter's, but not trained."""
    return name.endswith(START)


def initialise(model: nn.Module, seed: int) -> None:
    """A uniform in +-1/sqrt(in) (PEFT's Kaiming initialisation), B and changes of magnitude zero: the model starts as
    its base. PiSSA's A and B come from the base's weights, which must have been read.

    Each layer draws from its own generator, so that sharding and the order of layers change nothing.
    """
    decomposed = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoRALinear):
            continue
        if module.init != "kaiming":
            decomposed[name] = module
            continue
        generator = torch.Generator().manual_seed(_seed_of(seed, name))
        bound = 1 / math.sqrt(module.in_features)
        values = torch.empty(module.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
        fill(module.lora_A.weight, values)
        fill(module.lora_B.weight, torch.zeros(module.lora_B.weight.shape))
        if module.lora_magnitude_change is not None:
            fill(module.lora_magnitude_change, torch.zeros(module.out_features))
    if decomposed:
        _start_at_principal_part(decomposed, seed)


def _start_at_principal_part(layers: Mapping[str, LoRALinear], seed: int) -> None:
    """PiSSA's start, in which each process decomposes a matrix of its own at a time and tells the others."""
    rank, processes = place()
    waiting = list(layers.items())
    with progress_bar(len(waiting), "decomposing weights", "matrix", rank == 0) as bar:
        for first in range(0, len(waiting), processes):
            turn = waiting[first : first + processes]
            mine: tuple[Tensor, ...] = ()
            for source, (name, layer) in enumerate(turn):
                weight = full_tensor(
                    layer.dense_weight().detach()
                )  # gathered by all, kept by the one that decomposes it
                if source == rank:
                    mine = principal_part(
                        weight, layer.lora_A.out_features, layer.scale, layer.init, _seed_of(seed, name)
                    )
                del weight
            for source, (_, layer) in enumerate(turn):
                assert layer.lora_A0 is not None and layer.lora_B0 is not None
                own = (layer.lora_A.weight, layer.lora_A0), (layer.lora_B.weight, layer.lora_B0)
                for number, (trained, start) in enumerate(own):
                    empty = torch.empty(trained.shape, device=local_part(trained).device)
                    values = broadcast(mine[number] if source == rank else empty, source)
                    fill(trained, values)
                    fill(start, values)
                bar.update()


def principal_part(weight: Tensor, rank: int, scale: float, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with scale * B A the best approximation of W [out, in], singular values shared
    evenly (arXiv 2404.02948, section 3).

    `init` is "pissa", or "pissa_niter_N" for a randomised decomposition of N power iterations.
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


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy this process's rows of `values` (the whole tensor) into a parameter, sharded or not."""
    with torch.no_grad():
        local_part(parameter).copy_(values[local_rows(parameter)])


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """W + scale * B A, its rows as long as `magnitude` says where there is one (DoRA), in float32, then W's dtype."""
    changed = weight.float() + scale * (b.float() @ a.float())
    if magnitude is not None:
        changed *= (magnitude.float() / torch.linalg.vector_norm(changed, dim=1))[:, None]
    return changed.to(weight.dtype)
