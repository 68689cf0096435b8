"""Samples on a page, from a document made by hand: what is marked, what is said about it, and that it stands alone."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch

from vft.common.types import Conversation, Document
from vft.reporting.page import render
from vft.reporting.samples import MediumView, SampleView, evenly, sample_shown

WORDS = ["<|s|>", "seen", "vision", "What?", "</p><script>", "Good.", "Bad."]
"""The text of each token id."""


class Tokenizer:
    """As much of one as a page uses."""

    def __init__(self) -> None:
        self.added_tokens_decoder: dict[int, Any] = {}
        self.all_special_tokens = WORDS[:1]

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """As transformers."""
        return [WORDS.index(token) for token in tokens]

    def decode(self, ids: list[int], **_: bool) -> str:
        """As transformers."""
        return " ".join(WORDS[one] for one in ids)


def sample(rejected: tuple[bool, ...] = (False, False)) -> SampleView:
    """Three tokens of prefix, one of vision in it; two suffixes of three tokens whose last is supervised."""
    ids = torch.tensor([0, 2, 2, 3, 0, 5, 3, 4, 6])
    labels = torch.full_like(ids, -100)
    labels[[5, 8]] = ids[[5, 8]]
    ids_of = ("one",) if any(rejected) else ("one", "two")
    document = Document(
        ids_of, ids, labels, ids.expand(3, -1), 3, (3, 3), (), ids == 2, rejected, (None,) * len(ids_of),
        tuple(Conversation(name, (), "a.json:1", source="clips & co") for name in ids_of),
    )  # fmt: skip
    medium = MediumView("video", "a.mp4", [("data:image/jpeg;base64,", "0.00 s")], ["frames: 4 of 8 kept"])
    encoder: Any = SimpleNamespace(tokenizer=Tokenizer())
    return sample_shown(document, [medium], encoder)


def marked(html: str, kind: str) -> list[str]:
    """The texts of this kind, outside of the legend and the tokens."""
    shown = re.sub(r'<dl class="key">.*?</dl>|<details>.*?</details>', "", html, flags=re.DOTALL)
    return re.findall(rf'<span class="mark {kind}">([^<]*)</span>', shown)


def test_a_shared_prefix_and_its_suffixes() -> None:
    view = sample()
    assert [(part.name, part.num_tokens) for part in view.parts] == [
        ("shared prefix", 3),
        ("suffix 1: one", 3),
        ("suffix 2: two", 3),
    ]
    assert (view.num_tokens, view.num_vision, view.num_supervised) == (9, 2, 2) and view.is_shortened
    page = render("samples.html", samples=[view])
    assert marked(page, "supervised") == ["Good.", "Bad."] and marked(page, "vision") == ["2 vision tokens"]
    assert marked(page, "control") == ["&lt;|s|&gt;"] * 2 and not marked(page, "rejected")
    # Nothing of a record is markup, and nothing is fetched; the legend tells what the marks mean.
    assert "<script" not in page and "What? &lt;/p&gt;&lt;script&gt;" in page and not re.search(r"https?:|url\(", page)
    assert 'data-source="[&#34;clips \\u0026 co&#34;]" data-kinds="video"' in page and 'data-shortened="1"' in page
    assert "prefers-color-scheme: dark" in page and "frames: 4 of 8 kept" in page
    key = page[page.index('<dl class="key">') : page.index("</dl>")]
    explained = [re.sub(r"<[^>]*>", "", one) for one in re.findall(r"<dt>(.*?)</dt>", key)]
    assert explained == ["supervised", "vision tokens", "grey", "shared prefix", "suffix", "shortened"]
    assert "rejected" not in key


def test_a_pair_of_answers() -> None:
    view = sample(rejected=(False, True))
    assert [part.name for part in view.parts[1:]] == ["suffix 1, the chosen answer", "suffix 2, the rejected answer"]
    page = render("samples.html", samples=[view])
    assert marked(page, "supervised") == ["Good."] and marked(page, "rejected") == ["Bad."]
    assert "worse answer of a pair" in page


def test_evenly() -> None:
    assert evenly(range(9), 3) == [0, 4, 8] and evenly(range(9), 1) == [0] and evenly("ab", 3) == ["a", "b"]
    assert evenly(range(9), 0) == []
