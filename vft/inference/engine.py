"""Answers of a model: generated text, and which of a closed set of answers it finds likeliest.

Used by evaluation, in training and after it, and by tools/predict.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.reasoning import CLOSE, OPEN, answer_in, split_reasoning
from vft.common.task import Answer, Question
from vft.common.types import Conversation, Document, MediaInfo, MediaRef, Patches, Turn
from vft.config.data import DataConfig
from vft.data.budget import Candidate, fit, plan_conversation
from vft.data.chat import ChatEncoder
from vft.data.media.errors import MediaError
from vft.data.media.frame_cache import FrameCache
from vft.data.packing import collate
from vft.data.workers import WorkerPool
from vft.distributed.process_group import World, all_of
from vft.inference.generate import Sampling, generate
from vft.inference.option_scores import OptionScore, prefix_of, score_options
from vft.models.base import VideoLanguageModel


def user_question(
    id: str, media: Sequence[MediaRef], text: str, before: str = "", system: str | None = None
) -> Question:
    """A question without known answers; `before` stands before the media, `system` in a turn of its own."""
    own = [] if system is None else [Turn("system", (system,))]
    parts: tuple[str | MediaRef, ...] = (before, *media, text) if before else (*media, text)
    return Question(id, Conversation(id, (*own, Turn("user", parts)), id), ())


@dataclass(frozen=True, slots=True)
class Said:
    """What a model said."""

    text: str
    """Without its reasoning; empty where that did not end."""
    reasoning: str = ""
    is_cut_off: bool = False
    """Whether it ended at the limit of tokens, or of the model's context."""


def name_of(question: Question) -> str:
    """The same wherever and beside whatever the question is asked."""
    turns = [(turn.role, turn.text) for turn in question.prompt.turns]
    media = [(ref.name.rpartition("/")[2], ref.options) for ref in question.prompt.media]
    return repr((question.id, turns, media))


def answer_of(question: Question, said: Said, scores: Sequence[OptionScore]) -> Answer:
    """What a model said to a question, with the scores of its options in their two forms.

    The second is that of lm-eval's `acc_norm` (`lm_eval/api/task.py`): summed log-probability by `len(option)`.
    """
    options = question.prompt.options if scores else ()
    by_length = (score.text / len(option) for score, option in zip(scores, options, strict=True))
    whole = tuple(score.whole for score in scores)
    return Answer(question, said.text, whole, tuple(by_length), said.reasoning, said.is_cut_off)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model gets it."""

    document: Document
    """It ends where an answer begins."""
    patches: list[Patches]
    options: Document | None
    """The question's options as branches; None where it has none."""
    name: str = ""
    """What is drawn depends on this (`name_of`)."""


class TextStream:
    """Text of one answer, given on as its tokens come; what a token to come may still change is held back."""

    def __init__(self, decode: Callable[[Sequence[int]], str], show: Callable[[str], None]) -> None:
        self._decode, self._show = decode, show
        self._ids: list[int] = []
        self._shown = ""

    def add(self, tokens: Sequence[int | None]) -> None:
        """The next token of the first answer; None when it has ended."""
        if tokens[0] is not None:
            self._ids.append(tokens[0])
            text = self._decode(self._ids)
            if not text.endswith("\ufffd"):  # a character of several tokens, not yet whole
                self.finish(text)

    def finish(self, text: str) -> None:
        """Show what is new in `text`. All of it so far is decoded each time: tokens alone lack spaces, or bytes."""
        if text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


