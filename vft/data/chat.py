"""Conversations to documents: the chat template's text as token ids, with labels where the model has to speak.

Each piece of text is tokenized by itself, and no control token comes out of a record's text. Media take the place of
their placeholders; conversations about the same media become a shared prefix with suffixes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from vft.common.errors import UserError
from vft.common.files import digest
from vft.common.task import CLOSE, OPEN
from vft.common.types import IGNORE_INDEX, Conversation, Document, MediaKind, MediaPlan, MediaRef, Turn
from vft.data.template import LITERAL, SHOWN, ChatTemplate, Kind, Text
from vft.models.processor import VisionProcessor

MAX_CACHED = 1 << 14
"""Texts whose ids are cached: a question is often asked of many videos, a label offered to all of them."""

Tensors = tuple[torch.Tensor, ...]
"""ids [T], labels [T], media mask [T], positions [3, T] of a part of a document."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as token ids and labels, media still one placeholder each."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    media_rows: tuple[int, ...]
    """Where each medium's placeholder is. A template may put the media of one turn in another order."""

    @property
    def text_tokens(self) -> int:
        """Tokens that are not a medium's placeholder."""
        return len(self.ids) - len(self.media_rows)

    @property
    def prefix_tokens(self) -> int:
        """Text tokens up to the one after the last medium: those that suffixes may share."""
        return max(self.media_rows) + 2 - len(self.media_rows) if self.media_rows else 0

    @property
    def shareable_prefix(self) -> tuple[int, ...] | None:
        """The ids up to the token after the last medium. Conversations about the same media can share them if theirs
        are equal.

        None if something in it is supervised, or if nothing stands before or after it: a question or an answer before
        its video cannot share it.
        """
        end = max(self.media_rows) + 2 if self.media_rows else 0
        if not 0 < end < len(self.ids) or set(self.labels[:end]) != {IGNORE_INDEX}:
            return None
        return self.ids[:end]

    def in_row_order(self, media: Sequence[MediaPlan]) -> list[tuple[int, MediaPlan]]:
        """The media of the conversation with their rows, as they stand in the row."""
        return sorted(zip(self.media_rows, media, strict=True), key=lambda pair: pair[0])


