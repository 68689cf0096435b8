#!/usr/bin/env python
"""Memory and time of a run before any GPU is rented: python tools/plan.py CONFIG.toml --gpus 8 --gpu-memory-gib 80

The trainer's own sharding, forward and backward run on tensors without values, in a process group that is not there;
what they would hold is counted. Times follow from FLOPs and a share of the peak that is assumed, not measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from rows import row_of, video_document
from workload import MODELS, RELEASED, build_model

from vft import config as configs
from vft.config import Config, ParallelConfig
from vft.console import user_errors
from vft.data.budget import limits_of, plan_media
from vft.distributed import World, make_mesh
from vft.flops import PEAK_FLOPS, FlopCounter
from vft.lora import choose_trainable
from vft.memory import GIB, MODES, copied_bytes, offloaded_parameters, run_step, shares
from vft.models import build
from vft.models.weights import Checkpoint
from vft.nf4 import is_packed, true_shapes
from vft.parallel import checkpoint_activations
from vft.types import Batch, MediaInfo, MediaRef, UserError

FILMED = (1080, 1920)
"""Height and width of the videos, before they are fitted into the limits."""
RESERVE = 0.05
"""Share of the memory that is left to the allocator, to kernels' workspaces and to the communication library."""


@dataclass(frozen=True)
class Setting:
    """What is planned."""

    config: Config
    gpus: int
    memory_gib: float
    text_tokens: int
    device: torch.device


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment of a step, by what they are."""

    parallel: ParallelConfig
    packed: int
    weights: int
    adapters: int
    optimizer: int
    gathered: int
    activations: int
    host: int
    """Pinned for this GPU in its host's memory, and not in the total."""

    @property
    def total(self) -> int:
        """Everything."""
        return self.packed + self.weights + self.adapters + self.optimizer + self.gathered + self.activations


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path, help="TOML file of a training run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    parser.add_argument("--gpus", type=int, required=True, help="processes, one a GPU")
    parser.add_argument("--gpu-memory-gib", type=float, required=True, help="of each")
    parser.add_argument("--gpu", choices=sorted(PEAK_FLOPS), default="MI300X", help="for times (default MI300X)")
    parser.add_argument("--efficiency", type=float, default=0.35, help="assumed share of its peak (default 0.35)")
    parser.add_argument("--text-tokens", type=int, default=300, help="of a sample, beside its video (default 300)")
    parser.add_argument("--disk-gb-s", type=float, default=2.0, help="reading speed, 10^9 bytes a second (default 2)")
    arguments = parser.parse_intermixed_args()
    with user_errors():
        check(arguments)
        config = configs.load(arguments.config, arguments.overrides)
        config.require_training()
        setting = Setting(config, arguments.gpus, arguments.gpu_memory_gib, arguments.text_tokens, torch.device("cuda"))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.gpus)
        show(setting, arguments)