class Answerer:
    """A model with what it takes to answer questions about media."""

    def __init__(
        self,
        model: VideoLanguageModel,
        encoder: ChatEncoder,
        config: DataConfig,
        info: Callable[[MediaRef], MediaInfo],
        pool: WorkerPool,
        world: World,
    ) -> None:
        self.model, self.encoder, self.config = model, encoder, config
        self.info, self.pool, self.world = info, pool, world
        self.frames = FrameCache.of(config)

    def documents(self, question: Question, new_tokens: int = 1) -> tuple[Document, Document | None]:
        """The prompt as a document that ends where the answer begins, and its options on a trunk of the same frames.

        The media leave room in the model's context for an answer of `new_tokens`, where they can, and for each option.
        """
        prompt = question.prompt
        longest = max(map(self.encoder.answer_tokens, prompt.options), default=1)
        candidate = Candidate(prompt, self.encoder, answer_next=True)
        media = plan_conversation(prompt, self.encoder.processor, self.config, self.info)
        try:
            fitted = fit([candidate], media, self.encoder, self.config, new_tokens=max(longest, new_tokens))
        except UserError:  # then the answer is cut off where the context ends
            fitted = fit([candidate], media, self.encoder, self.config, new_tokens=longest)
        plans = fitted.media.plans
        options = self.encoder.options(prompt, prompt.options, plans) if prompt.options else None
        return self.encoder.document(fitted.encoded, plans, [question.id]), options

    def load(
        self, asked: Sequence[Question], new_tokens: int = 1
    ) -> Callable[[], list[Prompt | MediaError | UserError]]:
        """Begin to decode the media of some questions side by side; what is returned waits for them. Their answers may
        have `new_tokens`.

        An error stands where a question's media can't be decoded, or where it fits no row or context.
        """
        waiting = [self._begin(question, new_tokens) for question in asked]
        return lambda: [wait() for wait in waiting]

    def _begin(self, question: Question, new_tokens: int) -> Callable[[], Prompt | MediaError | UserError]:
        try:
            document, options = self.documents(question, new_tokens)
        except (MediaError, UserError) as error:
            failed = error
            return lambda: failed
        futures = [self.frames.submit(self.pool, plan, self.encoder.processor) for plan in document.media]

        def wait() -> Prompt | MediaError:
            try:
                return Prompt(document, [future.result() for future in futures], options, name_of(question))
            except MediaError as error:
                return error

        return wait

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, show: Callable[[str], None] | None = None
    ) -> list[Said]:
        """Answers to a handful of prompts at once. Every process must call it; it may bring none.

        `show` gets the text of the first one piece by piece, as it comes, its reasoning too.
        """
        batch = collate([(prompt.document, prompt.patches) for prompt in prompts], self.encoder.processor)
        stream = None if show is None or not prompts else TextStream(self.decode, show)
        on_tokens = None if stream is None else stream.add
        encoder, names = self.encoder, [prompt.name for prompt in prompts]
        answers = generate(
            *(self.model, batch.to(self.world.device), encoder.end_ids, sampling, on_tokens, names),
            context=encoder.processor.context_tokens,
        )
        texts = [self.decode(answer.ids) for answer in answers]
        if stream is not None:
            stream.finish(texts[0])
        return [self.said(text, not answer.ended) for text, answer in zip(texts, answers, strict=True)]

    def said(self, text: str, is_cut_off: bool) -> Said:
        """What was generated, its reasoning told from the answer."""
        thinking = self.encoder.template.thinking
        opened = thinking is not None and thinking.opened
        answer = answer_in(text, opened)
        reasoning = split_reasoning(text, opened)[0] if answer or CLOSE in text else text.removeprefix(OPEN)
        return Said(answer, (reasoning or "").strip(), is_cut_off)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self.encoder.tokenizer.decode(ids, skip_special_tokens=True))

    def score(self, prompts: Sequence[Prompt]) -> list[tuple[OptionScore, ...]]:
        """How likely each prompt's options are, nothing for those without. Every process must call it."""
        having = [(i, prompt.options, prompt.patches) for i, prompt in enumerate(prompts) if prompt.options is not None]
        trunks = collate([(prefix_of(options), patches) for _, options, patches in having], self.encoder.processor)
        documents = [options for _, options, _ in having]
        scores = score_options(self.model, trunks.to(self.world.device), documents, self.encoder.around_answer)
        found: list[tuple[OptionScore, ...]] = [() for _ in prompts]
        for (index, _, _), values in zip(having, scores, strict=True):
            found[index] = tuple(values)
        return found

    def answer_all(self, asked: Sequence[Question], sampling: Sampling, batch_size: int) -> dict[int, Answer]:
        """Answers by number of the question, shared out over the processes; every process gets them all.

        A question that can't be asked has none: its media can't be decoded, or an option leaves it no room. A line says
        how many and why.
        """
        mine = list(range(self.world.rank, len(asked), self.world.size))
        passes = math.ceil(math.ceil(len(asked) / self.world.size) / batch_size)
        has_options = any(question.prompt.options for question in asked)
        answers: dict[int, Answer] = {}
        failed: list[str] = []
        training = self.model.training
        self.model.eval()
        bar = progress_bar(len(mine), "answering", "question", self.world.is_main)
        chunks = [mine[number * batch_size : (number + 1) * batch_size] for number in range(passes)]
        most = sampling.max_new_tokens
        loading = self.load([asked[i] for i in mine[:batch_size]], most)
        try:
            for chunk, following in zip(chunks, [*chunks[1:], []], strict=True):
                ready = loading()
                loading = self.load([asked[i] for i in following], most)  # decoded while these are answered
                good = {index: one for index, one in zip(chunk, ready, strict=True) if isinstance(one, Prompt)}
                failed += [str(one) for one in ready if not isinstance(one, Prompt)]
                texts = self.answer(list(good.values()), sampling)
                scores = self.score(list(good.values())) if has_options else [()] * len(good)
                for index, text, values in zip(good, texts, scores, strict=True):
                    answers[index] = answer_of(asked[index], text, values)
                bar.update(len(chunk))
        finally:
            self.model.train(training)
            bar.close()
        errors = [error for part in all_of(failed) for error in part]
        if errors and self.world.is_main:
            print(f"{len(errors)} of {len(asked)} questions can't be asked: {errors[0]}", file=sys.stderr, flush=True)
        told = [
            (i, (a.text, a.option_scores, a.option_scores_norm, a.reasoning, a.is_cut_off)) for i, a in answers.items()
        ]
        return {i: Answer(asked[i], *said) for i, said in sorted(one for part in all_of(told) for one in part)}


def require_folder(path: Path | None, what: str) -> None:
    """UserError where a folder that was named isn't there."""
    if path is not None and not path.is_dir():
        raise UserError(f"{what} = {str(path)!r}: no such folder")
