"""Conversations to documents: the chat template's text as token ids, with labels where the model has to speak."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from vft.common.errors import UserError
from vft.common.types import IGNORE_INDEX, Conversation, Document, MediaKind, MediaPlan, MediaRef, Turn
from vft.data.document_layout import DocumentLayout, Encoded
from vft.data.template import LITERAL, ChatTemplate, Kind, Text
from vft.data.text_tokenizer import MAX_CACHED, TextTokenizer, control_tokens, placeholder_rows
from vft.models.processor import VisionProcessor


class ChatEncoder:
    """The checkpoint's tokenizer and chat template together with the family's rules."""

    def __init__(
        self, tokenizer: Any, processor: VisionProcessor, end_ids: Collection[int] = (), learn_reasoning: bool = True
    ) -> None:
        """`end_ids` are the tokens that the checkpoint names as ends of an answer, beside its tokenizer's own."""
        self.tokenizer, self.processor, self.learn_reasoning = tokenizer, processor, learn_reasoning
        kinds: tuple[MediaKind, ...] = ("video", "image")
        marks = [mark for kind in kinds for mark in tokenizer.convert_ids_to_tokens(list(processor.placeholder(kind)))]
        self.template = ChatTemplate(tokenizer, processor.turn_end, [*control_tokens(tokenizer), *marks])
        self.turn_end = self.template.turn_end
        self._text = TextTokenizer(tokenizer, self.template)
        self._layout = DocumentLayout(processor, self._text.ids_of)
        self._encode_cached = lru_cache(MAX_CACHED)(self._encode)
        if len(closing := self._text.ids_of(self.turn_end)) != 1:
            raise UserError(
                f"{tokenizer.name_or_path}: {self.turn_end!r}, which ends an answer, is {len(closing)} tokens in this "
                "tokenizer, and must be one; take the tokenizer of the release"
            )
        own_end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.end_ids = frozenset([*closing, *own_end, *end_ids])

    # ----------------------------------------------------------------------------------------- template and labels

    def render(self, conversation: Conversation, answer_next: bool) -> tuple[str, list[tuple[int, int]]]:
        """The template's text and the character spans that are supervised.

        A span is what the model has to say: an assistant message's content and the token that closes it. With
        `answer_next` the text ends where the model is to answer.
        """
        text, spans = "", []
        for piece in self.template.pieces(_text_of(conversation, ()), answer_next):
            shown = piece.text.replace(LITERAL, "")
            if _is_supervised(piece.kind, self.learn_reasoning):
                spans.append((len(text), len(text) + len(shown)))
            text += shown + piece.behind.replace(LITERAL, "")
        return text, spans

    def encode(
        self,
        conversation: Conversation,
        answer_next: bool = False,
        media: Sequence[MediaPlan] | None = None,
        reasoning: bool | None = None,
    ) -> Encoded:
        """Ids and labels of the whole text. Without the plans of the `media`, which a document needs, text that depends
        on them is left out. `reasoning`: whether it is labelled too; None: as configured.

        An answer is tokenized by itself, so that the tokens before it are those that generation starts from.
        """
        leads = tuple(self.processor.lead(plan) for plan in media or ())
        settled = conversation if media is None else conversation.resolved(media)
        labelled = self.learn_reasoning if reasoning is None else reasoning
        try:
            return replace(self._encode_cached(_text_of(settled, leads), answer_next, labelled), leads=leads)
        except UserError as error:
            raise UserError(f"{conversation.origin}: {error}") from None

    def depends_on_plans(self, conversation: Conversation, media: Sequence[MediaPlan]) -> bool:
        """Whether the text has parts that the plans of the media determine, such as times of frames."""
        return any(map(self.processor.lead, media)) or conversation.resolved(media) is not conversation

    def _encode(self, turns: Text, answer_next: bool, reasoning: bool) -> Encoded:
        ids: list[int] = []
        labels: list[int] = []
        for number, piece in enumerate(self.template.pieces(turns, answer_next)):
            ids_of = self._text.later_ids if number else self._text.first_ids
            own = ids_of(piece.text)
            both = ids_of(piece.text + piece.behind) if piece.behind else own
            if both[: len(own)] != own:  # what is behind would change how the answer ends
                both = own + self._text.later_ids(piece.behind)
            ids += both
            labels += own if _is_supervised(piece.kind, reasoning) else (IGNORE_INDEX,) * len(own)
            labels += (IGNORE_INDEX,) * (len(both) - len(own))
        if not answer_next and all(label == IGNORE_INDEX for label in labels):
            raise UserError("no assistant message, so nothing to learn from; add an answer")
        marks = [self.processor.placeholder(part[0]) for _, parts in turns for part in parts if isinstance(part, tuple)]
        rows = placeholder_rows(ids, marks)
        if len(rows) < len(marks):
            raise UserError(
                f"{len(marks)} media, but the chat template wrote {len(rows)} placeholders; media may stand in "
                "user turns only"
            )
        return Encoded(tuple(ids), tuple(labels), tuple(rows))

    def split_for_learning(self, conversation: Conversation) -> list[Conversation]:
        """The conversation, after one for each earlier answer that cannot be learnt in it, because the template would
        show that answer, or the text before it, otherwise than when it is asked for."""
        answers = [number for number, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        try:
            if len(answers) < 2 or self.template.in_place(_text_of(conversation, ())):
                return [conversation]
        except UserError:  # reported when the conversation itself is encoded
            return [conversation]
        parts = [replace(conversation, turns=conversation.turns[: number + 1]) for number in answers[:-1]]
        return [*(replace(part, options=(), facts={}, is_part=True) for part in parts), conversation]

    # --------------------------------------------------------------------------------------------------- documents

    def media_length(self, plan: MediaPlan) -> int:
        """Tokens that replace a medium's placeholder: vision embeddings and the text between them."""
        return self._layout.media_length(plan)

    def document(self, encoded: Sequence[Encoded], media: Sequence[MediaPlan], sample_ids: Sequence[str]) -> Document:
        """One document of conversations that share all their media. Several of them need equal shareable prefixes."""
        return self._layout.document(encoded, media, sample_ids)

    def options(self, prompt: Conversation, options: Sequence[str], media: Sequence[MediaPlan]) -> Document:
        """A prompt with each of `options` as a suffix that answers it, labelled as training supervises that answer: the
        option and the token that closes it."""
        answered = [replace(prompt, turns=(*prompt.turns, Turn("assistant", (option,)))) for option in options]
        encoded = [self.encode(one, media=media, reasoning=False).with_last_answer() for one in answered]
        return self._layout.options(encoded, media, options)

    def answer_tokens(self, answer: str) -> int:
        """Most tokens that the model needs to give this answer, with what it says before it and what closes it."""
        thinking = self.template.thinking
        before = self.template.gap if thinking is None else thinking.lead + thinking.close
        return sum(len(self._text.ids_of(text)) for text in (before, answer, self.turn_end))

    @cached_property
    def around_answer(self) -> tuple[int, int]:
        """Labelled tokens of an option before and behind its own text: what the template writes before it, and what
        closes it. White space before it is its own, as in lm-eval."""
        gap = self.template.gap if self.template.thinking is None else ""
        return len(self._text.ids_of(gap)) if gap.strip() else 0, len(self._text.ids_of(self.turn_end))


def _is_supervised(kind: Kind, reasoning: bool) -> bool:
    return kind is Kind.ANSWER or (reasoning and kind is Kind.REASONING)


def _text_of(conversation: Conversation, leads: Sequence[str]) -> Text:
    """What the template sees, each medium behind its lead if it has one."""
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
