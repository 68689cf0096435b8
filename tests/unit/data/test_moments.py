"""Moments and dense captions in the layouts of their publishers, with what is wrong in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import error_of, read_source, sample_of, write
from vft.common.types import MediaRef
from vft.data.records.record import Records

HIGHLIGHT = {
    "qid": 8737,
    "query": "A family is playing basketball.",
    "duration": 126,
    "vid": "bP5KfdFJzC4_660.0_810.0",
    "relevant_windows": [[0, 16], [40, 60]],
    "relevant_clip_ids": [0, 1],
    "saliency_scores": [[4, 1, 1], [4, 2, 1]],
}
DIDEMO = {
    "annotation_id": 49152,
    "num_segments": 6,
    "description": "the man  briefly\nbends",
    "dl_link": "https://example.org",
    "times": [[1, 1], [1, 1], [0, 0], [4, 5]],
    "video": "35034348999@N01_dc1a90b8ef.mov",
}
CAPTIONS = {"duration": 55.15, "timestamps": [[13.79, 54.32], [0.28, 55.15]], "sentences": ["They weave.", " Hands "]}


def read(root: Path, name: str, content: Any, format: str = "moments", **settings: Any) -> Records:
    write(root / name, content)
    return read_source(format, name, root, **settings)


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def file_of(records: Records) -> str:
    """The name of the first sample's video."""
    ref = sample_of(records).turns[0].parts[0]
    assert isinstance(ref, MediaRef) and isinstance(ref.path, Path)
    return str(ref.path)


def test_charades_sta(tmp_path: Path) -> None:
    """Lines of a text; a sentence may hold anything, numbers too."""
    write(tmp_path / "Charades_v1_480/3MSZA.mp4")
    text = "3MSZA 24.3 30.4##person turn a light on.\n\n3MSZA 0.0 6.9##a 1 - 2 ## 3\n"
    samples, bad = records = read(tmp_path, "charades_sta_test.txt", text)
    assert not bad and file_of(records).endswith("/Charades_v1_480/3MSZA.mp4")
    assert [sample.id for sample in samples] == ["3MSZA", "3MSZA#2"]
    assert [sample.origin for sample in samples] == ["charades_sta_test.txt:1", "charades_sta_test.txt:3"]
    assert samples[0].turns[0].text == samples[0].fields["query"] == "person turn a light on."
    assert samples[0].turns[1].text == "The given query happens in 24.3 - 30.4 seconds."
    assert samples[0].fields["spans"] == (((24.3, 30.4),),) and samples[1].fields["query"] == "a 1 - 2 ## 3"


def test_qvhighlights(tmp_path: Path) -> None:
    write(tmp_path / "videos/bP5KfdFJzC4_660.0_810.0.mp4")
    records = read(tmp_path, "val.jsonl", lines(HIGHLIGHT))
    sample = sample_of(records)
    assert (sample.id, sample.unread) == ("8737", ()) and file_of(records).endswith("_810.0.mp4")
    assert sample.fields["spans"] == (((0.0, 16.0), (40.0, 60.0)),)
    assert sample.turns[1].text == "The given query happens in 0.0 - 16.0, 40.0 - 60.0 seconds."


@pytest.mark.parametrize("file", ["35034348999@N01_dc1a90b8ef.mov", "35034348999@N01_dc1a90b8ef.mp4"])
def test_didemo(tmp_path: Path, file: str) -> None:
    """Chunks of five seconds by four annotators, of whom most are learnt; some copies of the videos were converted."""
    write(tmp_path / "clips" / file)
    records = read(tmp_path, "val_data.json", [DIDEMO], media="clips")
    sample = sample_of(records)
    assert file_of(records).endswith(file) and (sample.id, sample.unread) == ("49152", ())
    assert sample.fields["spans"] == (((5.0, 10.0),), ((5.0, 10.0),), ((0.0, 5.0),), ((20.0, 30.0),))
    assert sample.turns[1].text == "The given query happens in 5.0 - 10.0 seconds."
    assert sample.fields["query"] == "the man briefly bends"


