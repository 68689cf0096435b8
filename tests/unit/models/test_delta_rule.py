"""The gated delta rule in chunks, beside its definition token by token in float64; and its convolution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.allocations import allocated_peak
from vft.common.types import Segment
from vft.models import delta_rule as module
from vft.models.attention import document_segments
from vft.models.delta_rule import CHUNK, EPS, convolve, delta_rule, flops_of, recurrence_of

CPU = torch.device("cpu")
KEY_HEADS, HEADS, K, V, WIDTH = 2, 4, 6, 5, 4
DOCUMENTS: dict[str, tuple[tuple[int, tuple[int, ...]], ...]] = {
    **{f"one of {length}": ((0, (length,)),) for length in (1, CHUNK - 1, CHUNK, CHUNK + 1)},
    "several": ((0, (1,)), (0, (CHUNK + 1,)), (0, (3,)), (0, (2 * CHUNK,))),
    "shared": ((CHUNK + 6, (9, 2 * CHUNK + 2, 1)),),
    "short shared": ((1, (1, 2, 5)), (2, (70, 1))),
    "everything": ((70, (9, 130, 64)), (0, (1,)), (5, (65, 2)), (0, (200,))),
}
"""Rows of documents: tokens of the prefix, and of each suffix."""


def segments_of(documents: Sequence[tuple[int, Sequence[int]]]) -> list[Segment]:
    segments: list[Segment] = []
    for prefix, suffixes in documents:
        start = segments[-1].q_start + segments[-1].q_length if segments else 0
        segments += [s for s in document_segments(start, prefix, suffixes) if s.q_length]
    return segments


def random_inputs(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values, decays and strengths."""
    torch.manual_seed(0)
    shapes = ((tokens, KEY_HEADS, K), (tokens, KEY_HEADS, K), (tokens, HEADS, V))
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in shapes)
    decay, strength = -torch.rand(tokens, HEADS, dtype=dtype), torch.rand(tokens, HEADS, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, decay, strength)]


