"""Pieces of text to token ids, each piece by itself, with no control token out of a record's text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from vft.common.reasoning import CLOSE, OPEN
from vft.data.template import LITERAL, ChatTemplate

MAX_CACHED = 1 << 14
"""Texts whose ids are cached: a question is often asked of many videos, a label offered to all of them."""


class TextTokenizer:
    """A checkpoint's tokenizer, as the pieces of a conversation need it."""

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.ids_of = lru_cache(MAX_CACHED)(self._ids_of)
        """Token ids of a text, without any that the tokenizer puts before texts."""

    def first_ids(self, text: str) -> tuple[int, ...]:
        """Ids of text at the beginning of a row."""
        # What the tokenizer puts before a text (<s>) is the model's to see, but not twice: transformers' rule.
        bos = self.tokenizer.bos_token
        return self.ids_of(text) if bos and text.startswith(bos) else self._ids_before_text + self.ids_of(text)

    def later_ids(self, text: str) -> tuple[int, ...]:
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


def control_tokens(tokenizer: Any) -> list[str]:
    """Tokens that mean more to the model than their text. Not the tags of reasoning, which answers contain."""
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special or re.fullmatch(r"<\|.*\|>", token.content)]
    return [token for token in {*special, *tokenizer.all_special_tokens} if token not in (OPEN, CLOSE)]


def placeholder_rows(ids: Sequence[int], marks: Sequence[Sequence[int]]) -> list[int]:
    """Where the placeholder of each medium begins: the n-th equal mark is the n-th placeholder like it. Fewer rows than
    marks if the ids do not have them all."""
    rows: list[int] = []
    next_row: dict[tuple[int, ...], int] = {}
    for mark in map(tuple, marks):
        row = next_row.get(mark, 0)
        while row + len(mark) <= len(ids) and tuple(ids[row : row + len(mark)]) != mark:
            row += 1
        if row + len(mark) > len(ids):
            return rows
        rows.append(row)
        next_row[mark] = row + len(mark)
    return rows
