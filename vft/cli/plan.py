"""Memory and time of a run before any GPU is rented: python tools/plan.py CONFIG.toml --gpus 8 --gpu-memory-gib 80

The trainer's own sharding, forward and backward run on tensors without values, in a process group that is not there;
what they would hold is counted. Times need --gpu: they follow from FLOPs and traffic, the card's data sheet and an
assumed share of it; nothing is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))

from rows import row_of, video_document
from workload import MODELS, RELEASED, build_model

from vft.adapters.lora import choose_trainable
from vft.cli.arguments import add_config_arguments, parse_arguments
from vft.common.console import user_errors
from vft.common.device_specs import CARDS, Card
from vft.common.errors import UserError
from vft.common.task import trained_conversations
from vft.common.types import Batch, MediaInfo, MediaRef
from vft.config import run as configs
from vft.config.run import Config
from vft.data import formats as sources
from vft.data.budget import limits_of, plan_media, shrink
from vft.data.dataset import converse, take
from vft.distributed.process_group import World, make_mesh
from vft.models.base import VideoLanguageModel
from vft.models.flops import FlopCounter
from vft.models.quantization import is_packed, true_shapes
from vft.parallel.parallelize import checkpoint_activations
from vft.preparation.memory import GIB, MODES, copied_bytes, offloaded_parameters, run_step, shares
from vft.preparation.run import DTYPES, open_for_training
from vft.preparation.step_time import LINK_SHARE, Cluster, StepTime, step_time, traffic_of
from vft.recipes import task_of
from vft.training.checks import check_shares
from vft.training.losses import cross_entropy

FILMED = (1080, 1920)
"""Height and width of the videos, before they are fitted into the limits."""
RESERVE = 0.05
"""Share of the memory that is left to the allocator, to kernels' workspaces and to the communication library."""
MOST_GPUS = 512
"""Up to which a number is looked for that holds the run."""
WORTH_IT = 0.97
"""A faster setting is proposed where a step takes at most this share of the time."""


@dataclass(frozen=True)
class Setting:
    """What is planned."""

    config: Config
    cluster: Cluster
    memory_gib: float
    text_tokens: int
    card: Card | None
    """None: no times."""
    efficiency: float

    @property
    def gpus(self) -> int:
        """Processes."""
        return self.cluster.gpus

    @property
    def usable(self) -> float:
        """Bytes of one GPU's memory."""
        return self.memory_gib * (1 - RESERVE) * GIB

    def changed(self, model: dict[str, Any] | None = None, **parallel: Any) -> Setting:
        """The same with other values in `[model]` and `[parallel]`."""
        config = self.config
        tables = {
            "model": config.model.model_copy(update=model or {}),
            "parallel": config.parallel.model_copy(update=parallel),
        }
        return replace(self, config=config.model_copy(update=tables))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment of a step, by what they are."""

    setting: Setting
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
        return self.resident + self.gathered + self.activations

    @property
    def resident(self) -> int:
        """What stays from step to step."""
        return self.packed + self.weights + self.adapters + self.optimizer

    @property
    def fits(self) -> bool:
        """Whether the GPU holds it."""
        return self.total <= self.setting.usable


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(__doc__, add_arguments, argv, prog)
    with user_errors():
        check(arguments)
        config = configs.load(arguments.config, arguments.overrides)
        config.require_training()
        check_shares(config, arguments.gpus)
        cluster = Cluster(arguments.gpus, arguments.gpus_per_host, arguments.network_gb_s)
        card = CARDS[arguments.gpu] if arguments.gpu and config.train.precision == "bf16" else None
        setting = Setting(config, cluster, arguments.gpu_memory_gib, arguments.text_tokens, card, arguments.efficiency)
        show(setting, arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, required=True, help="processes, one a GPU")
    parser.add_argument("--gpu-memory-gib", type=float, required=True, help="of each")
    parser.add_argument("--gpu", choices=sorted(CARDS), help="the card, for times; without it there are none")
    parser.add_argument("--efficiency", type=float, default=0.35, help="assumed share of its peak (default 0.35)")
    parser.add_argument("--gpus-per-host", type=int, default=8, help="default 8")
    parser.add_argument(
        "--network-gb-s", type=float, default=50.0, help="between hosts, for each GPU, 10^9 bytes a second (default 50)"
    )
    parser.add_argument("--text-tokens", type=int, default=300, help="of a sample, beside its video (default 300)")
    parser.add_argument("--samples", type=int, help="of an epoch; without it they are counted in data.sources")
    parser.add_argument("--disk-gb-s", type=float, default=2.0, help="reading speed, 10^9 bytes a second (default 2)")


def check(arguments: argparse.Namespace) -> None:
    """UserError where a number makes no sense."""
    for name in ("gpus", "gpu_memory_gib", "gpus_per_host", "network_gb_s", "text_tokens", "samples", "disk_gb_s"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0 and finite")
    if not 0 < arguments.efficiency <= 1:
        raise UserError(f"--efficiency {arguments.efficiency}: must be above 0, at most 1")


def show(setting: Setting, arguments: argparse.Namespace) -> None:
    """Print the plan; SystemExit(1) where nothing fits."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    row = longest_row(setting)
    console.print(
        f"{setting.config.model.path} on {setting.gpus} x {setting.memory_gib:g} GiB; a row of {row.num_tokens:,} "
        f"tokens, {row.media_index_M.numel():,} of them video, {len(row.sample_ids)} sample(s)"
    )
    plans: list[Memory] = []
    # What to change is tried, not guessed.
    for attempt in attempts(setting):
        plans.append(plan_memory(attempt, row))
        if plans[-1].fits:
            break
    else:
        plans += [plan_memory(attempt, row) for attempt in last_resorts(plans[-1].setting)]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        console.print(memory_table(plans))
        console.print(what_is_missing(plans, row))
        raise SystemExit(1)
    chosen = fitting[0]
    faster = faster_plan(chosen, row)
    console.print(memory_table([*plans, faster] if faster else plans))
    change = differences(setting, chosen.setting)
    console.print(f"fits with {change} (checked)" if change else "fits")
    for other in fitting[1:]:
        console.print(f"fits too: {differences(setting, other.setting)} (checked)")
    if faster:
        better = differences(setting, faster.setting)
        console.print(f"faster, and fits too: {better} (checked){gain(chosen, faster, row)}")
    console.print(figures_table(chosen, row, arguments))
    if arguments.gpu and setting.card is None:
        console.print(f'no times: the peak of a {arguments.gpu} that is known is that of train.precision = "bf16"')
    elif setting.card is None:
        console.print("no times: name the card with --gpu")


