"""Paths in another spelling than the file's, and what systems leave beside a user's files, in every format."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import (
    error_of,
    read_folders,
    read_kinetics,
    read_llava_instruct,
    read_llava_video,
    read_messages,
    read_ssv2,
    read_story,
    read_ucf101,
    write,
)
from tests.helpers.tars import write_tar
from vft.common.errors import UserError
from vft.common.types import MediaRef
from vft.data.records.paths import find_path, is_stray, spellings
from vft.data.records.record import Records
from vft.data.streaming.archives import list_files
from vft.inference.requests import read_requests

NFC, NFD = (unicodedata.normalize(form, "café é.mp4") for form in ("NFC", "NFD"))


def said(video: str, key: str = "video") -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}], key: video}


def media(records: Records, root: Path) -> list[str]:
    """Files of all media, relative to the root."""
    samples, bad = records
    assert not bad, str(bad[0])
    refs = [part for sample in samples for turn in sample.turns for part in turn.parts if isinstance(part, MediaRef)]
    paths = [path for ref in refs for path in (ref.path if isinstance(ref.path, tuple) else (ref.path,))]
    return [path.relative_to(root.resolve()).as_posix() for path in paths]


# -------------------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize("there", [NFC, NFD, "ID.MP4", "sub dir/x.mp4", "a\\b.mp4"])
@pytest.mark.parametrize("format", ["messages", "story", "llava_video", "llava_instruct"])
def test_other_spellings_are_tried(format: str, there: str, tmp_path: Path) -> None:
    write(tmp_path / there)
    for written in {there, NFC if there == NFD else NFD if there == NFC else there.replace("/", "\\"), "ID.mp4"}:
        if written == "ID.mp4" and there != "ID.MP4":
            continue
        listed = write(tmp_path / "list.json", [said(written)])
        if format == "messages":
            found = read_messages(listed, tmp_path)
        elif format == "llava_video":
            found = read_llava_video(listed, tmp_path)
        elif format == "llava_instruct":
            found = read_llava_instruct(write(listed, [said(written, "image")]), tmp_path)
        else:
            found = read_story(write(listed, [{"video": written, "text": "!"}]), tmp_path)
        assert media(found, tmp_path) == [there], written


def test_the_spelling_as_written_goes_first(tmp_path: Path) -> None:
    for name in (NFC, NFD, "b.mp4", "b.MP4", "a\\b.mp4", "a/b.mp4"):
        write(tmp_path / name)
        assert media(read_messages(write(tmp_path / "list.json", [said(name)]), tmp_path), tmp_path) == [name]


def test_spellings_stay_in_the_root(tmp_path: Path) -> None:
    write(tmp_path / "out.mp4")
    listed = write(tmp_path / "root/list.json", [said("..\\out.mp4")])
    assert "out of data.root" in str(error_of(read_messages(listed, tmp_path / "root")))


def test_lists_name_files_with_suffixes_in_upper_case(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    for name in ("v/b_000001_000011.MP4", "20bn-something-something-v2/7.WEBM", "UCF-101/YoYo/v_YoYo_g01_c01.AVI"):
        write(tmp_path / name)
    rows = write(tmp_path / "v.csv", "label,youtube_id,time_start,time_end,split\nyoga,b,1,11,val\n")
    assert media(read_kinetics(rows, tmp_path), tmp_path) == ["v/b_000001_000011.MP4"]
    write(tmp_path / "labels.json", {"Holding something": "0"})
    row = {"id": "7", "label": "holding x", "template": "Holding [something]"}
    assert media(read_ssv2(write(tmp_path / "t.json", [row]), tmp_path), tmp_path) == [
        "20bn-something-something-v2/7.WEBM"
    ]
    write(tmp_path / "classInd.txt", "1 YoYo\n")
    clips = write(tmp_path / "trainlist01.txt", "YoYo/v_YoYo_g01_c01.avi 1\n")
    assert media(read_ucf101(clips, tmp_path), tmp_path) == ["UCF-101/YoYo/v_YoYo_g01_c01.AVI"]


def test_a_sources_own_path_has_spellings(tmp_path: Path) -> None:
    write(tmp_path / NFD)
    write(tmp_path / "a/b.jsonl")
    assert find_path(tmp_path, NFC) == tmp_path / NFD and find_path(tmp_path, "a\\b.jsonl") == tmp_path / "a/b.jsonl"
    assert find_path(tmp_path, "gone") == tmp_path / "gone"
    assert len(list(spellings("plain.mp4"))) == 2


@pytest.mark.parametrize(
    "written", ["D:\\data\\clips\\c.mp4", "d:/data/clips/c.mp4", "\\\\nas\\share\\clips\\c.mp4", "/data/clips/c.mp4"]
)
def test_paths_from_elsewhere_name_the_path_that_works(written: str, tmp_path: Path) -> None:
    listed = write(tmp_path / "list.json", [said(written)])
    message = str(error_of(read_messages(listed, tmp_path)))
    assert message.startswith("list.json:2: video: ") and "relative to data.root" in message
    write(tmp_path / "clips/c.mp4")
    other = tmp_path / "other"
    other.symlink_to(tmp_path)  # a root of another name: what was looked up before is remembered
    message = str(error_of(read_messages(listed, other)))
    mend = message.rpartition("write ")[2].strip("'")
    assert media(read_messages(write(listed, [said(mend)]), other), tmp_path) == ["clips/c.mp4"]


# ----------------------------------------------------------------------------------------------------------- strays


STRAYS = (
    "__MACOSX/._a.mp4",
    "._a.mp4",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "THUMBS.DB",
    ".hidden/a.mp4",
    "@eaDir/a",
)


def test_what_is_stray() -> None:
    assert all(is_stray(name) for name in STRAYS) and is_stray("x/__MACOSX") and is_stray("x/._y/z.mp4")
    assert not any(is_stray(name) for name in ("a.mp4", "x/a.b.mp4", "./a", "../a", "MACOSX/a.mp4", "_a", "thumbs"))


def test_strays_are_no_class_and_no_clip(tmp_path: Path) -> None:
    for name in ("run/a.mp4", "jump/b.mp4", "run/._a.mp4", "run/__MACOSX/._a.mp4", "__MACOSX/run/._a.mp4"):
        write(tmp_path / "set" / name)
    for name in ("run/Thumbs.db", "run/desktop.ini", ".DS_Store", "run/.DS_Store", "._run/x.mp4"):
        write(tmp_path / "set" / name)
    samples, bad = read_folders(tmp_path / "set", tmp_path)
    assert not bad and [sample.id for sample in samples] == ["jump/b.mp4", "run/a.mp4"]
    assert samples[0].fields["labels"] == ("jump", "run")
    assert [item.id for item in read_requests([tmp_path / "set"], "?", None)] == [
        str(tmp_path / "set" / name) for name in ("jump/b.mp4", "run/a.mp4")
    ]


def test_classes_in_two_forms_of_unicode_are_one(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for name in (f"set/train/{nfd}/a.mp4", f"set/test/{nfc}/b.mp4", "set/test/bar/c.mp4", "set/train/bar/d.mp4"):
        write(tmp_path / name)
    for split in ("train", "test"):
        samples, _ = read_folders(tmp_path / "set" / split, tmp_path)
        assert {sample.fields["labels"] for sample in samples} == {("bar", nfc)}
    write(tmp_path / "set/classes.txt", f"{nfd}\nbar\n")
    assert read_folders(tmp_path / "set/test", tmp_path)[0][0].fields["labels"] == (nfc, "bar")


def test_strays_are_no_records_no_frames_and_no_archives(tmp_path: Path) -> None:
    part = tmp_path / "part"
    for name in ("v/2.jpg", "v/10.jpg", "v/._2.jpg"):
        write(part / name)
    write(part / "a.json", [said("v")])
    for name in ("._a.json", "__MACOSX/._a.json", ".cache/huggingface/b.json"):
        write(part / name, b"\0\5\26\7")
    assert media(read_llava_video(part, tmp_path), tmp_path) == ["part/v/2.jpg", "part/v/10.jpg"]
    with pytest.raises(UserError, match="has no"):
        read_llava_video(part / "v", tmp_path)

    write_tar(part / "b.TAR", [("x.mp4", b"x")])
    for name in ("._b.tar", "__MACOSX/._b.tar"):
        write(part / name, b"\0\5\26\7")
    assert list_files(str(part), (".tar",)) == [str(part / "b.TAR")]


# --------------------------------------------------------------------------------------------------------- Kinetics


def test_kinetics_as_cvdfoundation_unpacks_it(tmp_path: Path) -> None:
    rows = ["riding a bike,a,1,11,train", "riding a bike,b,1,11,train", "yoga,c,1,11,train", "yoga,d,1,11,train"]
    path = write(
        tmp_path / "k400/annotations/train.csv", "\n".join(["label,youtube_id,time_start,time_end,split", *rows])
    )
    for name in ("train/riding_a_bike/a_000001_000011.mp4", "train/riding a bike/b_000001_000011.mp4"):
        write(tmp_path / "k400" / name)
    good = "k400/replacement/replacement_for_corrupted_k400/c_000001_000011.mp4"
    for name in (good, "k400/train/c_000001_000011.mp4", "k400/train/d_000001_000011.mp4"):
        write(tmp_path / name)
    expected = ["k400/train/riding_a_bike/a_000001_000011.mp4", "k400/train/riding a bike/b_000001_000011.mp4"]
    expected += [good, "k400/train/d_000001_000011.mp4"]
    for folder in ("", "k400/train"):
        assert media(read_kinetics(path, tmp_path, media=folder), tmp_path) == expected
