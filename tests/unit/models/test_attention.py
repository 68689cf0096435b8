"""Planned attention beside dense attention with a mask written out row by row, in float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.kernels import register, use_varlen
from vft.common.types import AttentionPlan, Segment, move
from vft.models import attention
from vft.models.attention import attend, attended_pairs, build_plan, document_segments


@dataclass(frozen=True)
class Shape:
    """A document: tokens of its shared prefix and of its suffixes."""

    prefix: int
    suffixes: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.suffixes)


def plan_of(shapes: Sequence[Shape]) -> AttentionPlan:
    segments, start = [], 0
    for shape in shapes:
        segments += document_segments(start, shape.prefix, shape.suffixes)
        start += shape.tokens
    return build_plan(segments, causal=True)


def mask_of(shapes: Sequence[Shape]) -> Tensor:
    """Who sees whom, from what each token is: its document, its suffix (None: the prefix) and its place."""
    tokens: list[tuple[int, int | None]] = []
    for number, shape in enumerate(shapes):
        tokens += [(number, None)] * shape.prefix
        for suffix, length in enumerate(shape.suffixes):
            tokens += [(number, suffix)] * length
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (document, suffix) in enumerate(tokens):
        for k, (other, of) in enumerate(tokens):
            mask[q, k] = document == other and k <= q and of in (None, suffix)
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k / sqrt(K)) v, head by head; query head h reads key head h // (heads / key heads)."""
    each = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // each].T / q.shape[-1] ** 0.5
        out[:, head] = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, head // each]
    return out


def random_qkv(tokens: int, heads: int, key_heads: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, h, 8) for h in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def random_row(chance: random.Random) -> list[Shape]:
    shapes = []
    for _ in range(chance.randint(1, 6)):
        suffixes = tuple(chance.randint(1, 4) for _ in range(chance.randint(1, 4)))
        shapes.append(Shape(chance.randint(1 if len(suffixes) > 1 else 0, 5), suffixes))
    return shapes


