"""Texts without a video, for the base model: the English that its tags never use.

Training lowers the logits of all tokens that it never shows alike, and adapters of the decoder's linears can hardly
tell these tokens apart again: a word that begins with one of them stays at a loss above 1.5, however long it is
trained. So the base reads sentences, summaries and stories made of tags, and options with their letters, and it repeats
texts in which every word and letter occurs.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Iterator
from typing import Any

import words
import world

Record = dict[str, Any]


def sentences() -> Iterator[Record]:
    """Tags and a sentence that says the same."""
    for scene in world.all_scenes(held_out=False):
        for answer in words.captions(scene):
            yield message(words.reading(words.SENTENCE_PROMPT, [scene]), answer)


def tales(rows: Iterable[tuple[world.Scene, ...]]) -> Iterator[Record]:
    """Tags and their summary, tags and their story."""
    for scenes in rows:
        yield message(words.reading(words.SUMMARY_PROMPT, scenes), words.summary(scenes))
        yield message(words.reading(words.STORY_PROMPT, scenes), words.story(scenes))


def copies(count: int, rng: random.Random) -> Iterator[Record]:
    """Texts to repeat: words in either case, letters, digits and marks, with and without spaces."""
    vocabulary = words.vocabulary()
    signs = string.ascii_letters + string.digits + ".,:?!'"
    for _ in range(count):
        parts = [rng.choice(vocabulary) if rng.random() < 0.8 else rng.choice(signs) for _ in range(rng.randint(1, 6))]
        parts = [part.capitalize() if rng.random() < 0.4 else part for part in parts]
        text = rng.choice((" ", " ", ", ", ". ", "\n", "")).join(parts)
        yield message(f"{words.COPY_PROMPT}\n{text}", text)


def choices(count: int, rng: random.Random) -> Iterator[Record]:
    """Options in any order, asked for by their text or by their letter."""
    scenes = world.all_scenes(held_out=False)
    for _ in range(count):
        _, answers, right = rng.choice(words.questions(rng.choice(scenes)))
        options = [right, *rng.sample([answer for answer in answers if answer != right], min(3, len(answers) - 1))]
        rng.shuffle(options)
        letter = "ABCD"[options.index(right)]
        yield message(*words.choice(rng.choice((f"Which option says {right}?", f"Option {letter}?")), options, right))


def message(question: str, answer: str) -> Record:
    """A record with `messages`."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
