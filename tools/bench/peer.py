#!/usr/bin/env python
"""vft beside what its users would otherwise run: python tools/bench/peer.py [--questions 5] [--mixed] [--output FILE]

The other side is transformers' Trainer with PEFT's LoRA on Qwen2_5_VLForConditionalGeneration (peer_trainer.py): SDPA
attention, DataLoader workers, batches padded to the longest row, each question with its whole video. Both train the
same adapter on the same checkpoint, in float32 on the CPU, with the same samples in every step, optimizer and schedule.

Their losses are printed beside each other. Two things are set so that they can be equal at all. A step's loss is
divided by the step's supervised tokens on both sides; Trainer left alone averages the means of its batches for this
model. And transformers 5 numbers the text after a video otherwise than the released model does (from start +
max(height, width), even where the video's time reached further), so that it is given the released positions. Neither
costs it anything.

Each side runs in a process of its own, with equally many threads and workers, in turns with the other. The first steps
warm up; the last one isn't timed either, because the workers of both decode ahead: while a step is timed, they work on
one to come. Where other programs keep the machine busy, the times by the clock say little: take --threads 1 and compare
the training processes' CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import benchmark, median, report, show_table
from workload import SHAPES, write_checkpoint, write_clips, write_records

from vft.adapters.lora import LoRALinear, initialise
from vft.adapters.peft_format import export_adapter
from vft.common.errors import UserError
from vft.config import run as configs
from vft.config.data import DataConfig, SourceConfig, VideoConfig
from vft.config.run import CheckpointConfig, Config, LoraConfig, ModelConfig, TrainConfig
from vft.preparation.run import open_for_training

WARM_UP = 2
"""Steps before the timed ones."""
AHEAD = 1
"""Steps after the timed ones: vft prepares so many ahead; the other side two batches a worker."""
LONGEST_STEP = 1 << 20
"""Tokens; a row is limited by its samples instead, so that all steps hold equally many."""
POLL_S = 0.1
MAX_PIXELS = 50176
"""Height x width of a frame, at most: 224 x 224, 64 tokens of two frames."""


@dataclass(frozen=True)
class Job:
    """The job of the other side: the argument of peer_trainer.py, as JSON."""

    config: str
    """TOML file that the vft side runs: data, optimizer, schedule and adapter are taken from it."""
    batch: int
    """Rows of a padded batch; the last of a step may have fewer."""
    workers: int
    """DataLoader's worker processes."""
    output: str
    """JSON file to write: a `Record`."""


@dataclass
class Record:
    """The course of a run: lists with a value for each step."""

    losses: list[float] = field(default_factory=list)
    """Mean over the supervised tokens of the step, natural log."""
    grad_norms: list[float] = field(default_factory=list)
    """2-norm before clipping."""
    targets: list[int] = field(default_factory=list)
    """Supervised tokens that the step's loss was divided by."""
    tokens: list[int] = field(default_factory=list)
    """Tokens through the decoder, padding with them."""
    samples: list[int] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    """When the step ended, on a clock that starts anywhere."""
    cpu_s: list[float] = field(default_factory=list)
    """Processor time of the training process, its threads together, up to the step's end."""


@dataclass(frozen=True)
class Run:
    """One run of a side."""

    record: Record
    seconds: float
    """Of all timed steps together, by the clock."""
    cpu_s: float
    """The same by the processor: of the training process with its threads, without its workers."""
    peak_bytes: int
    """Peak of the training process's resident memory, without its workers."""


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_arguments, repeats=3, may_be_zero=("workers",)) as (options, folder):
        check(options)
        compare(options, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=sorted(SHAPES), default="small", help="size of a random checkpoint (small)")
    model.add_argument("--model", type=Path, help="folder of a Qwen2.5-VL checkpoint instead")
    parser.add_argument("--clips", type=int, default=20, help="videos of 256 x 256 pixels (20)")
    parser.add_argument("--questions", type=int, default=5, help="questions about each video (5)")
    parser.add_argument("--words", type=int, default=4, help="words of a question, and of its answer (4: 25 tokens)")
    parser.add_argument(
        "--mixed", action="store_true", help="videos of 2 to 8 seconds at 2 frames a second, answers of uneven length"
    )
    parser.add_argument("--frames", type=int, default=8, help="frames sampled of a video that is not mixed (8)")
    parser.add_argument("--samples-per-step", type=int, default=20, help="questions in an optimizer step (20)")
    parser.add_argument("--steps", type=int, default=3, help=f"timed optimizer steps, besides {WARM_UP} + {AHEAD} (3)")
    parser.add_argument("--pack", type=int, default=20, help="questions in a row of vft's (20)")
    # The fastest of 1, 2, 4 and 8 on two cores: larger ones wait for more memory and pad more.
    parser.add_argument("--peer-batch", type=int, default=2, help="questions in a padded batch of the other side (2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch (all CPUs)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes of each side (2)")


