"""Memory and time of a run, before any GPU is rented: vft plan CONFIG.toml --gpus 8 --gpu H100

The trainer's own sharding, forward and backward run on tensors without values, in a fake process group, and what they
would hold is counted. Times need --gpu: they follow from FLOPs, kernels and traffic, the card's data sheet and assumed
shares of it; nothing is measured.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from rich.console import Console
from rich.table import Table

from vft.cli.arguments import ConfigArguments, command
from vft.common.console import make_table, stderr_console
from vft.common.device_specs import CARDS, card_name
from vft.common.errors import UserError
from vft.common.types import Batch
from vft.config import run as configs
from vft.config.run import Config
from vft.config.toml import Positive, PositiveFloat
from vft.data import formats as sources
from vft.data.dataset import converse, take
from vft.models.quantization import true_shapes
from vft.preparation.documents import learnt_conversations
from vft.preparation.memory import GIB, shares
from vft.preparation.planning import (
    AMD_PRODUCT_SHARE,
    LINK_SHARE,
    MEMORY_SHARE,
    PRODUCT_SHARE,
    Memory,
    Planner,
    Search,
    Setting,
    Step,
    overrides,
)
from vft.preparation.synthetic import filled_row
from vft.recipes import task_of
from vft.training.checks import check_shares
from vft.training.preferences import objective_of


def _card_name(text: str | None) -> str | None:
    name = text and (card_name(text) or card_name(f"rtx {text}"))
    if text and name is None:
        cards = ", ".join(sorted(CARDS))
        raise ValueError(f"is not known here; the cards are {cards}; for another give --gpu-memory-gib alone")
    return name


class PlanArguments(ConfigArguments):
    """Arguments of `vft plan`."""

    gpus: Positive
    """number of GPUs; each runs one process"""
    gpu_memory_gib: PositiveFloat | None = None
    """memory of one GPU, GiB (default: that of --gpu)"""
    gpu: Annotated[str | None, AfterValidator(_card_name)] = None
    """the card, such as 4090 or H100, to estimate times; without it there are none"""
    as_json: Annotated[bool, Field(alias="json")] = False
    """print the plan as JSON, for another program"""
    efficiency: Annotated[float | None, Field(gt=0, le=1)] = None
    """share of the card's peak FLOP/s that products are assumed to reach (default 0.65; on MI cards 0.42)"""
    gpus_per_host: Positive = 8
    """GPUs of one host (default 8)"""
    network_gb_s: PositiveFloat = 50.0
    """network bandwidth between hosts, for each GPU, 10^9 bytes a second (default 50)"""
    text_tokens: Positive = 300
    """tokens of a sample beside its video (default 300)"""
    samples: Positive | None = None
    """samples of an epoch (default: those of data.sources are counted)"""
    disk_gb_s: PositiveFloat = 2.0
    """reading speed of the disk, 10^9 bytes a second (default 2)"""


@command(PlanArguments, __doc__)
def main(arguments: PlanArguments) -> None:
    """Command line. SystemExit(1) if nothing fits."""
    config = configs.load(arguments.config, arguments.overrides)
    config.require_training()
    check_shares(config, arguments.gpus)
    card = CARDS[arguments.gpu] if arguments.gpu else None
    memory_gib = arguments.gpu_memory_gib or (card.memory_gib if card else None)
    if memory_gib is None:
        raise UserError("--gpu-memory-gib: is missing; give it, or name the card with --gpu")
    same = arguments.model_dump(include={"gpus", "text_tokens", "gpus_per_host", "network_gb_s"})
    share = AMD_PRODUCT_SHARE if (arguments.gpu or "").startswith("MI") else PRODUCT_SHARE
    same["efficiency"] = arguments.efficiency or share
    setting = Setting(config, memory_gib=memory_gib, card=card, **same)
    planner = Planner(objective_of(config))
    processor = planner.model_of(config).processor
    row = filled_row(processor, config.data, arguments.text_tokens, config.answers)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    if not arguments.as_json:
        console.print(
            f"{config.model.path} on {setting.gpus} x {setting.memory_gib:g} GiB; a row of {row.num_tokens:,} "
            f"tokens, {row.media_index_M.numel():,} of them video, {len(row.sample_ids)} sample(s)"
        )
    with stderr_console().status("counting memory and time, some seconds for each way to hold the model"):
        search = planner.search(setting, row)
    if arguments.as_json:
        print(json.dumps(plan_as_json(setting, search, planner, row, arguments), indent=1))
    else:
        console.print(memory_table(tried_in(search), planner, row))
        for line in verdict(setting, search, planner, row):
            console.print(line)
        if search.fitting:
            console.print(figures_table(search.fitting[0], planner, row, arguments))
        if search.fitting and card is None:
            console.print("no times: name the card with --gpu")
    if not search.fitting:
        raise SystemExit(1)


