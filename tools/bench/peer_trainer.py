"""The other side of peer.py: transformers' Trainer and PEFT's LoRA on one job, as their users set them up.

python tools/bench/peer_trainer.py JOB.json: trains, and writes what each step was and when it ended to the file that
the job names. Every question is a row of its own with its whole video; rows of a batch are padded to the longest.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from peer import Job, Record
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2_5_VLForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from vft.common.types import IGNORE_INDEX, Conversation, MediaPlan, MediaRef
from vft.config import run as configs
from vft.config.run import Config
from vft.data.chat import ChatEncoder
from vft.data.media.patches import load_patches
from vft.data.packing import Cursor, take_step
from vft.models.processor import VisionProcessor
from vft.preparation.documents import load_training
from vft.preparation.run import open_for_training
from vft.recipes import task_of

Question = tuple[Conversation, MediaPlan]
"""A question with its answer, and which frames of its video it is about."""


def main() -> None:
    """Run the job that the argument names."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    transformers.logging.set_verbosity_error()
    record = train(configs.load(Path(job.config)), job)
    Path(job.output).write_text(json.dumps(asdict(record)), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- data


def planned_steps(config: Config) -> tuple[list[list[Question]], ChatEncoder]:
    """The questions of every step of a vft run with this configuration, in its order."""
    encoder = open_for_training(config).encoder(config.data)
    documents = load_training(task_of(config), config, encoder)
    plan, cursor, steps = documents.pack_plan(config.seed), Cursor(), []
    for _ in range(config.train.max_steps or 0):
        packs, cursor = take_step(plan, cursor, config.train.packs_per_step, None)
        numbers = [number for pack in packs for number in pack.documents]
        media = {number: documents.build(number).media[0] for number in numbers}
        steps.append([(one, media[number]) for number in numbers for one in documents.documents[number].conversations])
    return steps, encoder


class Rows(Dataset[dict[str, Tensor]]):
    """Questions as the model's processor would give them.

    transformers' video processor needs torchvision; its rules (frames, bicubic resize in uint8, normalising in float,
    order of patches) are applied by vft's decoding instead, which gives the same pixels.
    """

    def __init__(
        self, questions: Sequence[Question], tokenizer: Any, processor: VisionProcessor, video_token: str
    ) -> None:
        self.questions, self.tokenizer, self.processor, self.video_token = questions, tokenizer, processor, video_token
        self.header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.mean_D, self.std_D = (
            torch.tensor(values).repeat_interleave(processor.patch_features // 3)
            for values in (processor.mean, processor.std)
        )

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        conversation, plan = self.questions[index]
        pixels_PD = load_patches(plan, self.processor).pixels_PD.float().div_(255).sub_(self.mean_D).div_(self.std_D)
        text = self.tokenizer.apply_chat_template(messages_of(conversation), tokenize=False)
        text = text.replace(self.video_token, self.video_token * plan.num_tokens)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        first = ids.index(self.tokenizer.convert_tokens_to_ids(self.video_token))
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels_of(ids, self.header, self.end)),
            # transformers 5 lets the text after a video go on at start + max(height, width) even where the video's
            # time reached further; the released model was trained with the largest position + 1. So they are given.
            "positions_3T": self.processor.positions(len(ids), [([first], plan)]),
            "pixels_PD": pixels_PD,
            "grid": torch.tensor(plan.grid_thw),
        }


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    """What the chat template reads."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": part.kind} if isinstance(part, MediaRef) else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in conversation.turns
    ]


def labels_of(ids: Sequence[int], header: Sequence[int], end: int) -> list[int]:
    """The ids of each answer and of the token that closes it; IGNORE_INDEX elsewhere."""
    labels = [IGNORE_INDEX] * len(ids)
    for start in range(len(ids) - len(header) + 1):
        if ids[start : start + len(header)] == header:
            first = start + len(header)
            after = ids.index(end, first) + 1
            labels[first:after] = ids[first:after]
    return labels


def padded(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded on the right; padding is neither attended nor supervised."""

    def column(name: str, padding: int) -> Tensor:
        return pad_sequence([row[name] for row in rows], batch_first=True, padding_value=padding)

    positions = pad_sequence([row["positions_3T"].T for row in rows], batch_first=True)
    return {
        "input_ids": column("input_ids", 0),
        "labels": column("labels", IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
        "position_ids": positions.permute(2, 0, 1),
        "pixel_values_videos": torch.cat([row["pixels_PD"] for row in rows]),
        "video_grid_thw": torch.stack([row["grid"] for row in rows]),
    }


# --------------------------------------------------------------------------------------------------------- training


class StepTrainer(Trainer):
    """Trainer with batches that never reach over the end of a step."""

    def __init__(self, batches: list[list[int]], **options: Any) -> None:
        super().__init__(**options)
        self.batches = batches

    def get_train_dataloader(self) -> Any:
        """As Trainer's own, but for the batches."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)


class Recorder(TrainerCallback):
    """Fills a record."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time."""
        self.record.ends_s.append(time.perf_counter())
        self.record.cpu_s.append(time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Note loss and gradient norm; the summary at the end has neither."""
        if logs and "loss" in logs:
            self.record.losses.append(logs["loss"])
            self.record.grad_norms.append(logs["grad_norm"])


def arguments_of(config: Config, job: Job, accumulation: int) -> TrainingArguments:
    """Trainer's settings: the run's own optimizer and schedule, float32, nothing written."""
    train = config.train
    return TrainingArguments(
        output_dir=str(Path(job.output).with_suffix("")),
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=accumulation,
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
        dataloader_num_workers=job.workers,
        dataloader_prefetch_factor=2 if job.workers else None,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
    )


def train(config: Config, job: Job) -> Record:
    """Every step of the run."""
    steps, encoder = planned_steps(config)
    record = Record(samples=[len(step) for step in steps])
    assert len(set(record.samples)) == 1, f"steps of {sorted(set(record.samples))} samples"
    size = record.samples[0]
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        config.model.path, dtype=torch.float32, attn_implementation="sdpa"
    )
    base.config.use_cache = False
    video_token = encoder.tokenizer.convert_ids_to_tokens(base.config.video_token_id)
    rows = Rows([one for step in steps for one in step], encoder.tokenizer, encoder.processor, video_token)
    starts = [(step * size, first) for step in range(len(steps)) for first in range(0, size, job.batch)]
    batches = [list(range(at + first, at + min(first + job.batch, size))) for at, first in starts]
    accumulation = math.ceil(size / job.batch)

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        # The model class refuses the step's count (accepts_loss_kwargs = False), and Trainer would then average the
        # means of its batches: short answers would weigh more than long ones. This is the same loss with the count.
        if len(record.tokens) % accumulation == 0:
            record.targets.append(int(num_items_in_batch))
        record.tokens.append(labels.numel())
        return ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch)

    trainer = StepTrainer(
        batches,
        model=PeftModel.from_pretrained(base, config.model.adapter, is_trainable=True),
        args=arguments_of(config, job, accumulation),
        train_dataset=rows,
        data_collator=padded,
        compute_loss_func=loss_of,
        callbacks=[Recorder(record)],
    )
    trainer.train()
    record.tokens = [sum(record.tokens[i : i + accumulation]) for i in range(0, len(record.tokens), accumulation)]
    return record


if __name__ == "__main__":
    main()
