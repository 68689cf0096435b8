"""Which settings of a run fit a GPU's memory, and how long a step takes, before any GPU is rented.

`Planner` runs the trainer's own sharding, forward and backward on tensors without values, in a fake process group, and
counts what they hold. What to change is tried, not guessed.

Times are estimates. Products take what their FLOPs or their bytes take at assumed shares of the card's peaks. After
them come the other kernels (`vft.preparation.kernels`), at the rate of the memory. All of it takes no less than the
host takes to launch it.

The traffic between GPUs is that of the trainer's sharding: a decoder layer is gathered for each pass, gradients are
reduced once a step (adapters) or once a row (full fine-tuning), offloaded weights are copied from the host before they
are gathered. All of these overlap, so the slowest of them is the time of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from vft.adapters.targets import choose_trainable
from vft.common.device_specs import Card
from vft.common.types import Batch
from vft.config import run as configs
from vft.config.run import Config
from vft.distributed.process_group import World, make_mesh
from vft.models.base import Objective, VideoLanguageModel
from vft.models.flops import FlopCounter
from vft.models.released import RELEASED, build_from_config
from vft.parallel.parallelize import checkpoint_activations
from vft.preparation.kernels import KernelCounter, Kernels
from vft.preparation.memory import (
    GIB,
    MODES,
    candidates,
    copied_bytes,
    offloaded_parameters,
    replicated_parameters,
    resident_sizes,
    run_step,
    usable_bytes,
)
from vft.preparation.run import DTYPES, open_for_training

MAX_GPUS = 512
"""Largest number of GPUs that is tried."""
WORTH_IT = 0.97
"""A faster setting is proposed if a step takes at most this share of the time."""
PRODUCT_SHARE, MEMORY_SHARE = 0.65, 0.78
"""Assumed shares of a card's data-sheet FLOP/s and memory traffic that large kernels reach."""
AMD_PRODUCT_SHARE = 0.42
"""The same of products on an MI card, whose power limits their clock further."""
ATTENTION_SHARE = 0.7
"""Assumed rate of attention, relative to that of products."""
LAUNCH_S = 4.5e-6
"""Assumed time in which the host launches a kernel."""
LINK_SHARE = 0.7
"""Assumed share of a link's data-sheet rate that collectives and copies reach."""


@dataclass(frozen=True)
class Setting:
    """A run and the GPUs that it is planned for."""

    config: Config
    gpus: int
    """Number of processes, one a GPU."""
    memory_gib: float
    """Of one GPU."""
    text_tokens: int
    """Tokens of a sample beside its video."""
    card: Card | None
    """None: no times are computed."""
    efficiency: float
    """Assumed share of the card's peak that products reach, above 0 and at most 1."""
    gpus_per_host: int = 8
    network_gb_s: float = 50.0
    """10^9 bytes a second between hosts, for each GPU and direction (400 Gb/s: 50)."""

    @property
    def shards(self) -> int:
        """Number of processes over which the weights are sharded."""
        return self.config.parallel.shards(self.gpus)

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU without the reserve."""
        return usable_bytes(self.memory_gib * GIB)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return DTYPES[self.config.train.precision]

    def changed(self, model: dict[str, Any] | None = None, **parallel: Any) -> Setting:
        """The same with other values in `[model]` and `[parallel]`."""
        changes = {"model": model or {}, "parallel": parallel}
        tables = {name: getattr(self.config, name).model_copy(update=change) for name, change in changes.items()}
        return replace(self, config=self.config.model_copy(update=tables))

    def changes_to(self, other: Setting) -> dict[str, Any]:
        """The settings of `other` that differ from these, by dotted key."""
        changes = configs.differences(self.config, other.config, ignore=("parallel.memory_budget_gib",))
        return {key: value for key, _, value in changes}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment of a step, by what they hold."""

    setting: Setting
    sizes: dict[str, int]
    """Those of `resident_sizes`; `gathered` weights, from the other GPUs or copied from the host, for the layers at
    work; `activations` and gradients."""

    @property
    def total(self) -> int:
        """All bytes on the GPU."""
        return sum(self.sizes.values()) - self.sizes["host"]

    @property
    def fits(self) -> bool:
        """Whether the GPU's memory is enough."""
        return self.total <= self.setting.usable_bytes