def tried_in(search: Search) -> list[Memory]:
    """All settings that were counted on the GPUs that are there."""
    return [*search.tried, *([search.faster] if search.faster else [])]


@dataclass(frozen=True)
class Proposal:
    """Settings that were tried and fit."""

    why: str
    """`needed`, `instead` of what is needed, `faster`, or `more GPUs`."""
    changes: dict[str, Any]
    """What to set, by dotted key."""
    memory: Memory


def proposals(setting: Setting, search: Search) -> list[Proposal]:
    """What to change so that the run fits, what would fit too, and what is faster; if nothing fits, more GPUs."""
    if enough := search.enough_gpus:
        packs, count = setting.config.train.packs_per_step, enough.setting.gpus
        changes = setting.changed(**taken_for_auto(setting, enough)).changes_to(enough.setting)
        if packs % count:
            changes["train.packs_per_step"] = math.lcm(packs, count)
        return [Proposal("more GPUs", changes, enough)]
    if not search.fitting:
        return []
    chosen, *others = search.fitting
    known = setting.changed(**taken_for_auto(setting, chosen))
    change = known.changes_to(chosen.setting)
    found = [Proposal("needed", change, chosen)] if change else []
    found += [Proposal("instead", known.changes_to(other.setting), other) for other in others]
    if search.faster:
        faster = search.faster.setting
        # One GPU has nothing to share, whatever `shard` says.
        asked = setting if setting.gpus > 1 else setting.changed(shard=faster.config.parallel.shard)
        found.append(Proposal("faster", asked.changes_to(faster), search.faster))
    return found


def taken_for_auto(setting: Setting, chosen: Memory) -> dict[str, Any]:
    """What the `auto` of `[parallel]` stand for in the settings that were chosen."""
    found, asked = chosen.setting.config.parallel, setting.config.parallel
    return {n: getattr(found, n) for n in ("activation_checkpointing", "shard") if getattr(asked, n) == "auto"}


def verdict(setting: Setting, search: Search, planner: Planner, row: Batch) -> list[str]:
    """Whether the run fits, with what, and what is faster; or why nothing does, and what would. A line each."""
    if not search.fitting:
        return [what_is_missing(setting, search)]
    chosen, made = search.fitting[0], proposals(setting, search)
    changes = {why: [overrides(one.changes) for one in made if one.why == why] for why in ("needed", "instead")}
    lines = [f"fits with {change} (checked)" for change in changes["needed"]] or ["fits"]
    taken = taken_for_auto(setting, chosen).items()
    if shown := [f"{name} = {value}" for name, value in taken if name != "shard" or setting.gpus > 1]:
        lines.append(f"auto takes {', '.join(shown)}")
    lines += [f"fits too: {change} (checked)" for change in changes["instead"]]
    if search.faster:
        gain = ""
        if setting.card:
            before, after = (planner.step(one.setting, row).seconds for one in (chosen, search.faster))
            gain = f": {after:.2f} s a step instead of {before:.2f} s"
        lines.append(f"faster, and fits too: {overrides(made[-1].changes)} (checked){gain}")
    return lines


def what_is_missing(asked: Setting, search: Search) -> str:
    """Why nothing fits, and what would."""
    memory = search.smallest
    setting = memory.setting
    sentences = [
        f"does not fit: at least {memory.total / GIB:.1f} GiB, with everything above tried, "
        f"{setting.usable_bytes / GIB:.1f} GiB usable."
    ]
    if memory.total - memory.sizes["activations"] > setting.usable_bytes:
        sentences.append("The weights alone are too much: shorter rows don't help.")
    else:
        sentences.append("A smaller data.pack_tokens, or fewer frames and pixels (data.video).")
    for more in proposals(asked, search):
        sentences.append(
            f"{more.memory.setting.gpus} GPUs of {setting.memory_gib:g} GiB hold it "
            f"({more.memory.total / GIB:.1f} GiB each, checked) with {overrides(more.changes)}.".replace(" with .", ".")
        )
    if setting.config.lora is None:
        sentences.append("Adapters instead of full fine-tuning take far less: a [lora] table.")
    return " ".join(sentences)


