"""From questions to answers: the one loop of evaluation and prediction.

`Answerer.answers` yields them in order. Evaluation collects them all; prediction writes each one as it comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice, repeat

from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.task import CLOSE, OPEN, Answer, Question, answer_in, split_reasoning
from vft.common.types import Document, MediaInfo, MediaRef, Patches
from vft.config.data import DataConfig
from vft.data.budget import check_spans, fit, plan_conversation
from vft.data.chat import ChatEncoder
from vft.data.media.errors import MediaError
from vft.data.media.frame_cache import FrameCache
from vft.data.packing import collate
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel, World, all_of
from vft.inference.generate import Sampling, TextStreamer, generate
from vft.inference.option_scores import OptionScore, prefix_of, score_options
from vft.models.base import VideoLanguageModel


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a question has no answer."""

    file: str
    """The medium, or the place of the record."""
    reason: str
    """In one word: that of a `MediaError`, `record` for a mistake in the record, `unfit` for what fits no row."""
    message: str


@dataclass(frozen=True, slots=True)
class PreparedQuestion:
    """A question as the model gets it."""

    question: Question
    document: Document
    """Ends where the answer begins."""
    options: Document | None
    """The question's options as suffixes of a shared prefix; None if it has none."""
    decoding: list[Future[Patches]]
    """Its media, which worker processes may still decode."""

    @property
    def patches(self) -> list[Patches]:
        """Its media, decoded. Raises MediaError if one cannot be decoded."""
        return [future.result() for future in self.decoding]


def sampling_name(question: Question) -> str:
    """What the random numbers of a question depend on: its id, its texts, the names and the options of its media. The
    folder of a medium does not matter."""
    turns = [(turn.role, turn.text) for turn in question.prompt.turns]
    media = [(ref.name.rpartition("/")[2], ref.options) for ref in question.prompt.media]
    return repr((question.id, turns, media))


def with_option_scores(answer: Answer, scores: Sequence[OptionScore]) -> Answer:
    """The answer with the scores of the question's options, if it has any, in two forms.

    The second is `acc_norm` of lm-eval (`lm_eval/api/task.py`): summed log-probability by `len(option)`.
    """
    pairs = zip(scores, answer.question.prompt.options, strict=True)
    by_length = tuple(score.text / len(option) for score, option in pairs)
    return replace(answer, option_scores=tuple(score.whole for score in scores), option_scores_norm=by_length)


