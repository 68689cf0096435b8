"""NExT-QA's open answers in their published layout; their score beside another writing of the authors' rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import answered, asked, read, write_empty, write_parquet
from tests.helpers.taxonomy import Meaning, Taxonomy
from vft import benchmarks
from vft.common.errors import UserError
from vft.metrics import wups

OPEN = benchmarks.find("nextqa_oe")
TEXTS = [
    "dog", "The dogs", "cat", "a car", "two", "yes", "no", "sofa", "run and walk", "walk", "", "zebra", "the",
    "dogs running", "3", "3 3", "a dog on the sofa", "cats", "bird", "animal", "sofa car", "walk run", "Yes.",
    "he walks", "cars",
    "dog cat", "because the dogs were running", "zebra dog", "entity", "act", "no dog", "move", "on sofas",
]  # fmt: skip
ANSWERS = ["dog", "cats", "on the sofa", "walks", "car", "3", "yes", "the dogs were running"]


@pytest.fixture(autouse=True)
def taxonomy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from Taxonomy.in_place_of_nltk(monkeypatch)


def row(i: int, **changes: Any) -> dict[str, Any]:
    kinds = ["CW", "CH", "TN", "TP", "TC", "DC", "DB", "DL", "DO"]
    second = [None, "", "animal"][i % 3]
    about = {"video": str(8968804598 + i % 2), "frame_count": 9, "width": 6, "height": 4}
    asked = {"question": f"what is it {i}", "qid": i, "type": kinds[i % 9]}
    return {**about, **asked, "answer": ANSWERS[i % 8], "additional_ref_answer": second, **changes}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "NExTQA" / "OE" / "test-00000-of-00001.parquet", [row(i) for i in range(len(TEXTS))])
    write_empty(tmp_path / "NExTQA" / "NExTVideo" / "8968804598.mp4")
    return tmp_path


def authors_score(text: str, right: list[str], kind: str, threshold: float) -> float:
    """Of base forms: equal words for DB and DC, else the lower of both directions, with the best answer."""

    def alike(one: str, other: str) -> float:
        if one == other:
            return 1.0
        known = [Taxonomy.corpus.wordnet.synsets(word) for word in (one, other)]
        score = (known[0][0].wup_similarity(known[1][0]) if all(known) else None) or 0.0
        return score if score >= threshold else score / 10

    def product(words: list[str], others: list[str]) -> float:
        found = [best for best in (max((alike(w, o) for o in others), default=0) for w in words) if best]
        result = 1.0
        for best in found:
            result *= best
        return result if found else 0.0

    words = wups.content_words(text).split()
    all_right = [wups.content_words(one).split() for one in right]
    if kind in ("DC", "DB"):
        return float(words in all_right)
    return max(min(product(words, one), product(one, words)) for one in all_right)


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(OPEN, root)
    assert not bad and len(samples) == len(TEXTS)
    video, text = samples[0].turns[0].parts
    assert text == "what is it 0\nAnswer a question using a short phrase or sentence."
    assert video.path.name == "8968804598.mp4" and samples[0].id == "8968804598-0"
    questions = asked(OPEN, samples)
    assert questions[1].references == ("cats",) and questions[2].references == ("on the sofa", "animal")
    assert samples[3].fields["groups"] == {"kind": "TN", "type": "T"}


def test_scores(root: Path) -> None:
    samples, _ = read(OPEN, root)
    scores = OPEN.score(answered(OPEN, samples, TEXTS))
    assert next(iter(scores)) == OPEN.main_metric == "wups_0.0"
    for threshold in (0.0, 0.9):
        own = [
            authors_score(text, list(one.references), sample.fields["groups"]["kind"], threshold)
            for text, one, sample in zip(TEXTS, asked(OPEN, samples), samples, strict=True)
        ]
        assert len(set(own)) > 5
        assert scores[f"wups_{threshold}"].value == pytest.approx(sum(own) / len(own), abs=1e-12)
        for kind in "CTD":
            of_kind = [s for s, one in zip(own, samples, strict=True) if one.fields["groups"]["type"] == kind]
            assert scores[f"wups_{threshold}/type/{kind}"].value == pytest.approx(sum(of_kind) / len(of_kind))
    assert scores["wups_0.9"].value < scores["wups_0.0"].value


def test_the_taxonomy_is_like_wordnet() -> None:
    assert Meaning("dog").wup_similarity(Meaning("cat")) == pytest.approx(2 * 2 / 6)
    assert Meaning("dog").wup_similarity(Meaning("run")) is None


def test_missing_data_are_told_before_anything_is_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("WUPS needs data")

    monkeypatch.setattr(wups, "nltk", missing)
    with pytest.raises(UserError, match="WUPS needs data"):
        read(OPEN, root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, "answer: is empty"),
        ({"answer": None}, "answer: null; it must be a text"),
        ({"type": "CX"}, "type: 'CX' is none of TP, CW"),
        ({"question": None}, "question: null; it must be a text"),
        ({"video": ""}, "video: is empty"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    write_parquet(root / "NExTQA" / "OE" / "test-00000-of-00001.parquet", [row(0), row(1, **change)])
    samples, bad = read(OPEN, root)
    assert len(samples) == 1 and len(bad) == 1
    assert bad[0].startswith(f"NExTQA/OE/test-00000-of-00001.parquet:2: {message}")
