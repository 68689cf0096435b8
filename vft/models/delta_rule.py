"""The gated delta rule over packed rows (Yang et al. 2024, "Gated Delta Networks", arXiv 2412.06464).

Each head has a state S [K, V]. A token with key k, value v, decay a <= 0 (a logarithm) and strength b changes it to

    S' = exp(a) S + k (b (v - exp(a) S^T k))^T        and gives    S'^T q / sqrt(K).

Keys and queries are divided by their length before.

A segment starts from the state that its prefix left, or from zero. It is cut into chunks. Within a chunk the changes of
all tokens are found by one triangular system (the paper's section 3.3), so that states are made once a chunk. The
chunks of all segments are computed together; only the states follow one another, those of segments of the same age in
one product.

The backward pass keeps the inputs alone and computes everything again: while it runs, it holds one state a chunk.

On CUDA in half precision flash-linear-attention's kernels (`fla`) do the same, if they are installed and a trial finds
nothing wrong with them (`has_fla`). **They have never run in vft on a GPU**; on a CPU they ran in Triton's
interpreter.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vft.common.errors import first_line
from vft.common.types import Segment, move
from vft.models.attention import document_segments

CHUNK = 64
"""Most tokens of a chunk."""
EPS = 1e-6
"""Added to the squared length of keys and queries."""

Steps = Sequence[tuple[int, bool]]
"""`Recurrence.steps`."""
PLAIN = 11
"""Tensors that the plain form takes: six inputs, and where they are. The kernels take further ones."""
Shape = tuple[int, int, int, int]
"""How many heads keys and values have, and their widths."""
TOLERANCE = 0.05
"""How far results may be from float32: the norm of the difference, over the norm. In bf16 the gradient of keys by fla's
kernels is 0.01 to 0.02 from it, other results are less."""


@dataclass(eq=False)
class Recurrence:
    """How the segments of a packed row are cut into chunks, for a convolution and for the delta rule.

    Chunks are in the order in which states need them: those of segments without a prefix in this row first; in each of
    these two groups the first chunks of all segments, then all second ones, and so on; the longest segment first. So
    the segments that have a further chunk are always the first ones.

    Tensors of fewer than two rows have further ones that nothing uses: compiled layers would be compiled anew for them.
    """

    count: int
    """Segments."""

    rows_NC: Tensor
    """Row of each token of each chunk; T, one behind the last, where a chunk is not full."""
    place_T: Tensor
    """Where the chunks have each row, as an index into N x C."""
    order_S: Tensor
    """Segments without a prefix in this row, in the order of their states, then the others."""
    place_S: Tensor
    """The inverse: where the states of each segment are."""
    parents_S: Tensor
    """For each segment with a prefix in this row, in order: where the state is that it starts from."""
    steps: tuple[tuple[int, bool], ...]
    """How many chunks come next, and whether they belong to the second group."""
    steps_on_host: Tensor
    """The same in host memory, for compiled layers: they would be compiled anew for other numbers."""
    edge_rows_B: Tensor
    """The rows that a convolution would feed with those of another segment."""
    edge_sources_BW: Tensor
    """The rows that they are to be fed with; T + w the w-th of what earlier passes left of its segment, or zeros."""
    tails_SW: Tensor
    """The last inputs of each segment, numbered in the same way: what a convolution of a later pass begins with."""
    sources_S: Tensor | None
    """For each segment, which one of an earlier pass it continues; their number: none. None: there is no such pass."""
    ends: tuple[Tensor, ...] = ()
    """For fla's kernels, for which a segment is one chunk of any length, and `rows_NC` has the rows of all chunks one
    behind another [T]: where each segment of the first group ends there, with a zero before them, and the same of the
    second group; then both in host memory. Without the kernels: none."""

    def flattened(self) -> Recurrence:
        """For plans of memory and time: the same chunks in at most two steps, as if none had to wait for another, so
        that a plan takes seconds instead of minutes. The others are empty. There are as many products and about as many
        bytes, of which a little more are held at once, in fewer kernels (`vft.preparation.kernels` adds the others)."""
        first, second = (sum(n for n, later in self.steps if later == is_second) for is_second in (False, True))
        steps = ((first, False), (second, True), *[(0, True)] * len(self.steps))[: len(self.steps)]
        order_S, parents_S = self.order_S.new_zeros(first), self.parents_S.new_zeros(second)
        return replace(self, steps=steps, order_S=order_S, parents_S=parents_S)


def flops_of(keys: int, values: int) -> tuple[int, int]:
    """FLOPs of the products of one head for one token of a full chunk: forward, and backward with what is computed
    again."""
    return (
        CHUNK * (5 * keys + 3 * values) + 6 * keys * values,
        CHUNK * (16 * keys + 8 * values) + 16 * keys * values,
    )


def recurrence_of(
    segments: Sequence[Segment],
    width: int,
    device: torch.device,
    sources: Sequence[int] | None = None,
    by_fla: bool = False,
) -> Recurrence:
    """The recurrence of a row that consists of `segments`, for a convolution over `width` tokens. With `sources`
    (`Recurrence.sources_S`) no prefix is in this row. `by_fla`: for fla's kernels, unless the row is a step of
    generation."""
    lengths = [segment.q_length for segment in segments]
    by_fla &= max(lengths) > 1
    total, chunk = sum(lengths), max(lengths) if by_fla else CHUNK if max(lengths) > 1 else 1
    starts = {(segment.q_start, segment.q_length): number for number, segment in enumerate(segments)}
    parents = [
        None if sources or not segment.prefix_length else starts[segment.prefix_start, segment.prefix_length]
        for segment in segments
    ]
    order: list[int] = []
    steps: list[tuple[int, bool]] = []
    chunks: list[tuple[int, int]] = []  # first row, length
    for is_second in (False, True):
        group = [number for number, parent in enumerate(parents) if (parent is not None) == is_second]
        group.sort(key=lambda number: -lengths[number])
        order += group
        for first in range(0, max((lengths[number] for number in group), default=0), chunk):
            having = [number for number in group if lengths[number] > first]
            steps.append((len(having), is_second))
            chunks += [(segments[n].q_start + first, min(chunk, lengths[n] - first)) for n in having]
    inside_C = torch.arange(chunk)
    first_N, length_N = torch.tensor(chunks).unbind(1)
    rows_NC = torch.where(inside_C < length_N[:, None], first_N[:, None] + inside_C, total)
    first = parents.count(None)
    groups = (length_N[:first], length_N[first:]) if by_fla else ()
    ends = [torch.nn.functional.pad(one.cumsum(0), (1, 0 if len(one) else 1)) for one in groups]
    rows_NC = rows_NC[rows_NC < total] if by_fla else rows_NC
    place_T = torch.empty(total + 1, dtype=torch.long)
    place_T[rows_NC.flatten()] = torch.arange(rows_NC.numel())
    place = {number: at for at, number in enumerate(order)}
    edge_rows, edge_sources, tails = _edges(segments, parents, width)
    parents_S = [place[parent] for number in order if (parent := parents[number]) is not None]

    def moved(index: Tensor) -> Tensor:
        return move(torch.cat([index, index.new_zeros(max(0, 2 - len(index)), *index.shape[1:])]), device)

    return Recurrence(
        count=len(segments),
        rows_NC=moved(rows_NC),
        place_T=move(place_T[:total], device),
        order_S=moved(torch.tensor(order)),
        place_S=moved(torch.tensor([place[number] for number in range(len(order))])),
        parents_S=moved(torch.tensor(parents_S, dtype=torch.long)),
        steps=tuple(steps),
        steps_on_host=torch.tensor([*steps, (0, False)] if len(steps) < 2 else steps),
        edge_rows_B=move(edge_rows, device),
        edge_sources_BW=move(edge_sources, device),
        tails_SW=moved(tails),
        sources_S=None if sources is None else move(torch.tensor(sources), device),
        ends=(*(move(one, device) for one in ends), *ends),
    )


def _edges(segments: Sequence[Segment], parents: Sequence[int | None], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """`edge_rows_B`, `edge_sources_BW` and `tails_SW` of a recurrence."""
    total, before = sum(segment.q_length for segment in segments), width - 1
    inputs: list[list[int]] = []
    rows, sources, tails = [], [], []
    for number, (segment, parent) in enumerate(zip(segments, parents, strict=True)):
        # What comes before the segment: the end of its prefix, or what an earlier pass left.
        left = [total + number * before + place for place in range(before)] if parent is None else inputs[parent]
        own = range(segment.q_start, segment.q_start + segment.q_length)
        seen = [*left[-before:], *own] if before else list(own)
        inputs.append(seen)
        tails.append(seen[len(seen) - before :])
        for place in range(min(before, segment.q_length)):
            rows.append(segment.q_start + place)
            sources.append(seen[place : place + width])
    rows_B, sources_BW, tails_SW = (torch.tensor(index, dtype=torch.long) for index in (rows, sources, tails))
    return rows_B, sources_BW.view(-1, width), tails_SW.view(len(segments), before)


def convolve(x_TC: Tensor, weight_CW: Tensor, recurrence: Recurrence, left_SWC: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal convolution of each channel within each segment, and the last inputs of each segment [S, W - 1, C], with
    further rows where there are fewer than two.

    `left_SWC` is what earlier passes left of each segment; None: nothing.
    """
    width, segments = weight_CW.shape[1], len(recurrence.tails_SW)
    weight_CW = weight_CW.to(x_TC.dtype)
    left = x_TC.new_zeros(segments, width - 1, x_TC.shape[1]) if left_SWC is None else left_SWC.to(x_TC.dtype)
    inputs = torch.cat([x_TC, left.flatten(0, 1)])
    padded = torch.nn.functional.pad(x_TC.T, (width - 1, 0))
    out = torch.nn.functional.conv1d(padded[None], weight_CW[:, None], groups=x_TC.shape[1])[0].T
    edges = inputs.index_select(0, recurrence.edge_sources_BW.flatten()).view(-1, width, x_TC.shape[1])
    exact = (edges.float() * weight_CW.T.float()).sum(1).to(x_TC.dtype)
    tails = inputs.index_select(0, recurrence.tails_SW.flatten()).view(segments, width - 1, x_TC.shape[1])
    return out.index_copy(0, recurrence.edge_rows_B, exact), tails


