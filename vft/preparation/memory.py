"""Memory of a training step: planned on fake tensors, or tried with the longest row.

The plan runs the real forward and backward on tensors without values and counts every storage. It takes seconds on any
machine, is exact up to the allocator's rounding, and needs no formula that has to follow the code.
tests/unit/preparation/test_memory.py compares it with what torch's profiler sees in a real step.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
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
from vft.data.dataset import Dataset
from vft.data.packing import PackPlan
from vft.distributed.process_group import World, local_part
from vft.models.attention import planning_for, prepare
from vft.models.base import Objective, VideoLanguageModel
from vft.models.flops import RECOMPUTED
from vft.models.quantization import is_packed
from vft.parallel.parallelize import checkpoint_activations, materialise, offloaded, shard
from vft.preparation.synthetic import row_of

logger = logging.getLogger(__name__)

MODES = tuple(RECOMPUTED)
"""Modes of activation checkpointing, from the one that saves most activations to the one that saves fewest."""
GIB = 1 << 30


def resolve_checkpointing(
    config: ParallelConfig,
    model: VideoLanguageModel,
    objective: Objective,
    row: Batch | None,
    world: World,
) -> ParallelConfig:
    """Replace `activation_checkpointing = "auto"` by the mode that recomputes least and fits the budget.

    `model` is on the meta device, and what is trained has been chosen. `row` is the longest one. Raises UserError if no
    mode fits.
    """
    budget_gib = config.memory_budget_gib
    assert budget_gib is not None
    if row is None:
        raise UserError('parallel.activation_checkpointing = "auto": a stream has no longest row; name a mode')
    needed_gib: dict[str, float] = {}
    for mode in MODES:
        candidate = deepcopy(model)
        checkpoint_activations(candidate, mode, config.vision_checkpointing)
        resident = resident_bytes(candidate, config.shard or world.size, config)
        needed_gib[mode] = (resident + run_step(candidate, objective, row, world.device).peak) / GIB
        if needed_gib[mode] <= budget_gib:
            sizes = ", ".join(f"{name} {gib:.1f}" for name, gib in needed_gib.items())
            logger.info("activation_checkpointing = %s: %s GiB of %g", mode, sizes, budget_gib)
            return config.model_copy(update={"activation_checkpointing": mode})
    raise UserError(
        f"parallel.memory_budget_gib = {budget_gib:g}: the longest row, {row.num_tokens} tokens, takes "
        f"{needed_gib['full']:.1f} GiB even with full activation checkpointing; lower data.pack_tokens, shard over "
        "more devices, or raise it"
    )


def memory_preflight(model: VideoLanguageModel, objective: Objective, row: Batch, device: torch.device) -> str:
    """Run forward and backward of a row, and discard the gradients. Returns a message with time and memory.

    With a sharded model every process must call it. Raises UserError if the device's memory is too small.
    """
    began = time.perf_counter()
    size = f"{row.num_tokens:,} tokens, {row.pixels_PD.shape[0]:,} vision patches"
    try:
        objective(model, row.to(device)).backward()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the longest row, {size} (samples {', '.join(row.sample_ids)[:80]}), doesn't fit in the memory of "
            f"{device}: {first_line(error)} Lower data.pack_tokens, or see tools/plan.py for what else helps",
            on_one_rank=True,
        ) from error
    model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    message = f"longest row: {size}: forward and backward in {seconds:.1f} s"
    if device.type != "cuda":
        return message
    return f"{message}, {torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB at most"


def longest_row(documents: Dataset, plan: PackPlan) -> Batch | None:
    """The row of the first epoch with the most tokens (and of several the most patches), with blank pixels.

    None if everything is streamed, because the rows of streams are not known in advance.
    """
    if not documents.documents:
        return None
    work, processor = [planned.work for planned in documents.documents], documents.encoder.processor
    pack = max(plan.first_packs, key=lambda pack: [sum(work[n][place] for n in pack) for place in (0, 2)])
    row = row_of(processor, [documents.build(number) for number in pack])
    blank_1D = torch.zeros_like(row.pixels_PD[:1])  # the row stays in memory: one patch stands for all
    return replace(row, pixels_PD=blank_1D.expand_as(row.pixels_PD))


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
            sizes["host"] += 1 << (share - 1).bit_length()  # torch pins memory in powers of two
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
) -> LiveBytes:
    """Run forward and backward of one row on fake tensors, as on `device`. Returns what it allocated: activations and
    gradients, not weights.

    With a mesh the model is sharded as in training; its process group may be a fake one. `model` is on the meta device,
    and cannot be used afterwards.
    """
    x = torch.empty(0, dtype=model.compute_dtype)
    with planning_for(device):
        for plan, length in _plans(row):
            prepare(plan, x.new_empty(length))
        # Inputs that are not fake: the mesh's tensors, and constant tables such as NF4's.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            config = config or ParallelConfig()
            if mesh is not None:
                shard(model, mesh, model.compute_dtype, config)
            materialise(model, torch.device("cpu"), config)
            with FakeCopyMode(mode):
                batch = deepcopy(row)
            with LiveBytes(map(local_part, model.parameters())) as live:
                objective(model, batch).backward()
    return live


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators have made and that are alive, except those of `known` tensors.

    FSDP2 frees and refills the storages of gathered weights: their current size counts.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self._noted = 0
        self._at_peak: list[tuple[list[int], int]] = []
        self._sizes = WeakIdKeyDictionary()  # of each storage, in a list with one element that may change
        for tensor in known:
            self._sizes[tensor.untyped_storage()] = [0]
        self._refilled: list[list[int]] = []
        self._alive: dict[int, list[int]] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> LiveBytes:
        """Start counting."""

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            if (known := self._sizes.get(storage)) is not None:
                self._refilled.append(known)
                self._grow(known, size - known[0])
            return self._resize(storage, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

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
        self.now += by
        self._alive[id(size)] = size
        if self.now > self.peak:
            if self.now > 1.001 * self._noted:
                self._at_peak, self._noted = [(one, one[0]) for one in self._alive.values()], self.now
            self.peak = self.now

    def _drop(self, size: list[int]) -> None:
        self.now -= size[0]
        size[0] = 0
        self._alive.pop(id(size), None)

    @property
    def gathered_at_peak(self) -> int:
        """Bytes of weights that FSDP2 had gathered at the peak."""
        refilled = {id(size) for size in self._refilled}
        return sum(held for size, held in self._at_peak if id(size) in refilled)


def _plans(row: Batch) -> list[tuple[AttentionPlan, int]]:
    """Every attention plan of the row, and how many rows it has."""
    plans = [] if row.layout is None else list(row.layout.plans.values())
    components = [(plan, sum(segment.q_length for segment in plan.segments)) for plan in plans]
    return [(row.plan, row.input_ids_T.numel()), *components]