def check(arguments: argparse.Namespace) -> None:
    """UserError where a number makes no sense."""
    for name in ("gpus", "gpu_memory_gib", "text_tokens", "disk_gb_s"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be above 0")
    if not 0 < arguments.efficiency <= 1:
        raise UserError(f"--efficiency {arguments.efficiency}: must be above 0, at most 1")


def show(setting: Setting, arguments: argparse.Namespace) -> None:
    """Print the plan; SystemExit(1) where nothing fits."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    config, row = setting.config, longest_row(setting)
    console.print(
        f"{config.model.path} on {setting.gpus} x {setting.memory_gib:g} GiB; a row of {row.num_tokens:,} tokens, "
        f"{row.media_index_M.numel():,} of them video, {len(row.sample_ids)} sample(s)",
        highlight=False,
    )
    room = setting.memory_gib * (1 - RESERVE) * GIB
    plans = []
    # What to change is tried, not guessed.
    for parallel in attempts(config.parallel):
        plans.append(plan_memory(setting, parallel, row))
        if plans[-1].total <= room:
            break
    console.print(memory_table(plans, setting))
    last = plans[-1].parallel
    if plans[-1].total > room:
        console.print(
            f"does not fit: {plans[-1].total / GIB:.1f} GiB with {differences(config.parallel, last) or 'that'}, "
            f"{room / GIB:.1f} GiB usable. More GPUs, a smaller data.pack_tokens, or fewer frames and pixels "
            "(data.video)",
            highlight=False,
        )
        raise SystemExit(1)
    change = differences(config.parallel, last)
    console.print(f"fits with {change} (checked)" if change else "fits", highlight=False)
    console.print(times_table(setting, plans[-1], row, arguments))


def attempts(wanted: ParallelConfig) -> Iterator[ParallelConfig]:
    """The settings as they are, then what costs more time and less memory, step by step."""
    modes = MODES[0 if wanted.activation_checkpointing == "auto" else MODES.index(wanted.activation_checkpointing) :]
    base = wanted.model_copy(update={"activation_checkpointing": modes[0], "memory_budget_gib": None})
    yield base
    if not base.reshard_after_forward:
        base = base.model_copy(update={"reshard_after_forward": True})
        yield base
    for mode in modes[1:]:
        base = base.model_copy(update={"activation_checkpointing": mode})
        yield base
    if base.offload == "none":
        yield base.model_copy(update={"offload": "frozen"})


def differences(wanted: ParallelConfig, other: ParallelConfig) -> str:
    """Settings of `other` that aren't those `wanted`, as overrides."""
    keys = ("reshard_after_forward", "activation_checkpointing", "offload")
    changed = {key: getattr(other, key) for key in keys if getattr(other, key) != getattr(wanted, key)}
    return " ".join(f"parallel.{key}={str(value).lower()}" for key, value in changed.items())


def model_of(config: Config) -> Any:
    """The model on the meta device, from its own config.json or that of the released size, with what is trained."""
    path, dtype = config.model.path, torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    released = next((shape for part, shape in RELEASED.items() if part in path), None)
    if Path(path).is_dir() or released is None:
        model = build(Checkpoint.open(path, config.model.rope_factor), dtype, config.model.quantize).model
    else:
        model = build_model(MODELS[released], dtype, config.model.quantize, config.model.rope_factor)
    choose_trainable(model, model.towers, config.lora, config.model.train)
    return model


def longest_row(setting: Setting) -> Batch:
    """As many of the largest videos that the limits allow, each with a question, as go into one row."""
    data, spec = setting.config.data, model_of(setting.config).spec
    ref = MediaRef("video", Path("video.mp4"))
    limits = limits_of(ref, data)
    limits = replace(limits, fps=None, frames=limits.frames or limits.max_frames)
    length = 10 * (limits.frames or 1)
    large = MediaInfo("video", *FILMED, length, 10.0, duration_s=length / 10)
    room = data.pack_tokens - setting.text_tokens - 20
    (media,) = plan_media([(ref, large, limits)], spec, room, str(setting.config.model.path))
    one = video_document(spec, media, 1, setting.text_tokens, setting.text_tokens // 2)
    count = max(1, data.pack_tokens // one.num_tokens)
    return row_of(spec, [one] * min(count, data.max_samples_per_pack or count))


def plan_memory(setting: Setting, parallel: ParallelConfig, row: Batch) -> Memory:
    """What one GPU holds, from the real step."""
    model = model_of(setting.config)
    checkpoint_activations(model, parallel.activation_checkpointing, parallel.tower_checkpointing)
    shards = parallel.shard or setting.gpus
    world = World(0, setting.gpus, 0, torch.device("cpu"))
    mesh = make_mesh(world, shards) if setting.gpus > 1 or parallel.offload != "none" else None
    sizes = {"packed": 0, "weights": 0, "adapters": 0, "optimizer": 0, "host": 0}
    away = {id(p) for p in offloaded_parameters(model, parallel)}
    for parameter, share in shares(model, shards):
        if id(parameter) in away:
            sizes["host"] += 1 << (share - 1).bit_length()  # torch pins memory in powers of two
        else:
            kind = "adapters" if parameter.requires_grad else "packed" if is_packed(parameter) else "weights"
            sizes[kind] += share
        sizes["optimizer"] += 2 * share if parameter.requires_grad else 0
    copied = copied_bytes(model, shards, parallel)  # the step is counted where there is nothing to copy
    live = run_step(model, row, setting.device, mesh, parallel)
    gathered = live.gathered_at_peak
    return Memory(parallel, **sizes, gathered=gathered + copied, activations=live.peak - gathered)


def memory_table(plans: Sequence[Memory], setting: Setting) -> Table:
    """A column for each of the settings that were tried."""
    table = Table(title="GiB on each GPU at the worst moment of a step")
    table.add_column("activation checkpointing")
    for plan in plans:
        table.add_column(_name(plan.parallel), justify="right")
    for label, name in (
        *([("NF4 weights", "packed")] if plans[0].packed else []),
        ("frozen weights", "weights"),
        ("trained weights", "adapters"),
        ("optimizer", "optimizer"),
        ("gathered weights", "gathered"),
        ("activations, gradients", "activations"),
        ("total", "total"),
    ):
        table.add_row(label, *(f"{getattr(plan, name) / GIB:,.2f}" for plan in plans))
    table.add_row(f"of {setting.memory_gib:g}", *(f"{plan.total / GIB / setting.memory_gib:.0%}" for plan in plans))
    if any(plan.host for plan in plans):
        table.add_row("host memory for it", *(f"{plan.host / GIB:,.2f}" for plan in plans))
    return table


def _name(parallel: ParallelConfig) -> str:
    """What a column was counted with."""
    parts: list[str] = [parallel.activation_checkpointing]
    parts += [] if parallel.reshard_after_forward else ["kept gathered"]
    parts += ["offloaded"] if parallel.offload == "frozen" else []
    return ", ".join(parts)


def times_table(setting: Setting, plan: Memory, row: Batch, arguments: argparse.Namespace) -> Table:
    """Speed, traffic and disk, each with what it rests on."""
    config, model = setting.config, model_of(setting.config)
    flops = FlopCounter(model, plan.parallel.activation_checkpointing).count(row)
    packs = -(-config.train.packs_per_step // setting.gpus)
    row_s = flops.hardware / (PEAK_FLOPS[arguments.gpu] * arguments.efficiency)
    step_s = packs * row_s
    rows = packs * setting.gpus
    whole = sum(map(math.prod, true_shapes(model).values())) * model.compute_dtype.itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = sum(p.numel() * p.element_size() for p in model.decoder.layers.parameters())
    shards = config.parallel.shard or setting.gpus
    passes = 2 if plan.parallel.reshard_after_forward else 1
    wire = passes * layers * (shards - 1) / shards * packs
    largest = max(share for _, share in shares(model, shards))
    table = Table(title=f"{arguments.gpu} at {arguments.efficiency:.0%} of its peak (assumed)")
    for name in ("what", "figure", "from"):
        table.add_column(name)
    table.add_row("step", f"{step_s:.2f} s", f"{packs} row(s) of {flops.hardware / 1e12:,.0f} TFLOP a GPU")
    table.add_row("tokens", f"{rows * row.num_tokens / step_s:,.0f} a second", f"{rows} rows a step")
    table.add_row("samples", f"{rows * len(row.sample_ids) / step_s:,.1f} a second", "rows as long as planned")
    if config.train.max_steps:
        hours = config.train.max_steps * step_s / 3600
        table.add_row("run", f"{hours:.2f} hours", f"{config.train.max_steps} steps, evaluation and saving not counted")
    table.add_row(
        "traffic",
        f"{wire / 1e9:,.0f} GB a step",
        "to each GPU: layers gathered forwards" + " and backwards" * (passes == 2),
    )
    if plan.host:
        table.add_row("from host", f"{2 * layers / shards * packs / 1e9:,.0f} GB a step", "to each GPU, twice a row")
    table.add_row("loading", f"{whole / 1e9 / arguments.disk_gb_s:,.0f} s", f"{whole / 1e9:,.0f} GB from one disk")
    if config.checkpoint.asynchronous:
        copies = f"{12 * trained / shards / 1e9:,.1f} GB"
        table.add_row("host memory", copies, "of each process that writes: copies of what checkpoints hold")
    host = f"{(largest + plan.host) / GIB:,.2f} GiB"
    table.add_row("loading, host", host, "own memory of each process: one tensor's rows, and what stays there")
    kept = config.checkpoint.keep_last or 1
    table.add_row("disk", f"{kept * 12 * trained / 1e9:,.1f} GB", f"{kept} checkpoint(s) kept, and the export beside")
    return table


if __name__ == "__main__":
    main()
