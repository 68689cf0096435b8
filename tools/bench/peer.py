#!/usr/bin/env python
"""vft beside what its users would otherwise run: python tools/bench/peer.py [--questions 5] [--mixed] [--output FILE]

The other side is transformers' Trainer with PEFT's LoRA on Qwen2_5_VLForConditionalGeneration: SDPA attention,
DataLoader workers, batches padded to the longest row, each question with its whole video. Both train the same adapter
on the same checkpoint, on the CPU, with the same samples in every step, optimizer and schedule; in float32, or with
frozen weights in bf16 and trained ones in float32. The tokens, labels and pixels of the other side are vft's: the tests
compare those with transformers' processors.

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
import sys
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import in_venv  # noqa: F401
import torch
from measure import benchmark, in_new_process, report, show_table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from workload import SHAPES, write_checkpoint, write_clips, write_records

from vft.adapters.lora import adapted_layers
from vft.adapters.peft_format import export_adapter
from vft.common.errors import UserError
from vft.common.types import IGNORE_INDEX, Document
from vft.config import run as configs
from vft.config.data import DataConfig, SourceConfig, VideoConfig
from vft.config.run import CheckpointConfig, Config, LoraConfig, ModelConfig, TrainConfig
from vft.data.media.patches import load_patches
from vft.data.packing import Cursor, take_step
from vft.preparation.documents import load_training
from vft.preparation.run import PreparedModel, open_for_training
from vft.recipes import task_of
from vft.recipes.main import train_config
from vft.reporting.monitor import Monitor

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 2
"""Steps before the timed ones."""
AHEAD = 1
"""Steps after the timed ones: vft prepares so many ahead; the other side two batches a worker."""
LONGEST_STEP = 1 << 20
"""Tokens; a row is limited by its samples instead, so that all steps hold equally many."""
MAX_PIXELS = 50176
"""Height x width of a frame, at most: 224 x 224, 64 tokens of two frames."""
Run = dict[str, Any]
"""The course of a run: lists with a value for each step. `loss`, `grad_norm`, `num_targets`, `tokens` (padding among
them) and `samples` as in metrics.jsonl; `ends_s` and `cpu_s`, the clock and the processor time of the training process
with its threads at the step's end; and `peak_bytes`, the most memory that this process had resident."""


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--side"]:  # a child process of `compare`
        run = SIDES[sys.argv[2]](configs.load(Path(sys.argv[3])), int(sys.argv[4]))
        print(json.dumps({**run, "peak_bytes": peak_bytes()}))
        return
    with benchmark(__doc__, add_arguments, repeats=3, may_be_zero=("workers",)) as (options, folder):
        check(options)
        compare(options, folder)


def peak_bytes() -> int:
    """The most memory that this process had resident so far."""
    # Not getrusage's peak: it counts the parent's memory too, from before the command was executed.
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


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
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both sides (fp32)")
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
    config, file = prepare(options, folder), folder / "run.toml"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    runs: dict[str, list[Run]] = {name: [] for name in SIDES}
    for number in range(options.repeats):
        for name in SIDES:
            own = config.model_copy(update={"output_dir": folder / f"{name}-{number}"})
            file.write_text(configs.dump(own), encoding="utf-8")
            command = ("--side", name, file, options.peer_batch)
            environment = {**threads, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
            runs[name].append(in_new_process(__file__, *command, **environment))
            print(f"run {number + 1}/{options.repeats} of {name}: done", file=sys.stderr)
    steps = compared(*(taken[0] for taken in runs.values()))
    rows = [row(name, taken, options.steps) for name, taken in runs.items()]
    ratio, cpu_ratio = rows[0]["samples/s"] / rows[1]["samples/s"], rows[1]["CPU s a step"] / rows[0]["CPU s a step"]
    largest = max(step["loss, relative difference"] for step in steps)
    show_table(f"losses: largest relative difference {largest:.1e}", steps)
    facts = {"ratio": ratio, "cpu_ratio": cpu_ratio, "largest_loss_difference": largest, "steps": steps}
    report(f"{ratio:.2f} times the samples/s ({cpu_ratio:.2f} times, by CPU seconds)", rows, options, **facts)


def row(name: str, runs: Sequence[Run], steps: int) -> dict[str, Any]:
    """A side's line of the table: medians over its runs, counts of the timed steps."""
    timed, last = slice(WARM_UP, WARM_UP + steps), WARM_UP + steps - 1
    seconds, cpu_s = ([run[key][last] - run[key][WARM_UP - 1] for run in runs] for key in ("ends_s", "cpu_s"))
    counts = {key: sum(runs[0][key][timed]) for key in ("samples", "num_targets", "tokens")}
    return {
        "side": name,
        "samples/s": counts["samples"] / median(seconds),
        "slowest": counts["samples"] / max(seconds),
        "fastest": counts["samples"] / min(seconds),
        "s a step": median(seconds) / steps,
        "CPU s a step": median(cpu_s) / steps,
        "peak GiB": median(run["peak_bytes"] for run in runs) / 2**30,
        "samples": counts["samples"],
        "supervised tokens": counts["num_targets"],
        "tokens": counts["tokens"],
    }


def compared(ours: Run, theirs: Run) -> list[dict[str, Any]]:
    """Losses and gradient norms step by step. UserError if the steps do not hold the same samples."""
    for name in ("samples", "num_targets"):
        if ours[name] != theirs[name]:
            raise UserError(f"{name} of the steps: {ours[name]} here, {theirs[name]} there")
    steps = []
    for number, targets in enumerate(ours["num_targets"]):
        line = {"step": number + 1, "supervised tokens": targets}
        for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
            a, b = ours[key][number], theirs[key][number]
            line |= {f"{name}, vft": a, f"{name}, peer": b, f"{name}, relative difference": abs(a - b) / abs(b)}
        steps.append(line)
    return steps


# ------------------------------------------------------------------------------------------------------ preparation


def prepare(options: argparse.Namespace, folder: Path) -> Config:
    """Clips, records, checkpoint and adapter in `folder`, and the configuration of vft's side."""
    model = options.model or write_checkpoint(folder / "base", SHAPES[options.shape], PRECISIONS[options.precision])
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
            precision=options.precision,
        ),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    write_adapter(config, folder / "adapter")
    return config


