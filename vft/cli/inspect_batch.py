"""Show the first pack as the model gets it: vft inspect CONFIG.toml --output DIR [--forward]

Writes batch.safetensors and preview.html. The page shows the lengths of all samples and what was dropped to fit, and of
the first pack the frames, the tokens, which of them are supervised, and the shared prefixes with their suffixes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vft.cli.arguments import add_config_arguments, parse_arguments
from vft.common.console import user_errors
from vft.common.errors import UserError
from vft.common.files import whole_folder
from vft.common.types import Batch
from vft.config import run as configs
from vft.config.run import Config, ParallelConfig
from vft.data.loader import Loader
from vft.data.packing import owners
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel
from vft.models.base import VideoLanguageModel
from vft.preparation.documents import load_training, training_streams
from vft.preparation.run import load_for_inference, open_for_inference
from vft.recipes import task_of
from vft.reporting.batch_preview import preview, summary
from vft.training.checks import warn_of_weights
from vft.training.losses import cross_entropy


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(__doc__, add_arguments, argv, prog)
    with user_errors():
        inspect(configs.load(arguments.config, arguments.overrides), arguments.output, arguments.forward)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_config_arguments(parser)
    parser.add_argument(
        "--output", required=True, type=Path, help="folder to write: a new one, or one that this command wrote"
    )
    parser.add_argument("--forward", action="store_true", help="also run the model in fp32 (for small models)")


def inspect(config: Config, output: Path, forward: bool) -> None:
    """Load the first pack of the configured run and write it to the folder `output`."""
    config.require_training()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output = {str(output)!r}: is a file; name a folder")
    if output.exists() and {path.name for path in output.iterdir()} - {"batch.safetensors", "preview.html"}:
        raise UserError(f"--output = {str(output)!r}: the folder holds other files; name a new one")
    warn_of_weights(config)
    adapter = Path(config.model.adapter) if config.model.adapter else None
    prepared = open_for_inference(config.model, adapter if forward else None, torch.float32)
    task, data, encoder = task_of(config), config.data, prepared.encoder(config.data)
    documents = load_training(task, config, encoder)
    with (
        WorkerPool(data.workers, data.decode_timeout_s) as pool,
        training_streams(task, config, encoder, pool) as streams,
    ):
        plan = documents.pack_plan(config.seed)
        slots = 1 if streams is None else config.train.packs_per_step
        loader = Loader(documents, plan, pool, DataParallel(), slots, 1, last_epoch=None, streams=streams)
        batch = first_batch(loader)
    lengths = summary(documents, plan, data)
    tensors = batch_tensors(batch, prepared.model)
    if forward:
        load_for_inference(prepared, torch.device("cpu"), None, ParallelConfig())
        tensors |= forward_tensors(batch, prepared.model)
    with whole_folder(output) as folder:
        save_file(tensors, folder / "batch.safetensors")
        (folder / "preview.html").write_text(preview(batch, encoder, config, lengths), encoding="utf-8")
    print(f"{batch.num_tokens} tokens, {batch.num_targets} supervised, {len(batch.sample_ids)} samples: see {output}")


def first_batch(loader: Loader) -> Batch:
    """The first row that is not empty. UserError if a stream gives none."""
    streams = loader.streams
    while True:
        for pack in loader.step():
            if pack.batch.documents or streams is None:
                return pack.batch
        assert streams is not None
        report = loader.report
        loader.merge_reports([report])
        if report.exhausted:
            raise streams.nothing_in(report.exhausted[0], loader.known_bad, 0)
        loader.check_streams(0, loader.dataset.config.max_bad_fraction)


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


def forward_tensors(batch: Batch, model: VideoLanguageModel) -> dict[str, Tensor]:
    """Summed loss, count and logits of the supervised tokens."""
    with torch.no_grad():
        return {
            "loss_sum": cross_entropy(model, batch),
            "num_targets": torch.tensor(batch.num_targets),
            "target_logits_NV": model.logits(batch),
        }


if __name__ == "__main__":
    main()
