"""Memory of a training step: planned on fake tensors, or tried with the longest row.

The plan runs the real forward and backward on tensors without values and counts every storage. It takes seconds on any
machine, is exact up to the allocator's rounding, and needs no formula that has to follow the code.
tests/unit/preparation/test_memory.py compares it with what torch's profiler sees in a real step.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vft.common.errors import UserError, first_line
from vft.common.types import AttentionPlan, Batch
from vft.config.run import ParallelConfig
from vft.data.dataset import Dataset, Work
from vft.data.packing import PackPlan
from vft.distributed.process_group import World, all_of, local_part, local_world_size
from vft.models.attention import check_kernel, has_kernel, planning_for, prepare
from vft.models.base import Objective, VideoLanguageModel
from vft.models.flops import RECOMPUTED
from vft.models.quantization import is_packed
from vft.parallel.parallelize import checkpoint_activations, materialise, offloaded, shard
from vft.preparation.synthetic import row_of

logger = logging.getLogger(__name__)

MODES = tuple(RECOMPUTED)
"""Modes of activation checkpointing, from the one that saves most activations to the one that saves fewest."""
GIB = 1 << 30
RESERVE, RESERVE_GIB = 0.05, 2.5
"""Share of a device's memory, and at least how much of it, that is left free."""


def usable_bytes(total: float) -> float:
    """What of a device's memory a step may take: the rest is for the driver, the allocator's holes, kernels' workspaces
    and the communication library."""
    return total - max(RESERVE_GIB * GIB, RESERVE * total)


def candidates(config: ParallelConfig, processes: int, per_host: int) -> list[ParallelConfig]:
    """The settings that `auto` may stand for, the fastest first: to compute again costs more than to gather weights
    within a host."""
    modes = MODES if config.activation_checkpointing == "auto" else (config.activation_checkpointing,)
    shards = [config.shard]
    if config.shard == "auto" and config.offload != "none":
        shards = [0]  # copies would fill the host's memory
    elif config.shard == "auto":
        within = [per_host] if 1 < per_host < processes and processes % per_host == 0 else []
        shards = [*([1] if processes > 1 else []), *within, 0]
    changes = [{"activation_checkpointing": mode, "shard": shard} for mode in modes for shard in shards]
    return [config.model_copy(update={**change, "memory_budget_gib": None}) for change in changes]


def resolve(
    config: ParallelConfig, model: VideoLanguageModel, objective: Objective, rows: Sequence[Batch], world: World
) -> ParallelConfig:
    """Replace every `auto` by what it stands for with this model on this device.

    `model` is on the meta device, and what is trained has been chosen. `rows` are the largest ones. Every process calls
    it. Raises UserError if nothing fits `memory_budget_gib`.
    """
    check_kernel(world.device, model.compute_dtype)  # memory and compiling depend on it
    if config.compile == "auto":
        config = config.model_copy(update={"compile": has_kernel(world.device, model.compute_dtype)})
    options = candidates(config, world.size, local_world_size())
    budget_gib = config.memory_budget_gib
    if budget_gib is None:
        if world.device.type != "cuda" or len(options) == 1 or not rows:
            return options[0].model_copy(update={"shard": 0} if config.shard == "auto" else {})
        budget_gib = min(all_of(usable_bytes(torch.cuda.mem_get_info(world.device)[0]))) / GIB
    if not rows:
        raise UserError("parallel.memory_budget_gib: a stream has no longest row to compare with it; take it out")
    peaks: dict[str, int] = {}
    for option in options:
        mode = option.activation_checkpointing
        if mode not in peaks:
            peaks[mode] = max(step_bytes(model, option, objective, row, world.device) for row in rows)
        needed_gib = (resident_bytes(model, option.shards(world.size), option) + peaks[mode]) / GIB
        if needed_gib <= budget_gib:
            message = "activation_checkpointing = %s, shard = %s, compile = %s: %.1f GiB of %.1f"
            logger.info(message, mode, option.shard, str(option.compile).lower(), needed_gib, budget_gib)
            return option
    tokens, what = rows[0].num_tokens, "lower data.pack_tokens, shard over more devices"
    what += ", or try parallel.offload=frozen (tools/plan.py says what fits)" if config.offload == "none" else ""
    if config.memory_budget_gib is None:  # the preflight tells how much it really takes
        message = "the longest row, %d tokens, is expected to take %.1f GiB of %.1f with all that auto may do: %s"
        logger.warning(message, tokens, needed_gib, budget_gib, what)
        return option
    raise UserError(
        f"parallel.memory_budget_gib = {budget_gib:g}: the longest row, {tokens} tokens, takes {needed_gib:.1f} GiB "
        f"even with {mode} activation checkpointing; {what}, or raise it"
    )


def inference_shard(config: ParallelConfig, model: VideoLanguageModel, world: World) -> int:
    """`config.shard` for a model that only answers. `auto`: a copy on each GPU, if it takes no more than half of it."""
    if config.shard != "auto":
        return config.shard
    if world.device.type != "cuda":
        return 0
    size = sum(parameter.nbytes for parameter in model.parameters())
    return 1 if 2 * size <= torch.cuda.get_device_properties(world.device).total_memory else 0