def check(options: argparse.Namespace) -> None:
    """UserError if steps cannot hold equally many samples, or there is no model."""
    if options.model is not None and not options.model.is_dir():
        raise UserError(f"--model {options.model}: no such folder")
    size, questions, everything = options.samples_per_step, options.questions, options.clips * options.questions
    if options.pack % questions or size % options.pack or everything % size:
        raise UserError(
            f"--questions {questions}, --pack {options.pack}, --samples-per-step {size} and all {everything} questions "
            f"(--clips {options.clips}): each must divide the next, so that steps are equal"
        )


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Run both sides in turns and report."""
    torch.set_num_threads(options.threads)
    config = prepare(options, folder)
    sides: dict[str, Callable[[], Run]] = {
        "vft": lambda: run_vft(config, options, folder),
        "Trainer + PEFT": lambda: run_peer(config, options, folder),
    }
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(options.repeats):
        for name, side in sides.items():
            runs[name].append(side())
            print(f"run {number + 1}/{options.repeats} of {name}: {runs[name][-1].seconds:.1f} s", file=sys.stderr)
    steps = compared(*(taken[0].record for taken in runs.values()))
    rows = [row(name, taken, options) for name, taken in runs.items()]
    ratio = rows[0]["samples/s"] / rows[1]["samples/s"]
    ours_s, theirs_s = (float(one["CPU s a step"]) for one in rows)
    cpu_ratio = theirs_s / ours_s if ours_s else None  # steps that passed between two looks have no seconds
    largest = max(step["loss, relative difference"] for step in steps)
    show_table(f"losses: largest relative difference {largest:.1e}", steps)
    by_cpu = "too short for CPU seconds" if cpu_ratio is None else f"{cpu_ratio:.2f} times, by CPU seconds"
    title = f"{ratio:.2f} times the samples/s ({by_cpu})"
    facts = {
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "largest_loss_difference": largest,
        "steps": steps,
    }
    report(title, rows, options, **facts)


def row(name: str, runs: Sequence[Run], options: argparse.Namespace) -> dict[str, Any]:
    """A side's line of the table: medians over its runs, counts of the timed steps."""
    timed = slice(WARM_UP, WARM_UP + options.steps)
    record = runs[0].record
    rates = [sum(run.record.samples[timed]) / run.seconds for run in runs]
    return {
        "side": name,
        "samples/s": median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "s a step": median([run.seconds for run in runs]) / options.steps,
        "CPU s a step": median([run.cpu_s for run in runs]) / options.steps,
        "peak GiB": median([run.peak_bytes for run in runs]) / 2**30,
        "samples": sum(record.samples[timed]),
        "supervised tokens": sum(record.targets[timed]),
        "tokens": sum(record.tokens[timed]),
    }