def write_adapter(config: Config, folder: Path) -> None:
    """The adapter that both sides start from. Its B is not zero, as a fresh one's is: else A would have no gradient,
    and the first losses would be those of the base alone."""
    assert config.lora is not None
    model, generator = open_for_training(config).model, torch.Generator().manual_seed(config.seed)
    for _, layer in adapted_layers(model):
        for part in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(part.to_empty(device="cpu").weight, std=0.02, generator=generator)
    export_adapter(model, folder, config.lora, config.model.path, {}, write=True)


# ----------------------------------------------------------------------------------- sides, in their own processes


def run_vft(config: Config, _: int) -> Run:
    """The recipe as a user starts it; its metrics.jsonl says what its steps were."""
    run: Run = {"ends_s": [], "cpu_s": []}
    step = Monitor.step

    def step_and_note(monitor: Monitor, line: Any) -> None:
        step(monitor, line)
        note(run)

    with patch.object(Monitor, "step", step_and_note):
        train_config(config, "qa")
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "grad_norm", "num_targets", "tokens", "samples")
    return {**run, **{key: [line[key] for line in lines] for key in keys}}


def note(run: Run) -> None:
    """The end of a step."""
    run["ends_s"].append(time.perf_counter())
    run["cpu_s"].append(time.process_time())


def run_peer(config: Config, batch: int) -> Run:
    """The other side on the same data, in the same steps, `batch` questions at a time."""
    import transformers
    from peft import PeftModel

    transformers.logging.set_verbosity_error()
    prepared = open_for_training(config)
    steps = questions_by_step(config, prepared)
    accumulated = [[step[i : i + batch] for i in range(0, len(step), batch)] for step in steps]
    run: Run = {"ends_s": [], "cpu_s": [], "samples": [len(step) for step in steps]}
    run["num_targets"] = [sum(int((one.labels_T != IGNORE_INDEX).sum()) for one in step) for step in steps]
    run["tokens"] = [sum(len(part) * max(one.num_tokens for one in part) for part in step) for step in accumulated]

    class Recorder(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            note(run)

    base = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        config.model.path, dtype=PRECISIONS[config.train.precision], attn_implementation="sdpa"
    )
    base.config.use_cache = False
    base.accepts_loss_kwargs = True  # a step's supervised tokens; otherwise short answers weigh more than long ones
    train, workers = config.train, config.data.workers
    arguments = transformers.TrainingArguments(
        output_dir=str(config.output_dir),
        per_device_train_batch_size=1,  # an item is a whole batch, so that none reaches over the end of a step
        gradient_accumulation_steps=len(accumulated[0]),
        num_train_epochs=1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        adam_epsilon=train.eps,
        max_grad_norm=train.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=config.train.precision == "bf16",
        train_sampling_strategy="sequential",
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=2 if workers else None,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
    )
    trainer = transformers.Trainer(
        model=PeftModel.from_pretrained(base, config.model.adapter, is_trainable=True),
        args=arguments,
        train_dataset=Batches([part for step in accumulated for part in step], prepared),
        data_collator=itemgetter(0),
        callbacks=[Recorder()],
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return {**run, **{key: [line[key] for line in logs] for key in ("loss", "grad_norm")}}


def questions_by_step(config: Config, prepared: PreparedModel) -> list[list[Document]]:
    """The questions of every step of a vft run, in its order, each with its whole video."""
    task, encoder = task_of(config), prepared.encoder(config.data)
    unshared = config.data.model_copy(update={"share_videos": False})
    shared = load_training(task, config, encoder)
    alone = load_training(task, config.model_copy(update={"data": unshared}), encoder)
    numbers = {planned.conversations[0].id: number for number, planned in enumerate(alone.documents)}
    plan, cursor, steps = shared.pack_plan(config.seed), Cursor(), []
    for _ in range(config.train.max_steps or 0):
        packs, cursor = take_step(plan, cursor, config.train.packs_per_step, None)
        documents = [shared.documents[number] for pack in packs for number in pack.documents]
        steps.append([alone.build(numbers[one.id]) for document in documents for one in document.conversations])
    return steps


class Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Batches as the model takes them, padded on the right; padding is neither attended nor supervised."""

    def __init__(self, batches: list[list[Document]], prepared: PreparedModel) -> None:
        self.batches, self.model = batches, prepared.model

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows = self.batches[index]
        plans = [row.media[0] for row in rows]
        pixels_PD = torch.cat([load_patches(plan, self.model.processor).pixels_PD for plan in plans])
        return {
            "input_ids": pad_sequence([row.ids_T for row in rows], batch_first=True),
            "labels": pad_sequence([row.labels_T for row in rows], batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row.ids_T) for row in rows], batch_first=True),
            "position_ids": pad_sequence([row.positions_3T.T for row in rows], batch_first=True).permute(2, 0, 1),
            "pixel_values_videos": self.model.normalise(pixels_PD),
            "video_grid_thw": torch.tensor([plan.grid_thw for plan in plans]),
        }


SIDES: dict[str, Callable[[Config, int], Run]] = {"vft": run_vft, "Trainer + PEFT": run_peer}


if __name__ == "__main__":
    main()
