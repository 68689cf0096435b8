"""Show what the model gets from the data: vft inspect CONFIG.toml --output DIR [--samples N] [--decode-all] [--forward]

Writes preview.html and batch.safetensors. The page shows the lengths of all samples, what was dropped to fit and what
was left out; then some samples from all of the data and those of the first pack: frames, text, what of it is
supervised, shared prefixes and suffixes. batch.safetensors holds the first pack. --decode-all finds damaged clips
before a run does: each medium is decoded as training will, and quarantine.jsonl lists what fails. Streams are not read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vft.cli.arguments import ConfigArguments, NewFolder, command
from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.files import whole_folder
from vft.common.types import Batch
from vft.config import run as configs
from vft.config.data import DataConfig
from vft.config.run import ParallelConfig
from vft.data.chat import ChatEncoder
from vft.data.dataset import Dataset
from vft.data.decode_check import decode_all
from vft.data.loader import Loader
from vft.data.media.patches import load_patches
from vft.data.packing import PackPlan, owners
from vft.data.quarantine import BadItem, Encountered, check_bad, write_quarantine
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel
from vft.models.base import VideoLanguageModel
from vft.preparation.documents import load_held_out, load_training, report_classes, training_streams
from vft.preparation.run import load_for_inference, open_for_inference
from vft.recipes import task_of
from vft.reporting.page import render
from vft.reporting.samples import SampleView, evenly, medium_shown, pictures, sample_shown, samples_shown, shortened
from vft.training.checks import warn_of_weights
from vft.training.export import adapter_folder
from vft.training.losses import cross_entropy

NUM_BARS = 32
"""Bars of the histogram of lengths."""
MAX_PLANNED = 2000
"""Documents, evenly spread, that are planned again to see what they lose to fit a row."""
MAX_LEFT_OUT = 200
"""Samples listed that can't be used."""
WRITTEN = {"batch.safetensors", "preview.html", "quarantine.jsonl"}
"""What this command writes."""


class InspectArguments(ConfigArguments):
    """Arguments of `vft inspect`."""

    output: NewFolder
    """folder to write: a new one, or one that this command wrote"""
    samples: int = 8
    """show so many more on the page than those of the first pack, evenly spread over the data"""
    decode_all: bool = False
    """decode every video and picture, and list those that can't be; more than data.max_bad_fraction is an error"""
    forward: bool = False
    """also run the model in fp32 (for small models)"""


@command(InspectArguments, __doc__)
def main(arguments: InspectArguments) -> None:
    """Command line."""
    config, output = configs.load(arguments.config, arguments.overrides), arguments.output
    config.require_training()
    limit = config.data.max_bad_fraction
    if arguments.decode_all:  # all of them are listed, and judged at the end
        config = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_fraction": 1.0})})
    check_arguments(arguments)
    warn_of_weights(config)
    adapter = adapter_folder(Path(config.model.adapter), "model.adapter") if config.model.adapter else None
    prepared = open_for_inference(config.model, adapter if arguments.forward else None, torch.float32)
    task, data, encoder = task_of(config), config.data, prepared.encoder(config.data)
    documents = load_training(task, config, encoder)
    report_classes(documents, None)
    sets = [documents]
    if arguments.decode_all and (config.eval.sources or config.eval.split):
        sets.append(load_held_out(task, config, encoder))
    with (
        WorkerPool(data.workers, data.decode_timeout_s) as pool,
        training_streams(task, config, encoder, pool) as streams,
    ):
        damaged = decoded(sets, pool) if arguments.decode_all else []
        plan = documents.pack_plan(config.seed)
        slots = 1 if streams is None else config.train.packs_per_step
        loader = Loader(documents, plan, pool, DataParallel(), slots, 1, last_epoch=None, streams=streams)
        loader.bad.restore(damaged, Encountered())
        batch = first_batch(loader)
        taken = {document.number for document in batch.documents}
        others = evenly([n for n in range(len(documents.documents)) if n not in taken], arguments.samples)
        spread = samples_shown(documents, others, lambda *one: pool.submit(load_patches, *one).result())
    left_out = [*documents.bad, *loader.bad.known.values(), *loader.bad.report.bad]
    tensors = batch_tensors(batch, prepared.model)
    if arguments.forward:
        load_for_inference(prepared, torch.device("cpu"), None, ParallelConfig())
        with torch.no_grad():
            tensors["loss_sum"] = cross_entropy(prepared.model, batch)
            tensors["num_targets"] = torch.tensor(batch.num_targets)
            tensors["target_logits_NV"] = prepared.model.logits(batch)
    with whole_folder(output) as folder:
        save_file(tensors, folder / "batch.safetensors")
        page = render(
            "preview.html",
            title=f"Samples of {arguments.config}",
            index=summary(documents, plan, data),
            left_out=left_out[:MAX_LEFT_OUT],
            num_left_out=len(left_out),
            spread=spread,
            row=row_facts(batch, data),
            first=first_row(batch, encoder, data),
        )
        (folder / "preview.html").write_text(page, encoding="utf-8")
        if arguments.decode_all:
            write_quarantine(folder, {item.key: item for item in all_bad(sets, damaged)}.values())
    print(f"{batch.num_tokens} tokens, {batch.num_targets} supervised, {len(batch.sample_ids)} samples: see {output}")
    if left_out:
        print(f"{len(left_out)} samples or media can't be used: the page says why")
    if arguments.decode_all:
        judge(sets, damaged, limit)


