"""Attention of a packed row by its plan, which says who attends whom. It is made once for each batch, and every layer
uses it.

A document has a shared prefix (its system text and media) and suffixes (each a question with its answer), elsewhere
called trunk and branches. Rows of the prefix attend the prefix, rows of a suffix attend the prefix and their suffix.
Each of these parts is a `Segment`. There is no padding, and no mask of the size of the row.

On CUDA in half precision it is one call of `torch.nn.attention.varlen` for each layer. Elsewhere it is one call of
scaled_dot_product_attention (SDPA) for each pair of a query and a key length.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vft.common.errors import first_line
from vft.common.types import AttentionPlan, Segment, move

VISION_WIDTHS = (64, 72, 80)
"""Widths of a head in the families' vision encoders."""

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch was built without flash attention
    varlen_attn = None

_planned_device: torch.device | None = None

_VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()


def document_segments(start: int, prefix_length: int, suffix_lengths: Sequence[int]) -> list[Segment]:
    """Segments of one document whose first token is row `start`. With a single suffix it is one segment."""
    if len(suffix_lengths) == 1:
        return [Segment(start, prefix_length + suffix_lengths[0])]
    segments = [Segment(start, prefix_length)]
    row = start + prefix_length
    for length in suffix_lengths:
        segments.append(Segment(row, length, prefix_start=start, prefix_length=prefix_length))
        row += length
    return segments


def build_plan(segments: Iterable[Segment], causal: bool, past: int = 0) -> AttentionPlan:
    """The plan of a row that consists of `segments`, which must cover its rows in order.

    With `past` rows of keys from earlier passes, the keys are these and then the row's own. Prefixes lie among the past
    keys.
    """
    segments = tuple(segment for segment in segments if segment.q_length)
    row = 0
    for segment in segments:
        assert segment.q_start == row, f"segment starts at row {segment.q_start}, the one before ended at {row}"
        row += segment.q_length
    k_index = None
    if past or any(segment.prefix_length for segment in segments):
        k_index = torch.cat([key_rows(segment, past) for segment in segments])
    return AttentionPlan(
        segments=segments,
        causal=causal,
        cu_seqlens_q_S=_cumulative(segment.q_length for segment in segments),
        cu_seqlens_k_S=_cumulative(segment.k_length for segment in segments),
        k_index=k_index,
        max_q=max((segment.q_length for segment in segments), default=0),
        max_k=max((segment.k_length for segment in segments), default=0),
        past=past,
    )