@dataclass(frozen=True)
class Step:
    """One step of rows like one row, on each GPU. Reductions move the same bytes from the GPU as to it."""

    setting: Setting
    rows: int
    flops: float
    """Of a row."""
    gathered: float
    """Bytes of layers' weights, gathered for every pass of every row."""
    reduced: float
    """Bytes of gradients, within a group of GPUs that shares the weights."""
    replicas: float
    """Bytes of gradients, between such groups."""
    host: float
    """Bytes from host memory: offloaded weights and pixels."""
    model_flops: float = 0.0
    """Of a row, without recomputation."""
    kernels: Kernels | None = None
    """Of a row. None: time is counted for the products alone."""

    @property
    def moved(self) -> float:
        """Bytes from other GPUs."""
        return self.gathered + self.reduced + self.replicas

    @property
    def parts(self) -> dict[str, float]:
        """Seconds on the setting's card, by resource.

        A ring through hosts with g GPUs, each with a network card, moves 1/g of its bytes through each card.
        """
        setting, card, per_host = self.setting, self.setting.card, self.setting.gpus_per_host
        assert card is not None
        within = self.gathered + self.reduced
        crossing = within / per_host if setting.shards > per_host else 0.0
        if setting.gpus > per_host:
            crossing += self.replicas / max(1, per_host // setting.shards)
        links = within + (self.replicas if setting.shards < per_host else 0.0)
        products_s, beside_s, launches_s = self._computing(card)
        return {
            "products": products_s,
            "memory traffic beside products": beside_s,
            "launching kernels": launches_s,
            "links between GPUs": links / (card.link_gb_s * 1e9 * LINK_SHARE),
            "the network between hosts": crossing / (setting.network_gb_s * 1e9 * LINK_SHARE),
            "copies from the host's memory": self.host / (card.pcie_gb_s * 1e9 * LINK_SHARE),
        }

    def _computing(self, card: Card) -> tuple[float, float, float]:
        """Seconds of products and attention, of the other kernels, and of launching all of them."""
        rate = card.peak(self.setting.dtype) * self.setting.efficiency
        if self.kernels is None:
            return self.rows * self.flops / rate, 0.0, 0.0
        memory, kernels = card.memory_gb_s * 1e9 * MEMORY_SHARE, self.kernels
        products_s = sum(count * max(flops / rate, size / memory) for (flops, size), count in kernels.products.items())
        attention_s = max(0.0, self.flops - kernels.product_flops) / (rate * ATTENTION_SHARE)
        compiled = self.setting.config.parallel.compile is not False
        size = kernels.fused_bytes if compiled else kernels.bytes
        launches = kernels.fused_launches if compiled else kernels.launches
        return self.rows * (products_s + attention_s), self.rows * size / memory, self.rows * launches * LAUNCH_S

    @property
    def seconds(self) -> float:
        """Time of the step, which is that of its slowest part."""
        products_s, beside_s, launches_s, *moving, host_s = self.parts.values()
        computing_s = max(products_s + beside_s, launches_s)
        # One process alone copies offloaded weights when they are used, not ahead.
        return computing_s + host_s if self.setting.gpus == 1 else max(computing_s, *moving, host_s)

    @property
    def bound(self) -> str:
        """What takes the most time."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def mfu(self) -> float:
        """Model FLOPs, as a share of what the card could compute in the step's time."""
        assert self.setting.card is not None
        return self.rows * self.model_flops / self.seconds / self.setting.card.peak(self.setting.dtype)


@dataclass(frozen=True)
class Search:
    """What `Planner.search` tried."""

    tried: list[Memory]
    """The settings as they are, then with one change after another."""
    faster: Memory | None = None
    """Faster settings that fit too."""
    enough_gpus: Memory | None = None
    """If nothing fits: the smallest number of GPUs that was found to hold the run."""

    @property
    def fitting(self) -> list[Memory]:
        """Those of `tried` that fit; the first one is to be taken."""
        return [memory for memory in self.tried if memory.fits]

    @property
    def smallest(self) -> Memory:
        """That of `tried` with the least memory."""
        return min(self.tried, key=lambda memory: memory.total)


@dataclass
class Planner:
    """Counts memory and time of settings whose longest row is the same."""

    objective: Objective
    """The loss that is minimised."""
    models: dict[str, VideoLanguageModel] = field(default_factory=dict)
    """Models that have been built, by their settings; `model_of` gives them out to be looked at only."""
    kernels: dict[tuple[str, str], Kernels] = field(default_factory=dict)
    """Those of a row that were counted, by quantization and recomputation."""

    def model_of(self, config: Config) -> VideoLanguageModel:
        """The model on the meta device, for reading only: it is built once."""
        key = config.model_dump_json(include={"model", "lora", "train"})
        if key not in self.models:
            self.models[key] = build_planned(config)
        return self.models[key]

    def resident_bytes(self, setting: Setting) -> int:
        """Bytes that stay on one GPU: no step takes less."""
        sizes = resident_sizes(self.model_of(setting.config), setting.shards, setting.config.parallel)
        return sum(size for kind, size in sizes.items() if kind != "host")

    def memory(self, setting: Setting, row: Batch) -> Memory:
        """What one GPU holds in a step of rows like `row`, counted in a step on tensors without values."""
        parallel, model = setting.config.parallel, build_planned(setting.config)
        checkpoint_activations(model, parallel.activation_checkpointing, parallel.vision_checkpointing)
        sizes = resident_sizes(model, setting.shards, parallel)
        copied = copied_bytes(model, setting.shards, parallel)  # the counted step has nothing to copy
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setting.gpus)
        try:
            world = World(0, setting.gpus, 0, torch.device("cpu"))
            needs_mesh = setting.gpus > 1 or parallel.offload != "none"
            mesh = make_mesh(world, setting.shards) if needs_mesh else None
            live = run_step(model, self.objective, row, torch.device("cuda"), mesh, parallel)
        finally:
            dist.destroy_process_group()
        gathered = live.gathered_at_peak
        return Memory(setting, {**sizes, "gathered": gathered + copied, "activations": live.peak - gathered})

    def search(self, setting: Setting, row: Batch) -> Search:
        """Find settings that fit; if there are some, also faster ones, else the number of GPUs that holds the run."""
        tried: list[Memory] = []
        for attempt in self._attempts(setting):
            tried.append(self.memory(attempt, row))
            if tried[-1].fits:
                break
        else:
            tried += [self.memory(attempt, row) for attempt in self._last_resorts(tried[-1].setting)]
        search = Search(tried)
        if search.fitting:
            return replace(search, faster=self._find_faster(tried, row))
        # Offloading and 4 bits only as far as the user chose them.
        asked = tried[0].setting.config
        unchanged = {"quantize": asked.model.quantize}
        sharded = search.smallest.setting.changed(unchanged, shard=0, offload=asked.parallel.offload)
        return replace(search, enough_gpus=self._find_enough_gpus(sharded, row))

    def _attempts(self, setting: Setting) -> Iterator[Setting]:
        """The settings as they are, with what `auto` may stand for, then, one after another, changes that take less
        memory and more time."""
        for option in candidates(setting.config.parallel, setting.gpus, setting.gpus_per_host):
            setting = replace(setting, config=setting.config.model_copy(update={"parallel": option}))
            yield setting
        parallel = setting.config.parallel
        later = MODES[MODES.index(parallel.activation_checkpointing) + 1 :]
        changes: list[dict[str, Any]] = []
        if setting.gpus > 1 and parallel.shard not in (0, setting.gpus):
            changes.append({"shard": 0})
        if setting.gpus > 1 and not parallel.reshard_after_forward:  # one GPU gathers nothing
            changes.append({"reshard_after_forward": True})
        for change in [*changes, *({"activation_checkpointing": mode} for mode in later)]:
            setting = setting.changed(**change)
            yield setting

    def _last_resorts(self, setting: Setting) -> list[Setting]:
        """Settings for the case that full recomputation is not enough: frozen matrices in the host's memory, or in 4
        bits. None of them if nothing is frozen."""
        config = setting.config
        offloaded, packed = setting.changed(offload="frozen"), setting.changed({"quantize": "nf4"})
        settings = []
        if config.parallel.offload == "none" and offloaded_parameters(self.model_of(config), offloaded.config.parallel):
            settings.append(offloaded)
        if config.model.quantize == "none" and config.lora is not None:
            settings.append(packed)
        return settings

    def _find_faster(self, tried: list[Memory], row: Batch) -> Memory | None:
        """The fastest settings with the same results as the first of `tried` that fit, if they fit too; None if nothing
        is gained.

        Traffic beside the products costs no time in the estimate, but does on a real link: of two settings that take
        equally long, the one with less traffic is taken.
        """
        setting = next(memory.setting for memory in tried if memory.fits)
        parallel, known = setting.config.parallel, [memory.setting for memory in tried]
        modes = MODES[: MODES.index(parallel.activation_checkpointing) + 1]
        shards = {parallel.shard, 1} if setting.gpus > 1 else {parallel.shard}
        resharded = {parallel.reshard_after_forward, False} if setting.gpus > 1 else {parallel.reshard_after_forward}
        here: dict[str, Any] = {"reshard_after_forward": True, "offload": "none"}
        time, traffic = self._cost(setting, row)
        candidates = []
        for mode, shard, reshard, offload in product(modes, shards, resharded, {parallel.offload, "none"}):
            if shard == 1 and reshard != parallel.reshard_after_forward:
                continue  # nothing is gathered then
            candidate = setting.changed(
                activation_checkpointing=mode, shard=shard, reshard_after_forward=reshard, offload=offload
            )
            # Wherever the weights are, the activations are those that were counted before.
            alike = [m.sizes["activations"] for m in tried if m.setting.changed(**here) == candidate.changed(**here)]
            least = self.resident_bytes(candidate) + max(alike, default=0)
            if candidate in known or least > candidate.usable_bytes:
                continue
            its_time, its_traffic = self._cost(candidate, row)
            is_better = its_time < WORTH_IT * time or (its_time <= time and its_traffic < traffic / 2)
            if is_better:
                candidates.append((its_time, its_traffic, candidate))
        for _, _, candidate in sorted(candidates, key=lambda entry: entry[:2]):
            if (memory := self.memory(candidate, row)).fits:
                return memory
        return None

    def _find_enough_gpus(self, setting: Setting, row: Batch) -> Memory | None:
        """The run on twice as many GPUs, four times as many, and so on, until it fits; None if `MAX_GPUS` do not
        hold it."""
        count = setting.gpus * 2
        while count <= MAX_GPUS:
            more = replace(setting, gpus=count)
            if self.resident_bytes(more) <= more.usable_bytes and (tried := self.memory(more, row)).fits:
                return tried
            count *= 2
        return None

    def _cost(self, setting: Setting, row: Batch) -> tuple[float, float]:
        """Seconds of a step (its FLOPs, if no card is named), and the bytes that it moves."""
        step = self.step(setting, row)
        return step.flops if setting.card is None else step.seconds, step.moved + step.host

    def step(self, setting: Setting, row: Batch) -> Step:
        """What a step of rows like `row` computes and moves."""
        kernels = self.kernels_of(setting.config, row) if setting.card is not None else None
        return step_of(self.model_of(setting.config), setting, row, kernels)

    def kernels_of(self, config: Config, row: Batch) -> Kernels:
        """The kernels of a row, counted in a step on tensors without values. Sharding changes none of them."""
        parallel = config.parallel
        key = config.model.quantize, parallel.activation_checkpointing
        if key not in self.kernels:
            model, counter = build_planned(config), KernelCounter()
            checkpoint_activations(model, parallel.activation_checkpointing, parallel.vision_checkpointing)
            run_step(model, self.objective, row, torch.device("cuda"), watcher=counter)
            self.kernels[key] = counter.kernels
        return self.kernels[key]


