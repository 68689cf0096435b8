#!/usr/bin/env python
"""vft beside TRL's DPOTrainer on pairs of answers: python tools/bench/pairs.py [--kind image] [--ratio 4]

Both train the same adapter on the same checkpoint in float32, on the CPU, with the same pairs in every step, by DPO
with the adapter as it was at the start as the reference. TRL runs each answer behind a copy of its picture or video,
twice: with the adapter and with its frozen copy. On pictures it prepares its own batches. It has no videos, so there
its trainer is given vft's tokens, positions and pixels. The chat template has no line break behind an answer, because
TRL would count it. Losses and log-probabilities are compared step by step.

`--ratio` is how many times as long as an answer its picture or video is, in tokens. From tokens alone the gain should
be 2 (V + a) / (V + 2 a). Each side runs in a process of its own, in turns with the other. The other side needs
`pip install trl torchvision`; without trl, vft's side alone is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import in_venv  # noqa: F401
import torch
from data_sides import import_torchvision
from measure import benchmark, in_new_process, report, show_table
from peer import AHEAD, LONGEST_STEP, MAX_PIXELS, WARM_UP, Run, note, peak_bytes, row, run_vft, write_adapter
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from workload import SHAPES, write_checkpoint, write_clips

from vft.common.errors import UserError
from vft.common.types import IGNORE_INDEX, Document
from vft.config import run as configs
from vft.config.data import DataConfig, SourceConfig, VideoConfig
from vft.config.run import CheckpointConfig, Config, LoraConfig, ModelConfig, ObjectiveConfig, TrainConfig
from vft.data.media.patches import load_patches
from vft.data.packing import Cursor, take_step
from vft.preparation.documents import load_training
from vft.preparation.run import PreparedModel, open_for_training
from vft.recipes import task_of

SIDE_PIXELS = 448
"""Of a picture: 16 x 16 tokens."""
FRAMES = 8
"""Of a video of 224 x 224 pixels: 4 x 8 x 8 tokens, as many as of a picture."""
VISION_TOKENS = 256
Example = dict[str, Any]


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--side"]:  # a child process of `compare`
        run = SIDES[sys.argv[2]](configs.load(Path(sys.argv[3])), int(sys.argv[4]))
        print(json.dumps({**run, "peak_bytes": peak_bytes()}))
        return
    with benchmark(__doc__, add_arguments, repeats=3, may_be_zero=("workers",)) as (options, folder):
        if options.pairs_per_step % options.pack or options.pairs_per_step % options.peer_batch:
            raise UserError(f"--pairs-per-step {options.pairs_per_step}: --pack and --peer-batch must divide it")
        compare(options, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="size of a random checkpoint (small)")
    parser.add_argument("--kind", choices=("image", "video"), default="image", help="what the pairs are about (image)")
    parser.add_argument("--ratio", type=int, default=4, help="tokens of the picture or video to those of an answer (4)")
    parser.add_argument("--pairs-per-step", type=int, default=4, help="pairs in an optimizer step (4)")
    parser.add_argument("--steps", type=int, default=2, help=f"timed optimizer steps, besides {WARM_UP} + {AHEAD} (2)")
    parser.add_argument("--pack", type=int, default=4, help="pairs in a row of vft's (4)")
    parser.add_argument("--peer-batch", type=int, default=2, help="pairs in a batch of the other side (2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch (all CPUs)")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes of each side (1)")


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Run the sides in turns and report."""
    torch.set_num_threads(options.threads)
    config, file = prepare(options, folder), folder / "run.toml"
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    names = list(SIDES)
    if importlib.util.find_spec("trl") is None:
        names.remove(TRL)
        print("trl is not installed (pip install trl): vft's side alone is measured", file=sys.stderr)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(options.repeats):
        for name in names:
            own = config.model_copy(update={"output_dir": folder / f"{name}-{number}"})
            file.write_text(configs.dump(own), encoding="utf-8")
            runs[name].append(in_new_process(__file__, "--side", name, file, options.peer_batch, **environment))
            print(f"run {number + 1}/{options.repeats} of {name}: done", file=sys.stderr)
    rows = [row(name, taken, options.steps) for name, taken in runs.items()]
    title, facts = f"{options.kind}s, {options.ratio}:1", dict[str, Any]()
    if TRL in runs:
        steps = compared(runs[VFT][0], runs[TRL][0])
        largest = max(value for step in steps for name, value in step.items() if name.endswith("difference"))
        answer = runs[VFT][0]["tokens_chosen"][0]
        expected = 2 * (VISION_TOKENS + answer) / (VISION_TOKENS + 2 * answer)
        ratio = rows[0]["samples/s"] / rows[1]["samples/s"]
        memory = rows[1]["peak GiB"] / rows[0]["peak GiB"]
        if largest > 1e-4:
            raise UserError(f"losses or log-probabilities differ by {largest:.1e}: the times are of different work")
        show_table(f"losses and log-probabilities: largest relative difference {largest:.1e}", steps)
        cpu_ratio = rows[1]["CPU s a step"] / rows[0]["CPU s a step"]
        title += f": {ratio:.2f} times the pairs/s ({cpu_ratio:.2f} by CPU seconds, {expected:.2f} by tokens); "
        title += f"TRL's memory is {memory:.2f} times ours"
        facts = {"ratio": ratio, "cpu_ratio": cpu_ratio, "expected": expected, "memory": memory, "steps": steps}
        facts["difference"] = largest
    report(title, rows, options, **facts)