def step_bytes(
    model: VideoLanguageModel, config: ParallelConfig, objective: Objective, row: Batch, device: torch.device
) -> int:
    """Bytes of activations and gradients of a row."""
    candidate = deepcopy(model)
    checkpoint_activations(candidate, config.activation_checkpointing, config.vision_checkpointing)
    return run_step(candidate, objective, row, device).peak


def memory_preflight(model: VideoLanguageModel, objective: Objective, row: Batch, device: torch.device) -> str:
    """Run forward and backward of a row, and discard the gradients. Returns a message with time and memory.

    With a sharded model every process must call it. Raises UserError if the device's memory is too small.
    """
    began = time.perf_counter()
    size = f"{row.num_tokens:,} tokens, {row.pixels_PD.shape[0]:,} vision patches"
    try:
        objective(model, row.to(device)).flatten()[0].backward()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the longest row, {size} (samples {', '.join(row.sample_ids)[:80]}), doesn't fit in the memory of "
            f"{device}: {first_line(error)} Lower data.pack_tokens, or see tools/plan.py for what else helps",
            on_one_rank=True,
        ) from error
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    message = f"longest row: {size}: forward and backward in {seconds:.1f} s"
    if device.type != "cuda":
        return message
    return f"{message}, {torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB at most"


def largest_rows(documents: Dataset, plan: PackPlan) -> list[Batch]:
    """The rows of the first epoch that can take the most memory, with blank pixels: that with the most tokens, that
    whose questions attend the most keys of shared videos, and that with the most patches. Mostly two are the same.

    None of them if everything is streamed, because the rows of streams are not known in advance.
    """
    if not documents.documents:
        return []
    each, processor = documents.work, documents.encoder.processor
    work = {pack: Work(*map(sum, zip(*(each[n] for n in pack), strict=True))) for pack in plan.first_packs}
    # The keys of all segments are gathered for each layer if any prefix is shared; they come after equal tokens.
    orders: tuple[Callable[[Work], tuple[int, ...]], ...] = (
        lambda row: (row.tokens, row.keys, row.patches),
        lambda row: (row.keys, row.tokens, row.patches),
        lambda row: (row.patches, row.tokens, row.keys),
    )
    rows = []
    for pack in dict.fromkeys(max(work, key=lambda pack: order(work[pack])) for order in orders):
        row = row_of(processor, [documents.build(number) for number in pack])
        blank_1D = torch.zeros_like(row.pixels_PD[:1])  # the row stays in memory: one patch stands for all
        rows.append(replace(row, pixels_PD=blank_1D.expand_as(row.pixels_PD)))
    return rows


def resident_bytes(model: VideoLanguageModel, shards: int, config: ParallelConfig | None = None) -> int:
    """Bytes that stay on one of `shards` devices from step to step: weights, and AdamW's moments of trained ones.

    With several devices also gathered layers: the current and the next one, or all of them. Of offloaded weights, the
    device's share of two layers.
    """
    config = config or ParallelConfig()
    sizes = resident_sizes(model, shards, config)
    total = sum(sizes.values()) - sizes["host"]
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.decoder.layers]
    if shards > 1 or sizes["host"]:
        replicated = replicated_parameters(model)
        ends = sum(p.nbytes for p in model.parameters() if id(p) not in replicated) - sum(layers)
        total += (2 * max(layers) if config.reshard_after_forward else sum(layers)) + ends
    return total + copied_bytes(model, shards, config)


def resident_sizes(model: VideoLanguageModel, shards: int, config: ParallelConfig) -> dict[str, int]:
    """Bytes that stay on one of `shards` devices, and in its host's memory, by what they hold: `packed` weights in 4
    bits, other frozen `weights`, `trained` ones, `optimizer`, `host`."""
    sizes = {"packed": 0, "weights": 0, "trained": 0, "optimizer": 0, "host": 0}
    on_host = {id(p) for p in offloaded_parameters(model, config)}
    for parameter, share in shares(model, shards):
        if id(parameter) in on_host:
            sizes["host"] += share
        else:
            kind = "trained" if parameter.requires_grad else "packed" if is_packed(parameter) else "weights"
            sizes[kind] += share
        sizes["optimizer"] += 2 * share if parameter.requires_grad else 0
    return sizes


