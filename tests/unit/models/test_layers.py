"""Layers that keep less for the backward pass than autograd would, beside the same mathematics left to autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vft.adapters.lora import LoRALinear
from vft.config.run import LoraConfig
from vft.models.layers import GatedMLP, RMSNorm


def plain_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    x32 = x.float()
    return norm.weight.to(x.dtype) * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def plain_mlp(mlp: GatedMLP, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def plain_lora(layer: LoRALinear, x: Tensor) -> Tensor:
    down, up = layer.lora_A.weight.to(x.dtype), layer.lora_B.weight.to(x.dtype)
    base = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
    dropped, _ = torch.native_dropout(x, layer.dropout, True)
    low = F.linear(dropped, down) * layer.scale
    return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.T).view_as(base)  # rounds the sum once


def make(kind: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    torch.manual_seed(0)
    if kind == "norm":
        norm = RMSNorm(48, 1e-6)
        nn.init.normal_(norm.weight, 1.0, 0.3)
        return norm, plain_norm
    if kind == "mlp":
        return GatedMLP(48, 96, bias=True), plain_mlp
    layer = LoRALinear(nn.Linear(48, 32), LoraConfig(dropout=0.25), 4, 8)
    nn.init.normal_(layer.lora_B.weight)
    layer.weight.requires_grad_(False)
    return layer, plain_lora


@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["norm", "mlp", "lora"])
def test_same_results_and_gradients(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The forward pass bit for bit, gradients to rounding; of the input and of every parameter that is trained."""
    module, plain = make(kind)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=generator)
    results = []
    for run in (lambda x: module(x), lambda x: plain(module, x)):
        x = values.to(dtype).requires_grad_(True)
        module.zero_grad()
        torch.manual_seed(5)  # of dropout
        out = run(x)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype))
        assert x.grad is not None
        grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        results.append((out.detach(), {"x": x.grad, **grads}))
    (out, grads), (wanted, wanted_grads) = results
    assert torch.equal(out, wanted) and grads.keys() == wanted_grads.keys()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, grad in wanted_grads.items():
        assert float((grads[name] - grad).norm()) <= tolerance * float(grad.norm()), name


@pytest.mark.parametrize(
    ("kind", "most"),
    # Of the input's bytes: itself and a scale; two hidden rows of twice its width; itself and, for
    # each of three adapters, a mask of single bytes.
    [("norm", 1.1), ("mlp", 2 * 2.1), ("lora", 1.0 + 3 * 0.51)],
)
def test_what_is_kept(kind: str, most: float) -> None:
    module, plain = make(kind)
    module.requires_grad_(False)
    if isinstance(module, LoRALinear):
        module.lora_A.requires_grad_(True)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def kept(run: Callable[[Tensor], object]) -> float:
        sizes: dict[int, int] = {}
        alive = []

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            alive.append(storage)
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(4096, 48, dtype=torch.bfloat16).requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(x)
        return sum(sizes.values()) / (x.numel() * x.element_size())

    times = 3 if kind == "lora" else 1  # the same input, as of q, k and v
    ours, theirs = (
        kept(lambda x: [module(x) for _ in range(times)]),
        kept(lambda x: [plain(module, x) for _ in range(times)]),
    )
    assert ours <= most < theirs


def test_dropout_is_off_where_nothing_is_trained() -> None:
    module, _ = make("lora")
    x = torch.randn(6, 48)
    module.eval()
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
