"""MSR-VTT in the authors' file: videos and captions in two lists."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import coco
from tests.helpers.benchmarks import answered, asked, read, write_empty, write_json
from vft import benchmarks
from vft.common.errors import UserError
from vft.metrics import cider_d_scores

MSRVTT = benchmarks.find("msrvtt")
NUMBERS = range(7010, 7044)


def content() -> dict[str, Any]:
    """34 videos of the test and one of training; captions in no order, one said twice, one blank."""
    videos = [
        {"category": i % 20, "url": "https://youtu.be/x", "video_id": f"video{i}", "start time": 1.5, "end time": 9.0,
         "split": "test", "id": i} for i in NUMBERS
    ]  # fmt: skip
    sentences = [
        {"caption": text, "video_id": f"video{7010 + i % 34}", "sen_id": i}
        for i, text in enumerate(coco.captions(100, seed=1)[8:])
    ]
    sentences += [{"caption": "a man runs", "video_id": "video7010", "sen_id": i} for i in (200, 201)]
    sentences += [{"caption": " ", "video_id": "video7011", "sen_id": 202}]
    videos.insert(3, {"video_id": "video0", "split": "train", "id": 0})
    return {"info": {"year": "2016"}, "videos": videos, "sentences": sentences}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_json(tmp_path / "MSR-VTT" / "test_videodatainfo.json", content())
    write_empty(*(tmp_path / "MSR-VTT" / "TestVideo" / f"video{i}.mp4" for i in NUMBERS if i != 7012))
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(MSRVTT, root)
    assert not bad and [one.id for one in samples] == [f"video{i}" for i in NUMBERS]
    video, text = samples[0].turns[0].parts
    assert text == "Describe the video in one concise sentence."
    assert video.path.parts[-3:] == ("MSR-VTT", "TestVideo", "video7010.mp4") and video.options.video_start is None
    questions = asked(MSRVTT, samples)
    assert questions[0].references[-2:] == ("a man runs", "a man runs") and len(questions[0].references) == 5
    assert "" not in map(str.strip, questions[1].references)
    assert not samples[2].turns[0].parts[0].path.exists()  # counted as unreadable


def test_scores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco.install(monkeypatch)
    samples, _ = read(MSRVTT, root)
    texts = coco.captions(34)
    scores = MSRVTT.score(answered(MSRVTT, samples, texts))
    assert list(scores) == ["cider_coco", "bleu4_coco", "rouge_l_coco", "meteor", "cider_d", "bleu4", "rouge_l"]
    right = [one.references for one in asked(MSRVTT, samples)]
    assert scores["cider_coco"].value == pytest.approx(coco.cider(texts, right), abs=1e-9)
    assert 0 < scores["cider_coco"].value < 10
    assert scores["cider_d"].value == pytest.approx(sum(cider_d_scores(texts, right)) / 34)


def test_without_java(root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The figures that need it are left out, and one line says so, however often something is scored."""
    coco.install(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    benchmarks._warn.cache_clear()
    samples, _ = read(MSRVTT, root)
    answers = answered(MSRVTT, samples, coco.captions(34))
    with caplog.at_level(logging.WARNING):
        scores = MSRVTT.score(answers)
        assert MSRVTT.score(answers) == scores
    assert list(scores) == ["cider_d", "bleu4", "rouge_l"]
    assert MSRVTT.main_metric == "cider_coco" and MSRVTT.fallback_metric == "cider_d"
    (message,) = caplog.messages
    assert re.search("needs Java.*: apt-get install .*; without it cider_coco is left out, and cider_d is", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_id": "video9"}, ":3: captions: None must be a list of at least 1 texts"),
        ({"video_id": None}, ":3: video_id: null; it must be a text"),
        ("video7012", ":3: 'video7012' is no JSON object"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any] | str, message: str) -> None:
    changed = content()
    changed["videos"][2] = {**changed["videos"][2], **change} if isinstance(change, dict) else change
    changed["sentences"].append("no object")
    write_json(root / "MSR-VTT" / "test_videodatainfo.json", changed)
    samples, bad = read(MSRVTT, root)
    assert len(samples) == 33 and len(bad) == 1 and f"test_videodatainfo.json{message}" in bad[0]


@pytest.mark.parametrize("wrong", [[{"video_id": "video1"}], {"videos": []}, {"videos": {}, "sentences": []}, []])
def test_another_file(root: Path, wrong: Any) -> None:
    write_json(root / "MSR-VTT" / "test_videodatainfo.json", wrong)
    with pytest.raises(UserError, match=r"test_videodatainfo.json: needs an object with the lists `videos` and"):
        read(MSRVTT, root)
