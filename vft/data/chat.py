"""Conversations to documents: template, one tokenizer call, labels by character offsets, trunk and branches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

import torch

from vft.data.trial import exceeds
from vft.types import IGNORE_INDEX, Conversation, Document, MediaKind, MediaPlan, MediaRef, Role, Turn, UserError
from vft.vision_spec import VisionSpec

Text = tuple[tuple[Role, tuple[str | tuple[MediaKind], ...]], ...]
"""What the template sees of a conversation: roles, texts, and which kind of medium stands where."""

MAX_KEPT = 1 << 14
"""Encoded texts that are kept: a question is often asked of many videos, a label offered to all of them."""

TEMPLATE_CPU_S, TEMPLATE_BYTES = 3, 1 << 29
"""What a chat template may take for TRIAL: released ones take a few milliseconds."""
TRIAL: Text = (
    ("system", ("Be brief.",)),
    ("user", (("video",), ("image",), "What is it?")),
    ("assistant", ("A dog.",)),
    ("user", ("Sure?",)),
    ("assistant", ("Yes.",)),
)

# Private-use characters stand for an answer while the template's own text around it is looked at.
_SENTINEL = "\ue000{}\ue001"

Tensors = tuple[torch.Tensor, ...]
"""ids [T], labels [T], media mask [T], positions [3, T] of a stretch of a document."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as token ids and labels, media still one placeholder each."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    media_rows: tuple[int, ...]
    """Where each medium's placeholder begins. A template may put media of one turn in another order."""
    leads: tuple[str, ...] = ()
    """What stands before the media, as the family has it of their plans; () where they were not known."""

    @property
    def text_tokens(self) -> int:
        """Tokens that are not a medium's placeholder (each is one token in every family so far)."""
        return len(self.ids) - len(self.media_rows)

    @property
    def trunk_tokens(self) -> int:
        """Text tokens up to the one after the last medium: the part that branches may share."""
        return max(self.media_rows) + 2 - len(self.media_rows) if self.media_rows else 0

    def in_row_order(self, media: Sequence[MediaPlan]) -> list[tuple[int, MediaPlan]]:
        """The media of the conversation with their rows, as they stand in the row."""
        return sorted(zip(self.media_rows, media, strict=True), key=lambda pair: pair[0])


