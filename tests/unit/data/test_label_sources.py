"""Action classification: folders, UCF101, Kinetics and Something-Something v2, as their publishers lay them out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import read_error, read_folders, read_kinetics, read_ssv2, read_ucf101, write
from vft.common.types import MediaRef, Sample, Turn
from vft.data.formats import ucf101
from vft.data.records.record import Records


def media_of(sample: Sample, root: Path) -> tuple[str, str]:
    """Kind of the one medium and its path in `root`; checks that the turns are a clip and its label."""
    label = sample.fields["label"]
    (ref,) = sample.turns[0].parts
    assert isinstance(ref, MediaRef) and isinstance(ref.path, Path)
    assert sample.turns == (Turn("user", (ref,)), Turn("assistant", (label,)))
    assert ref.field and label in sample.fields["labels"]
    return ref.kind, ref.path.relative_to(root.resolve()).as_posix()


def found(records: Records, root: Path) -> list[tuple[str, str, str, str]]:
    """(id, path, label, origin) of each sample, of which none is bad and all share one tuple of labels."""
    samples, bad = records
    assert not bad, str(bad[0])
    assert len({id(sample.fields["labels"]) for sample in samples}) == 1
    return [(s.id, media_of(s, root)[1], s.fields["label"], s.origin) for s in samples]


def mistakes(records: Records) -> list[tuple[str, str]]:
    assert all(("; " in one.message or "must be" in one.message) and "\n" not in str(one) for one in records[1])
    return [(one.origin, one.field) for one in records[1]]


def fail(call: Any, path: Path, *words: str) -> None:
    assert read_error(call, *words).startswith(str(path))


# ---------------------------------------------------------------------------------------------------------- folders


def lay_out_folders(root: Path) -> Path:
    clips = ("riding_a_bike/a.mp4", "riding_a_bike/x/y/b.WEBM", "chess/c.jpg")
    others = ("chess/.hidden.mp4", "chess/.thumbs/t.mp4", "chess/notes.txt", "readme.mp4", "chess/noname", ".git/x.mp4")
    for name in (*clips, *others):
        write(root / "train" / name)
    (root / "train" / "waving__hands").mkdir()
    return root / "train"


def test_a_folder_a_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lay_out_folders(tmp_path)
    caplog.set_level("INFO")
    records = read_folders(path, tmp_path)
    beside, pictures = caplog.messages
    assert beside.endswith(": what lies in no class folder is left out (1): 'readme.mp4'")
    assert pictures.endswith(": 1 of 3 files are pictures (of a GIF the first frame counts): 'c.jpg'")
    assert found(records, tmp_path) == [
        ("chess/c.jpg", "train/chess/c.jpg", "chess", "train/chess/c.jpg"),
        ("riding_a_bike/a.mp4", "train/riding_a_bike/a.mp4", "riding a bike", "train/riding_a_bike/a.mp4"),
        (
            "riding_a_bike/x/y/b.WEBM",
            "train/riding_a_bike/x/y/b.WEBM",
            "riding a bike",
            "train/riding_a_bike/x/y/b.WEBM",
        ),
    ]
    assert [media_of(sample, tmp_path)[0] for sample in records[0]] == ["image", "video", "video"]
    assert records[0][0].fields["labels"] == ("chess", "riding a bike", "waving hands")  # one has no clips


def test_of_animations_the_first_frame_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name in ("run/a.jpg", "jump/b.png"):
        write(tmp_path / name)
    read_folders(tmp_path, tmp_path)
    assert not caplog.messages
    write(tmp_path / "jump/c.GIF")
    read_folders(tmp_path, tmp_path)
    assert "3 of 3 files are pictures (of a GIF the first frame counts)" in caplog.text


def test_splits_share_their_labels(tmp_path: Path) -> None:
    path = lay_out_folders(tmp_path)
    write(tmp_path / "Val" / "diving" / "d.mp4")
    write(tmp_path / "held_out" / "chess" / "e.mp4")
    write(tmp_path / "other" / "cooking" / "e.mp4")
    expected = ("chess", "diving", "riding a bike", "waving hands")
    for split in ("train", "Val", "held_out"):
        assert read_folders(tmp_path / split, tmp_path)[0][0].fields["labels"] == expected
    assert read_folders(tmp_path / "other", tmp_path)[0][0].fields["labels"] == ("cooking",)
    write(path.parent / "classes.txt", "\ufeffwaving hands\r\n\r\ndiving\nchess\nriding_a_bike\nnever seen\n")
    expected = ("waving hands", "diving", "chess", "riding a bike", "never seen")
    assert read_folders(path, tmp_path)[0][0].fields["labels"] == expected
    write(path / "classes.txt", "chess\nriding_a_bike\nwaving__hands\n")
    assert read_folders(path, tmp_path)[0][0].fields["labels"] == ("chess", "riding a bike", "waving hands")


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lay_out_folders(tmp_path)
    write(tmp_path / "val" / "diving" / "d.mp4")
    monkeypatch.chdir(path)
    samples, _ = read_folders(Path(), Path())
    assert samples[0].fields["labels"] == ("chess", "diving", "riding a bike", "waving hands")
    assert media_of(samples[0], path) == ("image", "chess/c.jpg")


def test_mistakes_in_folders(tmp_path: Path) -> None:
    path = lay_out_folders(tmp_path)
    write(path.parent / "classes.txt", "chess\nriding_a_bike\n")
    fail(lambda: read_folders(path, tmp_path), tmp_path / "classes.txt", "'waving__hands'", "add it")
    write(path.parent / "classes.txt", "chess\nriding a bike\nriding_a_bike\n")
    fail(lambda: read_folders(path, tmp_path), tmp_path / "classes.txt", "'riding a bike' and 'riding_a_bike'")
    write(path.parent / "classes.txt", " \n")
    fail(lambda: read_folders(path, tmp_path), tmp_path / "classes.txt", "holds no names")
    (path.parent / "classes.txt").unlink()
    fail(lambda: read_folders(tmp_path, tmp_path), tmp_path, "holds splits (train)")
    write(tmp_path / "test" / "Riding a bike" / "a.mp4")
    assert len(read_folders(path, tmp_path)[0][0].fields["labels"]) == 4  # another spelling is another class
    write(tmp_path / "dev" / "riding a bike" / "a.mp4")
    fail(lambda: read_folders(path, tmp_path), tmp_path, "'riding a bike' and 'riding_a_bike'", "rename")
    write(tmp_path / "all" / "_" / "a.mp4")
    fail(lambda: read_folders(tmp_path / "all", tmp_path), tmp_path / "all", "'_' gives an empty label")
    fail(lambda: read_folders(tmp_path / "gone", tmp_path), tmp_path / "gone", "No such file")
    fail(lambda: read_folders(path / "readme.mp4", tmp_path), path / "readme.mp4", "Not a directory")
    fail(lambda: read_folders(path / "chess", tmp_path), path / "chess", "holds no folders")
    write(tmp_path / "none" / "chess" / "notes.txt")
    fail(lambda: read_folders(tmp_path / "none", tmp_path), tmp_path / "none", "no videos or pictures in its 1 class")


def test_links_and_odd_names(tmp_path: Path) -> None:
    root = tmp_path / "root"
    outside = write(tmp_path / "out" / "a.mp4")
    write(root / "all" / "ok" / "a.mp4")
    (root / "all" / "ok" / "leak.mp4").symlink_to(outside)
    (root / "all" / "linked").symlink_to(outside.parent)
    Path(os.fsdecode(os.fsencode(root / "all" / "ok") + b"/b\xff\n.mp4")).write_bytes(b"x")
    records = read_folders(root / "all", root)
    assert [sample.id for sample in records[0]] == ["ok/a.mp4"]
    assert mistakes(records) == [
        ("all/linked/a.mp4", "file"),
        ("'all/ok/b\\udcff\\n.mp4'", "file"),
        ("all/ok/leak.mp4", "file"),
    ]


# ----------------------------------------------------------------------------------------------------------- UCF101

UCF101 = [
    *("ApplyEyeMakeup", "BasketballDunk", "Basketball", "CleanAndJerk", "CuttingInKitchen", "HandstandPushups"),
    *("RockClimbingIndoor", "TaiChi", "WalkingWithDog", "YoYo"),
]


def lay_out_ucf101(root: Path, folder: str = "ucfTrainTestlist") -> Path:
    classes = "".join(f"{i} {name}\r\n" for i, name in enumerate(UCF101, 1))
    write(root / folder / "classInd.txt", classes)
    train = "YoYo/v_YoYo_g08_c01.avi 10\r\n\r\nHandstandPushups/v_HandStandPushups_g08_c02.avi 6\r\n"
    write(root / folder / "trainlist01.txt", train)
    write(root / folder / "testlist01.txt", "TaiChi/v_TaiChi_g01_c01.avi\n")
    return root / folder


def test_ucf101(tmp_path: Path) -> None:
    lists = lay_out_ucf101(tmp_path)
    write(tmp_path / "UCF-101/YoYo/v_YoYo_g08_c01.avi")
    train = read_ucf101(lists / "trainlist01.txt", tmp_path)
    pushups = "UCF-101/HandstandPushups/v_HandStandPushups_g08_c02.avi"  # a class that the files spell otherwise
    assert found(train, tmp_path) == [
        ("v_YoYo_g08_c01", "UCF-101/YoYo/v_YoYo_g08_c01.avi", "yo yo", "trainlist01.txt:1"),
        ("v_HandStandPushups_g08_c02", pushups, "handstand pushups", "trainlist01.txt:3"),
    ]
    test = read_ucf101(lists / "testlist01.txt", tmp_path)
    assert found(test, tmp_path) == [
        ("v_TaiChi_g01_c01", "UCF-101/TaiChi/v_TaiChi_g01_c01.avi", "tai chi", "testlist01.txt:1")
    ]
    labels = train[0][0].fields["labels"]
    assert labels == test[0][0].fields["labels"]
    assert len(set(labels)) == len(UCF101) and labels[0] == "apply eye makeup" and labels[-1] == "yo yo"
    assert {"clean and jerk", "rock climbing indoor", "cutting in kitchen", "basketball"} < set(labels)
    # Nothing but case and spaces has changed.
    assert [label.replace(" ", "") for label in labels] == [name.lower() for name in UCF101]


def test_words_of_other_names() -> None:
    names = ("TVShow", "WatchTV", "Jump3D", "Run100m", "100mRun", "golf_swing", "yo", "A", "PlayGTA5Online")
    words = ["tv show", "watch tv", "jump 3d", "run 100m", "100m run", "golf swing", "yo", "a", "play gta5 online"]
    assert [ucf101._words(name) for name in names] == words


@pytest.mark.parametrize(
    ("place", "media"),
    [
        ("UCF-101", ""),
        ("sets/UCF-101", ""),
        ("sets/ucfTrainTestlist/UCF-101", ""),
        ("sets/ucfTrainTestlist", ""),
        ("", ""),
        ("clips", "clips"),
    ],
)
def test_where_ucf101_lies(tmp_path: Path, place: str, media: str) -> None:
    lists = lay_out_ucf101(tmp_path, "sets/ucfTrainTestlist")
    file = write(tmp_path / place / "TaiChi/v_TaiChi_g01_c01.avi")
    (sample,), _ = read_ucf101(lists / "testlist01.txt", tmp_path, media=media)
    assert sample.turns[0].parts[0].path == file.resolve()


def test_lists_outside_of_the_root(tmp_path: Path) -> None:
    lists = lay_out_ucf101(tmp_path / "lists")
    write(lists / "UCF-101/TaiChi/v_TaiChi_g01_c01.avi")
    (sample,), bad = read_ucf101(lists / "testlist01.txt", tmp_path / "root")
    assert not bad and media_of(sample, tmp_path / "root")[1] == "TaiChi/v_TaiChi_g01_c01.avi"


def test_mistakes_in_ucf101(tmp_path: Path) -> None:
    lists = lay_out_ucf101(tmp_path)
    lines = [
        "YoYo/v_YoYo_g08_c01.avi 100",
        "Yoyo/a.avi 10",
        "a.avi 3",
        "YoYo/",
        "../../YoYo/a.avi 1",
        "YoYo/../../../a",
    ]
    path = write(lists / "trainlist02.txt", "\n".join(lines))
    records = read_ucf101(path, tmp_path)
    assert mistakes(records) == [
        (f"trainlist02.txt:{i}", "label" if i == 1 else "video") for i in range(1, len(lines) + 1)
    ]
    assert "100 disagrees: the folder 'YoYo' is class 10" in records[1][0].message
    assert "'Yoyo' is no class of classInd.txt" in records[1][1].message
    assert "out of data.root" in records[1][5].message

    classes = lists / "classInd.txt"
    for text, line in (("1 A\nB\n", 2), ("1 A\n1 B", 2), ("1 A\n\n2 A", 3), ("A 1", 1)):
        write(classes, text)
        fail(lambda: read_ucf101(path, tmp_path), Path(f"{classes}:{line}"))
    write(classes, "1 YoYo\n2 Yo_yo\n")
    fail(lambda: read_ucf101(path, tmp_path), classes, "same label 'yo yo'")
    classes.write_bytes(b"1 A\n2 \xff\n")
    fail(lambda: read_ucf101(path, tmp_path), Path(f"{classes}:2"), "not UTF-8")
    classes.unlink()
    fail(lambda: read_ucf101(path, tmp_path), classes, "No such file")


# --------------------------------------------------------------------------------------------------------- Kinetics

HEADER = "label,youtube_id,time_start,time_end,split"


def test_kinetics(tmp_path: Path) -> None:
    rows = [
        f"{HEADER},is_cc",
        "abseiling,-3B32lodo2M,59,69,val,0",
        "",
        '"petting animal (not cat)",--07,1,11,val,0',
        '"a ""b"",\nc",x_y,100000,100010,val,1',
        "abseiling,zzz,7,17,val,0",
        "abseiling,zzz,7,17,val,0",
    ]
    path = write(tmp_path / "k400/val.csv", "\ufeff" + "\r\n".join(rows))
    for place in ("val/-3B32lodo2M_000059_000069.mp4", "zzz_000007_000017.mp4"):
        write(tmp_path / "k400" / place)
    write(tmp_path / "k400/val/petting animal (not cat)/--07_000001_000011.mp4")
    records = read_kinetics(path, tmp_path)
    petting = "petting animal (not cat)"
    assert found(records, tmp_path) == [
        ("-3B32lodo2M_000059_000069", "k400/val/-3B32lodo2M_000059_000069.mp4", "abseiling", "val.csv:2"),
        ("--07_000001_000011", f"k400/val/{petting}/--07_000001_000011.mp4", petting, "val.csv:4"),
        ("x_y_100000_100010", "k400/val/x_y_100000_100010.mp4", 'a "b",\nc', "val.csv:5"),
        ("zzz_000007_000017", "k400/zzz_000007_000017.mp4", "abseiling", "val.csv:7"),
        ("zzz_000007_000017#2", "k400/zzz_000007_000017.mp4", "abseiling", "val.csv:8"),
    ]
    assert records[0][0].fields["labels"] == ('a "b",\nc', "abseiling", petting)


def test_unread_columns_of_kinetics(tmp_path: Path) -> None:
    """Those that the releases have are no surprise; a cell without a value says nothing."""
    text = f",{HEADER},is_cc,start,weight\n0,yoga,b,1,11,val,1,2.5,\n1,yoga,c,1,11,val,1,2.5,3\n"
    samples, bad = read_kinetics(write(tmp_path / "val.csv", text), tmp_path)
    assert not bad and [sample.unread for sample in samples] == [("start",), ("start", "weight")]


def test_labels_and_folder_of_kinetics(tmp_path: Path) -> None:
    path = write(tmp_path / "annotations/val.csv", f"{HEADER}\nskiing,a,1,11,val\nyoga,b,1,11,val\n")
    classes = write(tmp_path / "annotations/classes.txt", "yoga\nzumba\nskiing\n")
    write(tmp_path / "clips/yoga/b_000001_000011.mp4")
    samples, bad = read_kinetics(path, tmp_path, media="clips")
    assert not bad
    assert [media_of(s, tmp_path)[1] for s in samples] == [
        "clips/a_000001_000011.mp4",
        "clips/yoga/b_000001_000011.mp4",
    ]
    assert samples[0].fields["labels"] == ("yoga", "zumba", "skiing")
    write(classes, "yoga\nzumba\n")
    records = read_kinetics(path, tmp_path, media="clips")
    assert mistakes(records) == [("val.csv:2", "label")]
    assert "'skiing' is no label of classes.txt" in records[1][0].message


def test_columns_in_another_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "time_end, time_start,split,youtube_id,label\n 11,1,val,b, yoga \n")
    assert found(read_kinetics(path, tmp_path), tmp_path) == [
        ("b_000001_000011", "b_000001_000011.mp4", "yoga", "a.csv:2")
    ]


def test_mistakes_in_kinetics(tmp_path: Path) -> None:
    rows = ["yoga,#NAME?,1,11,val", "yoga,b,1.5,11,val", "yoga,b,1,-11,val", "yoga,b,1,val", " ,b,1,11,val"]
    rows += ["y,b,1,9999999,val", "../../out,b,1,11,val", "yoga,b,1,11,val"]
    write(tmp_path.parent / "out" / "b_000001_000011.mp4")
    path = write(tmp_path / "sub" / "a.csv", "\n".join([HEADER, *rows]))
    records = read_kinetics(path, tmp_path)
    fields = ["youtube_id", "time_start", "time_end", "", "label", "time_end", "youtube_id"]
    assert mistakes(records) == [(f"a.csv:{i}", field) for i, field in enumerate(fields, 2)]
    assert "out of data.root" in records[1][-1].message
    assert "4 values under 5 columns" in records[1][3].message
    assert len(records[0]) == 1

    write(path, "youtube_id,time_start,time_end,split\nb,1,11,test\n")
    fail(lambda: read_kinetics(path, tmp_path), path, "no column 'label'", "test")
    for text in ("", "yoga,b,1,11,val\n"):
        write(path, text)
        fail(lambda: read_kinetics(path, tmp_path), Path(f"{path}:1"), "expected label,youtube_id")
    write(path, f'{HEADER}\nyoga,b,1,11,val\n"yoga,b,1,11,val\nyoga,b,1,11,val\n')
    fail(lambda: read_kinetics(path, tmp_path), Path(f"{path}:3"), "quotes")
    path.write_bytes(f"{HEADER}\nyog\xe4,b,1,11,val".encode("latin-1"))
    fail(lambda: read_kinetics(path, tmp_path), Path(f"{path}:2"), "not UTF-8")
    fail(lambda: read_kinetics(tmp_path / "no.csv", tmp_path), tmp_path / "no.csv", "no such file")


# --------------------------------------------------------------------------------------------------------------- SSv2

CLASSES = {"Approaching something with your camera": "0", "Holding something next to something": "2"}
CLASSES |= {"Putting number of something onto something": "1"}
POTATO = {
    "id": "78687",
    "label": "holding potato next to vicks vaporub bottle",
    "template": "Holding [something] next to [something]",
    "placeholders": ["potato", "vicks vaporub bottle"],
}


def lay_out_ssv2(root: Path, *records: Any, labels: Any = CLASSES) -> Path:
    write(root / "ssv2/labels.json", json.dumps(labels))
    return write(root / "ssv2/train.json", json.dumps(list(records), indent=1))


def test_ssv2(tmp_path: Path) -> None:
    coins = {
        "id": 7,
        "label": "putting 3 coins onto a box",
        "template": "Putting [number of] [something] onto [something]",
    }
    path = lay_out_ssv2(tmp_path, POTATO, coins)
    write(tmp_path / "ssv2/20bn-something-something-v2/78687.webm")
    records = read_ssv2(path, tmp_path)
    folder = "ssv2/20bn-something-something-v2"
    assert found(records, tmp_path) == [
        ("78687", f"{folder}/78687.webm", "Holding something next to something", "train.json:2"),
        ("7", f"{folder}/7.webm", "Putting number of something onto something", "train.json:11"),
    ]
    assert records[0][0].fields["labels"] == tuple(sorted(CLASSES, key=lambda name: CLASSES[name]))
    assert records[0][0].fields["caption"] == POTATO["label"]
    samples, _ = read_ssv2(lay_out_ssv2(tmp_path, {**POTATO, "video_start": 1, "end": None}, POTATO), tmp_path)
    assert [sample.unread for sample in samples] == [("video_start",), ()]


@pytest.mark.parametrize(
    ("place", "media"),
    [("ssv2", ""), ("20bn-something-something-v2", ""), ("", ""), ("clips/webm", "clips/webm")],
)
def test_where_ssv2_lies(tmp_path: Path, place: str, media: str) -> None:
    path = lay_out_ssv2(tmp_path, POTATO)
    write(tmp_path / place / "78687.webm")
    (path.parent / "labels.json").rename(path.parent / "something-something-v2-labels.json")  # as first released
    assert found(read_ssv2(path, tmp_path, media=media), tmp_path)[0][1] == f"{place}/78687.webm".lstrip("/")


def test_mistakes_in_ssv2(tmp_path: Path) -> None:
    bad = [
        POTATO | {"template": "Holding [something]"},
        POTATO | {"template": ["x"]},
        POTATO | {"label": None},
        POTATO | {"id": "../../x"},
        POTATO | {"id": ""},
        POTATO | {"id": 1.5},
        {"id": "78687"},
        [],
    ]
    records = read_ssv2(lay_out_ssv2(tmp_path, *bad, POTATO), tmp_path)
    assert [field for _, field in mistakes(records)] == [
        "template",
        "template",
        "label",
        "id",
        "id",
        "id",
        "template",
        "",
    ]
    assert "'Holding something' is no class of labels.json" in records[1][0].message
    assert len(records[0]) == 1 and records[1][1].origin == "train.json:11"

    path = lay_out_ssv2(tmp_path, {"id": "1420"}, {"id": "3095"})
    fail(lambda: read_ssv2(path, tmp_path), path, "no record has a 'template'", "test")
    labels = tmp_path / "ssv2/labels.json"
    for table in ([], {}, ["Holding something"], {"Holding something": None}, {"": "0"}, {"\ud800": 1}, 1e999, None):
        path = lay_out_ssv2(tmp_path, POTATO, labels=table)
        fail(lambda: read_ssv2(path, tmp_path), labels)  # noqa: B023
    write(labels, '{"a": 1e999}')
    fail(lambda: read_ssv2(path, tmp_path), labels, "with their numbers")
    labels.unlink()
    fail(lambda: read_ssv2(path, tmp_path), labels, "No such file")