def overrides(changes: Mapping[str, Any]) -> str:
    """Settings by dotted key as overrides of a command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def step_of(model: VideoLanguageModel, setting: Setting, row: Batch, kernels: Kernels | None = None) -> Step:
    """What a step of rows like `row` computes and moves. What `model` trains has been chosen; it may be on the meta
    device."""
    config, shards = setting.config, setting.shards
    rows, groups, others = config.train.packs_per_step // setting.gpus, setting.gpus // shards, (shards - 1) / shards
    replicated = replicated_parameters(model)
    in_layers = {id(p) for p in model.decoder.layers.parameters()}
    layers = rest = trained = 0
    for parameter in model.parameters():
        # Trained weights are cast before they are gathered; frozen ones, also packed ones, keep their dtype.
        width = model.compute_dtype.itemsize
        size = parameter.numel() * width if parameter.requires_grad else parameter.nbytes
        if id(parameter) in in_layers:
            layers += size
        elif id(parameter) not in replicated:
            rest += size
        trained += parameter.numel() if parameter.requires_grad else 0
    passes = 2 if config.parallel.reshard_after_forward else 1
    reductions = 1 if config.lora is not None else rows
    offloaded = sum(p.nbytes for p in offloaded_parameters(model, config.parallel)) / shards
    flops = FlopCounter(model, config.parallel.activation_checkpointing).count(row)
    return Step(
        setting,
        rows,
        flops.hardware,
        gathered=rows * (passes * layers + rest) * others,
        reduced=reductions * 4 * trained * others,
        replicas=reductions * 2 * 4 * trained / shards * (groups - 1) / groups,
        host=rows * (passes * offloaded + row.pixels_PD.nbytes),
        model_flops=flops.model,
        kernels=kernels,
    )


def build_planned(config: Config) -> VideoLanguageModel:
    """A model on the meta device, with what is trained; from its config.json, or that of the released size."""
    released = next((known for part, known in RELEASED.items() if part in config.model.path), None)
    if Path(config.model.path).is_dir() or released is None:
        return open_for_training(config).model
    dtype = DTYPES[config.train.precision]
    model = build_from_config(released, dtype, config.model.quantize, config.model.rope_factor)
    choose_trainable(model, config.lora, config.model.train)
    return model