def token_by_token(
    inputs: Sequence[Tensor], segments: Sequence[Segment], initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: outputs [T, H, V] and the state that each segment leaves."""
    q, k, v, decay, strength = inputs
    q, k = (x / (x.square().sum(-1, keepdim=True) + EPS).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (q * K**-0.5, k))
    left: dict[tuple[int, int], Tensor] = {}
    outs, states = [], []
    for number, segment in enumerate(segments):
        state = v.new_zeros(HEADS, K, V) if initial is None else initial[number]
        if initial is None and segment.prefix_length:
            state = left[segment.prefix_start, segment.prefix_length]
        for t in range(segment.q_start, segment.q_start + segment.q_length):
            state = state * decay[t].exp()[:, None, None]
            change = strength[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + torch.einsum("hk,hv->hkv", k[t], change)
            outs.append(torch.einsum("hkv,hk->hv", state, q[t]))
        left[segment.q_start, segment.q_length] = state
        states.append(state)
    return torch.stack(outs), torch.stack(states)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    loss = torch.stack([(x * torch.randn(x.shape, dtype=torch.float64)).sum() for x in outputs]).sum()
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_chunks_are_the_rule_token_by_token(name: str) -> None:
    """Outputs, states and all gradients; those of a suffix reach back into its prefix."""
    segments = segments_of(DOCUMENTS[name])
    inputs = random_inputs(segments[-1].q_start + segments[-1].q_length)
    out, states = delta_rule(*inputs, recurrence_of(segments, WIDTH, CPU))
    found, wanted = (out, states[: len(segments)]), token_by_token(inputs, segments)
    for one, other in zip((*found, *gradients(found, inputs)), (*wanted, *gradients(wanted, inputs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_gradcheck() -> None:
    segments = segments_of(((3, (2, 4)), (0, (5,))))
    inputs, recurrence = random_inputs(14), recurrence_of(segments, WIDTH, CPU)
    initial = torch.randn(4, HEADS, K, V, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: delta_rule(*x[:5], recurrence, x[5]), (*inputs, initial))


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_the_backward_pass_holds_one_state_a_chunk(tokens: int) -> None:
    """For each chunk of C tokens and each head: numbers of 7 C x C matrices, 29 C x K and 2 states. A state for each
    token would be 64 of them."""
    width, heads = 128, 2
    q, k, v = (torch.randn(tokens, heads, width, requires_grad=True) for _ in range(3))
    decay, strength = -torch.rand(tokens, heads), torch.rand(tokens, heads)
    out, _ = delta_rule(q, k, v, decay, strength, recurrence_of([Segment(0, tokens)], WIDTH, CPU))
    grad = torch.randn_like(out)
    most = 4 * heads * tokens // CHUNK * (7 * CHUNK**2 + 29 * CHUNK * width + 2 * width**2)
    assert 0.8 * most < allocated_peak(lambda: out.backward(grad)) < most


def test_a_later_pass_continues_an_earlier_one() -> None:
    """The states of a first pass, given to the rest of the row, with a sequence that nothing came before."""
    lengths, later = (70, 5), (9, 64, 3)
    inputs = random_inputs(sum(lengths) + sum(later))
    first = [Segment(0, 70), Segment(70, 5)]
    rest = [Segment(0, 9), Segment(9, 64), Segment(73, 3)]
    _, states = delta_rule(*(x[:75] for x in inputs), recurrence_of(first, WIDTH, CPU))
    recurrence = recurrence_of(rest, WIDTH, CPU, sources=(1, 0, 2))
    assert recurrence.sources_S is not None
    initial = torch.cat([states, states.new_zeros(1, *states.shape[1:])]).index_select(0, recurrence.sources_S)
    found = delta_rule(*(x[75:] for x in inputs), recurrence, initial)
    _, left = token_by_token([x[:75] for x in inputs], first)
    begins = torch.stack([left[1], left[0], torch.zeros_like(left[0])])
    for one, other in zip(found, token_by_token([x[75:] for x in inputs], rest, begins), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_convolution_ends_at_a_document_and_begins_with_its_prefix(name: str) -> None:
    segments = segments_of(DOCUMENTS[name])
    tokens = segments[-1].q_start + segments[-1].q_length
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 6, dtype=torch.float64), torch.randn(6, WIDTH, dtype=torch.float64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    rows: dict[tuple[int, int], Tensor] = {}
    outs, tails = [], []
    for segment in segments:
        own = x[segment.q_start : segment.q_start + segment.q_length]
        before = rows[segment.prefix_start, segment.prefix_length] if segment.prefix_length else x.new_zeros(3, 6)
        seen = torch.cat([before, own])[-(WIDTH - 1 + segment.q_length) :]
        rows[segment.q_start, segment.q_length] = torch.cat([before, own])
        padded = F.pad(seen, (0, 0, WIDTH - 1 + segment.q_length - len(seen), 0))
        outs.append(F.conv1d(padded.T[None], weight[:, None], groups=6)[0].T)
        tails.append(torch.cat([before, own])[-(WIDTH - 1) :])
    out, last = convolve(x, weight, recurrence_of(segments, WIDTH, CPU), None)
    found = out, last[: len(segments)]
    wanted = torch.cat(outs), torch.stack(tails)
    pairs = zip((*found, *gradients(found, [x, weight])), (*wanted, *gradients(wanted, [x, weight])), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # at a segment's start it is summed in float32


def test_half_precision_computes_in_float32() -> None:
    segments = segments_of(DOCUMENTS["everything"])
    inputs = random_inputs(segments[-1].q_start + segments[-1].q_length)
    rounded = [x.detach().bfloat16() for x in inputs]
    out, states = delta_rule(*rounded, recurrence_of(segments, WIDTH, CPU))
    wanted, left = token_by_token([x.double() for x in rounded], segments)
    assert out.dtype == torch.bfloat16 and states.dtype == torch.float32
    torch.testing.assert_close(states.double(), left, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=1e-2)


def test_the_operator_of_compiled_layers_is_the_same() -> None:
    segments = segments_of(DOCUMENTS["everything"])
    inputs = random_inputs(segments[-1].q_start + segments[-1].q_length)
    recurrence = recurrence_of(segments, WIDTH, CPU)
    initial = torch.zeros(len(segments), HEADS, K, V, dtype=torch.float64, requires_grad=True)
    index = (recurrence.rows_NC, recurrence.place_T, recurrence.order_S, recurrence.place_S, recurrence.parents_S)
    given = ([*inputs, initial, *index], recurrence.steps_on_host)
    wanted, found = delta_rule(*inputs, recurrence, initial), torch.ops.vft.delta_rule(*given)
    for one, other in zip((*found, *gradients(found, inputs)), (*wanted, *gradients(wanted, inputs)), strict=True):
        assert torch.equal(one, other)
    torch.library.opcheck(module._delta_rule_op, given)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_states() -> None:
    """The inputs alone, though a row of 40 chunks has 40 states; and while it is computed again, one state a chunk."""
    tokens = 40 * CHUNK
    inputs = random_inputs(tokens, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        delta_rule(*inputs, recurrence_of([Segment(0, tokens)], WIDTH, CPU))
    given = {x.untyped_storage().data_ptr() for x in inputs}
    others = [x for x in kept if x.untyped_storage().data_ptr() not in given and x.is_floating_point()]
    assert sum(x.numel() for x in others) == 2 * HEADS * K * V  # where the row starts from, and a row that nothing uses


def test_flops() -> None:
    """Those of products, as torch counts them, which leaves triangular systems out."""
    tokens = 8 * CHUNK
    inputs, recurrence = random_inputs(tokens, torch.float32), recurrence_of([Segment(0, tokens)], WIDTH, CPU)
    forward, backward = flops_of(K, V)
    solving = CHUNK * (K + V)
    with FlopCounterMode(display=False) as counter:
        out, _ = delta_rule(*inputs, recurrence)
    assert counter.get_total_flops() == tokens * HEADS * (forward - solving)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == tokens * HEADS * (backward - 2 * solving)


def test_chunks_come_in_the_order_of_states() -> None:
    """Every row is in one place, steps only shrink within a group, and suffixes come after their prefix."""
    segments = segments_of(DOCUMENTS["everything"])
    made: Any = recurrence_of(segments, WIDTH, CPU)
    tokens = segments[-1].q_start + segments[-1].q_length
    assert torch.equal(made.rows_NC.flatten()[made.place_T], torch.arange(tokens))
    for second in (False, True):
        counts = [count for count, is_second in made.steps if is_second == second]
        assert all(a >= b for a, b in pairwise(counts)) and counts
    assert made.steps_on_host.tolist() == [list(step) for step in made.steps]
