"""The kernels of a step, counted before any GPU is at hand: products with their sizes, and the memory traffic of the
rest, one by one as in eager mode, and fused as `torch.compile` fuses them.

Both are counts of a step on tensors without values. What is made of them, seconds, rests on assumptions that
`vft.preparation.planning` names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vft.models import delta_rule, experts

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, *experts.PRODUCTS}
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten._unsafe_view, aten.alias}
"""Operators without a kernel, besides views."""
ALONE = (
    "attn",
    "attention",
    "index_put",
    "index_add",
    "embedding_dense",
    "scatter",
    "sort",
    "foreach",
    "fused",
    "c10d",
)
"""In the names of operators that no other is fused with. What is left are elementwise operators, sums and copies."""
LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""Operators that read only what they give of their inputs."""


@dataclass
class Kernels:
    """The kernels of forward and backward of a row."""

    products: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How many have so many FLOPs, and read and write so many bytes."""
    launches: int = 0
    """All kernels, in eager mode."""
    bytes: int = 0
    """That all but the products read and write, in eager mode."""
    fused_launches: int = 0
    fused_bytes: int = 0
    """If operators between two products become one kernel: each reads what it needs once, and writes what later ones
    need."""

    @property
    def eager(self) -> tuple[int, int]:
        """Launches, and bytes of all but the products, in eager mode."""
        return self.launches, self.bytes

    @property
    def fused(self) -> tuple[int, int]:
        """The same, compiled."""
        return self.fused_launches, self.fused_bytes

    @property
    def product_flops(self) -> float:
        """Of all products."""
        return float(sum(flops * count for (flops, _), count in self.products.items()))


class KernelCounter(TorchDispatchMode):
    """Counts the kernels of what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = Kernels()
        self.times = 1
        """How often what runs now counts."""
        self._region = 0
        """Operators that may become one kernel are in one region: none that stands alone comes between them."""
        self._made = WeakIdKeyDictionary()
        """Storages that fused operators made: the region, and whether it has been written to memory."""
        self._read: dict[int, torch.UntypedStorage] = {}
        """Storages that the kernel of this region has read, by `id`, which holds as long as they are kept."""
        self._in_recurrence = False
        self._rules = {name: getattr(delta_rule, name) for name in ("_forward", "_backward")}

    def __enter__(self) -> KernelCounter:
        """Start counting."""
        for name, rule in self._rules.items():
            setattr(delta_rule, name, partial(self._recur, rule))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        for name, rule in self._rules.items():
            setattr(delta_rule, name, rule)
        super().__exit__(*error)

    def _recur(self, rule: Callable[..., Any], steps: delta_rule.Steps, *given: Tensor) -> Any:
        """A recurrence is one operator to the compiler, which fuses nothing inside it. Each step that was left out by
        `Recurrence.flattened` would launch as many kernels as it takes more to compute the first one in two."""
        self._in_recurrence, before = True, self.kernels.launches
        result, kernels = rule(steps, *given), self.kernels
        left_out = [count for count, _ in steps].count(0)
        if left_out:
            self.kernels = Kernels()
            (count, is_second), *others = steps
            rule([(count - count // 2, is_second), (count // 2, is_second), *others], *given)
            more = left_out * (self.kernels.launches - (kernels.launches - before))
            self.kernels = kernels
            kernels.launches += more
            kernels.fused_launches += more
        self._in_recurrence = False
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count it."""
        result = func(*args, **(kwargs or {}))
        outs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if outs and not func.is_view and func.overloadpacket not in FREE:
            self._count(func, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)], outs)
        return result

    def _count(self, func: Any, inputs: list[Tensor], outs: list[Tensor]) -> None:
        made = sum(x.nbytes for x in outs)
        most = made if func.overloadpacket in LOOKUPS else None
        kernels, times, moved = self.kernels, self.times, made + sum(_bytes(x, most) for x in inputs)
        kernels.launches += times
        name = func.overloadpacket.__name__
        is_product = func.overloadpacket in PRODUCTS
        if is_product:
            *_, left, right = (x for x in inputs if x.dim() > 1)
            flops = 2 * left.shape[:-1].numel() * left.shape[-1] * right.shape[-1]
            kernels.products[flops, moved] += times
        else:
            kernels.bytes += times * moved
        if is_product or self._in_recurrence or any(part in name for part in ALONE):
            kernels.fused_launches += times
            for one in inputs:
                self._write(one)
            kernels.fused_bytes += 0 if is_product else times * moved
            self._region += 1
            self._read.clear()
        else:
            self._fuse(inputs, outs, most)

    def _fuse(self, inputs: list[Tensor], outs: list[Tensor], most: int | None) -> None:
        """An operator that becomes part of this region's kernel, and reads at most so many bytes of an input."""
        self.kernels.fused_launches += 0 if self._read else self.times
        for one in inputs:
            storage = one.untyped_storage()
            region, _ = self._made.get(storage, (-1, True))
            if region != self._region and id(storage) not in self._read:
                self._write(one)
                self.kernels.fused_bytes += self.times * _bytes(one, most)
                self._read[id(storage)] = storage
        for one in outs:
            self._made[one.untyped_storage()] = self._region, False

    def _write(self, tensor: Tensor) -> None:
        """What a fused kernel made is needed outside it."""
        storage = tensor.untyped_storage()
        region, is_written = self._made.get(storage, (-1, True))
        if not is_written:
            self._made[storage] = region, True
            self.kernels.fused_bytes += self.times * tensor.nbytes


def _bytes(tensor: Tensor, most: int | None) -> int:
    return tensor.nbytes if most is None else min(tensor.nbytes, most)
