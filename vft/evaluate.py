"""Answers on held-out samples, and their scores. Used while training, by tools/evaluate.py and by tools/predict.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vft.config import DataConfig
from vft.console import progress_bar
from vft.data import vision
from vft.data.budget import limits_of, plan_media
from vft.data.chat import ChatEncoder
from vft.data.documents import Documents
from vft.data.packing import collate
from vft.data.pool import WorkerPool
from vft.data.video import MediaError
from vft.distributed import World
from vft.files import replace_text
from vft.lora import Adapter, attach
from vft.models import Skeleton, build
from vft.models.generate import Sampling, generate
from vft.models.weights import Checkpoint, load_weights
from vft.types import Conversation, Document, MediaInfo, MediaRef, Patches, Task, Turn, UserError


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what would be right answers to it."""

    id: str
    prompt: Conversation
    references: tuple[str, ...]


def questions(conversations: Sequence[Conversation], limit: int = 0) -> list[Question]:
    """The last answer of each conversation as the reference; equal prompts on equal media are one question."""
    found: dict[object, Question] = {}
    for one in conversations:
        last = max(i for i, turn in enumerate(one.turns) if turn.role == "assistant")
        prompt = Conversation(one.id, one.turns[:last], one.origin)
        key = (one.media_key, tuple((turn.role, turn.text) for turn in prompt.turns))
        before = found.get(key)
        references = (*(before.references if before else ()), one.turns[last].text)
        found[key] = Question(before.id if before else one.id, prompt, references)
    everything = list(found.values())
    return everything[:limit] if limit else everything


def user_question(id: str, media: Sequence[MediaRef], text: str) -> Question:
    """A question without known answers."""
    return Question(id, Conversation(id, (Turn("user", (*media, text)),), id), ())


Prompt = tuple[Document, list[Patches]]
"""A document that ends where an answer begins, and its decoded media."""


class Answerer:
    """A model with what it takes to answer questions about media."""

    def __init__(
        self,
        model: Any,
        encoder: ChatEncoder,
        config: DataConfig,
        info: Callable[[MediaRef], MediaInfo],
        pool: WorkerPool,
        world: World,
    ) -> None:
        self.model, self.encoder, self.config = model, encoder, config
        self.info, self.pool, self.world = info, pool, world

    def document(self, question: Question) -> Document:
        """The prompt as a document that ends where the answer begins."""
        encoded = self.encoder.encode(question.prompt, answer_next=True)
        media = [(ref, self.info(ref), limits_of(ref, self.config)) for ref in question.prompt.media]
        room = self.config.pack_tokens - encoded.text_tokens
        plans = plan_media(media, self.encoder.spec, room, question.prompt.origin)
        return self.encoder.document([encoded], plans, [question.id])

    def load(self, asked: Sequence[Question]) -> list[Prompt | MediaError]:
        """Decode the media of some questions side by side; an error where they can't be."""
        documents = [self.document(question) for question in asked]
        spec = self.encoder.spec
        futures = [[self.pool.submit(vision.load, plan, spec) for plan in document.media] for document in documents]
        loaded: list[Prompt | MediaError] = []
        for document, waiting in zip(documents, futures, strict=True):
            try:
                loaded.append((document, [future.result() for future in waiting]))
            except MediaError as error:
                loaded.append(error)
        return loaded

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """Answers to a handful of prompts at once. Every process must call it; it may bring none."""
        batch = collate(prompts, self.encoder.spec).to(self.world.device)
        training = self.model.training
        self.model.eval()
        try:
            answers = generate(self.model, batch, self.stop_ids, sampling)
        finally:
            self.model.train(training)
        return [self.encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]

    def answer_all(self, asked: Sequence[Question], sampling: Sampling, batch_size: int) -> dict[int, str]:
        """Answers by number of the question, shared out over the processes; every process gets them all.

        A question whose media can't be decoded has none.
        """
        mine = list(range(self.world.rank, len(asked), self.world.size))
        passes = math.ceil(math.ceil(len(asked) / self.world.size) / batch_size)
        answers: dict[int, str] = {}
        bar = progress_bar(len(mine), "answering", "question", self.world.is_main)
        for number in range(passes):
            chunk = mine[number * batch_size : (number + 1) * batch_size]
            loaded = zip(chunk, self.load([asked[i] for i in chunk]), strict=True)
            good = {index: prompt for index, prompt in loaded if not isinstance(prompt, MediaError)}
            answers |= zip(good, self.answer(list(good.values()), sampling), strict=True)
            bar.update(len(chunk))
        bar.close()
        if self.world.size > 1:
            gathered: list[dict[int, str]] = [{} for _ in range(self.world.size)]
            dist.all_gather_object(gathered, answers)
            answers = {index: text for part in gathered for index, text in part.items()}
        return dict(sorted(answers.items()))

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token that closes a message, and the tokenizer's own end."""
        tokenizer = self.encoder.tokenizer
        closing = tokenizer(self.encoder.spec.turn_end, add_special_tokens=False)["input_ids"]
        return frozenset([*closing, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])


def evaluate(
    task: Task, answerer: Answerer, held_out: Documents, sampling: Sampling, batch_size: int, limit: int, file: Path
) -> dict[str, float]:
    """Scores of the task on held-out documents; the answers go to `file`, a line each."""
    asked = questions([one for members in held_out.members for one in members], limit)
    answers = answerer.answer_all(asked, sampling, batch_size)
    if answerer.world.is_main:
        replace_text(file, "".join(prediction_line(asked[i], answer) for i, answer in answers.items()))
    scores = task.score(list(answers.values()), [asked[i].references for i in answers])
    return {**scores, "answered": len(answers), "unreadable": len(asked) - len(answers)}


def prediction_line(question: Question, prediction: str) -> str:
    """A line of a predictions file: id, prompt, prediction and the first reference."""
    reference = question.references[0] if question.references else None
    prompt = question.prompt.turns[-1].text
    line = {"id": question.id, "prompt": prompt, "prediction": prediction, "reference": reference}
    return json.dumps(line, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class LoadedModel:
    """A model for use, not for training."""

    skeleton: Skeleton
    checkpoint: Checkpoint
    encoder: ChatEncoder


def load_model(path: str, adapter: Path | None, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """A base model with an adapter on it, if one is named, ready to answer."""
    checkpoint = Checkpoint.open(path)
    skeleton = build(checkpoint, dtype)
    files = None if adapter is None else Adapter.open(adapter, skeleton.peft_prefixes)
    base_names = frozenset(name for name, _ in skeleton.model.named_parameters())
    if files is not None:
        attach(skeleton.model, files, skeleton.towers)
        files.check(skeleton.model, path, checkpoint.fingerprint)
    skeleton.model.requires_grad_(False)
    skeleton.model.to_empty(device=device)
    extra = frozenset(name for name, _ in skeleton.model.named_parameters()) - base_names
    load_weights(skeleton.model, checkpoint, extra, show_progress=True)
    if files is not None:
        files.load_into(skeleton.model)
    skeleton.model.eval()
    return LoadedModel(skeleton, checkpoint, ChatEncoder(checkpoint.tokenizer, skeleton.spec))


def require_folder(path: Path | None, what: str) -> None:
    """UserError where a folder that was named isn't there."""
    if path is not None and not path.is_dir():
        raise UserError(f"{what} = {str(path)!r}: no such folder")