@pytest.mark.parametrize("file", ["v_QOlSCBRmfWY.mp4", "QOlSCBRmfWY.mkv"])
def test_activitynet_captions(tmp_path: Path, file: str) -> None:
    """A question for each sentence, or one for the video; names with and without `v_`."""
    write(tmp_path / "videos" / file)
    content = {"v_QOlSCBRmfWY": CAPTIONS, "v_none": {**CAPTIONS, "sentences": ["One."]}}
    samples, (error,) = read(tmp_path, "train.json", content)
    assert str(error) == "train.json:v_none: timestamps: 2 beside 1 sentences; give one span for each"
    assert [sample.fields["query"] for sample in samples] == ["Hands", "They weave."]
    assert samples[1].fields["spans"] == (((13.79, 54.32),),)
    content.pop("v_none")
    samples, _ = records = read(tmp_path, "train.json", content, "dense_captions")
    assert file_of(records).endswith(file) and len(samples) == 1
    assert samples[0].fields["segments"] == ((0.28, 55.15, "Hands"), (13.79, 54.32, "They weave."))
    assert samples[0].turns[0].text == ""


def test_records_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "a/b.webm")
    record = {"id": "x", "video": "a/b.webm", "query": "It ends.", "spans": [[1, 2.5]], "note": 1}
    sample = sample_of(read(tmp_path, "own.jsonl", lines(record)))
    assert (sample.id, sample.unread, sample.fields["spans"]) == ("x", ("note",), (((1.0, 2.5),),))
    told = {"video": "a/b", "timestamps": [[0, 1]], "sentences": ["It ends."]}
    assert sample_of(read(tmp_path, "own.json", [told], "dense_captions")).fields["segments"] == (
        (0.0, 1.0, "It ends."),
    )


@pytest.mark.parametrize(
    ("record", "field", "words"),
    [
        (
            {key: value for key, value in HIGHLIGHT.items() if key != "relevant_windows"},
            "relevant_windows",
            "to test on",
        ),
        ({**HIGHLIGHT, "relevant_windows": []}, "relevant_windows", "at least one"),
        ({**HIGHLIGHT, "relevant_windows": [[16, 0]]}, "relevant_windows[0]", "not after the start"),
        ({**HIGHLIGHT, "relevant_windows": [[0, 2], [3, "4"]]}, "relevant_windows[1]", "two numbers"),
        ({**HIGHLIGHT, "query": " "}, "query", "say what happens"),
        ({**HIGHLIGHT, "vid": 3}, "vid", "must be a text"),
        ({**DIDEMO, "times": [[1, 0]]}, "times[0]", "not after the start"),
        ({**DIDEMO, "times": [[1, -1]]}, "times[0]", "from 0"),
        ({**DIDEMO, "description": None}, "description", "must be a text"),
        ({"video": "x.mp4", "query": "a"}, "spans", "is missing"),
        ({"video": "x.mp4", "query": "a", "spans": [[True, 2]]}, "spans[0]", "two numbers"),
        ({"video": "x", **CAPTIONS, "timestamps": [[1, 2], [2, 1]]}, "timestamps[1]", "not after the start"),
        ({"video": "x", **CAPTIONS, "sentences": ["a", ""]}, "sentences[1]", "say what happens"),
        (["a"], "", "no JSON object"),
    ],
)
def test_bad_records(tmp_path: Path, record: Any, field: str, words: str) -> None:
    error = error_of(read(tmp_path, "bad.jsonl", lines(record)))
    assert (error.origin, error.field) == ("bad.jsonl:1", field) and words in error.message


@pytest.mark.parametrize("line", ["3MSZA 24.3##x", "3MSZA 1 2 x", "3MSZA 1.2.3 4##x", "3MSZA 5 4##x", "3MSZA 1 2##"])
def test_bad_lines(tmp_path: Path, line: str) -> None:
    samples, (error,) = read(tmp_path, "sta.txt", f"{line}\nAMT7R 1 2##fine\n")
    assert len(samples) == 1 and error.origin == "sta.txt:1"
