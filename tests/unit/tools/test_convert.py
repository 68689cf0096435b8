"""Converters to stories: a small file of each set's shape goes through the command and is read."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.clips import make_clip
from tests.helpers.formats import read_story
from vft.common.types import MediaRef, Sample

FOLDER = Path(__file__).parents[3] / "tools" / "convert"


SETS = ("activitynet_captions", "shot2story", "videoxum", "vist")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def option(name: str) -> str:
    return "--media" if name == "vist" else "--videos"


def run(name: str, *arguments: object) -> tuple[int, str, str]:
    """Status, output and errors of the script, run in this process because torch takes seconds to import."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        except SystemExit as error:
            status = int(error.code or 0)
    return status, out.getvalue(), err.getvalue()


def run_in(root: Path, name: str, media: str) -> tuple[int, str, str]:
    """`run` on root / in.json."""
    return run(name, root / "in.json", option(name), media, "--root", root, "--output", root / "set" / "out.jsonl")


def convert(name: str, root: Path, annotations: Any, media: str) -> tuple[list[Sample], str]:
    """What the converter's output reads as, and what it printed."""
    (root / "in.json").write_text(json.dumps(annotations), encoding="utf-8")
    status, printed, errors = run_in(root, name, media)
    assert status == 0, errors
    samples, bad = read_story(root / "set" / "out.jsonl", root)
    assert not bad
    return samples, printed


def names(sample: Sample, root: Path) -> list[str]:
    """Paths of the media relative to the root."""
    refs = [part for part in sample.turns[0].parts if isinstance(part, MediaRef)]
    assert len(refs) == len(sample.turns[0].parts)
    return [ref.path.relative_to(root.resolve()).as_posix() for ref in refs if isinstance(ref.path, Path)]


VIDEOXUM = {
    "video_id": "v_QOlSCBRmfWY",
    "duration": 82.73,
    "sampled_frames": 83,
    "timestamps": [[0.83, 19.86], [17.37, 60.81], [56.26, 56.26]],
    "tsum": ["A young woman is seen standing in a room.", " She dances around ", " She stops."],
    "vsum": [[[7.01, 12.37]] * 10] * 3,
    "vsum_onehot": [[False] * 83] * 10,
}


def test_videoxum(tmp_path: Path) -> None:
    touch(tmp_path, "activitynet/videos/v_QOlSCBRmfWY.mkv", "activitynet/videos/v_other.mp4")
    annotations = [VIDEOXUM, {**VIDEOXUM, "video_id": "v_gone"}, {**VIDEOXUM, "video_id": "v_other", "tsum": []}]
    samples, printed = convert("videoxum", tmp_path, annotations, "activitynet/videos")
    assert [sample.id for sample in samples] == ["v_QOlSCBRmfWY"]
    assert names(samples[0], tmp_path) == ["activitynet/videos/v_QOlSCBRmfWY.mkv"]
    assert samples[0].turns[1].text == "A young woman is seen standing in a room. She dances around She stops."
    assert samples[0].fields["segments"] == (
        (0.83, 19.86, "A young woman is seen standing in a room."),
        (17.37, 60.81, "She dances around"),
    )
    assert printed.splitlines()[0] == f"wrote 1 records with 2 segments to {tmp_path}/set/out.jsonl"
    assert set(printed.splitlines()[1:]) == {
        "left out 1: video not in activitynet/videos",
        "left out 1: no text",
        "left out 1: segments: empty, or end not after start",
    }