@dataclass
class Answerer:
    """A model, and what it takes to ask it about media."""

    model: VideoLanguageModel
    encoder: ChatEncoder
    config: DataConfig
    info: Callable[[MediaRef], MediaInfo]
    pool: WorkerPool
    world: World
    parallel: DataParallel = field(default_factory=DataParallel)
    """By default one process answers all questions."""

    def __post_init__(self) -> None:
        self.frames = FrameCache.of(self.config)

    def answers(
        self,
        questions: Sequence[Question | Failure],
        sampling: Sampling,
        batch_size: int,
        write: Callable[[str], None] | None = None,
        show_progress: bool = True,
        texts: bool = True,
    ) -> Iterator[Answer | Failure]:
        """An answer to each of `questions`, in order, or why there is none. A `Failure` among them stays one.

        Every process must call it with the same questions, and gets all answers: each answers its share, `batch_size`
        questions at a time. The media of the next ones are decoded while these are answered. `write` gets the text of
        the first question of a batch while it is generated, its reasoning included. Without `texts` nothing is
        generated: options alone are scored. The model is put into evaluation mode meanwhile.
        """
        parallel, per_turn = self.parallel, self.parallel.size * batch_size
        turns = [questions[first : first + per_turn] for first in range(0, len(questions), per_turn)]
        # The same in every process: all of them run the model equally often.
        has_options = any(isinstance(question, Question) and question.prompt.options for question in questions)
        was_training = self.model.training
        self.model.eval()
        try:
            with progress_bar(len(questions), "answering", "question", show_progress and self.world.is_main) as bar:
                for turn, share in zip(turns, self._prepared_shares(turns, sampling.max_new_tokens), strict=True):
                    ready = [one for one in share if isinstance(one, PreparedQuestion)]
                    unsaid = [Answer(one.question, "") for one in ready]
                    answers = self.generate(ready, sampling, write) if texts else unsaid
                    scores = self.score(ready) if has_options else repeat(())
                    answered = map(with_option_scores, answers, scores)
                    results = [one if isinstance(one, Failure) else next(answered) for one in share]
                    by_part = all_of(results, parallel.group)
                    yield from (by_part[place % parallel.size][place // parallel.size] for place in range(len(turn)))
                    bar.update(len(turn))
        finally:
            self.model.train(was_training)

    def _prepared_shares(
        self, turns: Sequence[Sequence[Question | Failure]], new_tokens: int
    ) -> Iterator[list[PreparedQuestion | Failure]]:
        """This process's share of each turn. Worker processes decode one turn ahead; without them nothing runs beside
        this process."""
        rank, size = self.parallel.rank, self.parallel.size
        shares = ([self.start(one, new_tokens) for one in turn[rank::size]] for turn in turns)
        pending = deque(islice(shares, 1 if self.pool.workers else 0))
        for _ in turns:
            pending.extend(islice(shares, 1))
            yield [self._decoded(one) for one in pending.popleft()]

    def start(self, question: Question | Failure, new_tokens: int) -> PreparedQuestion | Failure:
        """Start to decode the media of a question."""
        if isinstance(question, Failure):
            return question
        reason = "record"
        try:
            check_spans(question.prompt, self.info)
            reason = "unfit"  # no frame in the range, or too long a text
            document, options = self.documents(question, new_tokens)
        except MediaError as error:  # found by the scan
            return _failure(question, error.reason, error)
        except UserError as error:
            return _failure(question, reason, error)
        decoding = [self.frames.submit(self.pool, plan, self.encoder.processor) for plan in document.media]
        return PreparedQuestion(question, document, options, decoding)

    @staticmethod
    def _decoded(prepared: PreparedQuestion | Failure) -> PreparedQuestion | Failure:
        """Wait for the media of a question."""
        if isinstance(prepared, PreparedQuestion):
            try:
                _ = prepared.patches
            except MediaError as error:
                return _failure(prepared.question, error.reason, error)
        return prepared

    def documents(self, question: Question, new_tokens: int = 1) -> tuple[Document, Document | None]:
        """The prompt as a document that ends where the answer begins, and its options on a shared prefix of the same
        frames.

        The media leave space in the model's context for each option and, if they can, for an answer of `new_tokens`.
        """
        prompt = question.prompt
        longest = max(map(self.encoder.answer_tokens, prompt.options), default=1)
        media = plan_conversation(prompt, self.encoder.processor, self.config, self.info)
        longer = max(longest, new_tokens)
        try:
            fitted = fit([prompt], media, self.encoder, self.config, new_tokens=longer, answer_next=True)
        except UserError:  # then the answer is cut off at the end of the context
            fitted = fit([prompt], media, self.encoder, self.config, new_tokens=longest, answer_next=True)
        plans = fitted.media.plans
        options = self.encoder.options(prompt, prompt.options, plans) if prompt.options else None
        return self.encoder.document([prompt], plans, answer_next=True), options

    def generate(
        self, questions: Sequence[PreparedQuestion], sampling: Sampling, write: Callable[[str], None] | None = None
    ) -> list[Answer]:
        """Texts for a batch of questions. Every process must call it, with none if it has no question. Of several
        samples of a question the first is its answer, the others are that one's `others`."""
        batch = collate([(question.document, question.patches) for question in questions], self.encoder.processor)
        streamer = TextStreamer(self.decode, write) if write is not None and questions else None
        generated = generate(
            self.model,
            batch.to(self.world.device),
            self.encoder.end_ids,
            sampling,
            on_tokens=None if streamer is None else streamer.put,
            names=[sampling_name(one.question) for one in questions],
            context=self.encoder.processor.context_tokens,
        )
        texts = [self.decode(one.ids) for one in generated]
        if streamer is not None:
            streamer.end(texts[0])
        asked = [one.question for one in questions for _ in range(sampling.samples)]
        rows = zip(asked, texts, generated, strict=True)
        said = [self.parse(question, text, not one.ended) for question, text, one in rows]
        groups = (said[first : first + sampling.samples] for first in range(0, len(said), sampling.samples))
        return [replace(answer, others=tuple(others)) for answer, *others in groups]

    def parse(self, question: Question, text: str, is_cut_off: bool) -> Answer:
        """Tell the reasoning in a generated text from the answer, which is empty if the reasoning did not end."""
        thinking = self.encoder.template.thinking
        opened = thinking is not None and thinking.opened
        answer = answer_in(text, opened)
        reasoning = split_reasoning(text, opened)[0] if answer or CLOSE in text else text.removeprefix(OPEN)
        return Answer(question, answer, reasoning=(reasoning or "").strip(), is_cut_off=is_cut_off)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.encoder.tokenizer.decode(ids, skip_special_tokens=True))

    def score(self, questions: Sequence[PreparedQuestion]) -> list[tuple[OptionScore, ...]]:
        """Scores of each question's options, nothing for a question without. Every process must call it."""
        with_options = [(question.options, question.patches) for question in questions if question.options is not None]
        prefixes = collate([(prefix_of(options), patches) for options, patches in with_options], self.encoder.processor)
        documents = [options for options, _ in with_options]
        scores = iter(score_options(self.model, prefixes.to(self.world.device), documents, self.encoder.around_answer))
        return [() if question.options is None else tuple(next(scores)) for question in questions]


def _failure(question: Question, reason: str, error: Exception) -> Failure:
    media = question.prompt.media
    return Failure(media[0].name if media else question.prompt.origin, reason, str(error))