def blocks_plan(lengths: Sequence[int]) -> AttentionPlan:
    """The plan of consecutive blocks of these lengths. Each row attends all rows of its own block."""
    blocks = [Segment(end - length, length) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    return build_plan(blocks, causal=False)


def key_rows(segment: Segment, past: int) -> Tensor:
    """Rows of the keys that a segment attends."""
    prefix = torch.arange(segment.prefix_start, segment.prefix_start + segment.prefix_length)
    own = past + segment.q_start
    return torch.cat([prefix, torch.arange(own, own + segment.q_length)])


def attended_pairs(segments: Iterable[Segment], causal: bool) -> int:
    """Query-key pairs that are computed (of causal attention only the lower triangle). FLOP counts are based on it."""
    total = 0
    for segment in segments:
        own = segment.q_length * (segment.q_length + 1) // 2 if causal else segment.q_length**2
        total += own + segment.q_length * segment.prefix_length
    return total


def _cumulative(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
    """Attention of a packed row [T, H, K]. Keys and values may have fewer heads than queries (grouped queries)."""
    if has_kernel(q_THK.device, q_THK.dtype):
        return _attend_varlen(q_THK, k_THK, v_THK, plan)
    return _attend_groups(q_THK, k_THK, v_THK, plan)


def prepare(plan: AttentionPlan, x: Tensor) -> None:
    """Add to the plan what SDPA needs, if it is used for rows on the device and in the dtype of `x`."""
    if plan.groups is None and not has_kernel(x.device, x.dtype):
        _prepare_groups(plan, x)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend` uses `torch.nn.attention.varlen` for rows on this device in this dtype."""
    planned = device if _planned_device is None else _planned_device
    return planned.type == "cuda" and varlen_attn is not None and dtype in (torch.bfloat16, torch.float16)


@contextmanager
def planning_for(device: torch.device) -> Iterator[None]:
    """Within it `attend` takes the path of `device`, wherever the tensors are. Memory plans run fake tensors in it."""
    global _planned_device
    _planned_device = device
    try:
        yield
    finally:
        _planned_device = None


def check_kernel(device: torch.device, dtype: torch.dtype) -> None:
    """Try the varlen kernel forward and backward, on rows of vision encoders and of decoders.

    If it cannot run (builds for ROCm may lack parts of it, and not every GPU has it), or its results are far from those
    of SDPA in float32 or no numbers at all, SDPA is used from then on, and a warning says so.
    """
    global varlen_attn
    if has_kernel(device, dtype) and (trouble := _kernel_trouble(device, dtype, _attend_varlen)) is not None:
        varlen_attn = None
        warnings.warn(f"torch.nn.attention.varlen {trouble}: attention takes the slower path", stacklevel=2)


def compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend` can be part of a compiled graph: with the kernel, if that works there as it does outside. A
    warning says if it does not."""
    if not has_kernel(device, dtype):
        return False
    trouble = _kernel_trouble(device, dtype, torch.compile(_attend_varlen, dynamic=True), few=True)
    if trouble is not None:
        warnings.warn(f"torch.nn.attention.varlen, compiled, {trouble}: attention is not compiled", stacklevel=2)
    return trouble is None


def _kernel_trouble(
    device: torch.device, dtype: torch.dtype, run: Callable[..., Tensor], few: bool = False
) -> str | None:
    """What is wrong with attention by the varlen kernel; None if nothing is. `few`: one encoder and one decoder, as
    each kind of row is compiled."""
    # Longer than a block of any kernel, and lengths that fill none.
    windows = [Segment(0, 64), Segment(64, 64), Segment(128, 200), Segment(328, 1)]
    shared = [*document_segments(0, 300, [9, 130]), *document_segments(439, 0, [90])]
    trials = [(windows, False, 4, 4, width) for width in VISION_WIDTHS]
    trials += [(shared, True, 4, key_heads, 128) for key_heads in (4, 1)]
    for segments, causal, heads, key_heads, width in trials[2::2] if few else trials:
        plan = move(build_plan(segments, causal), device)
        rows = segments[-1].q_start + segments[-1].q_length
        generator = torch.Generator().manual_seed(0)
        # Every second row of heads in memory, as queries, keys and values of one product lie beside each other.
        shapes = [(rows, 2, count, width) for count in (heads, key_heads, key_heads)]
        inputs = [torch.randn(shape, generator=generator).to(device, dtype)[:, 1] for shape in shapes]
        _prepare_groups(plan, inputs[0])
        expected = _results(_attend_groups, [x.float() for x in inputs], plan)
        name = f"(width {width}, {heads} and {key_heads} heads)"
        try:
            results = _results(run, inputs, plan)
        except Exception as error:  # NotImplementedError, or whatever a driver raises
            return f"{name} can't run ({first_line(error):.200})"
        for found, right in zip(results, expected, strict=True):
            # Tolerates rounding to 8 bits. One key too many or too few gives a far larger difference. NaN is above and
            # below nothing: the comparison has to be the one that it fails.
            if not float((found.float() - right).abs().max()) <= 0.05 * float(right.abs().max()):
                return f"{name} gives other results than scaled_dot_product_attention"
    return None


def _results(run: Callable[..., Tensor], inputs: list[Tensor], plan: AttentionPlan) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = run(*leaves, plan)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def _attend_varlen(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
    assert varlen_attn is not None
    if plan.k_index is not None:
        # Not by indexing, whose gradient sorts the index.
        k_THK, v_THK = k_THK.index_select(0, plan.k_index), v_THK.index_select(0, plan.k_index)
    options: dict[str, Any] = {}
    # Between torch 2.10 and 2.12 the causal flag became a window, and grouped queries an option.
    if "window_size" in _VARLEN_PARAMETERS:
        options["window_size"] = (-1, 0) if plan.causal else (-1, -1)
    else:
        options["is_causal"] = plan.causal
    heads, key_heads = q_THK.shape[1], k_THK.shape[1]
    if heads != key_heads:
        if "enable_gqa" in _VARLEN_PARAMETERS:
            options["enable_gqa"] = True
        else:
            k_THK = k_THK.repeat_interleave(heads // key_heads, dim=1)
            v_THK = v_THK.repeat_interleave(heads // key_heads, dim=1)
    lengths = (plan.cu_seqlens_q_S, plan.cu_seqlens_k_S, plan.max_q, plan.max_k)
    return varlen_attn(q_THK, k_THK, v_THK, *lengths, **options)


def _attend_groups(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
    """SDPA: one batched call for all segments of equal lengths, after which rows are put back in order."""
    prepare(plan, q_THK)
    assert plan.groups is not None
    outputs = []
    for q_rows, k_rows, count, q_length, k_length, mask_QK in plan.groups:
        q, k, v = (
            x.unflatten(0, (count, length)).transpose(1, 2)
            for x, length in ((q_THK[q_rows], q_length), (k_THK[k_rows], k_length), (v_THK[k_rows], k_length))
        )
        out = sdpa(q, k, v, mask_QK, is_causal=plan.causal and mask_QK is None)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return joined if plan.restore_T is None else joined[plan.restore_T]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask_QL: Tensor | None, is_causal: bool = False) -> Tensor:
    """SDPA of queries [n, H, Q, K] with keys and values [n, G, L, K], where H is a multiple of G (grouped queries).

    With `enable_gqa` some backends refuse: flash attention if there is a mask, memory-efficient attention always. What
    is left of them computes in float32 through memory. So the heads of a group become rows of one head; where a mask
    would have to be made for that, keys and values are repeated on a GPU.
    """
    groups, heads = k.shape[1], q.shape[1]
    if heads == groups:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_QL, is_causal=is_causal)
    if is_causal:
        if q.device.type == "cuda":
            k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != heads)
    if mask_QL is not None:
        mask_QL = mask_QL.repeat(*(1 for _ in mask_QL.shape[:-2]), heads // groups, 1)
    rows = q.unflatten(1, (groups, -1)).flatten(2, 3)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask_QL).unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def _prepare_groups(plan: AttentionPlan, x: Tensor) -> None:
    by_length: dict[tuple[int, int], list[Segment]] = {}
    for segment in plan.segments:
        by_length.setdefault((segment.q_length, segment.k_length), []).append(segment)
    plan.groups, order = [], []
    for (q_length, k_length), members in by_length.items():
        order.append(q_rows := torch.cat([torch.arange(s.q_start, s.q_start + q_length) for s in members]))
        k_rows = torch.cat([key_rows(s, plan.past) for s in members])
        mask_QK = None
        if plan.causal and q_length != k_length:  # aligned lower right, which SDPA's own flag is not
            mask_QK = move(torch.ones(q_length, k_length, dtype=torch.bool).tril(k_length - q_length), x.device)
        rows = _rows(q_rows, x.device), _rows(k_rows, x.device)
        plan.groups.append((*rows, len(members), q_length, k_length, mask_QK))
    rows_T = torch.cat(order)
    is_in_order = torch.equal(rows_T, torch.arange(len(rows_T)))
    plan.restore_T = None if is_in_order else move(torch.argsort(rows_T), x.device)


def _rows(index: Tensor, device: torch.device) -> slice | Tensor:
    """A slice if the rows are consecutive, which gives a view instead of a copy."""
    start = int(index[0])
    if torch.equal(index, torch.arange(start, start + index.numel())):
        return slice(start, start + index.numel())
    return move(index, device)