def plan_as_json(
    setting: Setting, search: Search, planner: Planner, row: Batch, arguments: PlanArguments
) -> dict[str, Any]:
    """All of the plan for another program; docs/use/choosing.md describes it."""
    asked, first = setting.config, search.tried[0].setting.config

    def counted(memory: Memory) -> dict[str, Any]:
        has_time = setting.card is not None and memory.fits
        return {
            "settings": column_name(memory.setting.config, first),
            "fits": memory.fits,
            "total_gib": memory.total / GIB,
            "gib": {LABELS[kind]: size / GIB for kind, size in memory.sizes.items() if kind != "host"},
            "host_gib": memory.sizes["host"] / GIB,
            "step_s": planner.step(memory.setting, row).seconds if has_time else None,
        }

    run = None
    if search.fitting and setting.card:
        step = planner.step(search.fitting[0].setting, row)
        rows, samples = step.rows * setting.gpus, len(row.sample_ids)
        steps, basis = run_steps(asked, samples, arguments.samples)
        run = {"step_s": step.seconds, "share_of_peak": step.mfu, "bound_by": step.bound}
        run |= {"tokens_per_s": rows * row.num_tokens / step.seconds, "samples_per_s": rows * samples / step.seconds}
        run |= {"steps": steps, "hours": steps and steps * step.seconds / 3600, "steps_are": basis}
    return {
        "model": asked.model.path,
        "gpus": setting.gpus,
        "gpu": arguments.gpu,
        "gpu_memory_gib": setting.memory_gib,
        "usable_gib": setting.usable_bytes / GIB,
        "row": {"tokens": row.num_tokens, "vision_tokens": len(row.media_index_M), "samples": len(row.sample_ids)},
        "fits": bool(search.fitting),
        "verdict": verdict(setting, search, planner, row),
        "best": search.tried.index(search.fitting[0] if search.fitting else search.smallest),
        "tried": [counted(memory) for memory in tried_in(search)],
        "proposals": [
            {"why": one.why, "set": one.changes, "gpus": one.memory.setting.gpus, **counted(one.memory)}
            for one in proposals(setting, search)
        ],
        "run": run,
    }


LABELS = {
    "packed": "NF4 weights",
    "weights": "frozen weights",
    "trained": "trained weights",
    "optimizer": "optimizer",
    "gathered": "gathered weights",
    "activations": "activations, gradients",
}
"""What the kinds of `Memory.sizes` on a GPU are called."""


def memory_table(memories: Sequence[Memory], planner: Planner, row: Batch) -> Table:
    """A column for each of the settings that were tried: memory, and if a card is named, time."""
    first, rows = memories[0].setting, []
    for name, label in {**LABELS, "total": "total", "host": "host memory for it"}.items():
        sizes = [{**memory.sizes, "total": memory.total}[name] / GIB for memory in memories]
        if any(sizes) or name not in ("packed", "host"):
            rows.append([label, *(f"{gib:,.2f}" for gib in sizes)])
        if name == "total":
            rows.append([f"of {first.memory_gib:g}", *(f"{gib / first.memory_gib:.0%}" for gib in sizes)])
    if first.card is not None:
        seconds = [f"{planner.step(memory.setting, row).seconds:,.2f}" if memory.fits else "" for memory in memories]
        rows.append(["seconds a step", *seconds])
    names = [column_name(memory.setting.config, first.config) for memory in memories]
    title = "GiB on each GPU at the worst moment of a step"
    return make_table(title, ["activation checkpointing", *names], rows, justify="right")


def column_name(config: Config, first: Config) -> str:
    """The settings of a column; of some only what differs from the first column."""
    parallel = config.parallel
    parts: list[str] = [parallel.activation_checkpointing]
    parts += [] if parallel.reshard_after_forward else ["kept gathered"]
    parts += ["offloaded"] if parallel.offload == "frozen" else []
    parts += ["4 bits"] if config.model.quantize != first.model.quantize else []
    parts += [f"shard={parallel.shard}"] if parallel.shard != first.parallel.shard else []
    return ", ".join(parts)


