"""The operator behind `torch.nn.attention.varlen` on the CPU, where torch has none: plain mathematics, slow and exact.

With it the path that CUDA takes runs here: its indices, lengths, causal alignment, gradients, and what
`torch.compile` makes of it.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from vft.models import attention


def use_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of CUDA's kernel for the rest of the test."""
    register()
    monkeypatch.setattr(attention, "has_kernel", lambda device, dtype: True)


@cache
def register(kind: str = "exact") -> None:
    """Give the operator a CPU kernel: `exact`, `missing` (it raises, as where a build lacks it), or `nan`."""

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        if kind == "missing":
            raise NotImplementedError("no varlen attention in this build")
        out, *rest = _forward(*args, **kwargs)
        return out.fill_(torch.nan) if kind == "nan" else out, *rest

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert is_causal == (list(window_size or (-1, -1)) == [-1, 0]) and scale is None
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert int(cu_seq_q[-1]) == len(query) and int(cu_seq_k[-1]) == len(key) == len(value)
    out = torch.empty_like(query)
    for q_rows, k_rows in _sequences(cu_seq_q, cu_seq_k):
        assert q_rows.stop - q_rows.start <= max_q and k_rows.stop - k_rows.start <= max_k
        *_, v, share = _shares(query[q_rows], key[k_rows], value[k_rows], is_causal)
        out[q_rows] = (share @ v).transpose(0, 1).to(query.dtype)
    lse = query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> Any:
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (query, key, value)]
    repeats = query.shape[1] // key.shape[1]
    for q_rows, k_rows in _sequences(cu_seq_q, cu_seq_k):
        q, k, v, share = _shares(query[q_rows], key[k_rows], value[k_rows], is_causal)
        d_out = grad_out[q_rows].transpose(0, 1).double()
        d_share = d_out @ v.transpose(1, 2)
        d_scores = share * (d_share - (share * d_share).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        grads[0][q_rows] += (d_scores @ k).transpose(0, 1)
        for grad, per_head in ((grads[1], d_scores.transpose(1, 2) @ q), (grads[2], share.transpose(1, 2) @ d_out)):
            grad[k_rows] += per_head.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
    return tuple(grad.to(query.dtype) for grad in grads)


def _sequences(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    """Rows of queries and of keys of each sequence."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    rows = [[slice(a, b) for a, b in pairwise(ends.tolist())] for ends in (cu_q, cu_k)]
    return list(zip(*rows, strict=True))


def _shares(q_TQK: Tensor, k_THK: Tensor, v_THK: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """Queries, keys, values with heads first, and the share of attention that each query gives each key; float64."""
    repeats = q_TQK.shape[1] // k_THK.shape[1]
    q = q_TQK.transpose(0, 1).double()
    k, v = (x.repeat_interleave(repeats, 1).transpose(0, 1).double() for x in (k_THK, v_THK))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if causal:  # aligned lower right
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = scores.masked_fill(~seen, float("-inf"))
    return q, k, v, scores.softmax(-1)
