#!/usr/bin/env python
"""Time and memory of one training step at a real size: python tools/bench/step.py [--shape 7b] [--tokens 8192] ...

Random weights, no files: forward, backward, clipping and the optimizer of the trainer's own parts, for each mode of
activation checkpointing. MFU and HFU are of the device's dense peak; of a CPU none is known. `of products` is the share
of the rate that plain products of a layer's sizes reach in the same process; `products`, `attention` and `rest` are
shares of the step's time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import in_venv  # noqa: F401
import torch
import torch.nn.functional as F
from measure import DEVICE, WAITS, benchmark, in_turns, report
from torch import nn
from torch._dynamo.utils import counters
from workload import MODELS, add_shape, make_step, open_random, random_model, settings

from vft.common.device_specs import peak_flops
from vft.common.errors import UserError
from vft.common.types import Batch
from vft.config.run import Config, LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from vft.models.base import VideoLanguageModel
from vft.models.flops import FlopCounter
from vft.parallel.parallelize import checkpoint_activations
from vft.preparation.memory import GIB, MODES, resident_bytes, run_step
from vft.preparation.synthetic import Video, plan_of, row_of, text_document, video_document
from vft.training.losses import cross_entropy

PRODUCTS = tuple(f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "linear"))


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_arguments, may_be_zero=("video",)) as (options, _):
        if options.video > 1:
            raise UserError(f"--video {options.video}: must be 0 to 1")
        rows = [measure(config_of(options, mode), options) for mode in options.modes]
        what = f"{options.shape}, {options.precision}, LoRA r{options.rank}, {options.video:.0%} video"
        what += (", NF4" if options.quantize == "nf4" else "") + (", compiled" if options.compile else "")
        report(f"one step: {what}", rows, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    precision, tokens = ("bf16", 8192) if DEVICE.type == "cuda" else ("fp32", 1024)
    add_shape(parser, MODELS, on_gpu="7b")
    parser.add_argument("--tokens", type=int, default=tokens, help=f"of the row (default {tokens})")
    parser.add_argument("--video", type=float, default=0.9, metavar="SHARE", help="of the tokens, 0 to 1 (default 0.9)")
    parser.add_argument("--questions", type=int, default=1, help="about each video (default 1)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=precision, help=f"default: {precision}")
    parser.add_argument("--modes", nargs="+", default=["none"], choices=MODES, help="of activation checkpointing")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layers")
    parser.add_argument("--quantize", choices=("none", "nf4"), default="none", help="of the decoder's layers")


def config_of(options: argparse.Namespace, mode: str) -> Config:
    """The run that is measured, with a mode of activation checkpointing."""
    return settings(
        options.shape,
        model=ModelConfig(path=options.shape, quantize=options.quantize),
        lora=LoraConfig(rank=options.rank),
        train=TrainConfig(max_steps=1, precision=options.precision),
        parallel=ParallelConfig.model_validate({"activation_checkpointing": mode, "compile": options.compile}),
    )


def measure(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    counters.clear()
    planned, mode = open_random(config).model, config.parallel.activation_checkpointing
    row = make_row(planned.processor, options.tokens, options.video, options.questions)
    count = FlopCounter(planned, mode).count(row)
    checkpoint_activations(planned, mode)
    planned_bytes = resident_bytes(planned, 1) + run_step(planned, cross_entropy, row, DEVICE).peak
    step = make_step(random_model(config), row, DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median(in_turns({"step": step}, options.repeats, warm_up=2)["step"])
    graphs = counters["stats"]["unique_graphs"]
    waits = count_waits(step)
    line: dict[str, Any] = {"checkpointing": mode, "tokens": row.num_tokens, "step s": seconds}
    line |= {"tokens/s": row.num_tokens / seconds, "samples/s": len(row.sample_ids) / seconds}
    line["TFLOP/s"] = count.model / seconds / 1e12
    line["of products"] = count.hardware / seconds / product_rate(planned, row.num_tokens)
    if (peak := peak_flops(DEVICE, planned.compute_dtype)) is not None:
        line |= {"MFU": count.model / seconds / peak, "HFU": count.hardware / seconds / peak}
        line["peak GiB"] = torch.cuda.max_memory_allocated() / GIB
    line["planned GiB"] = planned_bytes / GIB
    if config.parallel.compile:
        line |= {"graphs": graphs, "recompiled": counters["stats"]["unique_graphs"] - graphs}
    if waits is not None:
        line["waits"] = waits
    return line | shares_of(step)


def shares_of(step: Callable[[], None]) -> dict[str, float]:
    """What a step's time goes to, by the operators of a profile: products, attention, all else."""
    with torch.profiler.profile() as profile:
        step()
    times = dict.fromkeys(("products", "attention", "rest"), 0.0)
    for event in profile.key_averages():
        name = event.key.lower()
        kind = "attention" if "attention" in name or "attn" in name else "rest"
        kind = "products" if name.startswith(PRODUCTS) else kind
        times[kind] += event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total
    return {name: time / sum(times.values()) for name, time in times.items()}


def product_rate(model: VideoLanguageModel, tokens: int) -> float:
    """FLOP/s of plain products of a decoder layer's matrices with a row of `tokens`, at best."""
    layer, dtype = model.decoder.layers[0], model.compute_dtype
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear) and min(module.weight.shape) > 64]
    matrices = [torch.randn(one.out_features, one.in_features, device=DEVICE, dtype=dtype) for one in linears]
    inputs = {one.in_features: torch.randn(tokens, one.in_features, device=DEVICE, dtype=dtype) for one in linears}

    def products() -> None:
        for matrix in matrices:
            F.linear(inputs[matrix.shape[1]], matrix)

    seconds = min(in_turns({"products": products}, 7, warm_up=2)["products"])
    return 2 * tokens * sum(matrix.numel() for matrix in matrices) / seconds


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


def count_waits(step: Callable[[], None]) -> int | None:
    """How often the processor waited for the GPU in one step; None without one. The gradient's norm is one."""
    if DEVICE.type != "cuda":
        return None
    with torch.profiler.profile() as profile:
        step()
    # The profiler itself waits once, at its end.
    return sum(event.count for event in profile.key_averages() if event.key in WAITS) - 1


if __name__ == "__main__":
    main()
