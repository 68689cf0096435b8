"""Scores by pycocoevalcap: equal to the package where it and Java are at hand, else to figures that it gave."""

from __future__ import annotations

import errno
import importlib.util
import random
import shutil
import sys
from collections.abc import Callable

import numpy as np
import pytest

from tests.helpers import coco
from vft.common.errors import UserError
from vft.common.scores import Samples
from vft.metrics import coco_scores, paired_difference, parts_from_json, parts_to_json
from vft.metrics.bootstrap import KINDS

PREDICTIONS = [
    "A dog's running (fast), isn't it?",
    "a puppy runs quickly in front of the car",
    'Two men are cutting up 3.5% of the "cake".',
    "!!!",
    "a woman sings on a stage",
]
REFERENCES = [
    ["a dog is running fast", "The dog runs."],
    ["a dog is running before the automobile", "a young dog runs by a car"],
    ["men slice a cake", "two people cut the cake into pieces"],
    ["nothing happens"],
    ["A woman sings on a stage!", "someone is singing"],
]
# By pycocoevalcap 1.2 with Java 17, on the texts above.
EXPECTED = {
    "cider_coco": 1.345097148250845,
    "cider_coco_grouped": (0.31965796028657 + 1.9388079262202735) / 2,
    "bleu4_coco": 21.90631221387876,
    "rouge_l_coco": 0.4687587043736398,
    "meteor": 0.3125300679329093,
}
METEOR_OF_EACH = [0.3796010932296159, 0.1920873876696008, 0.2921739130434783, 0.0, 1.0]
GROUPS = ["x", "x", "y", "y", "y"]

has_package = importlib.util.find_spec("pycocoevalcap") is not None and shutil.which("java") is not None


def test_figures_that_the_package_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    coco.install(monkeypatch)
    found = coco_scores(PREDICTIONS, REFERENCES, groups=GROUPS)
    assert {name: score.value for name, score in found.items()} == pytest.approx(EXPECTED, abs=1e-12)
    assert {score.how_cut for score in found.values()} == {" (PTB)"}
    for score in found.values():
        assert score.low < score.value < score.high
    table = found["meteor"].parts.table
    assert KINDS["meteor"](table, np.eye(5)) == pytest.approx(METEOR_OF_EACH, abs=1e-12)


def test_a_break_within_a_text_moves_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    coco.install(monkeypatch)
    whole = coco_scores(["a dog runs", "a cat sits", ""], [["a dog runs"], ["the cat sits"], ["x"]])
    for mark in ("\n", "\r", "\u2028", " \x85 "):
        broken = coco_scores([f"a{mark}dog runs{mark}", "a cat sits", mark], [["a dog runs"], ["the cat sits"], ["x"]])
        assert broken == whole


def test_scores_that_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIDEr of one sample is always 0; nothing said is worth nothing."""
    coco.install(monkeypatch)
    assert coco_scores(["a dog"], [["a dog"]]).keys() == {"bleu4_coco", "rouge_l_coco", "meteor"}
    nothing = coco_scores(["", ""], [["a dog"], ["a cat"]])
    assert {score.value for score in nothing.values()} == {0.0}
    with pytest.raises(ValueError, match="2 predictions, but references for 1"):
        coco_scores(["a", "b"], [["a"]])


def test_two_models_on_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLEU and METEOR are no means over samples: differences come from their counts, also those kept in a file."""
    coco.install(monkeypatch)
    samples = Samples(tuple("abcde"), (0, 0, 1, 2, 3))
    before = coco_scores(PREDICTIONS, REFERENCES, samples)
    after = coco_scores([refs[0] for refs in REFERENCES], REFERENCES, samples)
    kept = parts_from_json(parts_to_json(before))
    for name, score in before.items():
        difference, count = paired_difference(score, after[name])
        assert difference.value == pytest.approx(after[name].value - score.value, abs=1e-9) and count == 5
        assert (kept[name].table == score.parts.table).all()


def unwritable(*_: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system", "tmp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda patch: patch.setitem(sys.modules, "pycocoevalcap.tokenizer.ptbtokenizer", None), r"vft\[papers\]"),
        (lambda patch: patch.setattr(shutil, "which", lambda *_: None), "needs Java, which is not there: apt-get"),
        (lambda patch: patch.setattr(coco.PTBTokenizer, "tokenize", lambda *_: {}), "gave no words: does `java"),
        (
            lambda patch: patch.setattr(coco.PTBTokenizer, "tokenize", unwritable),
            r"fails \(\[Errno 30\] Read-only.*may write",
        ),
        (lambda patch: patch.setattr(coco.Meteor, "_stat", lambda *_: ""), "METEOR gave no counts: does `java"),
    ],
)
def test_what_is_missing(
    change: Callable[[pytest.MonkeyPatch], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco.install(monkeypatch)
    change(monkeypatch)
    with pytest.raises(UserError, match=message):
        coco_scores(PREDICTIONS, REFERENCES)


@pytest.mark.slow
@pytest.mark.skipif(not has_package, reason="needs pycocoevalcap and Java")
def test_equal_to_the_package() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    generator = random.Random(0)
    known = "a the dog puppy runs running quickly fast in front of before car automobile person is eating meal food"
    known = f"{known} , . don't it's (red) big large child kid slices cuts up \"quoted\" etc. U.S. 3.5% café 犬が走る !"
    texts = [" ".join(generator.choices(known.split(), k=generator.randrange(14))) for _ in range(200)]
    said, right = texts[:40], [texts[40 + 4 * i :][: 1 + i % 4] for i in range(40)]
    found = coco_scores([*PREDICTIONS, *said], [*REFERENCES, *right])
    tokenize = PTBTokenizer().tokenize
    rights = tokenize({i: [{"caption": text} for text in own] for i, own in enumerate([*REFERENCES, *right])})
    saids = tokenize({i: [{"caption": text}] for i, text in enumerate([*PREDICTIONS, *said])})
    expected = {
        "cider_coco": Cider().compute_score(rights, saids)[0],
        "bleu4_coco": 100 * Bleu(4).compute_score(rights, saids, verbose=0)[0][3],
        "rouge_l_coco": Rouge().compute_score(rights, saids)[0],
        "meteor": Meteor().compute_score(rights, saids)[0],
    }
    assert {name: score.value for name, score in found.items()} == pytest.approx(expected, abs=1e-9)
    own = coco_scores(PREDICTIONS, REFERENCES, groups=GROUPS)
    assert {name: score.value for name, score in own.items()} == pytest.approx(EXPECTED, abs=1e-9)
