"""fla's `chunk_gated_delta_rule` as fla-core 0.6 describes it, token by token in float64. It stands in for the kernels.

That they do the same was seen in Triton's interpreter (docs/develop/decisions.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

calls: list[tuple[int, ...]] = []
"""Lengths of the sequences of each call."""


def install(function: Callable[..., Any] | None = None, modules: dict[str, Any] = sys.modules) -> None:
    """Make `function`, or what is here, what `fla` has."""
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        modules[name] = module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
    module.chunk_gated_delta_rule = function or chunk_gated_delta_rule  # type: ignore[attr-defined]


def give_nan(*inputs: Tensor, **given: Any) -> Any:
    """As a kernel that is wrong on a device."""
    out, state = chunk_gated_delta_rule(*inputs, **given)
    return out * torch.nan, state


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Queries and keys [1, T, H, K], values [1, T, HV, V], decays (logarithms) and strengths [1, T, HV], states
    [N, HV, K, V] to outputs in the dtype of the queries, and the last states in float32."""
    assert cu_seqlens is not None and cu_seqlens_cpu is not None and initial_state is not None
    assert cu_seqlens.device == q.device and cu_seqlens_cpu.device.type == "cpu"
    (_, tokens, heads, width), (count, value_heads) = q.shape, initial_state.shape[:2]
    assert q.shape == k.shape and v.shape[:3] == g.shape == beta.shape == (1, tokens, value_heads)
    ends = cu_seqlens_cpu.tolist()
    assert len(ends) == len(cu_seqlens) == count + 1 and ends[0] == 0 and ends[-1] == tokens
    calls.append(tuple(b - a for a, b in pairwise(ends)))
    dtype, (q, k, v, g, beta) = q.dtype, (x[0].double() for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * (width**-0.5 if scale is None else scale)
    q, k = (x.unsqueeze(2).expand(-1, -1, value_heads // heads, -1).reshape(tokens, value_heads, width) for x in (q, k))
    outs, states = [], []
    for number, (begin, end) in enumerate(pairwise(ends)):
        state = initial_state[number].double()
        for t in range(begin, end):
            state = state * g[t].exp()[:, None, None]
            change = beta[t][:, None] * (v[t] - (state * k[t][:, :, None]).sum(1))
            state = state + k[t][:, :, None] * change[:, None, :]
            outs.append((state * q[t][:, :, None]).sum(1))
        states.append(state)
    final = torch.stack(states).float() if output_final_state else None
    return torch.stack(outs).unsqueeze(0).to(dtype), final