def delta_rule(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    decay_TH: Tensor,
    strength_TH: Tensor,
    recurrence: Recurrence,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, V] in the dtype of the values, and the state that each segment leaves [S, H, K, V] in float32,
    with further rows where there are fewer than two.

    `initial` has the states that segments without a prefix in this row start from; None: zero.
    """
    if initial is None:
        shape = (len(recurrence.place_S), v_THV.shape[1], k_THK.shape[2], v_THV.shape[2])
        initial = v_THV.new_zeros(shape, dtype=torch.promote_types(v_THV.dtype, torch.float32))
    inputs = (q_THK, k_THK, v_THV, decay_TH, strength_TH, initial)
    index = (recurrence.rows_NC, recurrence.place_T, recurrence.order_S, recurrence.place_S, recurrence.parents_S)
    given = (*inputs, *index, *recurrence.ends)
    if torch.compiler.is_compiling():
        return torch.ops.vft.delta_rule(given, recurrence.steps_on_host)
    return _DeltaRule.apply(recurrence.steps, *given)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Steps, *given: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*given)
        ctx.steps = steps
        return _run(steps, *given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        return None, *_run_backward(ctx.steps, *grads, *given), *[None] * (len(given) - 6)


def _run(steps: Steps, *given: Tensor) -> tuple[Tensor, Tensor]:
    return (_forward_by_fla if len(given) > PLAIN else _forward)(steps, *given)


def _run_backward(steps: Steps, grad_THV: Tensor, grad_states: Tensor, *given: Tensor) -> list[Tensor]:
    return (_backward_by_fla if len(given) > PLAIN else _backward)(steps, grad_THV, grad_states, *given)


class _Chunks:
    """What is known of all chunks before any state is: [N, H, C, ...] in float32, with the names of the paper's
    matrices in comments."""

    def __init__(self, inputs: Sequence[Tensor], rows_NC: Tensor) -> None:
        """`inputs` are the first five of `delta_rule`, and `rows_NC` those of chunks that there are."""

        def chunked(x_TH: Tensor) -> Tensor:
            """Zeros where a chunk is not full: these change no state."""
            x = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, rows_NC.flatten())
            return x.unflatten(0, rows_NC.shape).transpose(1, 2)

        self.raw_q, self.raw_k, self.v, decay, self.strength = map(chunked, inputs)
        self.width = self.raw_q.shape[-1]
        self.repeats = self.v.shape[1] // self.raw_k.shape[1]  # a key head serves several value heads
        self.q, self.k = (_unit(x).repeat_interleave(self.repeats, dim=1) for x in (self.raw_q, self.raw_k))
        self.q = self.q * self.width**-0.5
        total = decay.cumsum(-1)  # up to each token, since the chunk began
        self.since = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp().tril()  # from one token to a later one
        self.begun = total.exp().unsqueeze(-1)
        self.left = (total[..., -1:] - total).exp().unsqueeze(-1)
        self.kept = total[..., -1:].exp().unsqueeze(-1)
        b = self.strength.unsqueeze(-1)
        self.bk = b * self.k
        # What a token changes depends on what those before it in the chunk have changed: I + L.
        self.system = (self.bk @ self.k.mT * self.since).tril(-1)
        both = torch.cat([b * self.v, self.bk * self.begun], dim=-1)
        self.solved = torch.linalg.solve_triangular(self.system, both, upper=False, unitriangular=True)
        self.changes, self.reads = self.solved.split([self.v.shape[-1], self.width], dim=-1)  # U, W
        self.within = self.q @ self.k.mT * self.since  # the attention of a chunk to itself
        self.q_begun, self.k_left = self.q * self.begun, self.k * self.left


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def _unit_gradient(grad: Tensor, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
    return scale * grad - x * scale.pow(3) * (grad * x).sum(-1, keepdim=True)


def _count(steps: Steps) -> int:
    """Number of chunks."""
    return sum(count for count, _ in steps)


def _groups(steps: Steps) -> list[list[tuple[slice, int, int]]]:
    """For each group of segments its steps: their chunks, how many these are, and how many go on after them."""
    groups, at = [], 0
    for is_second in (False, True):
        counts = [count for count, second in steps if second == is_second and count]
        group = []
        for count, following in pairwise([*counts, 0]):
            group.append((slice(at, at + count), count, following))
            at += count
        groups += [group] if group else []
    return groups


def _forward(steps: Steps, *given: Tensor) -> tuple[Tensor, Tensor]:
    v_THV, (place_T, _, place_S, _) = given[2], given[7:]
    chunks = _Chunks(given[:5], given[6][: _count(steps)])
    states, changes, left = _scan(steps, chunks, *given[5:])
    out = torch.cat([chunks.q_begun[at] @ state + chunks.within[at] @ changes[at] for at, state in states])
    out = out.transpose(1, 2).flatten(0, 1).index_select(0, place_T)
    return out.to(v_THV.dtype), left.index_select(0, place_S)


def _scan(steps: Steps, chunks: _Chunks, *index: Tensor) -> tuple[list[tuple[slice, Tensor]], Tensor, Tensor]:
    """The state before each step with the chunks that begin with it, what the tokens of all chunks change, and the
    states that segments leave, in the order of states. `index` are the first states and where everything is."""
    initial, _, _, order_S, _, parents_S = index
    states: list[tuple[slice, Tensor]] = []
    changes: list[Tensor] = []
    groups: list[Tensor] = []
    for group in _groups(steps):
        first = group[0][1]
        state = groups[0].index_select(0, parents_S[:first]) if groups else initial.index_select(0, order_S[:first])
        finished: list[Tensor] = []
        for at, count, following in group:
            state = state[:count]
            states.append((at, state))
            changes.append(chunks.changes[at] - chunks.reads[at] @ state)
            state = state * chunks.kept[at] + chunks.k_left[at].mT @ changes[-1]
            finished.append(state[following:])
        groups.append(torch.cat(finished[::-1]))
    return states, torch.cat(changes), torch.cat(groups)


def _back_through_states(
    steps: Steps,
    c: _Chunks,
    scanned: tuple[list[tuple[slice, Tensor]], Tensor, Tensor],
    grad: Tensor,
    grad_states: Tensor,
    index: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], Tensor]:
    """From the last step to the first: gradients of `changes`, and of `reads`, `q_begun`, `k_left` and `kept` of all
    chunks; and of the initial states. `scanned` is the result of `_scan`, `grad` that of the outputs by chunks."""
    (states, changes, left), (initial, _, _, order_S, place_S, parents_S) = scanned, index
    grad_left = torch.zeros_like(left).index_add(0, place_S, grad_states.to(left.dtype))
    grad_change, grad_kept = torch.empty_like(changes), torch.empty_like(c.kept)
    grad_reads, grad_q_begun, grad_k_left = (torch.empty_like(x) for x in (c.reads, c.q_begun, c.k_left))
    before = iter(reversed(states))
    groups = _groups(steps)
    ends = [sum(group[0][1] for group in groups[: number + 1]) for number in range(len(groups))]
    for number in reversed(range(len(groups))):
        first = ends[number - 1] if number else 0
        own = grad_left[first : ends[number]]  # of the states that this group's segments leave
        grad_state = own[:0]
        for at, count, _ in reversed(groups[number]):
            _, state = next(before)
            grad_state = torch.cat([grad_state, own[len(grad_state) : count]])
            change = c.within[at].mT @ grad[at] + c.k_left[at] @ grad_state
            grad_change[at] = change
            grad_k_left[at] = changes[at] @ grad_state.mT
            grad_kept[at] = (state * grad_state).sum((-1, -2), keepdim=True)
            grad_q_begun[at] = grad[at] @ state.mT
            grad_reads[at] = -change @ state.mT
            grad_state = c.kept[at] * grad_state + c.q_begun[at].mT @ grad[at] - c.reads[at].mT @ change
        if number:  # a suffix began with what its prefix left
            grad_left = grad_left.index_add(0, parents_S[: len(grad_state)], grad_state)
    grad_initial = torch.zeros_like(initial).index_copy(0, order_S[: len(grad_state)], grad_state.to(initial.dtype))
    return (grad_change, grad_reads, grad_q_begun, grad_k_left, grad_kept), grad_initial


def _backward(steps: Steps, grad_THV: Tensor, grad_states: Tensor, *given: Tensor) -> list[Tensor]:
    """Gradients of the first six inputs. Everything is computed again."""
    rows_NC, place_T = given[6][: _count(steps)], given[7]
    c = _Chunks(given[:5], rows_NC)
    states, changes, left = _scan(steps, c, *given[5:])
    grad = torch.cat([grad_THV, grad_THV.new_zeros(1, *grad_THV.shape[1:])]).to(c.v.dtype)
    grad = grad.index_select(0, rows_NC.flatten()).unflatten(0, rows_NC.shape).transpose(1, 2)

    (grad_change, grad_reads, grad_q_begun, grad_k_left, grad_kept), grad_initial = _back_through_states(
        steps, c, (states, changes, left), grad, grad_states, given[5:]
    )
    # Back through what chunks know without a state.
    b = c.strength.unsqueeze(-1)
    grad_both = torch.linalg.solve_triangular(
        c.system.mT, torch.cat([grad_change, grad_reads], dim=-1), upper=True, unitriangular=True
    )
    grad_system = -(grad_both @ c.solved.mT).tril(-1)
    grad_within = (grad @ changes.mT).tril()
    grad_bv, grad_bk = grad_both.split([c.v.shape[-1], c.width], dim=-1)
    grad_begun = (grad_bk * c.bk).sum(-1) + (grad_q_begun * c.q).sum(-1)
    grad_bk = grad_bk * c.begun + (grad_system * c.since) @ c.k
    grad_q = grad_q_begun * c.begun + (grad_within * c.since) @ c.k
    grad_k = (grad_system * c.since).mT @ c.bk + (grad_within * c.since).mT @ c.q
    grad_k = grad_k + grad_bk * b + grad_k_left * c.left
    grad_strength = (grad_bk * c.k).sum(-1) + (grad_bv * c.v).sum(-1)
    # Each exponential's gradient is itself times that of its exponent, a sum of decays up to a token.
    since = grad_system * c.system + grad_within * c.within
    left_over = (grad_k_left * c.k_left).sum(-1)
    grad_total = since.sum(-1) - since.sum(-2) + grad_begun * c.begun.squeeze(-1) - left_over
    grad_total[..., -1] += left_over.sum(-1) + (grad_kept * c.kept).squeeze((-1, -2))
    grad_decay = grad_total.flip(-1).cumsum(-1).flip(-1)

    grad_q, grad_k = (x.unflatten(1, (-1, c.repeats)).sum(2) for x in (grad_q * c.width**-0.5, grad_k))
    grads = (_unit_gradient(grad_q, c.raw_q), _unit_gradient(grad_k, c.raw_k), grad_bv * b, grad_decay, grad_strength)
    return [
        *(
            one.transpose(1, 2).flatten(0, 1).index_select(0, place_T).to(x.dtype)
            for one, x in zip(grads, given[:5], strict=True)
        ),
        grad_initial,
    ]


# ----------------------------------------------------------------------------------------------------- fla's kernels


@cache
def has_fla(device: torch.device, dtype: torch.dtype, shape: Shape) -> bool:
    """Whether fla's kernels are installed, run there, and give what the plain form gives. A warning says so if they are
    installed and do not."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or find_spec("fla") is None:
        return False
    if trouble := fla_trouble(device, dtype, shape):
        warnings.warn(f"fla's gated delta rule {trouble}: recurrent layers take the slower path", stacklevel=2)
    return not trouble


