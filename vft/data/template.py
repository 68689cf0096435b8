"""The checkpoint's chat template: a conversation as pieces of text, cut where the model begins to speak.

In training an answer has the same text before it as in inference: either the template writes the same text in both
cases, or the prompt for that answer replaces what it writes in training.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, lru_cache, partial
from itertools import groupby
from typing import Any

from jinja2 import Environment
from jinja2.meta import find_undeclared_variables

from vft.common.errors import UserError, first_line
from vft.common.task import CLOSE, OPEN, split_reasoning
from vft.common.types import MediaKind, Role

Text = tuple[tuple[Role, tuple[str | tuple[MediaKind], ...]], ...]
"""What the template sees of a conversation: roles, texts, and the kind of each medium at its place."""

TEMPLATE_CPU_S, TEMPLATE_BYTES = 3, 1 << 29
"""CPU time and memory that a chat template may use for TRIAL. Released ones take a few milliseconds."""
TRIAL_S = 60.0
"""Wall-clock time for it. A copy of this process that has not used its CPU time by then waits for something else."""
TRIAL: Text = (
    ("system", ("Be brief.",)),
    ("user", (("video",), ("image",), "What is it?")),
    ("assistant", ("A dog.",)),
    ("user", ("Sure?",)),
    ("assistant", ("Yes.",)),
)

SHOWN: Text = (("user", (("video",), "?")),)
"""The shortest question about a video."""
NOT_OPTIONS = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
"""What transformers itself gives a chat template, beside special tokens."""

# Unicode's noncharacters are for a program's own use, so no text has them. Two enclose the number that stands for an
# answer while we look at the template's own text around it. LITERAL stands in a control token that is meant as text.
_HIDDEN = "\ufdd0{}\ufdd1"
LITERAL = "\ufdd2"
_NONCHARACTER = re.compile("[\ufdd0-\ufdd2]")


class Kind(Enum):
    """What a piece of text is to the model."""

    CONTEXT = "read"
    TAGS = "what a prompt already has of a thought: its opening tag, or all of an empty one"
    REASONING = "thought before the answer"
    ANSWER = "the answer and the token that closes it"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenized by itself: no token spans its start."""

    kind: Kind
    text: str
    """Control tokens in a record's text have LITERAL after their first character."""
    behind: str = ""
    """The template's text after it, which the model only reads."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """How the template lets the model think before it answers."""

    opened: bool
    """Whether the prompt ends with the opening tag."""
    lead: str
    """Text that the model writes before its reasoning."""
    close: str
    """Text that it writes between reasoning and answer."""


class ChatTemplate:
    """Renders conversations with the tokenizer's template."""

    def __init__(
        self,
        tokenizer: Any,
        turn_end: str,
        control: Sequence[str],
        options: Mapping[str, Any] | None = None,
        video: tuple[str, str] = ("", ""),
    ) -> None:
        """`turn_end` closes an answer; empty: the tokenizer's end of sequence, which the template may leave out.
        `control` are the tokens that a record's text must not produce. `options` are keywords of the template. `video`
        is a video's placeholder, and the text that stands for it whether the template writes all of it or not.

        Raises:
            UserError: the template uses too much time or memory, does not read an option, or refuses its value.
        """
        self.options, self.video = dict(options or {}), video
        self.tokenizer = tokenizer
        self.turn_end = turn_end or str(tokenizer.eos_token)
        self._must_close = bool(turn_end)
        self.control = re.compile("|".join(map(re.escape, sorted({*control, self.turn_end}, key=len, reverse=True))))
        if too_much := exceeds(lambda: self.apply(TRIAL, False), TEMPLATE_CPU_S, TEMPLATE_BYTES):
            name = tokenizer.name_or_path
            raise UserError(f"{name}: the chat template takes {too_much} for five turns; take the released one")
        if self.options:
            self.apply((("user", ("?",)),), answer_next=True)
            if unread := self.options.keys() - (read := options_of(tokenizer)):
                raise UserError(
                    f"data.template_options = {self.options}: the chat template of {tokenizer.name_or_path} does not "
                    f"read {min(unread)}; it reads {', '.join(sorted(read)) or 'no options'}"
                )
        self._in_place = lru_cache(1 << 10)(self._is_in_place)

    def pieces(self, turns: Text, answer_next: bool) -> list[Piece]:
        """The conversation's text. With `answer_next` it ends where the model is to answer.

        Every answer is a piece if all can be learnt in place; otherwise only the last one is.
        """
        if self.no_thought:
            return self._answers_after_thoughts(turns, answer_next)
        if self.in_place(turns):
            return self._all_answers(turns, answer_next)
        last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=None)
        if answer_next or last is None:
            return [Piece(Kind.CONTEXT, self.apply(turns, answer_next))]
        return [Piece(Kind.CONTEXT, self.apply(turns[:last], answer_next=True)), *self._last_answer(turns, last)]

    def in_place(self, turns: Text) -> bool:
        """Whether the template writes the same text before each answer as when the model is to give that answer.

        Templates of models that think do not: they remove the reasoning from earlier answers, or write an opening tag.
        If the prompt ends with an empty thought, each answer is learnt after one (`no_thought`).
        """
        if self.no_thought:
            return True
        if self.thinking is not None:
            return False
        shape = ((role, tuple("x" if isinstance(part, str) else part for part in parts)) for role, parts in turns)
        return self._in_place(tuple(shape))

    def _is_in_place(self, turns: Text) -> bool:
        """`in_place` by the shape of a conversation: the template's own text does not depend on the record's texts."""
        try:
            around = self._around(turns, answer_next=False)
            before = ""
            for text, (number, _) in zip(around[:-1], _answers(turns), strict=True):
                before += text
                if any(role == "user" for role, _ in turns[:number]):  # otherwise nobody asks for this answer
                    prompt = self.apply(turns[:number], answer_next=True, hide_answers=True)
                    if prompt != before and prompt != before.removesuffix(self.gap):
                        return False
                before += _HIDDEN.format(number)
        except UserError:  # raised again when the conversation itself is rendered
            pass
        return True

    def _all_answers(self, turns: Text, answer_next: bool) -> list[Piece]:
        around = self._around(turns, answer_next)
        answers = [self._escaped("assistant", _joined(parts)) for _, parts in _answers(turns)]
        whole = self.apply(turns, answer_next)
        if not _is_joined(around, answers, whole):
            answers = [answer.strip() for answer in answers]  # some templates do that
            if not _is_joined(around, answers, whole):
                raise UserError(
                    "the chat template changes the text of an answer; take out what it does not show, such as tags "
                    "that it knows"
                )
        behind = [around[0], *(self._closed(one).removeprefix(self.turn_end) for one in around[1:])]
        leads = [self.gap if one.endswith(self.gap) else "" for one in behind[:-1]]
        behind = [one.removesuffix(lead) for one, lead in zip(behind, [*leads, ""], strict=True)]
        texts = [lead + answer + self.turn_end for lead, answer in zip(leads, answers, strict=True)]
        return [Piece(Kind.CONTEXT, behind[0]), *map(partial(Piece, Kind.ANSWER), texts, behind[1:])]

    def _answers_after_thoughts(self, turns: Text, answer_next: bool) -> list[Piece]:
        """Every answer behind its reasoning, or behind an empty thought, as the model writes it when it is asked.

        The template removes thoughts from earlier answers. In training they stay, as in ms-swift, LLaMA-Factory and
        TRL, so that one row teaches all answers; where the model is to answer, the text is the template's.
        """
        answers = _answers(turns)
        if answer_next or not answers:
            return [Piece(Kind.CONTEXT, self.apply(turns, answer_next))]
        mark = re.compile(_HIDDEN.format("[0-9]+"))
        prompts = [self.apply(turns[:number], answer_next=True, hide_answers=True) for number, _ in answers]
        before = [mark.split(prompt)[-1].removesuffix(self.no_thought) for prompt in prompts]
        behind = [*before[1:], mark.split(self.apply(turns, False, hide_answers=True))[-1]]
        lead, pieces = before[0], list[Piece]()
        for (_, parts), after in zip(answers, behind, strict=True):
            reasoning, answer = self._split(parts, opened=False)
            thought = [Piece(Kind.TAGS, self.no_thought)]
            if reasoning is not None:
                reasons = Piece(Kind.REASONING, f"{reasoning.strip()}\n{CLOSE}\n\n")
                thought = [Piece(Kind.TAGS, f"{OPEN}\n"), reasons]
            if pieces:
                pieces[-1] = replace(pieces[-1], behind=lead)
            else:
                pieces.append(Piece(Kind.CONTEXT, lead))
            pieces += [*thought, Piece(Kind.ANSWER, answer + self.turn_end)]
            lead = self._closed(after).removeprefix(self.turn_end)
        return [*pieces[:-1], replace(pieces[-1], behind=lead)]

    def _split(self, parts: Sequence[str | tuple[MediaKind]], opened: bool) -> tuple[str | None, str]:
        """Reasoning and answer of an assistant's turn, without white space around them if the template removes it."""
        reasoning, answer = split_reasoning(self._escaped("assistant", _joined(parts)), opened)
        if reasoning is None and answer.lstrip().startswith(OPEN):
            raise UserError(f"an answer begins with {OPEN} and does not end it; add {CLOSE} before the answer")
        return (reasoning and reasoning.strip(), answer.strip()) if self._trims else (reasoning, answer)

    @cached_property
    def _trims(self) -> bool:
        """Whether the template removes white space around an answer."""
        probe = self.apply((("user", ("?",)), ("assistant", (" \n!\n ",))), False)
        return " \n!\n " not in probe

    @cached_property
    def no_thought(self) -> str:
        """The empty thought with which a prompt ends, so that the model answers at once; empty if there is none."""
        prompt = self.apply((("user", ("?",)),), answer_next=True)
        found = re.search(rf"{re.escape(OPEN)}\s*{re.escape(CLOSE)}\s*$", prompt)
        return found[0] if found else ""

    def _last_answer(self, turns: Text, last: int) -> list[Piece]:
        """The pieces that the model writes after the prompt for the answer of turn `last`."""
        parts, hidden = turns[last][1], _HIDDEN.format(last)
        thinking = self.thinking
        if thinking is None:
            content, pieces = hidden, [Piece(Kind.ANSWER, self.gap + self._escaped("assistant", _joined(parts)))]
        else:
            reasoning, answer = self._split(parts, thinking.opened)
            content = f"{OPEN}\n{reasoning or ''}\n{CLOSE}\n\n{hidden}"
            thought = thinking.lead + (reasoning or "") + thinking.close
            pieces = [Piece(Kind.REASONING, thought), Piece(Kind.ANSWER, answer)]
        around = self.apply((*turns[:last], ("assistant", (content,))), False, as_is=True).split(hidden)
        if len(around) != 2:
            raise UserError("the chat template leaves out assistant messages")
        behind = self._closed(around[1]).removeprefix(self.turn_end)
        return [*pieces[:-1], Piece(Kind.ANSWER, pieces[-1].text + self.turn_end, behind)]

    @cached_property
    def gap(self) -> str:
        """Text that the template writes before an answer but not at the end of a prompt: the model has to write it."""
        question: Text = (("user", ("?",)),)
        prompt = self.apply(question, answer_next=True)
        before = self.apply((*question, ("assistant", ("!",))), False, hide_answers=True).split(_HIDDEN[0])[0]
        return before.removeprefix(prompt) if before.startswith(prompt) else ""

    @cached_property
    def thinking(self) -> Thinking | None:
        """None if the template neither opens a thought for the model nor writes one before an answer."""
        question: Text = (("user", ("?",)),)
        prompt = self.apply(question, answer_next=True)
        opened = prompt.rstrip().endswith(OPEN)
        if not opened and not self.gap.lstrip().startswith(OPEN):
            return None
        stem = prompt[: prompt.rindex(OPEN)] if opened else prompt
        thought, answer = _HIDDEN.format(0), _HIDDEN.format(1)
        content = f"{OPEN}\n{thought}\n{CLOSE}\n\n{answer}"
        rendered = self.apply((*question, ("assistant", (content,))), False, as_is=True)
        lead, close = f"{OPEN}\n", f"\n{CLOSE}\n\n"  # if the template removes reasoning even from the last answer
        if rendered.startswith(stem) and thought in rendered and answer in rendered:
            lead, _, rest = rendered.removeprefix(stem).partition(thought)
            close = rest.partition(answer)[0]
        prompted = prompt.removeprefix(stem)
        return Thinking(opened, lead.removeprefix(prompted) if lead.startswith(prompted) else "", close)

    def _closed(self, after: str) -> str:
        """The template's text after an answer, made to begin with the text that closes it."""
        if after.startswith(self.turn_end):
            return after
        if self._must_close or after[:1].strip():
            raise UserError(f"the chat template closes an answer with {after[:20]!r}, expected {self.turn_end!r}")
        return self.turn_end + after.lstrip()  # the model was trained with it in place of the white space

    def _around(self, turns: Text, answer_next: bool) -> list[str]:
        """The template's own text before, between and after the answers."""
        around = re.split(_HIDDEN.format("[0-9]+"), self.apply(turns, answer_next, hide_answers=True))
        if len(around) != len(_answers(turns)) + 1:
            raise UserError("the chat template leaves out assistant messages")
        return around

    def _escaped(self, role: Role, text: str) -> str:
        """The text with its control tokens marked as text. UserError if it holds one of this module's own marks."""
        if mark := _NONCHARACTER.search(text):
            raise UserError(f"{role} text holds U+{ord(mark[0]):04X}, which is no character; remove it")
        return self.control.sub(lambda token: f"{token[0][0]}{LITERAL}{token[0][1:]}", text)

    def apply(self, turns: Text, answer_next: bool, hide_answers: bool = False, as_is: bool = False) -> str:
        """The template's text. With `hide_answers` a mark stands for each answer; with `as_is` the texts of the last
        turn are not escaped.

        Raises:
            UserError: the template fails.
        """
        messages = []
        for number, (role, parts) in enumerate(turns):
            if role == "assistant" and hide_answers:
                content = [{"type": "text", "text": _HIDDEN.format(number)}]
            else:
                content = []
                for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):  # neighbours are one text
                    same = tuple(run)
                    text = _joined(same)
                    if is_text:
                        is_escaped = not (as_is and number == len(turns) - 1)
                        content.append({"type": "text", "text": self._escaped(role, text) if is_escaped else text})
                    else:
                        content += [{"type": part[0]} for part in same]
            messages.append({"role": role, "content": content})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next, **self.options
            )
        except Exception as error:  # a template is a program, and may raise anything
            having = f" with data.template_options = {self.options}" if self.options else ""
            raise UserError(f"the chat template fails{having} ({type(error).__name__}: {first_line(error)})") from error
        mark, whole = self.video
        return text.replace(whole, mark).replace(mark, whole) if whole else text


