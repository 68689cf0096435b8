"""Talk with a model about videos and pictures: vft chat --model MODEL [--adapter DIR] [CLIP...]

Type a question and get the answer as it is written; the next question goes on from there. /new forgets the talk, /clip
FILE takes another video or picture and forgets it too, /quit or Ctrl-D ends. Frames and pixels are those of training.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from vft.cli.arguments import Positional, command
from vft.cli.predict import DECODE_TIMEOUT_S, OPTIONS, AskArguments, with_options
from vft.common.errors import UserError, missing
from vft.common.task import Answer, Question
from vft.common.types import Conversation, MediaRef, Turn
from vft.config.run import ParallelConfig
from vft.data.media.errors import MediaError
from vft.data.media.timed_text import with_frame_times
from vft.data.media.video import scan
from vft.data.workers import WorkerPool
from vft.distributed.process_group import environment
from vft.inference.engine import Answerer, Failure
from vft.inference.generate import Sampling
from vft.inference.requests import read_requests
from vft.preparation.run import load_for_inference

logger = logging.getLogger(__name__)


class ChatArguments(AskArguments):
    """Arguments of `vft chat`."""

    system: str | None = None
    """system text (default: that of training, if it had one)"""
    clips: Annotated[list[Path], Positional("CLIP")] = Field(default_factory=list)
    """videos or pictures to talk about"""


@dataclass
class Talk:
    """The turns so far, about some media. `say` goes on."""

    answerer: Answerer
    sampling: Sampling
    system: str | None
    media: Sequence[MediaRef] = ()
    turns: Sequence[Turn] = ()

    def about(self, clips: Sequence[Path]) -> None:
        """Begin anew, about other clips. UserError if one is no video or picture."""
        for clip in clips:
            if not clip.exists():
                raise UserError(f"{clip}: {missing(clip, 'file')}")
        media: list[MediaRef] = []
        for request in read_requests(clips, "", None):
            if isinstance(request.question, Failure):
                raise UserError(request.question.message)
            media += request.question.prompt.media
        try:
            for ref in media:
                self.answerer.info(ref)
        except MediaError as error:
            raise UserError(str(error)) from None
        self.media, self.turns = media, ()

    def question(self, text: str, options: Sequence[str] = ()) -> Question:
        """One more question, with the turns so far before it."""
        prompt = Conversation("chat", self._asked(text), "chat", options=tuple(options))
        return Question("chat", with_frame_times(prompt) if self.answerer.config.video.timestamps else prompt, ())

    def _asked(self, text: str) -> tuple[Turn, ...]:
        first = [] if self.turns or self.system is None else [Turn("system", (self.system,))]
        return (*self.turns, *first, Turn("user", (text,) if self.turns else (*self.media, text)))

    def say(self, text: str, write: Callable[[str], None]) -> Answer:
        """The answer to one more question, of which `write` gets each piece as it is generated. UserError if there is
        none: the talk is then as before."""
        answer = self._answer(self.question(text), write)
        self.turns = (*self._asked(text), Turn("assistant", (answer.text,)))
        return answer

    def weigh(self, text: str, options: Sequence[str]) -> Answer:
        """How likely each of `options` is as the answer to one more question. Nothing is generated, and the talk stays
        as it is. UserError if the question can't be asked."""
        return self._answer(self.question(text, options), None)

    def _answer(self, question: Question, write: Callable[[str], None] | None) -> Answer:
        asked = [question], self.sampling, 1, write
        (answer,) = self.answerer.answers(*asked, show_progress=False, texts=write is not None)
        if isinstance(answer, Failure):
            raise UserError(with_options(answer.message))
        return answer


@command(ChatArguments, __doc__, OPTIONS)
def main(options: ChatArguments) -> None:
    """Command line."""
    prepared, about, config = options.open()
    world = environment()
    load_for_inference(prepared, world.device, None, ParallelConfig())
    with WorkerPool(0, DECODE_TIMEOUT_S) as pool:
        answerer = Answerer(prepared.model, prepared.encoder(config), config, scan, pool, world)
        talk = Talk(answerer, options.sampling, options.system or about.get("system"))
        talk.about(options.clips)
        names = ", ".join(ref.name for ref in talk.media) or "no video or picture; /clip FILE takes one"
        logger.info("about %s. /new begins anew, /quit ends", names)
        while (text := read_line()) is not None:
            try:
                follow(talk, text.strip())
            except UserError as error:  # the talk goes on
                logger.error("%s", error)


def follow(talk: Talk, text: str) -> None:
    """Do what was typed."""
    word, _, rest = text.partition(" ")
    if word == "/clip":
        talk.about([Path(rest.strip())])
    elif word == "/new":
        talk.turns = ()
    elif word.startswith("/"):
        raise UserError(f"{word}: there are /clip FILE, /new and /quit")
    elif text:
        answer = talk.say(text, lambda piece: print(piece, end="", flush=True))
        print(flush=True)
        if answer.is_cut_off:
            limit = talk.sampling.max_new_tokens
            logger.info("cut off at --max-new-tokens = %d, or at the end of the model's context", limit)


def read_line() -> str | None:
    """What is typed next; None at the end."""
    try:
        text = input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if text.strip().lower() in ("/quit", "/exit", "quit", "exit") else text