class ChatEncoder:
    """The checkpoint's tokenizer and chat template together with the family's rules."""

    def __init__(self, tokenizer: Any, spec: VisionSpec) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.turn_end = spec.turn_end or str(tokenizer.eos_token)
        kinds: tuple[MediaKind, ...] = ("video", "image")
        marks = [token for kind in kinds for token in tokenizer.convert_ids_to_tokens(list(spec.placeholder(kind)))]
        control = dict.fromkeys([*tokenizer.all_special_tokens, *marks])
        self._control = re.compile("|".join(map(re.escape, control)))
        if too_much := exceeds(lambda: self._apply(TRIAL, False, False), TEMPLATE_CPU_S, TEMPLATE_BYTES):
            name = tokenizer.name_or_path
            raise UserError(f"{name}: the chat template takes {too_much} for five turns; take the released one")
        self._encode_kept = lru_cache(MAX_KEPT)(self._encode)
        self._ids_of = lru_cache(MAX_KEPT)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])

    def render(self, conversation: Conversation, answer_next: bool) -> tuple[str, list[tuple[int, int]]]:
        """The template's text and the character spans that are supervised.

        A span is what the model has to say: an assistant message's content and the token that closes it. With
        `answer_next` the text ends where the model is to answer.
        """
        return self._render(_text_of(conversation, ()), answer_next)

    def encode(
        self, conversation: Conversation, answer_next: bool = False, media: Sequence[MediaPlan] | None = None
    ) -> Encoded:
        """Ids and labels from one tokenizer call over the whole text. Text that depends on the plans of the `media`,
        which are needed to make a document of it, is left out where they are not given.

        A token that straddles the start of an answer belongs to the answer.
        """
        leads = tuple(self.spec.lead(plan) for plan in media or ())
        settled = conversation if media is None else conversation.settled(media)
        try:
            return replace(self._encode_kept(_text_of(settled, leads), answer_next), leads=leads)
        except UserError as error:
            raise UserError(f"{conversation.origin}: {error}") from None

    def _render(self, turns: Text, answer_next: bool) -> tuple[str, list[tuple[int, int]]]:
        true_text = self._apply(turns, answer_next, hide_answers=False)
        pieces = re.split("\ue000[0-9]+\ue001", self._apply(turns, answer_next, hide_answers=True))
        answers = [_joined(parts) for role, parts in turns if role == "assistant"]
        if len(pieces) != len(answers) + 1:
            raise UserError("the chat template leaves out assistant messages")
        if pieces[0] + "".join(a + after for a, after in zip(answers, pieces[1:], strict=True)) != true_text:
            raise UserError("the chat template changes the text of an answer")
        text, spans = pieces[0], []
        for answer, after in zip(answers, pieces[1:], strict=True):
            start = len(text) - (len(self._gap) if text.endswith(self._gap) else 0)
            spans.append((start, len(text) + len(answer) + len(self.turn_end)))
            text += answer + self._closed(after)
        return text, spans

    @cached_property
    def _gap(self) -> str:
        """What the template writes before an answer but not where the model is to answer: the model has to say it."""
        asked: Text = (("user", ("?",)),)
        prompt = self._apply(asked, answer_next=True, hide_answers=False)
        answered = self._apply((*asked, ("assistant", ("!",))), answer_next=False, hide_answers=True)
        before = answered.split("\ue000")[0]
        return before.removeprefix(prompt) if before.startswith(prompt) else ""

    def _closed(self, after: str) -> str:
        """What the template wrote behind an answer, with the text that closes it."""
        if after.startswith(self.turn_end):
            return after
        if self.spec.turn_end or after[:1].strip():
            raise UserError(f"the chat template closes an answer with {after[:20]!r}, expected {self.turn_end!r}")
        return self.turn_end + after.lstrip()  # the model was trained with it in the place of the white space

    def _encode(self, turns: Text, answer_next: bool) -> Encoded:
        text, spans = self._render(turns, answer_next)
        # What the tokenizer puts before a text (<s>) is the model's to see, but not twice: the rule of transformers.
        begins = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        tokens = self.tokenizer(text, add_special_tokens=not begins, return_offsets_mapping=True)
        ids, labels = list(tokens["input_ids"]), []
        waiting = list(spans)
        for token, (start, end) in zip(ids, tokens["offset_mapping"], strict=True):
            while waiting and waiting[0][1] <= start:
                waiting.pop(0)
            labels.append(token if waiting and end > waiting[0][0] else IGNORE_INDEX)
        if not answer_next and all(label == IGNORE_INDEX for label in labels):
            raise UserError("no assistant message, so nothing to learn from; add an answer")
        return Encoded(tuple(ids), tuple(labels), self._media_rows(ids, turns))

    def document(self, encoded: Sequence[Encoded], media: Sequence[MediaPlan], sample_ids: Sequence[str]) -> Document:
        """One document of conversations that share all their media; several of them need one `shareable_head`."""
        wholes = [self._expand(one, media) for one in encoded]
        trunk = 0 if len(wholes) == 1 else self._trunk_length(encoded, wholes)
        branches = [tuple(x[..., trunk:] for x in whole) for whole in wholes]
        in_order = [plan for _, plan in encoded[0].in_row_order(media)]
        return _lay_out(tuple(x[..., :trunk] for x in wholes[0]), branches, in_order, sample_ids)

    def check_length(self, origin: str, tokens: int) -> None:
        """UserError where one conversation has more tokens than the model has positions."""
        context = self.spec.context_tokens
        if context is not None and tokens > context:
            raise UserError(
                f"{origin}: {tokens} tokens, but the model was trained for {context}; take fewer frames (data.video), "
                f"or set model.rope_factor to {-(-tokens // context)} times what it is"
            )

    def options(self, prompt: Conversation, options: Sequence[str], media: Sequence[MediaPlan]) -> Document:
        """A prompt with each of `options` as a branch that answers it, labelled as training supervises that answer: the
        option and the token that closes it.

        The trunk is all that the prompts have in common but for their last token, which begins each branch and
        predicts its first label.
        """
        answered = [replace(prompt, turns=(*prompt.turns, Turn("assistant", (option,)))) for option in options]
        encoded = [_last_answer_alone(self.encode(one, media=media)) for one in answered]
        common = min(next(i for i, label in enumerate(one.labels) if label != IGNORE_INDEX) for one in encoded)
        while any(one.ids[:common] != encoded[0].ids[:common] for one in encoded):
            common -= 1  # a token that straddles the answer's start differs from option to option
        # The media's tokens are laid out once, for the longest; the positions behind them are the same for all.
        longest = max(encoded, key=lambda one: len(one.ids))
        whole = self._expand(longest, media)
        trunk = common - 1 + len(whole[0]) - len(longest.ids)
        branches = []
        for one in encoded:
            ids, labels = torch.tensor(one.ids[common - 1 :]), torch.tensor(one.labels[common - 1 :])
            mask_T, positions_3T = whole[2][trunk:], whole[3][:, trunk:]
            branches.append((ids, labels, mask_T[: len(ids)], positions_3T[:, : len(ids)]))
        head = (*(x[:trunk] for x in whole[:3]), whole[3][:, :trunk])
        head = (head[0], torch.full_like(head[1], IGNORE_INDEX), *head[2:])
        return _lay_out(head, branches, [plan for _, plan in longest.in_row_order(media)], list(options))

    @cached_property
    def around_answer(self) -> tuple[int, int]:
        """Supervised tokens of an answer before and behind its own text: what the template writes before it, and what
        closes it."""
        return len(self._ids_of(self._gap)), len(self._ids_of(self.turn_end))

    def shareable_head(self, one: Encoded) -> tuple[int, ...] | None:
        """The ids up to the token after the last medium, which conversations about the same media share if theirs are
        equal: they may then be branches of one trunk.

        None where something in it is supervised, or nothing stands before or behind it: a question or an answer that
        precedes its video can't share it.
        """
        end = max(one.media_rows) + 2 if one.media_rows else 0
        if not 0 < end < len(one.ids) or set(one.labels[:end]) != {IGNORE_INDEX}:
            return None
        return one.ids[:end]

    def _trunk_length(self, encoded: Sequence[Encoded], wholes: Sequence[Tensors]) -> int:
        heads = {self.shareable_head(one) for one in encoded}
        assert len(heads) == 1 and None not in heads, "these conversations share no trunk"
        return int(wholes[0][2].nonzero()[-1]) + 2

    def media_tokens(self, plan: MediaPlan) -> tuple[list[int], list[bool]]:
        """The ids that replace a medium's placeholder, and which of them are vision embeddings."""
        (mark,) = self.spec.placeholder(plan.ref.kind)
        ids: list[int] = []
        mask: list[bool] = []
        for piece in self.spec.expand(plan):
            new = self._ids_of(piece) if isinstance(piece, str) else [mark] * piece
            ids += new
            mask += [not isinstance(piece, str)] * len(new)
        return ids, mask

    def _expand(self, one: Encoded, media: Sequence[MediaPlan]) -> Tensors:
        """The whole conversation with every placeholder replaced."""
        leads = tuple(self.spec.lead(plan) for plan in media)
        assert "".join(leads) == "".join(one.leads), f"encoded with {one.leads}, planned with {leads}"
        ids: list[int] = []
        labels: list[int] = []
        mask: list[bool] = []
        runs = []
        row = 0
        for start, plan in one.in_row_order(media):
            ids += one.ids[row:start]
            labels += one.labels[row:start]
            mask += [False] * (start - row)
            new_ids, new_mask = self.media_tokens(plan)
            begins = [new and not before for new, before in zip(new_mask, [False, *new_mask], strict=False)]
            runs.append(([len(ids) + i for i, first in enumerate(begins) if first], plan))
            ids += new_ids
            labels += [IGNORE_INDEX] * len(new_ids)
            mask += new_mask
            row = start + 1
        ids += one.ids[row:]
        labels += one.labels[row:]
        mask += [False] * (len(one.ids) - row)
        positions_3T = self.spec.positions(len(ids), runs)
        return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask), positions_3T

    def _media_rows(self, ids: Sequence[int], turns: Text) -> tuple[int, ...]:
        """The n-th medium of a kind is the n-th placeholder of that kind."""
        rows: list[int] = []
        kinds = [part[0] for _, parts in turns for part in parts if not isinstance(part, str)]
        next_row = dict.fromkeys(kinds, 0)
        for kind in kinds:
            mark, row = list(self.spec.placeholder(kind)), next_row[kind]
            while row + len(mark) <= len(ids) and ids[row : row + len(mark)] != mark:
                row += 1
            if row + len(mark) > len(ids):
                raise UserError(
                    f"{len(kinds)} media, but the chat template wrote {len(rows)} placeholders; media may stand in "
                    "user turns only"
                )
            rows.append(row)
            next_row[kind] = row + len(mark)
        return tuple(rows)

    def _apply(self, turns: Text, answer_next: bool, hide_answers: bool) -> str:
        messages = []
        for index, (role, parts) in enumerate(turns):
            for part in parts:
                if isinstance(part, str) and (found := self._control.search(part)):
                    raise UserError(f"{role} text holds the control token {found[0]!r}; remove it")
            if role == "assistant" and hide_answers:
                parts = (_SENTINEL.format(index),)
            content = []
            for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):  # neighbouring texts are one
                kept = tuple(run)
                content += [{"type": "text", "text": _joined(kept)}] if is_text else [{"type": p[0]} for p in kept]
            messages.append({"role": role, "content": content})
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        except Exception as error:  # it is a program: of Jinja, of its sandbox, of whatever the template calls
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"the chat template fails ({type(error).__name__}: {reason})") from error


