"""The kernels of a step: counted by hand, and beside what torch's compiler says that its own kernels move."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering

from vft.common.types import Segment
from vft.models.delta_rule import delta_rule, recurrence_of
from vft.models.layers import GatedMLP, RMSNorm
from vft.preparation.kernels import KernelCounter


class Layer(nn.Module):
    """Half a decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(512, 1e-6)
        self.mlp = GatedMLP(512, 1024, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def test_by_hand() -> None:
    """A product, two elementwise operators, a product: 2 of the 5 sizes that are read and written stay in registers."""
    x, first, gate, second = (torch.randn(shape) for shape in ((7, 8), (8, 16), (7, 16), (16, 4)))
    with KernelCounter() as counter:
        (F.silu(x @ first) * gate).view(7, 4, 4).flatten(1) @ second
    kernels = counter.kernels
    size = 4 * 7 * 16
    assert kernels.eager == (4, 5 * size) and kernels.fused == (3, 3 * size)
    assert kernels.products == {
        (2 * 7 * 8 * 16, 4 * (7 * 8 + 8 * 16) + size): 1,
        (2 * 7 * 16 * 4, 4 * (16 * 4 + 7 * 4) + size): 1,
    }
    assert kernels.product_flops == 2 * 7 * 16 * (8 + 4)


def test_what_is_read_twice_by_one_kernel_counts_once() -> None:
    x = torch.randn(100)
    with KernelCounter() as counter:
        (x * 2 + x).sort()  # stands alone: reads 400 bytes, writes 400 and their order, 800
    assert counter.kernels.fused == (2, 400 + 400 + (400 + 400 + 800))


def test_of_a_table_only_what_is_looked_up_is_read() -> None:
    table, index = torch.randn(1000, 8), torch.arange(3)
    with KernelCounter() as counter:
        F.embedding(index, table) * 2
    assert counter.kernels.eager == (2, (24 + 96 + 96) + (96 + 96))
    assert counter.kernels.fused == (1, 24 + 96)


def test_a_recurrence_is_not_fused() -> None:
    """It is an operator of its own to the compiler: its kernels are those of eager mode."""
    recurrence = recurrence_of([Segment(0, 100)], 4, torch.device("cpu"))
    q, k, v, (decay, strength) = *torch.randn(3, 100, 2, 8), torch.rand(2, 100, 2)
    with KernelCounter() as counter:
        delta_rule(q, k, v, -decay, strength, recurrence)
    kernels = counter.kernels
    # Of the two operators before it, the sign and the first state, one kernel is made.
    assert kernels.fused_launches == kernels.launches - 1 > 20 and kernels.fused_bytes == kernels.bytes


def test_fused_as_the_compiler_fuses(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    """Within a tenth of the bytes that Inductor counts for its kernels, forward and backward."""
    layer, x = Layer(), torch.randn(700, 512, requires_grad=True)
    with KernelCounter() as counter:
        layer(x).sum().backward()
    codegen, moved = GraphLowering.codegen, []

    def count(self: GraphLowering) -> object:
        made = codegen(self)
        moved.append(self.count_bytes()[0])
        return made

    monkeypatch.setattr(GraphLowering, "codegen", count)
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch.compile(layer)(x).sum().backward()
    products = sum(size * number for (_, size), number in counter.kernels.products.items())
    assert len(moved) == 2 and counter.kernels.fused_bytes == pytest.approx(sum(moved) - products, rel=0.1)
    assert counter.kernels.bytes > 2.5 * counter.kernels.fused_bytes