def compared(ours: Run, theirs: Run) -> list[dict[str, Any]]:
    """Losses and log-probabilities step by step."""
    return [
        {"step": number + 1}
        | {
            name: value
            for key in ("loss", "log_p_chosen", "log_p_rejected")
            for a, b in [(ours[key][number], theirs[key][number])]
            for name, value in ((key, a), (f"{key}, TRL", b), (f"{key}, difference", abs(a - b) / abs(b)))
        }
        for number in range(len(ours["loss"]))
    ]


# ------------------------------------------------------------------------------------------------------ preparation


def prepare(options: argparse.Namespace, folder: Path) -> Config:
    """Media, pairs, checkpoint and adapter in `folder`, and the configuration of vft's side."""
    model = write_checkpoint(folder / "base", SHAPES[options.shape])
    for file in ("chat_template.json", "tokenizer_config.json"):
        content = json.loads((model / file).read_text(encoding="utf-8"))
        if "chat_template" in content:
            content["chat_template"] = content["chat_template"].replace("<|im_end|>\n", "<|im_end|>")
            (model / file).write_text(json.dumps(content), encoding="utf-8")
    count = options.pairs_per_step * (WARM_UP + options.steps + AHEAD)
    write_pairs(folder, options.kind, count, VISION_TOKENS // options.ratio)
    config = Config(
        task="qa",
        output_dir=folder / "vft",
        model=ModelConfig(path=str(model), adapter=str(folder / "adapter")),
        lora=LoraConfig(rank=16, alpha=32.0, targets=("language_model.*",)),
        objective=ObjectiveConfig(kind="dpo"),
        data=DataConfig(
            root=folder,
            sources=(SourceConfig(format="messages", path="pairs.jsonl"),),
            pack_tokens=LONGEST_STEP,
            max_samples_per_pack=options.pack,
            workers=options.workers,
            cache_dir=str(folder / "cache"),
            prefetch_packs=max(1, AHEAD * options.pairs_per_step // options.pack),
            video=VideoConfig(frames=FRAMES, max_pixels=MAX_PIXELS),
        ),
        train=TrainConfig(
            max_steps=WARM_UP + options.steps + AHEAD,
            packs_per_step=options.pairs_per_step // options.pack,
            learning_rate=1e-3,
            schedule="cosine",
            weight_decay=0.01,
            max_grad_norm=1.0,
            precision="fp32",
        ),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    write_adapter(config.model_copy(update={"objective": None}), folder / "adapter")
    return config


def write_pairs(folder: Path, kind: str, count: int, tokens: int) -> None:
    """A medium, a question and two answers of about so many tokens for each pair. The rejected one is shorter."""
    generator = torch.Generator().manual_seed(0)
    if kind == "video":
        files = write_clips(folder / "media", count)
    else:
        (folder / "media").mkdir()
        files = [folder / "media" / f"{number:05}.png" for number in range(count)]
        for file in files:
            pixels = torch.randint(256, (SIDE_PIXELS, SIDE_PIXELS, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(file)
    vocabulary = ("red", "blue", "disc", "square", "moves", "left", "right", "on", "a", "dark")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def text(length: int) -> str:
        said = vocabulary[0]
        while len(tokenizer(said).input_ids) < length:
            said += f" {vocabulary[int(torch.randint(len(vocabulary), (), generator=generator))]}"
        return said

    lines = [
        {
            "id": file.stem,
            f"{kind}s": [str(file.relative_to(folder))],
            "prompt": f"<{kind}>{text(6)}?",
            "chosen": text(tokens),
            "rejected": text(tokens - 4),
        }
        for file in files
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# ----------------------------------------------------------------------------------- sides, in their own processes


def run_trl(config: Config, batch: int) -> Run:
    """TRL's trainer on the same pairs in the same steps, `batch` pairs at a time."""
    import_torchvision()
    import datasets
    import transformers
    from peft import PeftModel
    from trl import DPOConfig, DPOTrainer

    transformers.logging.set_verbosity_error()
    prepared = open_for_training(config.model_copy(update={"objective": None}))
    steps = pairs_by_step(config, prepared)
    run: Run = {"ends_s": [], "cpu_s": [], "samples": [len(step) for step in steps]}
    run["num_targets"] = [sum(int((one.labels_T != IGNORE_INDEX).sum()) for one in step) for step in steps]
    run["tokens"] = [sum(one.num_tokens + one.prefix_length for one in step) for step in steps]

    class Recorder(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            note(run)

    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        config.model.path, dtype=torch.float32, attn_implementation="sdpa"
    )
    train, workers = config.train, config.data.workers
    records = {json.loads(line)["id"]: json.loads(line) for line in (config.data.root / "pairs.jsonl").open()}
    order = [(document.sample_ids[0], document) for document in chain(*steps)]
    is_video = "videos" in records[order[0][0]]
    dataset = datasets.Dataset.from_list([example(records[name], config.data.root) for name, _ in order])
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(model, config.model.adapter, is_trainable=True),
        args=DPOConfig(
            output_dir=str(config.output_dir),
            beta=0.1,
            max_length=None,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=len(steps[0]) // batch,
            gradient_checkpointing=False,
            num_train_epochs=1,
            learning_rate=train.learning_rate,
            lr_scheduler_type=train.schedule,
            warmup_steps=0,
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
            bf16=False,
            train_sampling_strategy="sequential",
            dataloader_num_workers=workers,
            dataloader_prefetch_factor=2 if workers else None,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            seed=config.seed,
        ),
        train_dataset=dataset if is_video else dataset.cast_column("images", datasets.List(datasets.Image())),
        processing_class=transformers.AutoProcessor.from_pretrained(config.model.path),
        data_collator=partial(video_batch, prepared, dict(order)) if is_video else None,
        callbacks=[Recorder()],
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    names = {"loss": "loss", "log_p_chosen": "logps/chosen", "log_p_rejected": "logps/rejected"}
    return {
        **run,
        **{ours: [line[theirs] for line in logs] for ours, theirs in names.items()},
    }


def example(record: dict[str, Any], root: Path) -> Example:
    """A pair in TRL's conversational form. A video is stood for by an empty list of pictures: the collator has it."""
    question = record["prompt"].partition(">")[2]
    told = {key: [{"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected")}
    media = {"id": record["id"], "images": [str(root / one) for one in record.get("images", ())]}
    return {"prompt": [{"role": "user", "content": question}], **told, **media}


def pairs_by_step(config: Config, prepared: PreparedModel) -> list[list[Document]]:
    """The pairs of every step of a vft run, in its order."""
    data = load_training(task_of(config), config, prepared.encoder(config.data))
    plan, cursor, steps = data.pack_plan(config.seed), Cursor(), []
    for _ in range(config.train.max_steps or 0):
        packs, cursor = take_step(plan, cursor, config.train.packs_per_step, None)
        steps.append([data.build(number) for pack in packs for number in pack.documents])
    return steps


def video_batch(prepared: PreparedModel, documents: dict[str, Document], examples: Sequence[Example]) -> dict[str, Any]:
    """All chosen and then all rejected sequences of a batch, each behind a copy of its video, padded on the right."""
    pairs = [documents[one["id"]] for one in examples]
    media = [pair.media[0] for pair in pairs] * 2
    answers = [(pair, pair.suffix_rows[number]) for number in (0, 1) for pair in pairs]
    rows = [torch.cat([torch.arange(pair.prefix_length), torch.arange(own.start, own.stop)]) for pair, own in answers]
    pixels_PD = torch.cat([load_patches(plan, prepared.model.processor).pixels_PD for plan in media])

    def padded(values: Callable[[Document], Tensor]) -> Tensor:
        return pad_sequence(
            [values(pair)[kept] for (pair, _), kept in zip(answers, rows, strict=True)], batch_first=True
        )

    return {
        "input_ids": padded(lambda pair: pair.ids_T),
        "attention_mask": padded(lambda pair: torch.ones_like(pair.ids_T)),
        "completion_mask": padded(lambda pair: (pair.labels_T != IGNORE_INDEX).long()),
        "position_ids": padded(lambda pair: pair.positions_3T.T).permute(2, 0, 1),
        "pixel_values_videos": prepared.model.normalise(pixels_PD),
        "video_grid_thw": torch.tensor([plan.grid_thw for plan in media]),
    }


def run_ours(config: Config, _: int) -> Run:
    """vft's recipe, with what its pairs were."""
    run = run_vft(config, 0)
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    return run | {key: [line[key] for line in lines] for key in ("log_p_chosen", "log_p_rejected", "tokens_chosen")}


VFT, TRL = "vft", "TRL"
SIDES: dict[str, Callable[[Config, int], Run]] = {VFT: run_ours, TRL: run_trl}


if __name__ == "__main__":
    main()