def attempts(setting: Setting) -> Iterator[Setting]:
    """The settings as they are, then what takes less memory and more time, step by step."""
    parallel = setting.config.parallel
    first = 0 if parallel.activation_checkpointing == "auto" else MODES.index(parallel.activation_checkpointing)
    setting = setting.changed(activation_checkpointing=MODES[first], memory_budget_gib=None)
    yield setting
    if setting.gpus > 1 and parallel.shard not in (0, setting.gpus):
        setting = setting.changed(shard=0)
        yield setting
    if setting.gpus > 1 and not parallel.reshard_after_forward:  # one GPU gathers nothing
        setting = setting.changed(reshard_after_forward=True)
        yield setting
    for mode in MODES[first + 1 :]:
        setting = setting.changed(activation_checkpointing=mode)
        yield setting


def last_resorts(setting: Setting) -> list[Setting]:
    """What helps where recomputing everything doesn't: frozen matrices in the host's memory, or in 4 bits.

    Neither where nothing is frozen."""
    away, packed = setting.changed(offload="frozen"), setting.changed({"quantize": "nf4"})
    can_offload = setting.config.parallel.offload == "none" and offloaded_parameters(
        model_of(setting.config), away.config.parallel
    )
    can_pack = setting.config.model.quantize == "none" and setting.config.lora is not None
    return [*([away] if can_offload else []), *([packed] if can_pack else [])]


def faster_plan(plan: Memory, row: Batch) -> Memory | None:
    """The fastest settings with the same results that fit too; None where nothing is gained.

    Traffic beside the products costs no time here, but does on a real link: of two as fast the one with less of it.
    """
    setting, parallel = plan.setting, plan.setting.config.parallel
    modes = MODES[: MODES.index(parallel.activation_checkpointing) + 1]
    shards = {parallel.shard, 1} if setting.gpus > 1 else {parallel.shard}
    resharded = {parallel.reshard_after_forward, False} if setting.gpus > 1 else {parallel.reshard_after_forward}
    (now, moved), found = cost(setting, row), []
    for mode, shard, reshard, offload in product(modes, shards, resharded, {parallel.offload, "none"}):
        if shard == 1 and reshard != parallel.reshard_after_forward:
            continue  # nothing is gathered then
        one = setting.changed(
            activation_checkpointing=mode, shard=shard, reshard_after_forward=reshard, offload=offload
        )
        time, traffic = cost(one, row)
        if (time < WORTH_IT * now or (time <= now and traffic < moved / 2)) and resident(one) <= setting.usable:
            found.append((time, traffic, one))
    for _, _, one in sorted(found, key=lambda candidate: candidate[:2]):
        if (tried := plan_memory(one, row)).fits:
            return tried
    return None


