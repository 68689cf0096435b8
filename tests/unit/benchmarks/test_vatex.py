"""VATEX as lmms-eval's data set has it, and the authors' file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import coco
from tests.helpers.benchmarks import answered, asked, read, write_empty, write_json, write_parquet
from vft import benchmarks

VATEX = benchmarks.find("vatex")
NAMES = [f"G9zN5TTuGO4_{i:06d}_{i + 10:06d}" for i in range(33)]
PROMPT = """Provide a brief single-sentence caption for the last video below. Do not give any reasoning, just the \
caption. You must follow the captioning style of the preceding videos. Do not start your response with "Output:", just \
provide the caption.
[video1] output: A man picks up a can of shoe paste, a towel, and brush from a table.
[video2] output: A person places the frying pan on the stove and then another person flips over the food that is in it.
[video3] output: A woman describes and demonstrates how to create a colorful cross stitch design.
[video4] output: A little girl uses the grass in her yard as well as a blue mat to do flips.
"""


def rows() -> list[dict[str, Any]]:
    texts = coco.captions(338, seed=3)[8:]
    return [{"videoID": name, "enCap": texts[10 * i : 10 * i + 10]} for i, name in enumerate(NAMES)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "VATEX" / "vatex_test" / "test-00000-of-00001.parquet", rows())
    suffixes = ["mp4", "MP4", "mkv"]
    write_empty(*(tmp_path / "VATEX" / "videos" / f"{name}.{suffixes[i % 3]}" for i, name in enumerate(NAMES)))
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(VATEX, root)
    assert not bad and [one.id for one in samples] == NAMES
    for i, one in enumerate(samples[:3]):
        video, text = one.turns[0].parts
        assert text == PROMPT and video.path.exists() and video.path.stem == NAMES[i]
    assert {len(one.references) for one in asked(VATEX, samples)} == {10}
    write_json(root / "VATEX" / "vatex_public_test_english_v1.1.json", rows())
    authors, _ = read(VATEX, root, path="VATEX/vatex_public_test_english_v1.1.json")
    assert [one.turns for one in authors] == [one.turns for one in samples]


def test_scores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco.install(monkeypatch)
    samples, _ = read(VATEX, root)
    texts = coco.captions(33)
    scores = VATEX.score(answered(VATEX, samples, texts))
    assert scores["cider_coco"].value == pytest.approx(coco.cider(texts, [row["enCap"] for row in rows()]), abs=1e-9)
    assert "cider_coco_grouped" not in scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"videoID": None}, "videoID: null; it must be a text"),
        ({"enCap": None}, "enCap: None must be a list of at least 1 texts"),
        ({"enCap": [""]}, "enCap: all of its texts are empty"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    first, *others = rows()
    write_parquet(root / "VATEX" / "vatex_test" / "test-00000-of-00001.parquet", [{**first, **change}, *others])
    samples, bad = read(VATEX, root)
    assert len(samples) == 32 and len(bad) == 1
    assert bad[0].startswith("VATEX/vatex_test/test-00000-of-00001.parquet:1:") and message in bad[0]