def judge(sets: Sequence[Dataset], damaged: Sequence[BadItem], limit: float) -> None:
    """Say how many media can't be decoded. UserError if more samples are bad than the fraction `limit`."""
    media = set().union(*(one.samples_by_medium for one in sets))
    print(f"decoded {len(media):,} videos and pictures: {len({item.key for item in damaged}):,} can't be used")
    check_bad(all_bad(sets, damaged), sum(one.num_samples + len(one.bad) for one in sets), limit)


def all_bad(sets: Sequence[Dataset], damaged: Sequence[BadItem]) -> list[BadItem]:
    """What can't be decoded, and what the sets had left out before."""
    return [*damaged, *(item for one in sets for item in one.bad)]


def check_arguments(arguments: InspectArguments) -> None:
    """UserError if --samples is negative, or --output holds what this command did not write."""
    output = arguments.output
    if arguments.samples < 0:
        raise UserError(f"--samples = {arguments.samples}: must be at least 0")
    if output.exists() and {path.name for path in output.iterdir()} - WRITTEN:
        raise UserError(f"--output = {str(output)!r}: the folder holds other files; name a new one")


def decoded(sets: Sequence[Dataset], pool: WorkerPool) -> list[BadItem]:
    """Decode all media, with a bar: those that can't be, in each of the sets that show them."""
    damaged = []
    with progress_bar(sum(len(one.documents) for one in sets), "decoding", "document") as bar:
        for items in (items for one in sets for items in decode_all(one, pool)):
            damaged += items
            bar.update()
    return damaged


def first_batch(loader: Loader) -> Batch:
    """The first row that is not empty. UserError if a stream gives none."""
    streams = loader.streams
    while True:
        for pack in loader.step():
            if pack.batch.documents or streams is None:
                return pack.batch
        assert streams is not None
        report = loader.bad.report
        loader.bad.merge([report])
        if report.exhausted:
            raise streams.nothing_in(report.exhausted[0], loader.bad.known.values(), 0)
        loader.bad.check_streams(0, streams.passes, loader.dataset.config.max_bad_fraction)


def batch_tensors(batch: Batch, model: VideoLanguageModel) -> dict[str, Tensor]:
    """The batch under its stable names; pixels as the model sees them, in float32."""
    plans = [plan for document in batch.documents for plan in document.media]
    times = [time for plan in plans for time in plan.frame_times_s]
    document_T, branch_T = owners(batch.documents)
    tensors = {
        "input_ids_T": batch.input_ids_T,
        "labels_T": batch.labels_T,
        "positions_3T": batch.positions_3T,
        "document_T": document_T,
        "branch_T": branch_T,
        "pixels_PD": model.normalise(batch.pixels_PD),
        "grid_thw": torch.tensor(batch.grids, dtype=torch.long).reshape(-1, 3),
        "seconds_per_grid": torch.tensor([plan.seconds_per_grid for plan in plans], dtype=torch.float64),
        "frame_times_s": torch.tensor(times, dtype=torch.float64),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


# -------------------------------------------------------------------------------------------------------- the page


def summary(documents: Dataset, plan: PackPlan, data: DataConfig) -> dict[str, Any] | None:
    """The index in numbers, with a histogram; None if all sources are streams, which have no index."""
    lengths, count, packs = documents.lengths, len(documents.documents), plan.first_packs
    if not count:
        return None
    tokens = sum(lengths[number] for pack in packs for number in pack)
    planned = range(0, count, -(-count // MAX_PLANNED))
    notes = Counter(
        note.split(":")[0]
        for number in planned
        for media in documents.build(number).media
        for note in shortened(media, documents.encoder.processor, data)
    )
    planned_text = f" of {len(planned):,} documents looked at" if len(planned) < count else ""
    facts = {
        "samples": f"{documents.num_samples:,} in {count:,} documents (those about one video are one); "
        f"{len(documents.bad):,} left out",
        "tokens of a document": f"{min(lengths):,} to {max(lengths):,}",
        "rows of an epoch": f"{len(packs):,}, filled to {tokens / (len(packs) * data.pack_tokens):.0%} on average",
        "dropped to fit a row": ", ".join(f"{note} in {n:,}" for note, n in notes.items()) + planned_text or "nothing",
    }
    width = -(-max(lengths) // NUM_BARS)
    counts = Counter(min(length // width, NUM_BARS - 1) for length in lengths)
    most = max(counts.values())
    bars = [
        (f"{counts[i] / most:.1%}", f"{i * width:,} to {(i + 1) * width - 1:,} tokens: {counts[i]:,}")
        for i in range(NUM_BARS)
    ]
    return {
        "count": f"{count:,}",
        "facts": facts,
        "bars": bars,
        "longest": f"{width * NUM_BARS:,}",
        "most": f"{most:,}",
    }


def row_facts(batch: Batch, data: DataConfig) -> dict[str, str]:
    """The first pack in numbers."""
    vision = int(batch.media_index_M.numel())
    return {
        "tokens": f"{batch.num_tokens:,} of data.pack_tokens = {data.pack_tokens:,}",
        "vision tokens": f"{vision:,}",
        "text tokens": f"{batch.num_tokens - vision:,}, of which {batch.num_targets:,} are supervised",
        "samples in it": f"{len(batch.sample_ids)}, in {len(batch.documents)} documents",
    }


def first_row(batch: Batch, encoder: ChatEncoder, data: DataConfig) -> list[SampleView]:
    """The documents of the first pack, with the pixels that are in it."""
    processor, patch, made = encoder.processor, 0, []
    for document in batch.documents:
        media = []
        for plan in document.media:
            pixels_PD = batch.pixels_PD[patch : patch + math.prod(plan.grid_thw)]
            patch += len(pixels_PD)
            media.append(medium_shown(plan, pictures(pixels_PD, plan, processor), processor, data))
        made.append(sample_shown(document, media, encoder))
    return made