def compared(ours: Record, theirs: Record) -> list[dict[str, Any]]:
    """Losses and gradient norms step by step. UserError if the steps do not hold the same samples."""
    for name in ("samples", "targets"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(f"{name} of the steps: {getattr(ours, name)} here, {getattr(theirs, name)} there")
    steps = []
    for number, (a, b) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        norms = ours.grad_norms[number], theirs.grad_norms[number]
        steps.append(
            {
                "step": number + 1,
                "supervised tokens": ours.targets[number],
                "loss, vft": f"{a:.6f}",
                "loss, peer": f"{b:.6f}",
                "loss, relative difference": abs(a - b) / abs(b),
                "gradient norm, vft": norms[0],
                "gradient norm, peer": norms[1],
                "norm, relative difference": abs(norms[0] - norms[1]) / norms[1],
            }
        )
    return steps


# ------------------------------------------------------------------------------------------------------ preparation


def prepare(options: argparse.Namespace, folder: Path) -> Config:
    """Clips, records, checkpoint and adapter in `folder`, and the configuration of vft's side."""
    model = options.model or write_checkpoint(folder / "base", SHAPES[options.shape])
    clips = write_clips(folder / "clips", options.clips, longest=240 if options.mixed else 0)
    if options.mixed:
        video = VideoConfig(fps=2.0, min_frames=4, max_frames=16, max_pixels=MAX_PIXELS)
    else:
        video = VideoConfig(frames=options.frames, max_pixels=MAX_PIXELS)
    write_records(folder / "train.json", clips, options.questions, options.words, options.mixed)
    config = Config(
        task="qa",
        output_dir=folder / "vft",
        model=ModelConfig(path=str(model), adapter=str(folder / "adapter")),
        lora=LoraConfig(rank=16, alpha=32.0, targets=("language_model.*",)),
        data=DataConfig(
            root=folder,
            sources=(SourceConfig(format="llava_video", path="train.json"),),
            pack_tokens=LONGEST_STEP,
            max_samples_per_pack=options.pack,
            workers=options.workers,
            cache_dir=str(folder / "cache"),
            prefetch_packs=AHEAD * options.samples_per_step // options.pack,
            video=video,
        ),
        train=TrainConfig(
            max_steps=WARM_UP + options.steps + AHEAD,
            packs_per_step=options.samples_per_step // options.pack,
            learning_rate=1e-3,
            schedule="cosine",
            weight_decay=0.01,
            max_grad_norm=1.0,
            precision="fp32",
        ),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    write_adapter(config, folder / "adapter")
    return config


def write_adapter(config: Config, folder: Path) -> None:
    """The adapter that both sides start from. Its B is not zero, as a fresh one's is: else A would have no gradient,
    and the first losses would be those of the base alone."""
    assert config.lora is not None
    model = open_for_training(config).model
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.lora_A.to_empty(device="cpu")
        layer.lora_B.to_empty(device="cpu")
    initialise(model, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B.weight, std=0.02, generator=generator)
    export_adapter(model, folder, config.lora, config.model.path, {}, write=True)


# ----------------------------------------------------------------------------------------------------------- sides


def run_vft(config: Config, options: argparse.Namespace, folder: Path) -> Run:
    """The recipe as a user starts it; its metrics.jsonl says what its steps were."""
    with tempfile.TemporaryDirectory(prefix="vft-", dir=folder) as output:
        run = Path(output)
        file = run.with_suffix(".toml")
        file.write_text(configs.dump(config.model_copy(update={"output_dir": run})), encoding="utf-8")
        command = [sys.executable, "-m", "vft.recipes.qa", str(file)]
        peak, cpu_s = watched(command, options.threads, run.with_suffix(".log"), run / "metrics.jsonl")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    record = Record(
        losses=[line["loss"] for line in lines],
        grad_norms=[line["grad_norm"] for line in lines],
        targets=[line["num_targets"] for line in lines],
        tokens=[line["tokens"] for line in lines],
        samples=[line["samples"] for line in lines],
        cpu_s=cpu_s,
    )
    seconds = sum(line["step_time_s"] for line in lines[WARM_UP : WARM_UP + options.steps])
    return Run(record, seconds, of_timed(cpu_s, options), peak)


def run_peer(config: Config, options: argparse.Namespace, folder: Path) -> Run:
    """The other side on the same data, in the same steps."""
    file, output = folder / "peer.toml", folder / "peer.json"
    file.write_text(configs.dump(config), encoding="utf-8")
    job = Job(config=str(file), batch=options.peer_batch, workers=options.workers, output=str(output))
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    script = Path(__file__).with_name("peer_trainer.py")
    peak, _ = watched([sys.executable, str(script), str(job_file)], options.threads, folder / "peer.log")
    record = Record(**json.loads(output.read_text(encoding="utf-8")))
    return Run(record, of_timed(record.ends_s, options), of_timed(record.cpu_s, options), peak)


def of_timed(ends: Sequence[float], options: argparse.Namespace) -> float:
    """What passed in the timed steps, of a clock's readings at the end of each step."""
    return ends[WARM_UP + options.steps - 1] - ends[WARM_UP - 1]


def watched(command: Sequence[str], threads: int, log: Path, progress: Path | None = None) -> tuple[int, list[float]]:
    """Run `command` to its end on the CPU with `threads` of torch.

    Returns the most bytes that it had resident, and the CPU seconds that it had used when each line of `progress`
    appeared (looked at ten times a second). UserError, with the last line that it printed, if it fails.
    """
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    peak = 0
    cpu_s: list[float] = []
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                now_peak, now_cpu_s = usage_of(process.pid)
                peak = max(peak, now_peak)
                done = progress.read_bytes().count(b"\n") if progress and progress.exists() else 0
                cpu_s += [now_cpu_s] * (done - len(cpu_s))
                time.sleep(POLL_S)
        finally:
            process.kill()
    if process.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or [f"exit status {process.returncode}"]
        raise UserError(f"{' '.join(command[1:3])}: {lines[-1].removeprefix('error: ')}")
    return peak, cpu_s


def usage_of(pid: int) -> tuple[int, float]:
    """Most bytes that a process had resident, and its CPU seconds; zeros if it has just ended.

    Not getrusage's: its maximum counts this process's memory too, from before the command was executed.
    """
    try:
        status, fields = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "stat"))
    except OSError:
        return 0, 0.0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    user, system = fields.rpartition(")")[2].split()[11:13]  # behind the command's name, which may hold spaces
    return int(found[1]) * 1024 if found else 0, (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