def fla_trouble(device: torch.device, dtype: torch.dtype, shape: Shape) -> str:
    """What is wrong with fla's kernels beside the plain form in float32; empty if nothing is."""
    # With a shared prefix, and with lengths beside that of a chunk.
    segments = [*document_segments(0, 65, [1, 63]), *document_segments(129, 0, [64]), *document_segments(193, 0, [1])]
    inputs = trial_inputs(segments, shape, dtype, device)
    expected = results_of([x.float() for x in inputs], recurrence_of(segments, 1, device))
    try:
        results = results_of(inputs, recurrence_of(segments, 1, device, by_fla=True))
    except Exception as error:  # ImportError, or whatever a driver or a compiler raises
        return f"can't run ({first_line(error):.200})"
    pairs = zip(results, expected, strict=True)
    # NaN is no number below it.
    near = all(float((one - right).norm()) <= TOLERANCE * float(right.norm()) for one, right in pairs)
    return "" if near else "gives other results than the plain form"


def trial_inputs(
    segments: Sequence[Segment], shape: Shape, dtype: torch.dtype, device: torch.device
) -> Sequence[Tensor]:
    """Random inputs of `delta_rule` in `dtype`, but decays and first states in float32."""
    rows, (key_heads, heads, keys, values) = sum(segment.q_length for segment in segments), shape
    keys_and_values = (rows, key_heads, keys), (rows, key_heads, keys), (rows, heads, values)
    shapes = (*keys_and_values, (rows, heads), (rows, heads), (max(2, len(segments)), heads, keys, values))
    generator = torch.Generator().manual_seed(0)
    q, k, v, decay, strength, initial = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype), -0.1 * decay.abs(), strength.sigmoid().to(dtype), initial