def cost(setting: Setting, row: Batch) -> tuple[float, float]:
    """Seconds of a step, or its FLOPs where no card is named; and the bytes that it moves."""
    model, config = model_of(setting.config), setting.config
    traffic = traffic_of(model, config, setting.gpus, row)
    moved = traffic.gathered + traffic.reduced + traffic.replicas + traffic.host
    if setting.card is not None:
        return time_of(setting, row).seconds, moved
    return FlopCounter(model, config.parallel.activation_checkpointing).count(row).hardware, moved


def time_of(setting: Setting, row: Batch) -> StepTime:
    """Seconds of a step on the setting's card."""
    assert setting.card is not None
    return step_time(model_of(setting.config), setting.config, row, setting.cluster, setting.card, setting.efficiency)


def gain(before: Memory, after: Memory, row: Batch) -> str:
    """How much time it saves; nothing without a card."""
    if before.setting.card is None:
        return ""
    then, now = (time_of(plan.setting, row).seconds for plan in (before, after))
    return f": {now:.2f} s a step instead of {then:.2f} s"


def what_is_missing(plans: Sequence[Memory], row: Batch) -> str:
    """Why no attempt fits, and what would."""
    plan = min(plans, key=lambda plan: plan.total)
    setting = plan.setting
    told = [
        f"does not fit: at least {plan.total / GIB:.1f} GiB, with everything above tried, "
        f"{setting.usable / GIB:.1f} GiB usable."
    ]
    if plan.resident + plan.gathered > setting.usable:
        told.append("The weights alone are too much: shorter rows don't help.")
    else:
        told.append("A smaller data.pack_tokens, or fewer frames and pixels (data.video).")
    # As many GPUs as hold it without offloading or 4 bits that weren't asked for.
    asked = plans[0].setting.config
    least = setting.changed({"quantize": asked.model.quantize}, shard=0, offload=asked.parallel.offload)
    enough = gpus_that_hold(least, row)
    if enough is not None:
        count, packs = enough.setting.gpus, setting.config.train.packs_per_step
        also = f" and train.packs_per_step={math.lcm(packs, count)}, a multiple of it" if packs % count else ""
        change = differences(setting, enough.setting)
        told.append(
            f"{count} GPUs of {setting.memory_gib:g} GiB hold it ({enough.total / GIB:.1f} GiB each, checked)"
            + (f" with {change}" if change else "")
            + f"{also}."
        )
    if setting.config.lora is None:
        told.append("Adapters instead of full fine-tuning take far less: a [lora] table.")
    return " ".join(told)


def gpus_that_hold(setting: Setting, row: Batch) -> Memory | None:
    """The least of doubled numbers of GPUs that hold the run; None where none up to MOST_GPUS does."""
    count = setting.gpus * 2
    while count <= MOST_GPUS:
        more = replace(setting, cluster=replace(setting.cluster, gpus=count))
        if resident(more) <= more.usable and (tried := plan_memory(more, row)).fits:
            return tried
        count *= 2
    return None


def differences(wanted: Setting, other: Setting) -> str:
    """Settings of `other` that aren't those `wanted`, as overrides."""
    found = configs.differences(wanted.config, other.config, ignore=("parallel.memory_budget_gib",))
    return " ".join(f"{key}={str(value).lower()}" for key, _, value in found)


_MODELS: dict[str, VideoLanguageModel] = {}


def model_of(config: Config) -> VideoLanguageModel:
    """The model on the meta device, with what is trained: to be looked at alone, for it is made once."""
    key = config.model_dump_json(include={"model", "lora", "train"})
    if key not in _MODELS:
        _MODELS[key] = make_model(config)
    return _MODELS[key]


def make_model(config: Config) -> VideoLanguageModel:
    """A model on the meta device, from its own config.json or that of the released size, with what is trained."""
    path = config.model.path
    released = next((shape for part, shape in RELEASED.items() if part in path), None)
    if Path(path).is_dir() or released is None:
        return open_for_training(config).model
    dtype = DTYPES[config.train.precision]
    model = build_model(MODELS[released], dtype, config.model.quantize, config.model.rope_factor)
    choose_trainable(model, config.lora, config.model.train)
    return model