def test_activitynet_captions(tmp_path: Path) -> None:
    touch(tmp_path, "v/v_bXdq2zI1Ms0.webm", "v/train/v_QOlSCBRmfWY.mp4")
    entry = {
        "duration": 73.1,
        "timestamps": [[38.01, 73.1], [10.23, 10.6]],
        "sentences": ["Two men spar.", " One falls."],
    }
    annotations = {"v_bXdq2zI1Ms0": entry, "v_QOlSCBRmfWY": {**entry, "timestamps": [[1, 2]]}, "v_gone": entry}
    samples, printed = convert("activitynet_captions", tmp_path, annotations, "v")
    assert [names(sample, tmp_path) for sample in samples] == [["v/v_bXdq2zI1Ms0.webm"], ["v/train/v_QOlSCBRmfWY.mp4"]]
    assert samples[0].turns[1].text == "Two men spar. One falls."
    assert samples[0].fields["segments"] == ((10.23, 10.6, "One falls."), (38.01, 73.1, "Two men spar."))
    assert samples[1].fields["segments"] == ()
    assert "left out 1: video not in v" in printed and "left out 2: segments: not as many times as texts" in printed


def test_shot2story(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    make_clip(tmp_path / "v" / "MVq8Q9tKdfU.23.mp4", range(20), fps=10)
    touch(tmp_path, "v/broken.1.mp4")
    record = {
        "video": "MVq8Q9tKdfU.23.mp4",
        "image_id": "MVq8Q9tKdfU.23.mp4",
        "id": 0,
        "whole_caption": "A man cooks,\nthen eats.",
        "whole_ASR": " now we stir ",
        "nvid": "MVq8Q9tKdfU.23.mp4",
        "video_names": ["MVq8Q9tKdfU.23_0_7.mp4", "MVq8Q9tKdfU.23_8_19.mp4"],
        "audio_captions": ["", "He says to stir."],
        "captions": ["He cooks.", "He eats."],
        "ASR": ["", "now we stir"],
    }
    broken = {**record, "video": "broken.1.mp4", "whole_ASR": ""}
    samples, printed = convert("shot2story", tmp_path, [record, broken, {**record, "video": "gone.mp4"}], "v")
    assert [names(sample, tmp_path) for sample in samples] == [["v/MVq8Q9tKdfU.23.mp4"], ["v/broken.1.mp4"]]
    assert samples[0].turns[1].text == "A man cooks, then eats."
    assert samples[0].fields["speech"] == "now we stir" and samples[1].fields["speech"] == ""
    assert samples[0].fields["segments"] == ((0.0, 0.8, "He cooks."), (0.8, 2.0, "He eats."))
    assert samples[1].fields["segments"] == ()
    assert "left out 2: segments: no frames in the shot's name, or no frame rate in the video" in printed


def test_vist(tmp_path: Path) -> None:
    photos = [f"{i}00" for i in range(5)]
    touch(tmp_path, *(f"vist/images/train/{photo}.{'png' if photo == '300' else 'jpg'}" for photo in photos))
    words = ["the", "family", "met", "[male]", "here"]

    def story_of(story_id: str, photo_ids: list[str], **more: str) -> list[list[dict[str, Any]]]:
        keys = {"album_id": "7", "setting": "first-2-pick-and-tell", "tier": "story-in-sequence", "story_id": story_id}
        return [
            [{**keys, "photo_flickr_id": photo, "worker_arranged_photo_order": order, "text": f"{word} .", **more}]
            for order, (photo, word) in enumerate(zip(photo_ids, words, strict=True))
        ]

    parts = story_of("30355", photos)
    annotations = [*reversed(parts), *story_of("2", ["gone", *photos[1:]]), *story_of("3", photos, original_text="So.")]
    samples, printed = convert("vist", tmp_path, {"images": [], "annotations": annotations}, "vist/images")
    assert [sample.id for sample in samples] == ["30355", "3"]
    folder = "vist/images/train"
    assert names(samples[0], tmp_path) == [f"{folder}/{p}.{'png' if p == '300' else 'jpg'}" for p in photos]
    assert samples[0].turns[1].text == "the . family . met . [male] . here ."
    assert samples[1].turns[1].text == "So. So. So. So. So."
    assert "left out 1: a photo not in vist/images" in printed


@pytest.mark.parametrize("name", ["activitynet_captions", "videoxum"])
def test_segments_that_are_not_in_the_video(tmp_path: Path, name: str) -> None:
    """Neither by the file, which has 2 s (20 frames of ten a second), nor by the set's own length, if it says one. An
    end that is rounded up is the video's."""
    (tmp_path / "v").mkdir()
    make_clip(tmp_path / "v" / "v_a.mp4", range(20), fps=10)
    times = [[0, 1.5], [1, 2.4], [1, 2.6], [30, 40], [1500, 2000], [1.5, 1], [-1, 1], [1, 1], [0, True], [2, 2.4]]
    texts = [f"Text {i}." for i in range(len(times))]
    for length_s, kept in ((2.0, 2), (None, 2), (1.6, 1), (60, 2)):
        entry: dict[str, Any] = {"timestamps": times, "sentences": texts, "tsum": texts, "video_id": "v_a"}
        entry |= {} if length_s is None else {"duration": length_s}
        annotations: Any = [entry] if name == "videoxum" else {"v_a": entry}
        samples, printed = convert(name, tmp_path, annotations, "v")
        assert samples[0].fields["segments"] == ((0.0, 1.5, "Text 0."), (1.0, 2.0, "Text 1."))[:kept]
        assert f"left out {6 - kept}: segments: not in the video\n" in f"{printed}\n"
        assert "left out 4: segments: empty, or end not after start" in printed


def test_shots_that_are_not_in_the_video(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    make_clip(tmp_path / "v" / "x.1.mp4", range(20), fps=10)
    names = ["x.1_0_9.mp4", "x.1_10_22.mp4", "x.1_30_40.mp4"]
    record = {"video": "x.1.mp4", "whole_caption": "He cooks.", "video_names": names, "captions": ["a", "b", "c"]}
    samples, printed = convert("shot2story", tmp_path, [record], "v")
    assert samples[0].fields["segments"] == ((0.0, 1.0, "a"), (1.0, 2.0, "b"))
    assert "left out 1: segments: not in the video" in printed


def test_several_files_of_one_name(tmp_path: Path) -> None:
    """The one that is as long as the set says; where it can't be told, none."""
    for folder, frames in (("a", 20), ("b", 50)):
        (tmp_path / "v" / folder).mkdir(parents=True)
        make_clip(tmp_path / "v" / folder / "v_a.mp4", range(frames), fps=10)
        make_clip(tmp_path / "v" / folder / "v_c.mp4", range(20), fps=10)
    entry = {"timestamps": [[0, 4]], "sentences": ["One."], "duration": 5.0}
    samples, printed = convert("activitynet_captions", tmp_path, {"v_a": entry, "v_c": entry}, "v")
    assert [names(sample, tmp_path) for sample in samples] == [["v/b/v_a.mp4"]]
    assert samples[0].fields["segments"] == ((0.0, 4.0, "One."),)
    assert "left out 1: video: several of that name in v" in printed


@pytest.mark.parametrize("name", SETS)
def test_help(name: str) -> None:
    status, printed, _ = run(name, "--help")
    assert status == 0 and "--root" in printed and option(name) in printed


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("content", "media", "message"),
    [
        ('[{"a": 1}]', "v", "in.json:1: "),
        ('{"annotations": [[{"text": "x"}]], "v_a": 3}', "v", "in.json:1: "),
        ('{"a": ', "v", "in.json:1: "),
        ("[]", "v", "in.json: nothing to write"),
        ("[]", "empty", "empty: no files of "),
        ("[]", "..", "..: lies outside --root"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, name: str, content: str, media: str, message: str) -> None:
    touch(tmp_path, "v/a.mp4", "v/a.jpg")
    (tmp_path / "in.json").write_text(content)
    status, _, errors = run_in(tmp_path, name, media)
    assert status == 2 and message in errors and errors.count("\n") == 1
    assert errors.startswith("error: ") and not (tmp_path / "set").exists()