def options_of(tokenizer: Any) -> set[str]:
    """Names of the keywords that a tokenizer's chat template reads."""
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", tokenizer.get_chat_template())  # transformers' own tag
    jinja = Environment(extensions=["jinja2.ext.loopcontrols"])
    given = {*NOT_OPTIONS, *jinja.globals, *tokenizer.special_tokens_map}
    return find_undeclared_variables(jinja.parse(source)) - given


def _answers(turns: Text) -> list[tuple[int, tuple[str | tuple[MediaKind], ...]]]:
    """Numbers and parts of the assistant's turns."""
    return [(number, parts) for number, (role, parts) in enumerate(turns) if role == "assistant"]


def _is_joined(around: Sequence[str], answers: Sequence[str], whole: str) -> bool:
    return around[0] + "".join(a + after for a, after in zip(answers, around[1:], strict=True)) == whole


def _joined(parts: Sequence[str | tuple[MediaKind]]) -> str:
    return "".join(part for part in parts if isinstance(part, str))


# ------------------------------------------------------------------------------------------ untrusted templates


def exceeds(work: Callable[[], object], cpu_s: int, memory_bytes: int) -> str | None:
    """Which limit untrusted `work` (a template is a program) exceeds in a copy of this process: CPU time in seconds, or
    memory in bytes beyond what this process has. None if it exceeds none, whatever it raises."""
    pid = os.fork()
    if pid == 0:
        _try(work, cpu_s, memory_bytes)
    end = time.monotonic() + TRIAL_S
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(ended[1])
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"more than {cpu_s} s"
    return None if status == 0 else f"more than {memory_bytes >> 20} MiB of memory"


def _try(work: Callable[[], object], cpu_s: int, memory_bytes: int) -> None:
    """Never returns: no handler and no `finally` of the original process may run in the copy."""
    status = 1
    with suppress(BaseException):
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
        size = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        try:
            work()
            status = 0
        except BaseException as error:
            status = int(isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError))
    os._exit(status)