def longest_row(setting: Setting) -> Batch:
    """As many of the largest videos that the limits allow, each with a question, as go into one row."""
    data, processor = setting.config.data, model_of(setting.config).processor
    ref = MediaRef("video", Path("video.mp4"))
    limits = limits_of(ref, data)
    limits = replace(limits, fps=None, frames=limits.frames or limits.max_frames)
    length = 10 * (limits.frames or 1)
    large = MediaInfo("video", *FILMED, length, 10.0, duration_s=length / 10)
    room = data.pack_tokens - setting.text_tokens - 20
    name = str(setting.config.model.path)
    (media,) = shrink(plan_media([(ref, large, limits)], processor, name), processor, room, name).plans
    one = video_document(processor, media, 1, setting.text_tokens, setting.text_tokens // 2)
    count = max(1, data.pack_tokens // one.num_tokens)
    return row_of(processor, [one] * min(count, data.max_samples_per_pack or count))


def sizes_of(setting: Setting, model: VideoLanguageModel) -> dict[str, int]:
    """Bytes that stay on one GPU, by what they are, and those in its host's memory."""
    parallel = setting.config.parallel
    sizes = {"packed": 0, "weights": 0, "adapters": 0, "optimizer": 0, "host": 0}
    away = {id(p) for p in offloaded_parameters(model, parallel)}
    for parameter, share in shares(model, parallel.shard or setting.gpus):
        if id(parameter) in away:
            sizes["host"] += 1 << (share - 1).bit_length()  # torch pins memory in powers of two
        else:
            kind = "adapters" if parameter.requires_grad else "packed" if is_packed(parameter) else "weights"
            sizes[kind] += share
        sizes["optimizer"] += 2 * share if parameter.requires_grad else 0
    return sizes


def resident(setting: Setting) -> int:
    """Bytes that stay on one GPU: no step takes less."""
    return sum(size for kind, size in sizes_of(setting, model_of(setting.config)).items() if kind != "host")


def plan_memory(setting: Setting, row: Batch) -> Memory:
    """What one GPU holds, from the real step."""
    parallel, model = setting.config.parallel, make_model(setting.config)
    checkpoint_activations(model, parallel.activation_checkpointing, parallel.vision_checkpointing)
    sizes, shard = sizes_of(setting, model), parallel.shard or setting.gpus
    copied = copied_bytes(model, shard, parallel)  # the step is counted where there is nothing to copy
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setting.gpus)
    try:
        world = World(0, setting.gpus, 0, torch.device("cpu"))
        mesh = make_mesh(world, shard) if setting.gpus > 1 or parallel.offload != "none" else None
        live = run_step(model, cross_entropy, row, torch.device("cuda"), mesh, parallel)
    finally:
        dist.destroy_process_group()
    gathered = live.gathered_at_peak
    return Memory(setting, **sizes, gathered=gathered + copied, activations=live.peak - gathered)


def memory_table(plans: Sequence[Memory]) -> Table:
    """A column for each of the settings that were tried."""
    table = Table(title="GiB on each GPU at the worst moment of a step")
    table.add_column("activation checkpointing")
    for plan in plans:
        table.add_column(_name(plan.setting.config, plans[0].setting.config), justify="right")
    for label, name in (
        *([("NF4 weights", "packed")] if any(plan.packed for plan in plans) else []),
        ("frozen weights", "weights"),
        ("trained weights", "adapters"),
        ("optimizer", "optimizer"),
        ("gathered weights", "gathered"),
        ("activations, gradients", "activations"),
        ("total", "total"),
    ):
        table.add_row(label, *(f"{getattr(plan, name) / GIB:,.2f}" for plan in plans))
    memory_gib = plans[0].setting.memory_gib
    table.add_row(f"of {memory_gib:g}", *(f"{plan.total / GIB / memory_gib:.0%}" for plan in plans))
    if any(plan.host for plan in plans):
        table.add_row("host memory for it", *(f"{plan.host / GIB:,.2f}" for plan in plans))
    return table


def _name(config: Config, first: Config) -> str:
    """What a column was counted with."""
    parallel = config.parallel
    parts: list[str] = [parallel.activation_checkpointing]
    parts += [] if parallel.reshard_after_forward else ["kept gathered"]
    parts += ["offloaded"] if parallel.offload == "frozen" else []
    parts += ["4 bits"] if config.model.quantize != first.model.quantize else []
    parts += [f"shard={parallel.shard}"] if parallel.shard != first.parallel.shard else []
    return ", ".join(parts)


def figures_table(plan: Memory, row: Batch, arguments: argparse.Namespace) -> Table:
    """Speed, traffic and disk, each with what it rests on."""
    setting, config = plan.setting, plan.setting.config
    model, gpus = model_of(config), setting.gpus
    flops = FlopCounter(model, config.parallel.activation_checkpointing).count(row)
    packs = config.train.packs_per_step // gpus
    shard = config.parallel.shard or gpus
    whole = sum(map(math.prod, true_shapes(model).values())) * model.compute_dtype.itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    traffic = traffic_of(model, config, gpus, row)
    assumed = f"{arguments.gpu} at {setting.efficiency:.0%} of its peak, {LINK_SHARE:.0%} of its links (assumed)"
    table = Table(title=assumed if setting.card else "what a step moves, and what the run needs beside")
    for name in ("what", "figure", "from"):
        table.add_column(name)
    products = f"{packs} row(s) of {flops.hardware / 1e12:,.0f} TFLOP a GPU"
    if setting.card:
        time = time_of(setting, row)
        rows = packs * gpus
        table.add_row("step", f"{time.seconds:.2f} s", f"bound by {time.bound}")
        table.add_row("products", f"{time.compute:.2f} s", products)
        if gpus > 1:
            table.add_row("links", f"{time.links:.2f} s", f"within a host, {setting.card.link_gb_s:g} GB/s")
        if gpus > setting.cluster.gpus_per_host:
            table.add_row("network", f"{time.network:.2f} s", f"{setting.cluster.network_gb_s:g} GB/s for each GPU")
        table.add_row(
            "from host", f"{time.host:.2f} s", f"{traffic.host / 1e9:,.1f} GB, {setting.card.pcie_gb_s:g} GB/s"
        )
        table.add_row("tokens", f"{rows * row.num_tokens / time.seconds:,.0f} a second", f"{rows} rows a step")
        samples = rows * len(row.sample_ids) / time.seconds
        table.add_row("samples", f"{samples:,.1f} a second", "rows as long as planned")
        table.add_row("run", *run_hours(config, time.seconds, len(row.sample_ids), arguments.samples))
    else:
        table.add_row("products", f"{packs * flops.hardware / 1e12:,.0f} TFLOP a step", products)
        table.add_row("from host", f"{traffic.host / 1e9:,.1f} GB a step", "to each GPU: pixels, offloaded weights")
    if gpus > 1:
        passes = "forwards and backwards" if config.parallel.reshard_after_forward else "forwards"
        moved = traffic.gathered + traffic.reduced + traffic.replicas
        table.add_row("traffic", f"{moved / 1e9:,.1f} GB a step", f"to each GPU: layers gathered {passes}, gradients")
    table.add_row("loading", f"{whole / 1e9 / arguments.disk_gb_s:,.0f} s", f"{whole / 1e9:,.0f} GB from one disk")
    if config.checkpoint.asynchronous:
        copies = f"{12 * trained / shard / 1e9:,.1f} GB"
        table.add_row("host memory", copies, "of each process that writes: copies of what checkpoints hold")
    largest = max(share for _, share in shares(model, shard))
    host = f"{(largest + plan.host) / GIB:,.2f} GiB"
    table.add_row("loading, host", host, "own memory of each process: one tensor's rows, and what stays there")
    kept = config.checkpoint.keep_last or 1
    table.add_row("disk", f"{kept * 12 * trained / 1e9:,.1f} GB", f"{kept} checkpoint(s) kept, and the export beside")
    return table


def run_hours(config: Config, step_s: float, samples_a_row: int, samples: int | None) -> tuple[str, str]:
    """The run's hours, and what they rest on: its steps, or its epochs of so many samples."""
    if config.train.max_steps:
        steps, told = config.train.max_steps, f"{config.train.max_steps:,} steps"
    else:
        if samples is None:
            samples = count_samples(config)
        if samples is None:
            return "?", "epochs of data that are not on this machine: say how many with --samples"
        epochs = config.train.epochs or 1
        steps = math.ceil(epochs * math.ceil(samples / samples_a_row) / config.train.packs_per_step)
        told = f"{epochs} epoch(s) of {samples:,} samples, {steps:,} steps at most"
    return f"{steps * step_s / 3600:.2f} hours", f"{told}; evaluation and saving not counted"


def count_samples(config: Config) -> int | None:
    """Samples of an epoch, from the records of `data.sources`; None where one of them is not on this machine."""
    data, make, found = config.data, trained_conversations(task_of(config), config.data.segment_questions), 0.0
    for source in data.sources:
        if source.stream or not (data.root / source.path).exists():
            return None
        samples, _ = sources.read(source, data)
        made = (converse(one, make, data)[0] for one in take(samples, source.take, config.seed))
        found += source.times * sum(map(len, made))
    return math.ceil(found * (1 - (config.eval.split or 0)))


if __name__ == "__main__":
    main()
