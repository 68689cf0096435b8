"""The one model in memory that everyone who has the page open asks, and what each of them has asked it so far."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from vft.adapters.lora import without_adapters
from vft.adapters.peft_format import WEIGHTS_FILE
from vft.app.workspace import Workspace
from vft.cli.chat import ChatArguments, Talk
from vft.cli.predict import DEFAULT_PROMPT
from vft.common.errors import UserError
from vft.common.types import MediaRef, Turn
from vft.config.run import ParallelConfig
from vft.data.media.video import scan
from vft.data.workers import WorkerPool
from vft.distributed.process_group import environment
from vft.inference.engine import Answerer
from vft.inference.generate import Sampling
from vft.models.base import VideoLanguageModel
from vft.preparation.documents import check_answer_length
from vft.preparation.memory import GIB, usable_bytes
from vft.preparation.run import load_for_inference
from vft.training.checkpoint import available_memory

DECODE_TIMEOUT_S = 60.0
"""For the scan or the frames of a clip: everyone waits meanwhile."""
REDRAW_S = 0.05
"""Between two states of an answer that is being written."""
SIDES = ("tuned", "base")
"""The model with its adapter, and without."""


@dataclass(frozen=True)
class Choice:
    """What was loaded."""

    base: str
    adapter: str
    """Its folder, as the page shows it; empty for the base alone."""
    is_4_bit: bool
    written_ns: int
    """When the adapter's file was written: after more training the same folder is another model."""

    @property
    def text(self) -> str:
        """For messages."""
        return f"{self.adapter} on {self.base}" if self.adapter else self.base


class Held:
    """A model and the lock around it: one question at a time, and a model is replaced between two questions."""

    def __init__(self, workers: int = 1) -> None:
        """`workers` as of `WorkerPool`: a clip that hangs or kills its process ends no page."""
        self.choice: Choice | None = None
        self.about: dict[str, Any] = {}
        """What the training recorded (vft.json)."""
        self._lock = threading.Lock()
        self._answerer: Answerer | None = None
        self._pool = WorkerPool(workers, DECODE_TIMEOUT_S)

    def load(self, space: Workspace, base: str, adapter: str, is_4_bit: bool) -> tuple[Choice, Choice | None]:
        """Load a model as `vft chat` does, in the place of the one before. Returns both, the latter None if there was
        none or the same.

        Raises UserError if it can't be had; if it is too large for the device, the one before is gone, too.
        """
        words = [f"--model={space.model(base)}", f"--quantize={'nf4' if is_4_bit else 'none'}"]
        words += [f"--adapter={space.existing(adapter, 'adapter')}"] if adapter.strip() else []
        options = ChatArguments.parse(None, words, "vft chat")
        weights = options.adapter and options.adapter / WEIGHTS_FILE
        written_ns = weights.stat().st_mtime_ns if weights and weights.is_file() else 0
        shown = space.shown(options.adapter) if options.adapter else ""
        choice = Choice(options.model, shown, is_4_bit, written_ns)
        with self._lock:
            if self.choice == choice:
                return choice, None
            prepared, about, config = options.open()
            replaced, self.choice, self._answerer = self.choice, None, None
            gc.collect()
            world = environment()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
            check_room(prepared.model, world.device, options.model)
            load_for_inference(prepared, world.device, None, ParallelConfig())
            encoder = prepared.encoder(config)
            self._answerer = Answerer(prepared.model, encoder, config, self._info, self._pool, world)
            self.about, self.choice = about, choice
        return choice, replaced

    def _info(self, ref: MediaRef) -> Any:
        return self._pool.submit(scan, ref).result()

    @contextmanager
    def asked(self, choice: Choice | None) -> Iterator[Answerer]:
        """What answers, for this thread alone. UserError if it isn't `choice` any more, or memory runs out."""
        if choice is None:
            raise UserError("no model is loaded: choose one, then Load")
        with self._lock:
            if self._answerer is None or self.choice != choice:
                by = f"{self.choice.text}, which was loaded in another window" if self.choice else "one that failed"
                raise UserError(f"{choice.text} made place for {by}: Load takes it back")
            try:
                yield self._answerer
            except torch.OutOfMemoryError:
                raise UserError(
                    f"{choice.text}: the device's memory is too small for this question; take a shorter clip, or fewer "
                    "tokens"
                ) from None


