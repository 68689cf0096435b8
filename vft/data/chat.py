"""Conversations to documents: template, tokenizer, labels, trunk and branches."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from vft.common.errors import UserError
from vft.common.reasoning import CLOSE, OPEN
from vft.common.types import IGNORE_INDEX, Conversation, Document, MediaKind, MediaPlan, MediaRef, Turn
from vft.data.template import LITERAL, ChatTemplate, Kind, Text
from vft.models.processor import VisionProcessor

MAX_KEPT = 1 << 14
"""Encoded texts that are kept: a question is often asked of many videos, a label offered to all of them."""

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
    def prefix_tokens(self) -> int:
        """Text tokens up to the one after the last medium: the part that branches may share."""
        return max(self.media_rows) + 2 - len(self.media_rows) if self.media_rows else 0

    def in_row_order(self, media: Sequence[MediaPlan]) -> list[tuple[int, MediaPlan]]:
        """The media of the conversation with their rows, as they stand in the row."""
        return sorted(zip(self.media_rows, media, strict=True), key=lambda pair: pair[0])


class ChatEncoder:
    """The checkpoint's tokenizer and chat template together with the family's rules."""

    def __init__(
        self, tokenizer: Any, processor: VisionProcessor, end_ids: Collection[int] = (), learn_reasoning: bool = True
    ) -> None:
        """`end_ids` are the tokens that the checkpoint names as ends of an answer, beside its tokenizer's own."""
        self.tokenizer = tokenizer
        self.processor = processor
        self.learn_reasoning = learn_reasoning
        kinds: tuple[MediaKind, ...] = ("video", "image")
        marks = [
            token for kind in kinds for token in tokenizer.convert_ids_to_tokens(list(processor.placeholder(kind)))
        ]
        self.template = ChatTemplate(tokenizer, processor.turn_end, [*_control_tokens(tokenizer), *marks])
        self.turn_end = self.template.turn_end
        self._encode_kept = lru_cache(MAX_KEPT)(self._encode)
        self._ids_of = lru_cache(MAX_KEPT)(self._tokenise)
        if len(closing := self._ids_of(self.turn_end)) != 1:
            raise UserError(
                f"{tokenizer.name_or_path}: {self.turn_end!r}, which ends an answer, is {len(closing)} tokens in this "
                "tokenizer, and must be one; take the tokenizer of the release"
            )
        own_end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.end_ids = frozenset([*closing, *own_end, *end_ids])

    def render(self, conversation: Conversation, answer_next: bool) -> tuple[str, list[tuple[int, int]]]:
        """The template's text and the character spans that are supervised.

        A span is what the model has to say: an assistant message's content and the token that closes it. With
        `answer_next` the text ends where the model is to answer.
        """
        text, spans = "", []
        for piece in self.template.pieces(_text_of(conversation, ()), answer_next):
            said = piece.text.replace(LITERAL, "")
            if self._learns(piece.kind, self.learn_reasoning):
                spans.append((len(text), len(text) + len(said)))
            text += said + piece.behind.replace(LITERAL, "")
        return text, spans

    def encode(
        self,
        conversation: Conversation,
        answer_next: bool = False,
        media: Sequence[MediaPlan] | None = None,
        reasoning: bool | None = None,
    ) -> Encoded:
        """Ids and labels of the whole text. Text that depends on the plans of the `media`, which are needed to make a
        document of it, is left out where they are not given. `reasoning`: whether that is labelled too; None: as the
        configuration has it.

        An answer is tokenised by itself, so that what stands before it is what generation starts from.
        """
        leads = tuple(self.processor.lead(plan) for plan in media or ())
        settled = conversation if media is None else conversation.settled(media)
        learnt = self.learn_reasoning if reasoning is None else reasoning
        try:
            return replace(self._encode_kept(_text_of(settled, leads), answer_next, learnt), leads=leads)
        except UserError as error:
            raise UserError(f"{conversation.origin}: {error}") from None

    def depends_on_plans(self, conversation: Conversation, media: Sequence[MediaPlan]) -> bool:
        """Whether the text has parts that the plans of the media determine, such as times of frames."""
        return any(map(self.processor.lead, media)) or conversation.settled(media) is not conversation

    def learnt_apart(self, conversation: Conversation) -> list[Conversation]:
        """The conversation, behind one for each earlier answer that can't be learnt in it: the template would show
        that answer, or what stands before it, otherwise than when it is asked for."""
        answers = [number for number, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        try:
            if len(answers) < 2 or self.template.in_place(_text_of(conversation, ())):
                return [conversation]
        except UserError:  # told when the conversation itself is encoded
            return [conversation]
        parts = [replace(conversation, turns=conversation.turns[: number + 1]) for number in answers[:-1]]
        return [*(replace(part, options=(), facts={}, is_part=True) for part in parts), conversation]

    @staticmethod
    def _learns(kind: Kind, reasoning: bool) -> bool:
        return kind is Kind.ANSWER or (reasoning and kind is Kind.REASONING)

    def _encode(self, turns: Text, answer_next: bool, reasoning: bool) -> Encoded:
        ids: list[int] = []
        labels: list[int] = []
        for number, piece in enumerate(self.template.pieces(turns, answer_next)):
            said = self._piece(piece.text, number == 0)
            both = self._piece(piece.text + piece.behind, number == 0) if piece.behind else said
            if both[: len(said)] != said:  # what is behind would change how the answer ends
                both = said + self._piece(piece.behind, False)
            ids += both
            labels += said if self._learns(piece.kind, reasoning) else (IGNORE_INDEX,) * len(said)
            labels += (IGNORE_INDEX,) * (len(both) - len(said))
        if not answer_next and all(label == IGNORE_INDEX for label in labels):
            raise UserError("no assistant message, so nothing to learn from; add an answer")
        return Encoded(tuple(ids), tuple(labels), self._media_rows(ids, turns))

    def _piece(self, text: str, is_first: bool) -> tuple[int, ...]:
        """Ids of text that begins a row, or goes on within one."""
        if is_first:
            # What the tokenizer puts before a text (<s>) is the model's to see, but not twice: transformers' rule.
            begins = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
            return self._ids_of(text) if begins else self._before_text + self._ids_of(text)
        if not self._adds_space:
            return self._ids_of(text)
        for guard in (":", ".", "\n"):  # some text before it, which does not become one token with it
            before, both = self._ids_of(guard), self._ids_of(guard + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._ids_of(text)

    @cached_property
    def _before_text(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text."""
        plain = self._ids_of("b")
        whole = self.tokenizer("b")["input_ids"]
        return tuple(whole[: whole.index(plain[0])])

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer takes a text as if a space stood before it, as SentencePiece does."""
        return "".join(self.tokenizer.convert_ids_to_tokens(list(self._ids_of("b")))) != "b"

    def _tokenise(self, text: str) -> tuple[int, ...]:
        if LITERAL not in text:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        # The template's own control tokens are tokens; those of the record's texts are not.
        ids: list[int] = []
        start = 0
        for token in self.template.control.finditer(text):
            ids += [*self._as_text(text[start : token.start()]), self.tokenizer.convert_tokens_to_ids(token[0])]
            start = token.end()
        return (*ids, *self._as_text(text[start:]))

    def _as_text(self, text: str) -> list[int]:
        """Ids of a text of which no part is a control token."""
        whole = text.replace(LITERAL, "")
        ids: list[int] = self.tokenizer(whole, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.template.control.search("\0".join(self.tokenizer.convert_ids_to_tokens(ids))):
            # One that the tokenizer does not call special: cut where the mark stands.
            parts = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(LITERAL)]
            ids = [one for part in parts for one in part]
        return ids

    def document(self, encoded: Sequence[Encoded], media: Sequence[MediaPlan], sample_ids: Sequence[str]) -> Document:
        """One document of conversations that share all their media; several of them need one `shareable_head`."""
        wholes = [self._expand(one, media) for one in encoded]
        trunk = 0 if len(wholes) == 1 else self._trunk_length(encoded, wholes)
        branches = [tuple(x[..., trunk:] for x in whole) for whole in wholes]
        in_order = [plan for _, plan in encoded[0].in_row_order(media)]
        return _lay_out(tuple(x[..., :trunk] for x in wholes[0]), branches, in_order, sample_ids)

    def answer_tokens(self, answer: str) -> int:
        """Most tokens that the model needs to give this answer: with what it says before it, and what closes it."""
        thinking = self.template.thinking
        before = self.template.gap if thinking is None else thinking.lead + thinking.close
        return sum(len(self._ids_of(text)) for text in (before, answer, self.turn_end))

    def options(self, prompt: Conversation, options: Sequence[str], media: Sequence[MediaPlan]) -> Document:
        """A prompt with each of `options` as a branch that answers it, labelled as training supervises that answer: the
        option and the token that closes it.

        The trunk is all that the prompts have in common but for their last token, which begins each branch and
        predicts its first label.
        """
        answered = [replace(prompt, turns=(*prompt.turns, Turn("assistant", (option,)))) for option in options]
        encoded = [_last_answer_alone(self.encode(one, media=media, reasoning=False)) for one in answered]
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
        ids_T, labels_T, mask_T, positions_3T = (x[..., :trunk] for x in whole)
        head = ids_T, torch.full_like(labels_T, IGNORE_INDEX), mask_T, positions_3T
        return _lay_out(head, branches, [plan for _, plan in longest.in_row_order(media)], list(options))

    @cached_property
    def around_answer(self) -> tuple[int, int]:
        """Labelled tokens of an option before and behind its own text: what the template writes before it, and what
        closes it. White space before it is its own, as in lm-eval."""
        gap = self.template.gap if self.template.thinking is None else ""
        return len(self._ids_of(gap)) if gap.strip() else 0, len(self._ids_of(self.turn_end))

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

    def media_length(self, plan: MediaPlan) -> int:
        """Tokens that replace a medium's placeholder: vision embeddings and the text between them."""
        return sum(
            len(self._ids_of(piece)) if isinstance(piece, str) else piece for piece in self.processor.expand(plan)
        )

    def media_tokens(self, plan: MediaPlan) -> tuple[list[int], list[bool]]:
        """The ids that replace a medium's placeholder, and which of them are vision embeddings."""
        (mark,) = self.processor.placeholder(plan.ref.kind)
        ids: list[int] = []
        mask: list[bool] = []
        for piece in self.processor.expand(plan):
            new = self._ids_of(piece) if isinstance(piece, str) else [mark] * piece
            ids += new
            mask += [not isinstance(piece, str)] * len(new)
        return ids, mask

    def _expand(self, one: Encoded, media: Sequence[MediaPlan]) -> Tensors:
        """The whole conversation with every placeholder replaced."""
        leads = tuple(self.processor.lead(plan) for plan in media)
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
        positions_3T = self.processor.positions(len(ids), runs)
        return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask), positions_3T

    def _media_rows(self, ids: Sequence[int], turns: Text) -> tuple[int, ...]:
        """The n-th medium of a kind is the n-th placeholder of that kind."""
        rows: list[int] = []
        kinds = [part[0] for _, parts in turns for part in parts if not isinstance(part, str)]
        next_row = dict.fromkeys(kinds, 0)
        for kind in kinds:
            mark, row = list(self.processor.placeholder(kind)), next_row[kind]
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


def _control_tokens(tokenizer: Any) -> list[str]:
    """Tokens that mean something to the model beyond their text. Not the tags of reasoning, which answers have."""
    added = tokenizer.added_tokens_decoder.values()
    special = [one.content for one in added if one.special or re.fullmatch(r"<\|.*\|>", one.content)]
    return [token for token in {*special, *tokenizer.all_special_tokens} if token not in (OPEN, CLOSE)]


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
        prefix_length=trunk[0].numel(),
        suffix_lengths=tuple(branch[0].numel() for branch in branches),
        media=tuple(media),
        media_mask_T=mask,
    )