class ChatEncoder:
    """The checkpoint's tokenizer and chat template together with the family's rules."""

    def __init__(
        self,
        tokenizer: Any,
        processor: VisionProcessor,
        end_ids: Collection[int] = (),
        learn_reasoning: bool = True,
        learn_thought_tags: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """`end_ids` are the tokens that the checkpoint names as ends of an answer, beside its tokenizer's own.

        Raises:
            UserError: `template_options` or the processor's settings do not fit the chat template.
        """
        self.tokenizer, self.processor = tokenizer, processor
        self.learn_reasoning, self.learn_thought_tags = learn_reasoning, learn_thought_tags
        marks = tokenizer.convert_ids_to_tokens([processor.video_token, processor.image_token])
        control, keeps, whole = [*control_tokens(tokenizer), *marks], processor.keep_outer_pair, processor.video_text
        video = marks[0], "" if keeps else whole
        self.template = ChatTemplate(tokenizer, processor.turn_end, control, template_options, video)
        if keeps and not (whole and whole in self.template.apply(SHOWN, False)):
            raise UserError(
                f"data.video.keep_outer_pair = true: {tokenizer.name_or_path} has no outer pair of tokens around "
                f"a video, by its {'chat template' if whole else 'family'}; take the setting out"
            )
        self.turn_end = self.template.turn_end
        self.ids_of = lru_cache(MAX_CACHED)(self._ids_of)
        """Token ids of a text, without any that the tokenizer puts before texts."""
        self._encode_cached = lru_cache(MAX_CACHED)(self._encode)
        if len(closing := self.ids_of(self.turn_end)) != 1:
            raise UserError(
                f"{tokenizer.name_or_path}: {self.turn_end!r}, which ends an answer, is {len(closing)} tokens in this "
                "tokenizer, and must be one; take the tokenizer of the release"
            )
        own_end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.end_ids = frozenset([*closing, *own_end, *end_ids])

    def __reduce__(self) -> tuple[object, ...]:
        """For worker processes: made anew there, with caches of its own."""
        settings = self.learn_reasoning, self.learn_thought_tags, self.template.options
        return ChatEncoder, (self.tokenizer, self.processor, self.end_ids, *settings)

    @cached_property
    def fingerprint(self) -> str:
        """Differs for an encoder that may give other ids, labels or plans."""
        own = self.tokenizer
        tokens = own.backend_tokenizer.to_str(), own.chat_template, own.special_tokens_map
        settings = self.learn_reasoning, self.learn_thought_tags, sorted(self.template.options.items())
        return digest(repr((type(own), tokens, self.processor, sorted(self.end_ids), settings)))

    # ----------------------------------------------------------------------------------------------- ids and labels

    def encode(
        self,
        conversation: Conversation,
        answer_next: bool = False,
        media: Sequence[MediaPlan] | None = None,
        reasoning: bool | None = None,
    ) -> Encoded:
        """Ids and labels of the whole text; with `answer_next` it ends where the model is to answer. Without the plans
        of the `media`, text that depends on them (times of frames, subtitles) is left out. `reasoning`: whether it is
        labelled too; None: as configured.

        An answer is tokenized by itself, so that the tokens before it are those that generation starts from.
        """
        leads = [self.processor.lead(plan) for plan in media or ()]
        settled = conversation if media is None else conversation.resolved(media)
        labelled = self.learn_reasoning if reasoning is None else reasoning
        try:
            return self._encode_cached(_text_of(settled, leads), answer_next, labelled, conversation.last_only)
        except UserError as error:
            raise UserError(f"{conversation.origin}: {error}") from None

    def _encode(self, turns: Text, answer_next: bool, reasoning: bool, last_only: bool) -> Encoded:
        ids: list[int] = []
        labels: list[int] = []
        pieces = self.template.pieces(turns, answer_next)
        for number, piece in enumerate(pieces):
            if last_only and piece.kind is Kind.CONTEXT and any(one.kind is Kind.ANSWER for one in pieces[number:]):
                labels = [IGNORE_INDEX] * len(labels)
            ids_of = self._later_ids if number else self._first_ids
            own = ids_of(piece.text)
            both = ids_of(piece.text + piece.behind) if piece.behind else own
            if both[: len(own)] != own:  # what is behind would change how the answer ends
                both = own + self._later_ids(piece.behind)
            ids += both
            is_supervised = piece.kind is Kind.ANSWER or (reasoning and piece.kind is Kind.REASONING)
            is_supervised = is_supervised or (self.learn_thought_tags and piece.kind is Kind.TAGS)
            labels += own if is_supervised else (IGNORE_INDEX,) * len(own)
            labels += (IGNORE_INDEX,) * (len(both) - len(own))
        if not answer_next and all(label == IGNORE_INDEX for label in labels):
            raise UserError("no assistant message, so nothing to learn from; add an answer")
        marks = [self.processor.placeholder(part[0]) for _, parts in turns for part in parts if isinstance(part, tuple)]
        # The n-th medium of a kind is at the n-th placeholder of that kind.
        places = {mark: iter([row for row, token in enumerate(ids) if token == mark]) for mark in set(marks)}
        rows = [row for mark in marks if (row := next(places[mark], None)) is not None]
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
            if (
                len(answers) < 2
                or conversation.rejected is not None
                or self.template.in_place(_text_of(conversation, ()))
            ):
                return [conversation]
        except UserError:  # reported when the conversation itself is encoded
            return [conversation]
        parts = [replace(conversation, turns=conversation.turns[: number + 1]) for number in answers[:-1]]
        return [*(replace(part, options=(), facts={}, is_part=True) for part in parts), conversation]

    def answer_tokens(self, answer: str) -> int:
        """Most tokens that the model needs to give this answer, with what it says before it and what closes it."""
        thinking = self.template.thinking
        before = self.template.gap if thinking is None else thinking.lead + thinking.close
        return sum(len(self.ids_of(text)) for text in (before, answer, self.turn_end))

    @cached_property
    def around_answer(self) -> tuple[int, int]:
        """Labelled tokens of an option before and behind its own text: what the template writes before it, and what
        closes it. White space before it is its own, as in lm-eval."""
        gap = self.template.gap if self.template.thinking is None else ""
        return len(self.ids_of(gap)) if gap.strip() else 0, len(self.ids_of(self.turn_end))

    # -------------------------------------------------------------------------------------------------- tokenizing

    def _first_ids(self, text: str) -> tuple[int, ...]:
        """Ids of text at the beginning of a row."""
        # What the tokenizer puts before a text (<s>) is the model's to see, but not twice: transformers' rule.
        bos = self.tokenizer.bos_token
        return self.ids_of(text) if bos and text.startswith(bos) else self._ids_before_text + self.ids_of(text)

    def _later_ids(self, text: str) -> tuple[int, ...]:
        """Ids of text that continues a row."""
        if self._adds_space:
            for guard in (":", ".", "\n"):  # some text before it that does not become one token with it
                before, both = self.ids_of(guard), self.ids_of(guard + text)
                if both[: len(before)] == before:
                    return both[len(before) :]
        return self.ids_of(text)

    @cached_property
    def _ids_before_text(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text."""
        plain = self.ids_of("b")
        whole = self.tokenizer("b")["input_ids"]
        return tuple(whole[: whole.index(plain[0])])

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer takes a text as if a space stood before it, as SentencePiece does."""
        return "".join(self.tokenizer.convert_ids_to_tokens(list(self.ids_of("b")))) != "b"

    def _ids_of(self, text: str) -> tuple[int, ...]:
        if LITERAL not in text:
            return tuple(self._tokenize(text))
        # The template's own control tokens are tokens; those in a record's texts are not.
        ids: list[int] = []
        start = 0
        for token in self.template.control.finditer(text):
            ids += [*self._literal_ids(text[start : token.start()]), self.tokenizer.convert_tokens_to_ids(token[0])]
            start = token.end()
        return (*ids, *self._literal_ids(text[start:]))

    def _literal_ids(self, text: str) -> list[int]:
        """Ids of a text of which no part is a control token."""
        ids = self._tokenize(text.replace(LITERAL, ""), split_special_tokens=True)
        if self.template.control.search("\0".join(self.tokenizer.convert_ids_to_tokens(ids))):
            # One that the tokenizer does not call special: cut the text where the mark stands.
            ids = [token for part in text.split(LITERAL) for token in self._tokenize(part)]
        return ids

    def _tokenize(self, text: str, **options: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return ids

    # --------------------------------------------------------------------------------------------------- documents

    def media_length(self, plan: MediaPlan) -> int:
        """Tokens that replace a medium's placeholder: vision embeddings and the text between them."""
        return sum(
            len(self.ids_of(piece)) if isinstance(piece, str) else piece for piece in self.processor.expand(plan)
        )

    def document(
        self, conversations: Sequence[Conversation], media: Sequence[MediaPlan], answer_next: bool = False
    ) -> Document:
        """One document of conversations that share all their media. Several of them need equal shareable prefixes; the
        two of a pair without media share nothing."""
        encoded = [self.encode(branch, answer_next, media) for one in conversations for branch in one.branches]
        wholes = [self._expand(one, media) for one in encoded]
        length = 0
        if len(wholes) > 1 and media:
            prefixes = {one.shareable_prefix for one in encoded}
            assert len(prefixes) == 1 and None not in prefixes, "these conversations share no prefix"
            length = len(wholes[0][0]) - len(encoded[0].ids) + max(encoded[0].media_rows) + 2
        suffixes = [tuple(x[..., length:] for x in whole) for whole in wholes]
        in_order = [plan for _, plan in encoded[0].in_row_order(media)]
        made = _join(tuple(x[..., :length] for x in wholes[0]), suffixes, in_order, [one.id for one in conversations])
        made.rejected = tuple(number > 0 for one in conversations for number in range(len(one.branches)))
        made.desirable = tuple(one.desirable for one in conversations)
        made.conversations = tuple(conversations)
        return made

    def options(self, prompt: Conversation, options: Sequence[str], media: Sequence[MediaPlan]) -> Document:
        """A prompt with each of `options` as a suffix that answers it, labelled as training supervises that answer: the
        option and the token that closes it. Earlier answers are part of the question.

        The shared prefix is all that they have in common except for its last token, which begins each suffix and
        predicts its first label.
        """
        answered = [replace(prompt, turns=(*prompt.turns, Turn("assistant", (option,)))) for option in options]
        encoded = [self.encode(one, media=media, reasoning=False) for one in answered]
        starts = []
        for one in encoded:
            start = max(i for i, label in enumerate(one.labels) if label != IGNORE_INDEX)
            while start and one.labels[start - 1] != IGNORE_INDEX:
                start -= 1
            starts.append(start)
        common = min(starts)
        while any(one.ids[:common] != encoded[0].ids[:common] for one in encoded):
            common -= 1  # a token that straddles the answer's start differs from option to option
        # The media's tokens are laid out once, for the longest; the positions after them are the same for all.
        longest = max(encoded, key=lambda one: len(one.ids))
        whole = self._expand(longest, media)
        length = common - 1 + len(whole[0]) - len(longest.ids)
        suffixes = []
        for one, start in zip(encoded, starts, strict=True):
            ids, labels = torch.tensor(one.ids[common - 1 :]), torch.tensor(one.labels[common - 1 :])
            labels[: start - common + 1] = IGNORE_INDEX
            mask_T, positions_3T = whole[2][length:], whole[3][:, length:]
            suffixes.append((ids, labels, mask_T[: len(ids)], positions_3T[:, : len(ids)]))
        ids_T, labels_T, mask_T, positions_3T = (x[..., :length] for x in whole)
        prefix = ids_T, torch.full_like(labels_T, IGNORE_INDEX), mask_T, positions_3T
        return _join(prefix, suffixes, [plan for _, plan in longest.in_row_order(media)], options)

    def _expand(self, one: Encoded, media: Sequence[MediaPlan]) -> Tensors:
        """The whole conversation with every placeholder replaced."""
        ids: list[int] = []
        labels: list[int] = []
        mask: list[bool] = []

        def add(new: Sequence[int], own_labels: Sequence[int], is_vision: bool = False) -> None:
            ids.extend(new)
            labels.extend(own_labels)
            mask.extend([is_vision] * len(new))

        runs, row = [], 0
        for start, plan in one.in_row_order(media):
            add(one.ids[row:start], one.labels[row:start])
            mark, run_starts = self.processor.placeholder(plan.ref.kind), list[int]()
            for piece in self.processor.expand(plan):
                is_vision = not isinstance(piece, str)
                new = self.ids_of(piece) if isinstance(piece, str) else [mark] * piece
                if is_vision and not (run_starts and mask[-1]):
                    run_starts.append(len(ids))
                add(new, [IGNORE_INDEX] * len(new), is_vision)
            runs.append((run_starts, plan))
            row = start + 1
        add(one.ids[row:], one.labels[row:])
        positions_3T = self.processor.positions(len(ids), runs)
        return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask), positions_3T


def control_tokens(tokenizer: Any) -> list[str]:
    """Tokens that mean more to the model than their text. Not the tags of reasoning, which answers contain."""
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special or re.fullmatch(r"<\|.*\|>", token.content)]
    return [token for token in {*special, *tokenizer.all_special_tokens} if token not in (OPEN, CLOSE)]


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


def _join(
    prefix: Tensors, suffixes: Sequence[Tensors], media: Sequence[MediaPlan], sample_ids: Sequence[str]
) -> Document:
    """A document of a shared prefix, which may be empty, and its suffixes."""
    ids, labels, mask, positions = (torch.cat(parts, dim=-1) for parts in zip(prefix, *suffixes, strict=True))
    return Document(
        sample_ids=tuple(sample_ids),
        ids_T=ids,
        labels_T=labels,
        positions_3T=positions,
        prefix_length=prefix[0].numel(),
        suffix_lengths=tuple(suffix[0].numel() for suffix in suffixes),
        media=tuple(media),
        media_mask_T=mask,
    )