ROWS = {
    "one": [Shape(0, (9,))],
    "one with a prefix": [Shape(5, (4,))],
    "several": [Shape(0, (6,)), Shape(3, (1,)), Shape(0, (6,)), Shape(0, (11,))],
    "suffixes": [Shape(7, (3, 5, 3))],
    "single tokens": [Shape(1, (1, 1, 1)), Shape(0, (1,))],
    "everything": [Shape(4, (5,)), Shape(8, (2, 6)), Shape(0, (9,)), Shape(8, (6, 2, 1, 1)), Shape(3, (6,))],
    **{f"random {seed}": random_row(random.Random(seed)) for seed in range(10)},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_against_a_dense_mask(name: str, key_heads: int) -> None:
    """Outputs and gradients in float64, grouped queries included."""
    shapes = ROWS[name]
    inputs = random_qkv(sum(shape.tokens for shape in shapes), 4, key_heads)
    weight = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, wanted = attend(*inputs, plan_of(shapes)), dense(*inputs, mask_of(shapes))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("lengths", [[8], [4, 4, 4], [4, 6, 4, 2, 6], [1, 1]])
def test_windows(lengths: list[int]) -> None:
    """Not causal: every row of a block sees the whole block and nothing else."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    plan = build_plan([Segment(end - n, n) for end, n in zip(ends, lengths, strict=True)], causal=False)
    block = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    inputs = random_qkv(sum(lengths), 2, 2)
    wanted = dense(*inputs, block[:, None] == block[None, :])
    torch.testing.assert_close(attend(*inputs, plan), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_plan_says_the_same_to_the_varlen_kernel(name: str) -> None:
    """Its arguments, read as the kernel reads them: cumulative lengths, gathered keys, causal from the lower right. The
    count behind FLOP figures is that of the ones in the mask."""
    plan, mask = plan_of(ROWS[name]), mask_of(ROWS[name])
    assert attended_pairs(plan.segments, causal=True) == int(mask.sum())
    assert plan.cu_seqlens_q_S.dtype == plan.cu_seqlens_k_S.dtype == torch.int32
    keys = torch.arange(len(mask)) if plan.k_index is None else plan.k_index
    q_ends, k_ends = plan.cu_seqlens_q_S.tolist(), plan.cu_seqlens_k_S.tolist()
    assert q_ends[-1] == len(mask) and k_ends[-1] == len(keys)
    found = torch.zeros_like(mask)
    for segment in range(len(q_ends) - 1):
        rows = range(q_ends[segment], q_ends[segment + 1])
        seen = keys[k_ends[segment] : k_ends[segment + 1]]
        assert len(rows) <= plan.max_q and len(seen) <= plan.max_k
        for place, row in enumerate(rows):
            found[row, seen[: len(seen) - len(rows) + place + 1]] = True
    assert torch.equal(found, mask)


def test_segments_must_cover_the_row() -> None:
    with pytest.raises(AssertionError, match="row 5"):
        build_plan([Segment(0, 4), Segment(5, 2)], causal=True)


def lacking(*inputs: Any, **options: Any) -> Tensor:
    raise RuntimeError("Flash attention is not in this build.\nC++ frames follow.")


def silent(*inputs: Any, **options: Any) -> Tensor:
    raise NotImplementedError


def other(*inputs: Any, **options: Any) -> Tensor:
    raise TypeError("varlen_attn() takes 7 arguments")  # a driver's or a newer torch's, which is no RuntimeError


def nan(*inputs: Any, **options: Any) -> Tensor:
    return varlen_attn(*inputs, **options) * torch.nan


def wrong_at_72(*inputs: Any, **options: Any) -> Tensor:
    return varlen_attn(*inputs, **options) * (2 if inputs[0].shape[-1] == 72 else 1)


def uncausal(*inputs: Any, **options: Any) -> Tensor:
    return varlen_attn(*inputs, **{**options, "window_size": (-1, -1)})


@pytest.mark.parametrize(
    ("kernel", "trouble"),
    [
        (varlen_attn, None),
        (lacking, r"can't run \(Flash attention is not in this build\.\): attention takes the slower path"),
        (uncausal, "gives other results than scaled_dot_product_attention"),
        (silent, r"can't run \(NotImplementedError\)"),
        (other, r"can't run \(varlen_attn\(\) takes 7 arguments\)"),
        (nan, "gives other results than scaled_dot_product_attention"),
        (wrong_at_72, r"\(width 72, 4 and 4 heads\) gives other results than scaled_dot_product_attention"),
    ],
)
def test_a_kernel_is_tried_before_it_is_used(kernel: Any, trouble: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is missing or wrong gives way to the other path, and the row comes out right."""
    register()
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    cpu, shapes = torch.device("cpu"), ROWS["everything"]
    inputs = [x.detach().bfloat16() for x in random_qkv(sum(shape.tokens for shape in shapes), 4, 2)]
    with attention.planning_for(torch.device("cuda")):
        assert attention.has_kernel(cpu, torch.bfloat16)
        with pytest.warns(match=trouble) if trouble else nullcontext():
            attention.check_kernel(cpu, torch.bfloat16)
        assert attention.has_kernel(cpu, torch.bfloat16) == (trouble is None)
        found = attend(*inputs, plan_of(shapes))
    wanted = dense(*(x.double() for x in inputs), mask_of(shapes))
    assert float((found.double() - wanted).abs().max()) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_varlen_kernel_on_cuda(name: str, key_heads: int) -> None:
    """In bfloat16, beside dense float64 attention of the same rounded inputs."""
    shapes, device = ROWS[name], torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    tokens = sum(shape.tokens for shape in shapes)
    rounded = [torch.randn((tokens, h, 64), generator=generator).bfloat16() for h in (4, key_heads, key_heads)]
    inputs = [x.to(device).requires_grad_() for x in rounded]
    exact = [x.double().requires_grad_() for x in rounded]
    found, wanted = attend(*inputs, move(plan_of(shapes), device)), dense(*exact, mask_of(shapes))
    assert float((found.double().cpu() - wanted).detach().abs().max()) < 0.02
    for one, other in zip(
        torch.autograd.grad(found.float().square().sum(), inputs),
        torch.autograd.grad(wanted.square().sum(), exact),
        strict=True,
    ):
        assert float((one.double().cpu() - other).abs().max()) < 0.05 * max(1.0, float(other.abs().max()))


def test_the_gradient_of_shared_keys_sorts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a shared prefix are gathered for each suffix. The gradient of indexing sorts the index; on a GPU that is
    slow (pytorch #137425)."""
    use_varlen(monkeypatch)
    names: set[str] = set()

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    shapes = ROWS["everything"]
    inputs = [x.requires_grad_() for x in random_qkv(sum(shape.tokens for shape in shapes), 4, 2)]
    with Noted():
        attend(*inputs, plan_of(shapes)).sum().backward()
    assert "index_add" in names and not any("index_put" in name for name in names)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_grouped_queries_with_a_mask_are_no_grouped_queries(
    key_heads: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention refuses a mask, and memory-efficient attention grouped queries: together, neither would run."""
    q, k, v = (torch.randn(3, heads, rows, 8) for heads, rows in ((4, 5), (key_heads, 7), (key_heads, 7)))
    mask = torch.rand(3, 1, 5, 7) > 0.4 if masked else None
    if mask is not None:
        mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    calls: list[dict[str, Any]] = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: calls.append(o) or plain(*a, **o))
    torch.testing.assert_close(attention.sdpa(q, k, v, mask), expected)
    assert len(calls) == 1 and not calls[0].get("enable_gqa")
