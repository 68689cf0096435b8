"""YouCook2 as lmms-eval's data set has it: CIDEr within each video, beside that of all steps."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.helpers import coco
from tests.helpers.benchmarks import answered, asked, read, write_empty, write_parquet
from vft import benchmarks

YOUCOOK2 = benchmarks.find("youcook2")
VIDEOS = ["zqTXQ-YqrgQ"] * 12 + ["GLd3aX16zBg"] * 20 + ["xHr8X2Wpmno"] * 2 + ["alone"]


def rows() -> list[dict[str, Any]]:
    return [
        {"id": f"{name}_{i}", "video_url": "https://youtu.be/x", "recipe_type": "113", "segment": [90.0, 102.0],
         "sentence": text, "video_path": f"val/{name}_{i}.mp4", "youtube_id": name}
        for i, (name, text) in enumerate(zip(VIDEOS, coco.captions(43, seed=4)[8:], strict=True))
    ]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "YouCook2" / "data" / "val-00000-of-00001.parquet", rows())
    write_parquet(tmp_path / "YouCook2" / "data" / "test-00000-of-00001.parquet", rows()[:1])
    write_empty(*(tmp_path / "YouCook2" / "YouCookIIVideos" / row["video_path"] for row in rows()[1:]))
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(YOUCOOK2, root)
    assert not bad and len(samples) == 35
    video, text = samples[1].turns[0].parts
    assert text == "Provide a one-sentence caption for the provided video."
    assert video.path.exists() and video.path.parts[-3:] == ("YouCookIIVideos", "val", "zqTXQ-YqrgQ_1.mp4")
    assert video.options.video_start is None  # it is cut already
    assert all(ref.isascii() for one in asked(YOUCOOK2, samples) for ref in one.references)


def test_scores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lmms-eval: what is no ASCII becomes a space, and a video with one step counts 0."""
    coco.install(monkeypatch)
    samples, _ = read(YOUCOOK2, root)
    texts = coco.captions(35)
    scores = YOUCOOK2.score(answered(YOUCOOK2, samples, texts))
    said, right = (
        ["".join(letter if ord(letter) < 128 else " " for letter in text) for text in own]
        for own in (texts, [row["sentence"] for row in rows()])
    )
    by_video = []
    for name in dict.fromkeys(VIDEOS):
        own = [i for i, video in enumerate(VIDEOS) if video == name]
        by_video.append(coco.cider([said[i] for i in own], [[right[i]] for i in own]))
    assert by_video[-1] == 0 < max(by_video)
    assert scores["cider_coco_grouped"].value == pytest.approx(fmean(by_video), abs=1e-9)
    assert scores["cider_coco"].value == pytest.approx(coco.cider(said, [[text] for text in right]), abs=1e-9)
    assert YOUCOOK2.main_metric == "cider_coco_grouped"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_path": None}, "video_path: null; it must be a text"),
        ({"youtube_id": None}, "youtube_id: null; it must be a text"),
        ({"sentence": ""}, "sentence: all of its texts are empty"),
        ({"sentence": None}, "sentence[0]: null; it must be a text"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    first, *others = rows()
    write_parquet(root / "YouCook2" / "data" / "val-00000-of-00001.parquet", [{**first, **change}, *others])
    samples, bad = read(YOUCOOK2, root)
    assert len(samples) == 34 and len(bad) == 1
    assert bad[0].startswith("YouCook2/data/val-00000-of-00001.parquet:1:") and message in bad[0]
