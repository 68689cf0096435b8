#!/usr/bin/env python
"""See the first pack as the model gets it: python tools/inspect_batch.py CONFIG.toml --output DIR [--forward]

Writes preview.html (frames, tokens, what is supervised, trunk and branches) and batch.safetensors.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vft import config as configs
from vft.answer import load_model
from vft.config import Config
from vft.console import user_errors
from vft.data.chat import ChatEncoder
from vft.data.documents import load_documents
from vft.data.loader import Loader, open_streams
from vft.data.pool import WorkerPool
from vft.data.vision import frames_of
from vft.files import whole_folder
from vft.models import Skeleton, build
from vft.models.weights import Checkpoint
from vft.recipes import task_of
from vft.task import main_conversation
from vft.types import IGNORE_INDEX, Batch, MediaPlan, UserError, VisionSpec

STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
h2{margin:2rem 0 .3rem;font-size:1.1rem}table{border-collapse:collapse}
td,th{padding:.1rem .8rem .1rem 0;text-align:left}
.strip{display:flex;flex-wrap:wrap;gap:.4rem;margin:.5rem 0}.strip figure{margin:0}
.strip figcaption{color:#666;font-size:12px}
.tokens{white-space:pre-wrap;padding:.3rem .8rem;border-left:4px solid #ccc}
.tokens{font-family:ui-monospace,monospace;font-size:13px}
.supervised{background:#c8efc8}.media{background:#dde6ff;color:#345}.t{border-right:1px solid #ddd}"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path, help="TOML file of a training run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    parser.add_argument("--output", required=True, type=Path, help="folder to write, new or written by this tool")
    parser.add_argument("--forward", action="store_true", help="run the model too, in fp32 (for small models)")
    arguments = parser.parse_intermixed_args()  # settings may stand behind options
    with user_errors():
        inspect(configs.load(arguments.config, arguments.overrides), arguments.output, arguments.forward)


def inspect(config: Config, output: Path, forward: bool) -> None:
    """Load the first pack of the configured run and write what it holds."""
    config.require_training()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output = {str(output)!r}: is a file; name a folder")
    if output.exists() and {path.name for path in output.iterdir()} - {"batch.safetensors", "preview.html"}:
        raise UserError(f"--output = {str(output)!r}: the folder holds other files; name a new one")
    checkpoint = Checkpoint.open(config.model.path, config.model.rope_factor)
    skeleton = build(checkpoint, torch.float32)
    encoder = ChatEncoder(checkpoint.tokenizer, skeleton.spec)
    task, data = task_of(config), config.data
    make = task.conversations if data.segment_questions else main_conversation(task)
    indexed = [source for source in data.sources if not source.stream]
    documents = load_documents(data, indexed, make, encoder, config.seed)
    with (
        WorkerPool(data.workers, data.clip_deadline_s) as pool,
        open_streams(data, make, encoder, pool, config.train.packs_per_step, config.seed) as streams,
    ):
        plan = documents.pack_plan(config.seed)
        slots = 1 if streams is None else config.train.packs_per_step
        loader = Loader(documents, plan, pool, 1, 0, slots, 1, last_epoch=None, streams=streams)
        batch = next(loader.step()).batch
    tensors = batch_tensors(batch, skeleton)
    if forward:
        tensors |= forward_tensors(batch, config)
    with whole_folder(output) as folder:
        save_file(tensors, folder / "batch.safetensors")
        (folder / "preview.html").write_text(preview(batch, encoder, config), encoding="utf-8")
    print(f"{batch.num_tokens} tokens, {batch.num_targets} supervised, {len(batch.sample_ids)} samples: see {output}")


def batch_tensors(batch: Batch, skeleton: Skeleton) -> dict[str, Tensor]:
    """The batch under its stable names; pixels as the model sees them, in float32."""
    plans = [plan for document in batch.documents for plan in document.media]
    times = [time for plan in plans for time in plan.frame_times_s]
    tensors = {
        "input_ids_T": batch.input_ids_T,
        "labels_T": batch.labels_T,
        "positions_3T": batch.positions_3T,
        "document_T": batch.document_T,
        "branch_T": batch.branch_T,
        "pixels_PD": skeleton.model.normalise(batch.pixels_PD),
        "grid_thw": torch.tensor(batch.grids, dtype=torch.long).reshape(-1, 3),
        "seconds_per_grid": torch.tensor([plan.seconds_per_grid for plan in plans], dtype=torch.float64),
        "frame_times_s": torch.tensor(times, dtype=torch.float64),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def forward_tensors(batch: Batch, config: Config) -> dict[str, Tensor]:
    """Summed loss, count and logits of the supervised tokens, by the model in float32."""
    adapter = Path(config.model.adapter) if config.model.adapter else None
    cpu, factor = torch.device("cpu"), config.model.rope_factor
    model = load_model(config.model.path, adapter, torch.float32, cpu, factor).skeleton.model
    with torch.no_grad():
        return {
            "loss_sum": model(batch),
            "num_targets": torch.tensor(batch.num_targets),
            "target_logits_NV": model(batch, loss=False),
        }


def preview(batch: Batch, encoder: ChatEncoder, config: Config) -> str:
    """A page that stands alone: no scripts, no links, pictures inside."""
    parts = [f"<!doctype html><meta charset=utf-8><title>first pack</title><style>{STYLE}</style><h1>First pack</h1>"]
    vision = int(batch.media_index_M.numel())
    rows = {
        "tokens": f"{batch.num_tokens:,} of data.pack_tokens = {config.data.pack_tokens:,}",
        "video and picture tokens": f"{vision:,}",
        "text tokens": f"{batch.num_tokens - vision:,}",
        "supervised tokens": f"{batch.num_targets:,}",
        "documents, samples": f"{len(batch.documents)}, {len(batch.sample_ids)}",
    }
    parts.append("<table>" + "".join(f"<tr><th>{k}<td>{v}" for k, v in rows.items()) + "</table>")
    patch_row = token_row = 0
    for number, document in enumerate(batch.documents):
        parts.append(f"<h2>document {number}: {html.escape(', '.join(document.sample_ids))}</h2>")
        for plan in document.media:
            count = plan.grid_thw[0] * plan.grid_thw[1] * plan.grid_thw[2]
            parts.append(_strip(batch.pixels_PD[patch_row : patch_row + count], plan, encoder.spec))
            patch_row += count
        for name, start, length in _pieces(document.trunk_length, document.branch_lengths):
            rows_of = slice(token_row + start, token_row + start + length)
            parts.append(f"<div>{name}, {length} tokens</div>{_tokens(batch, rows_of, encoder.tokenizer)}")
        token_row += document.num_tokens
    return "\n".join(parts) + "\n"


def _pieces(trunk: int, branches: tuple[int, ...]) -> list[tuple[str, int, int]]:
    pieces = [("trunk", 0, trunk)] if trunk else []
    start = trunk
    for number, length in enumerate(branches):
        pieces.append((f"branch {number}" if trunk else "one branch", start, length))
        start += length
    return pieces


def _strip(pixels_PD: Tensor, plan: MediaPlan, spec: VisionSpec) -> str:
    times = [time_s for time_s in plan.frame_times_s for _ in range(max(1, len(plan.views)))]
    times.append(times[-1])  # an odd clip's last frame stands twice
    figures = []
    for frame_CHW, time_s in zip(frames_of(pixels_PD, plan, spec), times, strict=False):
        buffer = io.BytesIO()
        Image.fromarray(frame_CHW.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        figures.append(f'<figure><img alt="frame" src="{source}"><figcaption>{time_s:.2f} s</figcaption></figure>')
    size = f"{plan.width} x {plan.height} px, grid {plan.grid_thw}, {plan.num_tokens} tokens"
    source_size = f"{plan.info.width} x {plan.info.height} px, {plan.info.num_frames} frames"
    heading = f"{html.escape(str(plan.ref.path))}: {source_size}, seen as {size}"
    return f"<div>{heading}</div><div class=strip>{''.join(figures)}</div>"


def _tokens(batch: Batch, rows: slice, tokenizer: Any) -> str:
    """Tokens one by one; a run of vision tokens is written once, with its length."""
    media = set(batch.media_index_M.tolist())
    pieces: list[str] = []
    run = 0
    for row in range(rows.start, rows.stop):
        if row in media:
            run += 1
            if row + 1 < rows.stop and row + 1 in media:
                continue
            pieces.append(f'<span class="t media">{run} vision tokens</span>')
            run = 0
            continue
        text = html.escape(tokenizer.decode([int(batch.input_ids_T[row])]))
        supervised = int(batch.labels_T[row]) != IGNORE_INDEX
        pieces.append(f'<span class="t{" supervised" if supervised else ""}">{text}</span>')
    return f"<div class=tokens>{''.join(pieces)}</div>"


if __name__ == "__main__":
    main()
