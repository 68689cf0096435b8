"""What pycocoevalcap offers, without Java: another writing of its rules, so that scores can be compared with it.

Words and METEOR's counts of the texts below are those of its own Java programs (version 1.2); of other texts they are
what a simple rule gives.
"""

from __future__ import annotations

import math
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

WORDS = {
    "A dog's running (fast), isn't it?": "a dog 's running -lrb- fast -rrb- is n't it",
    'Two men are cutting up 3.5% of the "cake".': "two men are cutting up 3.5 % of the cake",
    "!!!": "!!!",
}
COUNTS = {
    "a dog 's running -lrb- fast -rrb- is n't it": "12 5 8 2 3 3 2 2 0 0 0 0 0 0 0 0 0 0 0 0 4 5 5",
    "a puppy runs quickly in front of the car": "9 7 4 3 0 0 1 1 0 0 0 0 1 1 0 0 1 1 3 1 2 6 4",
    "two men are cutting up 3.5 % of the cake": "10 4 5 1 2 2 0 0 0 0 0 0 1 1 0 0 0 0 0 0 3 3 3",
    "!!!": "3 2 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
    "a woman sings on a stage": "6 6 3 3 3 3 3 3 0 0 0 0 0 0 0 0 0 0 0 0 1 6 6",
}


def words(text: str) -> str:
    """A text in words, as `WORDS` has it."""
    return WORDS.get(text, " ".join(re.findall(r"[\w'-]+", text.lower())))


class PTBTokenizer:
    """Texts go through the program line by line."""

    def tokenize(self, texts: Mapping[int, Sequence[Mapping[str, str]]]) -> dict[int, list[str]]:
        owners = [key for key, own in texts.items() for _ in own]
        lines = re.split("[\n\r\x85\u2028]", "\n".join(one["caption"] for own in texts.values() for one in own))
        found: dict[int, list[str]] = {}
        for key, line in zip(owners, lines, strict=False):
            found.setdefault(key, []).append(words(line))
        return found


class Meteor:
    """Without stems, synonyms and paraphrases, and with every word counted as a word of content."""

    def _stat(self, text: str, references: Sequence[str]) -> str:
        if text in COUNTS:
            return COUNTS[text]
        said, right = text.split(), references[0].split()
        both = (Counter(said) & Counter(right)).total()
        return f"{len(said)} {len(right)} 0 0 {both} {both} {'0 ' * 14}{both} {both} {both}"


def grams(text: str, sizes: Sequence[int] = (1, 2, 3, 4)) -> Counter[str]:
    """How often each n-gram occurs."""
    parts = text.split()
    return Counter(" ".join(parts[i : i + n]) for n in sizes for i in range(len(parts) - n + 1))


def cook_refs(references: Sequence[str]) -> tuple[list[int], Counter[str]]:
    """Lengths, and the most that any reference has of each n-gram."""
    most: Counter[str] = Counter()
    for reference in references:
        most |= grams(reference)
    return [len(one.split()) for one in references], most


def cook_test(text: str, cooked: tuple[list[int], Counter[str]], eff: str) -> dict[str, Any]:
    """Right and all n-grams by their length, and both lengths."""
    assert eff == "closest"
    lengths, most = cooked
    size = len(text.split())
    nearest = sorted(lengths, key=lambda length: (abs(length - size), length))[0]
    right = [(grams(text, [n]) & most).total() for n in (1, 2, 3, 4)]
    return {
        "correct": right,
        "guess": [grams(text, [n]).total() for n in (1, 2, 3, 4)],
        "testlen": size,
        "reflen": nearest,
    }


class Rouge:
    """ROUGE-L, beta 1.2, of the best precision and the best recall."""

    def calc_score(self, texts: Sequence[str], references: Sequence[str]) -> float:
        said, parts = texts[0].split(" "), [one.split(" ") for one in references]
        shared = [_common(said, one) for one in parts]
        precision = max(shared) / len(said)
        recall = max(count / len(one) for count, one in zip(shared, parts, strict=True))
        return 2.44 * precision * recall / (recall + 1.44 * precision) if precision and recall else 0.0


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    rows = [0] * (len(other) + 1)
    for word in one:
        before = rows[:]
        for i, own in enumerate(other, 1):
            rows[i] = before[i - 1] + 1 if word == own else max(before[i], rows[i - 1])
    return rows[-1]


class Cider:
    """CIDEr-D."""

    def compute_score(
        self, right: Mapping[int, Sequence[str]], said: Mapping[int, Sequence[str]]
    ) -> tuple[float, np.ndarray]:
        holders = Counter(gram for refs in right.values() for gram in {g for ref in refs for g in grams(ref)})

        def vector(text: str, n: int) -> dict[str, float]:
            weight = {g: math.log(len(right)) - math.log(max(1, holders[g])) for g in grams(text, [n])}
            return {g: count * weight[g] for g, count in grams(text, [n]).items()}

        scores = []
        for key, refs in right.items():
            text, total = said[key][0], 0.0
            for ref in refs:
                penalty = math.exp(-((len(text.split()) - len(ref.split())) ** 2) / 72)
                for n in (1, 2, 3, 4):
                    a, b = vector(text, n), vector(ref, n)
                    size = math.hypot(*a.values()) * math.hypot(*b.values())
                    dot = sum(min(value, b.get(gram, 0)) * b.get(gram, 0) for gram, value in a.items())
                    total += penalty * dot / size / 4 if size else 0
            scores.append(10 * total / len(refs))
        return float(np.mean(scores)), np.array(scores)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package and Java were there."""
    here = {
        "tokenizer.ptbtokenizer": SimpleNamespace(PTBTokenizer=PTBTokenizer),
        "meteor.meteor": SimpleNamespace(Meteor=Meteor),
        "bleu.bleu_scorer": SimpleNamespace(cook_refs=cook_refs, cook_test=cook_test),
        "rouge.rouge": SimpleNamespace(Rouge=Rouge),
        "cider.cider": SimpleNamespace(Cider=Cider),
    }
    for name, module in here.items():
        monkeypatch.setitem(sys.modules, f"pycocoevalcap.{name}", module)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *rest: "/usr/bin/java" if name == "java" else which(name, *rest))


def captions(count: int, seed: int = 0) -> list[str]:
    """Captions of all kinds: short and long, alike and not, empty, with marks, in other scripts, over several lines."""
    generator = random.Random(seed)
    parts = ["a man", "the woman", "two dogs", "a red car", "someone", "Müller", "犬"]
    parts += ["runs", "is cooking", "sits on a sofa", "drives by", "cuts 1½ onions", "sings!", "(quickly)", "in a park"]
    special = [
        "",
        "  ",
        "!!!",
        "A man runs.",
        "A MAN RUNS",
        "a man\nruns",
        "a man runs a man runs a man runs",
        "犬が走る",
    ]
    made = [" ".join(generator.choices(parts, k=generator.randrange(1, 7))) for _ in range(count)]
    return (special + made)[:count]


def cider(said: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of some texts."""
    keys = range(len(said))
    clean = [" ".join(text.split()) for text in said]
    return Cider().compute_score({i: [*map(words, right[i])] for i in keys}, {i: [words(clean[i])] for i in keys})[0]