def results_of(inputs: Sequence[Tensor], recurrence: Recurrence) -> list[Tensor]:
    """Outputs and states, and the gradients of all inputs to the sum of their squares."""
    q, k, v, decay, strength, initial = leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, states = delta_rule(q, k, v, decay, strength, recurrence, initial)
        loss = out.square().sum() + states.square().sum()
    return [out.detach(), states.detach(), *torch.autograd.grad(loss, leaves)]


def _forward_by_fla(steps: Steps, *given: Tensor) -> tuple[Tensor, Tensor]:
    """As `_forward`: one call for the segments without a prefix in this row, and one for the others."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    initial, rows_T, place_T, order_S, place_S, parents_S, *ends = given[5:]
    inputs = [x.index_select(0, rows_T).unsqueeze(0) for x in given[:5]]
    results: list[tuple[Tensor, Tensor]] = []
    for (count, is_second), ends_S, on_host in zip(steps, ends[:2], ends[2:], strict=False):
        if count:
            begin, sources_S = (results[0][1], parents_S) if is_second else (initial, order_S)
            own = slice(-int(on_host[-1]), None) if is_second else slice(int(on_host[-1]))
            begun = begin.index_select(0, sources_S[:count])
            options = {"cu_seqlens": ends_S, "cu_seqlens_cpu": on_host, "use_qk_l2norm_in_kernel": True}
            out, state = chunk_gated_delta_rule(
                *(x[:, own] for x in inputs), initial_state=begun, output_final_state=True, **options
            )
            results.append((out.squeeze(0), state))
    outs, states = zip(*results, strict=True)
    return torch.cat(outs).index_select(0, place_T), torch.cat(states).index_select(0, place_S)


def _backward_by_fla(steps: Steps, grad_THV: Tensor, grad_states: Tensor, *given: Tensor) -> list[Tensor]:
    """As `_backward`."""
    leaves = [x.detach().requires_grad_() for x in given[:6]]
    with torch.enable_grad():
        outs = _forward_by_fla(steps, *leaves, *given[6:])
    return list(torch.autograd.grad(outs, leaves, (grad_THV, grad_states)))


# ------------------------------------------------------------------------------- one operator, for compiled layers


@torch.library.custom_op("vft::delta_rule", mutates_args=())
def _delta_rule_op(given: Sequence[Tensor], steps: Tensor) -> tuple[Tensor, Tensor]:
    """The forward pass as an operator: a loop over chunks would be compiled anew for every row."""
    return _run(steps.tolist(), *given)


@_delta_rule_op.register_fake
def _(given: Sequence[Tensor], steps: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(given[2], memory_format=torch.contiguous_format), torch.empty_like(given[5])


# Inside a `custom_op` nothing is recorded for autograd, which differentiates the kernels.
_LIBRARY = torch.library.Library("vft", "FRAGMENT")
_LIBRARY.define("delta_rule_backward(Tensor[] grads, Tensor[] given, Tensor steps) -> Tensor[]")
_LIBRARY.impl(
    "delta_rule_backward", lambda g, x, steps: _run_backward(steps.tolist(), *g, *x), "CompositeExplicitAutograd"
)
_LIBRARY.impl("delta_rule_backward", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("vft::delta_rule_backward", lib=_LIBRARY)
def _(grads: Sequence[Tensor], given: Sequence[Tensor], steps: Tensor) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[:6]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[0], inputs[1])


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    *given, steps = ctx.saved_tensors
    return [*torch.ops.vft.delta_rule_backward(grads, given, steps), *[None] * (len(given) - 6)], None


_delta_rule_op.register_autograd(_differentiate, setup_context=_save)