def shares(model: VideoLanguageModel, shards: int) -> list[tuple[nn.Parameter, int]]:
    """Every parameter, and how many bytes of it one of `shards` devices has."""
    replicated = replicated_parameters(model)
    return [(p, -(-p.nbytes // (1 if id(p) in replicated else shards))) for p in model.parameters()]


def replicated_parameters(model: VideoLanguageModel) -> set[int]:
    """`id` of each parameter that is not sharded: those of a vision encoder in which nothing is trained."""
    return set() if model.trains_vision else {id(p) for p in model.vision_parameters()}


def offloaded_parameters(model: VideoLanguageModel, config: ParallelConfig) -> list[nn.Parameter]:
    """Weights that are in host memory between uses."""
    return [p for module in offloaded(model, config) for p in module.parameters(recurse=False)]


def copied_bytes(model: VideoLanguageModel, shards: int, config: ParallelConfig) -> int:
    """Bytes of a device's share of two offloaded layers: the one that is gathered, and the next."""
    on_host = {id(p) for p in offloaded_parameters(model, config)}
    layers = [sum(p.nbytes for p in layer.parameters() if id(p) in on_host) for layer in model.decoder.layers]
    return 2 * -(-max(layers) // shards)


def run_step(
    model: VideoLanguageModel,
    objective: Objective,
    row: Batch,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    config: ParallelConfig | None = None,
    watcher: Any = None,
    whole: bool = False,
) -> LiveBytes:
    """Run forward and backward of one row on fake tensors, as on `device`. Returns what it allocated: activations and
    gradients, not weights. `watcher` is a mode that sees the operators, too.

    Of layers that are alike, only a few are run, unless the `whole` model is to be: what the others would do is what
    one of these does. `watcher.times` says for how many layers the one at work stands.

    With a mesh the model is sharded as in training; its process group may be a fake one. `model` is on the meta device,
    and cannot be used afterwards.
    """
    x = torch.empty(0, dtype=model.compute_dtype)
    with planning_for(device):
        for plan, length in _plans(row):
            prepare(plan, x.new_empty(length))
        model.decoder.prepare(row.plan, x)
        planned = replace(
            row, plan=replace(row.plan, recurrence=row.plan.recurrence and row.plan.recurrence.flattened())
        )
        watchers = [] if watcher is None else [watcher]
        if not whole and not model.decoder.routing_weight:  # the loss of which reads something of every layer
            _shorten(model, watchers)
        config = config or ParallelConfig()
        if mesh is not None:
            shard(model, mesh, model.compute_dtype, config)
        # Inputs that are not fake: the mesh's tensors, and constant tables such as NF4's.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            materialise(model, torch.device("cpu"), config)
            with FakeCopyMode(mode):
                batch = deepcopy(planned)
            with LiveBytes(map(local_part, model.parameters())) as live, watcher or nullcontext():
                watchers.append(live)
                objective(model, batch).flatten()[0].backward()
    return live


def _shorten(model: VideoLanguageModel, watchers: Sequence[Any]) -> None:
    """Take repeated layers out of the decoder. `times` of the watchers becomes the number of layers that one stands for
    while it runs.

    Left are those that differ: the first ones, to which further tensors are added, the first of each kind, which free
    what all of the kind have saved, and the last one; beside each of them one of the others, because FSDP2 gathers the
    neighbour's weights.
    """
    layers: Any = model.decoder.layers
    kinds = [[(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()] for layer in layers]
    period = next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])
    first = max(model.vision.added + 1, period)
    after = first + period
    taken = max(0, len(layers) - after - 2) // period
    del layers[after : after + taken * period]

    def repeat(times: int, *_: Any) -> None:
        for watcher in watchers:
            watcher.times = times

    def begin(forwards: int, backwards: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        repeat(forwards)
        if inputs[0].requires_grad:
            inputs[0].register_hook(partial(repeat, backwards))

    if taken:
        layers[first].register_forward_pre_hook(partial(begin, taken + 1, 1))
        layers[after].register_forward_pre_hook(partial(begin, 1, taken + 1))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators have made and that are alive, except those of `known` tensors.

    FSDP2 frees and refills the storages of gathered weights: their current size counts.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = self.gathered_at_peak = 0
        """Most bytes at once, and what of them were weights that FSDP2 had gathered."""
        self.times = 1
        """How often what happens now is repeated: it is counted again after each unbroken stretch."""
        self._sizes = WeakIdKeyDictionary()  # of each storage, in a list with one element that may change
        for tensor in known:
            self._sizes[tensor.untyped_storage()] = [0]
        self._changes: list[tuple[int, list[int], int]] = []  # `times`, a size, and what is added to it
        self._refilled: set[int] = set()
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> LiveBytes:
        """Start counting."""

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            if (known := self._sizes.get(storage)) is not None:
                self._refilled.add(id(known))
                self._grow(known, size - known[0])
            return self._resize(storage, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)
        now = gathered = 0
        for times, stretch in groupby(self._changes, itemgetter(0)):
            for _, size, by in list(stretch) * times:
                now += by
                gathered += by if id(size) in self._refilled else 0
                if now > self.peak:
                    self.peak, self.gathered_at_peak = now, gathered

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count the storages that it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._sizes:
                self._sizes[storage] = size = [0]
                self._grow(size, storage.nbytes())
                weakref.finalize(storage, self._drop, size)
        return result

    def _grow(self, size: list[int], by: int) -> None:
        size[0] += by
        self._changes.append((self.times, size, by))

    def _drop(self, size: list[int]) -> None:
        self._grow(size, -size[0])


def _plans(row: Batch) -> list[tuple[AttentionPlan, int]]:
    """Every attention plan of the row, and how many rows it has."""
    plans = [] if row.layout is None else list(row.layout.plans.values())
    components = [(plan, sum(segment.q_length for segment in plan.segments)) for plan in plans]
    return [(row.plan, row.input_ids_T.numel()), *components]