def check_room(model: VideoLanguageModel, device: torch.device, name: str) -> None:
    """UserError if the weights of a model on the meta device are larger than what `device` has left."""
    needed = sum(parameter.nbytes for parameter in model.parameters())
    free = usable_bytes(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_memory()
    if needed > free:
        raise UserError(
            f"{name}: its weights take {needed / GIB:.1f} GiB, of {max(0, free) / GIB:.1f} GiB free on {device}; end "
            "what else is there, load it in 4 bits, or use `torchrun --nproc-per-node N tools/predict.py`, which "
            "spreads it over several GPUs"
        )


@dataclass
class Side:
    """The talk with one of `SIDES`."""

    turns: Sequence[Turn] = ()
    shown: list[dict[str, str]] = field(default_factory=list)
    """The same for the eye, as Gradio's messages: with what was stopped or failed, and with notes."""


@dataclass(eq=False)
class Session:
    """One open page's talks about some clips."""

    choice: Choice | None = None
    prompt: str = DEFAULT_PROMPT
    """Asked if nothing is typed: what training asked."""
    media: Sequence[MediaRef] = ()
    problem: str = ""
    """Why the clips that were chosen can't be used.
    Nothing is asked then: an answer would look like one about them."""
    sides: dict[str, Side] = field(default_factory=lambda: {name: Side() for name in SIDES})
    is_stopping: bool = False

    def begin(self) -> None:
        """Forget the talks. An answer that is being written ends unread."""
        self.is_stopping, self.sides = True, {name: Side() for name in SIDES}

    @property
    def shown(self) -> list[list[dict[str, str]]]:
        """Messages of both sides."""
        return [side.shown for side in self.sides.values()]


class Stopped(Exception):
    """Nobody waits for the answer any more."""


def sampling_of(answerer: Answerer, temperature: float, max_new_tokens: int, seed: int) -> Sampling:
    """How answers are generated, by the options of `vft chat` and with their messages."""
    given = {"temperature": temperature, "max-new-tokens": max_new_tokens, "seed": seed}
    words = ["--model=asked", *(f"--{name}={value}" for name, value in given.items())]
    sampling = ChatArguments.parse(None, words, "vft chat").sampling
    check_answer_length(sampling.max_new_tokens, answerer.encoder.processor.context_tokens, "--max-new-tokens")
    return sampling


def talk_with(answerer: Answerer, session: Session, name: str, sampling: Sampling, system: str) -> Talk:
    """The session's talk with one side, as `vft chat` has it."""
    return Talk(answerer, sampling, system.strip() or None, session.media, session.sides[name].turns)


def as_side(answerer: Answerer, name: str) -> Any:
    """In it the model is that side: the same weights, for the base with the adapter switched off."""
    return without_adapters(answerer.model) if name == "base" else nullcontext()


def ask(held: Held, session: Session, names: Sequence[str], text: str, system: str, *how: Any) -> Iterator[None]:
    """Ask the sides `names`, one after another; yields whenever `session.shown` has more. `how` goes to `sampling_of`.

    Why there is no answer, or no whole one, stands in its place; the talk is then as before the question.
    """
    sides = {name: session.sides[name] for name in names}
    answers = {name: {"role": "assistant", "content": ""} for name in names}
    for name, side in sides.items():
        side.shown += [{"role": "user", "content": text}, answers[name]]
    waiting, session.is_stopping = list(names), False
    yield

    def answer(tell: Callable[[], None]) -> None:
        with held.asked(session.choice) as answerer:
            sampling = sampling_of(answerer, *how)
            for name, side in sides.items():

                def write(piece: str, shown: dict[str, str] = answers[name]) -> None:
                    if session.is_stopping:
                        raise Stopped
                    shown["content"] += piece
                    tell()

                talk = talk_with(answerer, session, name, sampling, system)
                with as_side(answerer, name):
                    is_cut_off = talk.say(text, write).is_cut_off
                side.turns = talk.turns
                answers[name]["content"] += " [cut off at the limit of tokens]" if is_cut_off else ""
                waiting.remove(name)

    note = ""
    try:
        yield from told_of(answer)
    except UserError as error:
        note = f"[no answer: {error}]"
    except Stopped:
        note = "[stopped; the next question goes on without this one]"
    for name in waiting:
        answers[name]["content"] = f"{answers[name]['content']} {note}".strip()
    yield


def told_of(work: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Yields after `work`, which runs in a thread, has called the function that it is given, and raises what it raises.
    Once nobody iterates any more, that function raises Stopped."""
    events: SimpleQueue[BaseException | bool] = SimpleQueue()
    is_left = threading.Event()

    def tell() -> None:
        if is_left.is_set():
            raise Stopped
        events.put(True)

    def run() -> None:
        try:
            work(tell)
            events.put(False)
        except BaseException as error:
            events.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while event := events.get():
            time.sleep(REDRAW_S)
            while event is True and not events.empty():  # of what came meanwhile one is enough
                event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield
            if not event:
                break
    finally:
        is_left.set()