def _text_of(conversation: Conversation, leads: Sequence[str]) -> Text:
    """What the template sees, each medium behind its lead where there is one."""
    waiting = iter(leads)
    turns = []
    for turn in conversation.turns:
        parts: list[str | tuple[MediaKind]] = []
        for part in turn.parts:
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, MediaRef):
                lead = next(waiting, "")
                parts += [lead, (part.kind,)] if lead else [(part.kind,)]
        turns.append((turn.role, tuple(parts)))
    return tuple(turns)


def _joined(parts: Sequence[str | tuple[MediaKind]]) -> str:
    return "".join(part for part in parts if isinstance(part, str))


def _last_answer_alone(one: Encoded) -> Encoded:
    """With labels for the last answer only: earlier answers are part of the question."""
    start = max(i for i, label in enumerate(one.labels) if label != IGNORE_INDEX)
    while start and one.labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return replace(one, labels=(IGNORE_INDEX,) * start + one.labels[start:])


def _lay_out(
    trunk: Tensors, branches: Sequence[Tensors], media: Sequence[MediaPlan], sample_ids: Sequence[str]
) -> Document:
    """A document of a trunk, which may be empty, and its branches."""
    ids, labels, mask, positions = (torch.cat(parts, dim=-1) for parts in zip(trunk, *branches, strict=True))
    return Document(
        sample_ids=tuple(sample_ids),
        ids_T=ids,
        labels_T=labels,
        positions_3T=positions,
        trunk_length=trunk[0].numel(),
        branch_lengths=tuple(branch[0].numel() for branch in branches),
        media=tuple(media),
        media_mask_T=mask,
    )