def figures_table(memory: Memory, planner: Planner, row: Batch, arguments: PlanArguments) -> Table:
    """Speed, traffic and disk space, each with what it rests on."""
    setting, config = memory.setting, memory.setting.config
    model, gpus = planner.model_of(config), setting.gpus
    title = "what a step moves, and what the run needs beside"
    if setting.card:
        shares_of = f"{setting.efficiency:.0%} of its peak, {MEMORY_SHARE:.0%} of its memory's, {LINK_SHARE:.0%} of its"
        title = f"{arguments.gpu}: products at {shares_of} links' (assumed)"
    table = make_table(title, ("what", "figure", "from"), ())
    step = planner.step(setting, row)
    products = f"{step.rows} row(s) of {step.flops / 1e12:,.0f} TFLOP a GPU"
    host_gb = step.host / 1e9
    if setting.card:
        seconds, rows = step.seconds, step.rows * gpus
        products_s, beside_s, launches_s, links_s, network_s, host_s = step.parts.values()
        table.add_row("step", f"{seconds:.2f} s", f"{step.mfu:.0%} of the peak; bound by {step.bound}")
        table.add_row("products", f"{products_s:.2f} s", products)
        table.add_row("beside them", f"{beside_s:.2f} s", describe_kernels(step))
        table.add_row("launches", f"{launches_s:.2f} s", "at the same time; the slower of both counts")
        if gpus > 1:
            table.add_row("links", f"{links_s:.2f} s", f"within a host, {setting.card.link_gb_s:g} GB/s")
        if gpus > setting.gpus_per_host:
            table.add_row("network", f"{network_s:.2f} s", f"{setting.network_gb_s:g} GB/s for each GPU")
        table.add_row("from host", f"{host_s:.2f} s", f"{host_gb:,.1f} GB, {setting.card.pcie_gb_s:g} GB/s")
        table.add_row("tokens", f"{rows * row.num_tokens / seconds:,.0f} a second", f"{rows} rows a step")
        samples = rows * len(row.sample_ids) / seconds
        table.add_row("samples", f"{samples:,.1f} a second", "rows as long as planned")
        table.add_row("run", *run_hours(config, seconds, len(row.sample_ids), arguments.samples))
    else:
        table.add_row("products", f"{step.rows * step.flops / 1e12:,.0f} TFLOP a step", products)
        table.add_row("from host", f"{host_gb:,.1f} GB a step", "to each GPU: pixels, offloaded weights")
    if gpus > 1:
        passes = "forwards and backwards" if config.parallel.reshard_after_forward else "forwards"
        table.add_row(
            "traffic", f"{step.moved / 1e9:,.1f} GB a step", f"to each GPU: layers gathered {passes}, gradients"
        )
    weights_gb = sum(map(math.prod, true_shapes(model).values())) * model.compute_dtype.itemsize / 1e9
    table.add_row("loading", f"{weights_gb / arguments.disk_gb_s:,.0f} s", f"{weights_gb:,.0f} GB from one disk")
    # A checkpoint has 12 bytes for each trained parameter: the parameter and AdamW's two means, in fp32.
    checkpoint_gb = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e9
    if config.checkpoint.asynchronous:
        copies = "of each process that writes: copies of what checkpoints hold"
        table.add_row("host memory", f"{checkpoint_gb / setting.shards:,.1f} GB", copies)
    largest = max(share for _, share in shares(model, setting.shards))
    own = "own memory of each process: one tensor's rows, and what stays there"
    table.add_row("loading, host", f"{(largest + memory.sizes['host']) / GIB:,.2f} GiB", own)
    count = config.checkpoint.keep_last or 1
    table.add_row("disk", f"{count * checkpoint_gb:,.1f} GB", f"{count} checkpoint(s) kept, and the export beside")
    return table


def describe_kernels(step: Step) -> str:
    """How many kernels a row has, and how much memory they read and write."""
    kernels = step.kernels
    assert kernels is not None
    used, other, name = kernels.fused, kernels.eager, "eager"
    if step.setting.config.parallel.compile is False:
        used, other, name = other, used, "compiled"
    return f"{used[0]:,} kernels a row, {used[1] / 1e9:,.0f} GB; {name} {other[0]:,} and {other[1] / 1e9:,.0f} GB"


def run_steps(config: Config, samples_per_row: int, samples: int | None) -> tuple[int | None, str]:
    """Steps of the whole run, and what they rest on: what is set, or epochs of `samples` samples (None: counted). None
    if the samples can't be counted."""
    if config.train.max_steps:
        return config.train.max_steps, f"{config.train.max_steps:,} steps"
    if samples is None:
        samples = count_samples(config)
    if samples is None:
        return None, "epochs of data that are not on this machine: say how many with --samples"
    epochs = config.train.epochs or 1
    steps = math.ceil(epochs * math.ceil(samples / samples_per_row) / config.train.packs_per_step)
    return steps, f"{epochs} epoch(s) of {samples:,} samples, {steps:,} steps at most"


def run_hours(config: Config, step_s: float, samples_per_row: int, samples: int | None) -> tuple[str, str]:
    """Hours of the whole run, and what they rest on."""
    steps, basis = run_steps(config, samples_per_row, samples)
    if steps is None:
        return "?", basis
    return f"{steps * step_s / 3600:.2f} hours", f"{basis}; evaluation and saving not counted"


def count_samples(config: Config) -> int | None:
    """Samples of an epoch, from the records of `data.sources`; None if one of them is not on this machine."""
    data, make = config.data, learnt_conversations(task_of(config), config)
    count = 0.0
    for source in data.sources:
        if source.stream or not (data.root / source.path).exists():
            return None
        samples, _ = sources.read(source, data)
        documents = (converse(sample, make, data)[0] for sample in take(samples, source.take, config.seed))
        count += source.times * sum(map(len, documents))
    return math.ceil(count * (1 - (config.eval.split or 0)))
