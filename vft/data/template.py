"""The checkpoint's chat template: a conversation as pieces of text, cut where the model begins to speak.

What stands before an answer in training is the text that stands there when the model is asked: either the template
writes the same in both cases, or the prompt for that answer is taken in its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache, partial
from itertools import groupby
from typing import Any

from vft.common.errors import UserError, first_line
from vft.common.reasoning import CLOSE, OPEN, split_reasoning
from vft.common.types import MediaKind, Role
from vft.data.trial import exceeds

Text = tuple[tuple[Role, tuple[str | tuple[MediaKind], ...]], ...]
"""What the template sees of a conversation: roles, texts, and which kind of medium stands where."""

TEMPLATE_CPU_S, TEMPLATE_BYTES = 3, 1 << 29
"""What a chat template may take for TRIAL: released ones take a few milliseconds."""
TRIAL: Text = (
    ("system", ("Be brief.",)),
    ("user", (("video",), ("image",), "What is it?")),
    ("assistant", ("A dog.",)),
    ("user", ("Sure?",)),
    ("assistant", ("Yes.",)),
)

# Unicode's noncharacters are for a program's own use: no text has them. Two stand around the number of an answer while
# the template's own text around it is looked at; one stands within a control token that is meant as text.
_HIDDEN = "\ufdd0{}\ufdd1"
LITERAL = "\ufdd2"
_OWN = re.compile("[\ufdd0-\ufdd2]")


class Kind(Enum):
    """What a piece of text is to the model."""

    CONTEXT = "read"
    REASONING = "thought before the answer"
    ANSWER = "the answer and the token that closes it"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenised by itself: nothing merges with what stands before it."""

    kind: Kind
    text: str
    """A control token that a record has as text holds LITERAL behind its first character."""
    behind: str = ""
    """What the template goes on with, which the model only reads."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """How the template has the model think before it answers."""

    opened: bool
    """Whether the prompt ends with the opening tag."""
    lead: str
    """What the model says before its reasoning."""
    close: str
    """What it says between reasoning and answer."""


class ChatTemplate:
    """Renders conversations with the tokenizer's template."""

    def __init__(self, tokenizer: Any, turn_end: str, control: Sequence[str]) -> None:
        """`turn_end` closes an answer; empty: the tokenizer's end of sequence, which the template may leave out.
        `control` are the tokens that no text of a record may bring in.

        Raises:
            UserError: the template takes too much time or memory.
        """
        self.tokenizer = tokenizer
        self.turn_end = turn_end or str(tokenizer.eos_token)
        self._must_close = bool(turn_end)
        self.control = re.compile("|".join(map(re.escape, sorted({*control, self.turn_end}, key=len, reverse=True))))
        if too_much := exceeds(lambda: self.apply(TRIAL, False), TEMPLATE_CPU_S, TEMPLATE_BYTES):
            name = tokenizer.name_or_path
            raise UserError(f"{name}: the chat template takes {too_much} for five turns; take the released one")
        self._in_place = lru_cache(1 << 10)(self._is_in_place)

    def pieces(self, turns: Text, answer_next: bool) -> list[Piece]:
        """The conversation's text. With `answer_next` it ends where the model is to answer.

        Every answer is a piece of its own where all of them can be learnt in place, else the last one alone.
        """
        if self.in_place(turns):
            return self._all_answers(turns, answer_next)
        last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=None)
        if answer_next or last is None:
            return [Piece(Kind.CONTEXT, self.apply(turns, answer_next))]
        return [Piece(Kind.CONTEXT, self.apply(turns[:last], answer_next=True)), *self._last_answer(turns, last)]

    def in_place(self, turns: Text) -> bool:
        """Whether before each answer the template writes what it writes where the model is to give that answer.

        Templates of models that think take the reasoning out of earlier answers, or write an opening tag for the model.
        """
        if self.thinking is not None:
            return False
        return self._in_place(tuple((role, _shape(parts)) for role, parts in turns))

    def _is_in_place(self, turns: Text) -> bool:
        """`in_place` by the shape of a conversation: what the template writes itself does not depend on texts."""
        try:
            around = self._around(turns, answer_next=False)
            before = ""
            for text, (number, _) in zip(around[:-1], _answers(turns), strict=True):
                before += text
                if any(role == "user" for role, _ in turns[:number]):  # else nobody asks for it
                    prompt = self.apply(turns[:number], answer_next=True, hide_answers=True)
                    if prompt != before and prompt != before.removesuffix(self.gap):
                        return False
                before += _HIDDEN.format(number)
        except UserError:  # said where the conversation itself is rendered
            pass
        return True

    def _all_answers(self, turns: Text, answer_next: bool) -> list[Piece]:
        around = self._around(turns, answer_next)
        answers = [self._escaped("assistant", _joined(parts)) for _, parts in _answers(turns)]
        whole = self.apply(turns, answer_next)
        if not _is_joined(around, answers, whole):
            answers = [answer.strip() for answer in answers]  # as some templates have it
            if not _is_joined(around, answers, whole):
                raise UserError(
                    "the chat template changes the text of an answer; take out what it does not show, such as tags "
                    "that it knows"
                )
        behind = [around[0], *(self._closed(one).removeprefix(self.turn_end) for one in around[1:])]
        leads = [self.gap if one.endswith(self.gap) else "" for one in behind[:-1]]
        behind = [one.removesuffix(lead) for one, lead in zip(behind, [*leads, ""], strict=True)]
        said = [lead + answer + self.turn_end for lead, answer in zip(leads, answers, strict=True)]
        return [Piece(Kind.CONTEXT, behind[0]), *map(partial(Piece, Kind.ANSWER), said, behind[1:])]

    def _last_answer(self, turns: Text, last: int) -> list[Piece]:
        """What the model has to say as the answer of turn `last`, behind the prompt for it."""
        answer, hidden = self._escaped("assistant", _joined(turns[last][1])), _HIDDEN.format(last)
        thinking = self.thinking
        if thinking is None:
            shown, said = hidden, [Piece(Kind.ANSWER, self.gap + answer)]
        else:
            reasoning, answer = split_reasoning(answer, thinking.opened)
            if reasoning is None and answer.lstrip().startswith(OPEN):
                raise UserError(f"an answer begins with {OPEN} and does not end it; add {CLOSE} before the answer")
            shown = f"{OPEN}\n{reasoning or ''}\n{CLOSE}\n\n{hidden}"
            thought = thinking.lead + (reasoning or "") + thinking.close
            said = [Piece(Kind.REASONING, thought), Piece(Kind.ANSWER, answer)]
        found = self.apply((*turns[:last], ("assistant", (shown,))), False, given=True).split(hidden)
        if len(found) != 2:
            raise UserError("the chat template leaves out assistant messages")
        closed = self._closed(found[1])
        behind = closed.removeprefix(self.turn_end)
        return [*said[:-1], Piece(Kind.ANSWER, said[-1].text + self.turn_end, behind)]

    @cached_property
    def gap(self) -> str:
        """What the template writes before an answer but not where the model is to answer: the model has to say it."""
        asked: Text = (("user", ("?",)),)
        prompt = self.apply(asked, answer_next=True)
        before = self.apply((*asked, ("assistant", ("!",))), False, hide_answers=True).split(_HIDDEN[0])[0]
        return before.removeprefix(prompt) if before.startswith(prompt) else ""

    @cached_property
    def thinking(self) -> Thinking | None:
        """None where the template neither opens a thought for the model nor writes one before an answer."""
        asked: Text = (("user", ("?",)),)
        prompt = self.apply(asked, answer_next=True)
        opened = prompt.rstrip().endswith(OPEN)
        if not opened and not self.gap.lstrip().startswith(OPEN):
            return None
        stem = prompt[: prompt.rindex(OPEN)] if opened else prompt
        thought, answer = _HIDDEN.format(0), _HIDDEN.format(1)
        said = f"{OPEN}\n{thought}\n{CLOSE}\n\n{answer}"
        shown = self.apply((*asked, ("assistant", (said,))), False, given=True)
        lead, close = f"{OPEN}\n", f"\n{CLOSE}\n\n"  # where the template leaves reasoning out, of the last answer too
        if shown.startswith(stem) and thought in shown and answer in shown:
            lead, _, rest = shown.removeprefix(stem).partition(thought)
            close = rest.partition(answer)[0]
        given = prompt.removeprefix(stem)
        return Thinking(opened, lead.removeprefix(given) if lead.startswith(given) else "", close)

    def _closed(self, after: str) -> str:
        """What the template wrote behind an answer, with the text that closes it."""
        if after.startswith(self.turn_end):
            return after
        if self._must_close or after[:1].strip():
            raise UserError(f"the chat template closes an answer with {after[:20]!r}, expected {self.turn_end!r}")
        return self.turn_end + after.lstrip()  # the model was trained with it in the place of the white space

    def _around(self, turns: Text, answer_next: bool) -> list[str]:
        """The template's own text before, between and behind the answers."""
        around = re.split(_HIDDEN.format("[0-9]+"), self.apply(turns, answer_next, hide_answers=True))
        if len(around) != len(_answers(turns)) + 1:
            raise UserError("the chat template leaves out assistant messages")
        return around

    def _escaped(self, role: Role, text: str) -> str:
        """A text in which no control token is one. UserError where it holds what this module marks texts with."""
        if found := _OWN.search(text):
            raise UserError(f"{role} text holds U+{ord(found[0]):04X}, which is no character; remove it")
        return self.control.sub(lambda found: f"{found[0][0]}{LITERAL}{found[0][1:]}", text)

    def apply(self, turns: Text, answer_next: bool, hide_answers: bool = False, given: bool = False) -> str:
        """The template's text. With `hide_answers` a mark stands for each answer; with `given` the texts of the last
        turn are taken as they are.

        Raises:
            UserError: the template fails.
        """
        messages = []
        for number, (role, parts) in enumerate(turns):
            if role == "assistant" and hide_answers:
                content = [{"type": "text", "text": _HIDDEN.format(number)}]
            else:
                content = []
                as_is = given and number == len(turns) - 1
                for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):  # neighbours are one text
                    kept = tuple(run)
                    text = _joined(kept)
                    texts = [{"type": "text", "text": text if as_is else self._escaped(role, text)}]
                    content += texts if is_text else [{"type": part[0]} for part in kept]
            messages.append({"role": role, "content": content})
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        except Exception as error:  # it is a program: of Jinja, of its sandbox, of whatever the template calls
            raise UserError(f"the chat template fails ({type(error).__name__}: {first_line(error)})") from error


def _answers(turns: Text) -> list[tuple[int, tuple[str | tuple[MediaKind], ...]]]:
    """Numbers and parts of the assistant's turns."""
    return [(number, parts) for number, (role, parts) in enumerate(turns) if role == "assistant"]


def _shape(parts: Sequence[str | tuple[MediaKind]]) -> tuple[str | tuple[MediaKind], ...]:
    return tuple("x" if isinstance(part, str) else part for part in parts)


def _is_joined(around: Sequence[str], answers: Sequence[str], whole: str) -> bool:
    return around[0] + "".join(a + after for a, after in zip(answers, around[1:], strict=True)) == whole


def _joined(parts: Sequence[str | tuple[MediaKind]]) -> str:
    return "".join(part for part in parts if isinstance(part, str))
