"""MSVD as the data set of the hub has it: a list of clips with all captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import coco
from tests.helpers.benchmarks import answered, asked, read, write_empty, write_json
from vft import benchmarks

MSVD = benchmarks.find("msvd")
NAMES = [f"-_hbPLsZvvo_{i}_{i + 9}" for i in range(32)]


def rows() -> list[dict[str, Any]]:
    """Different numbers of captions; some blank, some alike."""
    texts = coco.captions(200, seed=2)[8:]
    return [
        {"video_id": name, "video": f"{name}.avi", "caption": [*texts[5 * i : 5 * i + 1 + i % 5], "a man runs", " "]}
        for i, name in enumerate(NAMES)
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_json(tmp_path / "MSVD" / "msvd_test.json", rows())
    write_empty(*(tmp_path / "MSVD" / "raw_videos" / f"{name}.avi" for name in NAMES))
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(MSVD, root)
    assert not bad and [one.id for one in samples] == NAMES
    video, text = samples[3].turns[0].parts
    assert text == "Describe the video in one concise sentence."
    assert video.path.parts[-3:] == ("MSVD", "raw_videos", f"{NAMES[3]}.avi")
    assert [len(one.references) for one in asked(MSVD, samples)[:6]] == [2, 3, 4, 5, 6, 2]


def test_scores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco.install(monkeypatch)
    samples, _ = read(MSVD, root)
    texts = coco.captions(32)
    scores = MSVD.score(answered(MSVD, samples, texts))
    right = [[text for text in row["caption"] if text.strip()] for row in rows()]
    assert scores["cider_coco"].value == pytest.approx(coco.cider(texts, right), abs=1e-9)
    assert scores["cider_coco"].tokenization == "PTB" and scores["cider_d"].tokenization != "PTB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_id": 7}, "video_id: 7 is of type int"),
        ({"caption": "a man runs"}, "caption: 'a man runs' must be a list of at least 1 texts"),
        ({"caption": ["", " "]}, "caption: all of its texts are empty"),
        ({"caption": ["a man", None]}, "caption[1]: null; it must be a text"),
        ({"video_id": "../../../../x"}, "out of data.root"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    first, *others = rows()
    write_json(root / "MSVD" / "msvd_test.json", [{**first, **change}, *others])
    samples, bad = read(MSVD, root)
    assert len(samples) == 31 and len(bad) == 1
    assert bad[0].startswith("MSVD/msvd_test.json:1:") and message in bad[0]
