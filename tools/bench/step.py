#!/usr/bin/env python
"""Time and memory of one training step at a real size: python tools/bench/step.py [--shape 7b] [--tokens 8192] ...

Random weights, no files: forward, backward, clipping and the optimizer of the trainer's own parts, for each mode of
activation checkpointing. MFU and HFU are of the device's dense bf16 peak; of a CPU none is known.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import benchmark, default_device, median, report, seconds_of
from torch._dynamo.utils import counters
from workload import MODELS, fill

from vft.adapters.lora import initialise
from vft.adapters.targets import choose_trainable
from vft.common.device_specs import peak_flops
from vft.common.errors import UserError
from vft.common.types import Batch
from vft.config.run import LoraConfig, ParallelConfig, TrainConfig
from vft.models.base import VideoLanguageModel
from vft.models.flops import FlopCounter
from vft.models.released import build_from_config
from vft.parallel.parallelize import checkpoint_activations, parallelize
from vft.preparation.memory import GIB, MODES, resident_bytes, run_step
from vft.preparation.synthetic import Video, plan_of, row_of, text_document, video_document
from vft.training.losses import cross_entropy
from vft.training.optimizer import build_optimizer, scale_and_clip

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize")
"""Calls of the runtime in which the CPU waits for the device."""


@dataclass(frozen=True)
class Setting:
    """The model and the settings that are measured."""

    shape: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    lora: LoraConfig
    parallel: ParallelConfig
    quantize: str


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_arguments, may_be_zero=("video",)) as (options, _):
        if options.video > 1:
            raise UserError(f"--video {options.video}: must be 0 to 1")
        device = default_device()
        on_gpu = device.type == "cuda"
        name = options.shape or ("7b" if on_gpu else "small")
        precision = options.precision or ("bf16" if on_gpu else "fp32")
        tokens = options.tokens or (8192 if on_gpu else 1024)
        rows = []
        for mode in options.modes:
            setting = Setting(
                MODELS[name],
                torch.bfloat16 if precision == "bf16" else torch.float32,
                device,
                LoraConfig(rank=options.rank),
                ParallelConfig(activation_checkpointing=mode, compile=options.compile),
                options.quantize,
            )
            rows.append(measure(setting, tokens, options.video, options.questions, options.repeats))
        what = f"{name}, {precision}, LoRA r{options.rank}, {options.video:.0%} video"
        what += (", NF4" if options.quantize == "nf4" else "") + (", compiled" if options.compile else "")
        report(f"one step: {what}", rows, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--shape", choices=sorted(MODELS), help="default: 7b on a GPU, small on a CPU")
    parser.add_argument("--tokens", type=int, help="of the row (default: 8192 on a GPU, 1024 on a CPU)")
    parser.add_argument("--video", type=float, default=0.9, metavar="SHARE", help="of the tokens, 0 to 1 (default 0.9)")
    parser.add_argument("--questions", type=int, default=1, help="about each video (default 1)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--modes", nargs="+", default=["none"], choices=MODES, help="of activation checkpointing")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layers")
    parser.add_argument("--quantize", choices=("none", "nf4"), default="none", help="of the decoder's layers")


def measure(setting: Setting, tokens: int, video: float, questions: int, repeats: int) -> dict[str, Any]:
    """One line of the table."""
    model = build_from_config(setting.shape, setting.dtype, setting.quantize)
    choose_trainable(model, setting.lora, ())
    mode = setting.parallel.activation_checkpointing
    flops = FlopCounter(model, mode)
    row = make_row(model.processor, tokens, video, questions)
    planned = plan_bytes(setting, row)
    counters.clear()
    parallelize(model, None, setting.parallel, setting.dtype, setting.device)
    model.to_empty(device=setting.device)
    fill(model)
    initialise(model, seed=0)
    step = make_step(model, row, setting.device)
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median(seconds_of(step, repeats, warm_up=2))
    graphs = counters["stats"]["unique_graphs"]
    waits = count_waits(step)
    count, peak = flops.count(row), peak_flops(setting.device)
    line: dict[str, Any] = {"checkpointing": mode, "tokens": row.num_tokens, "step s": seconds}
    line |= {"tokens/s": row.num_tokens / seconds, "samples/s": len(row.sample_ids) / seconds}
    line["TFLOP/s"] = count.model / seconds / 1e12
    if peak is not None:
        line |= {"MFU": count.model / seconds / peak, "HFU": count.hardware / seconds / peak}
        line["peak GiB"] = torch.cuda.max_memory_allocated() / GIB
    line["planned GiB"] = planned / GIB
    if setting.parallel.compile:
        line |= {"graphs": graphs, "recompiled": counters["stats"]["unique_graphs"] - graphs}
    if waits is not None:
        line["waits"] = waits
    return line


def make_row(processor: Any, tokens: int, video: float, questions: int) -> Batch:
    """A row of about `tokens` tokens: videos of 16 frames at 448 x 448 (smaller if these do not fit), then text."""
    for size in (Video(16, 448, 448), Video(8, 224, 224), Video(4, 112, 112)):
        count = int(tokens * video / (plan_of(processor, size).num_tokens + questions * 40))
        if count or not video:
            break
    documents = [video_document(processor, size, questions, 40, 20, seed) for seed in range(count)]
    left = tokens - sum(document.num_tokens for document in documents)
    if left > 1:
        documents.append(text_document(left, max(1, left // 4), seed=count))
    return row_of(processor, documents)


def plan_bytes(setting: Setting, row: Batch) -> int:
    """What vft.preparation.memory says the step will hold."""
    model = build_from_config(setting.shape, setting.dtype, setting.quantize)
    choose_trainable(model, setting.lora, ())
    checkpoint_activations(model, setting.parallel.activation_checkpointing)
    return resident_bytes(model, 1) + run_step(model, cross_entropy, row, setting.device).peak


def make_step(model: VideoLanguageModel, row: Batch, device: torch.device) -> Callable[[], None]:
    """What the trainer does with one pack."""
    optimizer = build_optimizer(model, TrainConfig())
    trainable = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        cross_entropy(model, row.to(device)).backward()
        scale_and_clip(trainable, 1 / row.num_targets, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_waits(step: Callable[[], None]) -> int | None:
    """How often the processor waited for the GPU in one step; None without one. The gradient's norm is one."""
    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile() as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    # The profiler itself waits once, at its end.
    return sum(event.get("name") in WAITS for event in events) - 1


if __name__ == "__main__":
    main()
