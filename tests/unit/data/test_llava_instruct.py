"""LLaVA-Instruct-150K: bare names of COCO pictures in every place where people keep COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import read_llava_instruct, write
from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample
from vft.data.records.record import Records

NAME = "000000033471.jpg"


def record(image: Any = NAME, text: str = "<image>\nWhat are the colors of the bus?", **more: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": text},
        {"from": "gpt", "value": "White and red."},
        {"from": "human", "value": "What feature can be seen on the back?"},
        {"from": "gpt", "value": "An advertisement."},
    ]
    return {"id": "000000033471", "image": image, "conversations": turns, **more}


def read(tmp_path: Path, *records: Any, media: str = "") -> Records:
    return read_llava_instruct(write(tmp_path / "llava_instruct_150k.json", records), tmp_path, media=media)


def picture(sample: Sample) -> Path:
    ref = sample.turns[0].parts[0]
    assert isinstance(ref, MediaRef) and isinstance(ref.path, Path)
    return ref.path


def test_a_record(tmp_path: Path) -> None:
    file = write(tmp_path / "train2017" / NAME)
    (sample,), bad = read(tmp_path, record())
    assert not bad
    assert (sample.id, sample.origin) == ("000000033471", "llava_instruct_150k.json:2")
    assert sample.fields == {"id": "000000033471", "image": NAME}
    assert [turn.role for turn in sample.turns] == ["user", "assistant", "user", "assistant"]
    ref, text = sample.turns[0].parts
    assert ref == MediaRef("image", file.resolve(), field="image")
    assert text == "What are the colors of the bus?"
    assert sample.turns[1].text == "White and red."


@pytest.mark.parametrize(
    ("place", "media"),
    [
        (NAME, ""),
        (f"train2017/{NAME}", ""),
        (f"coco/train2017/{NAME}", ""),
        (f"train2014/COCO_train2014_{NAME}", ""),
        (f"coco/train2014/COCO_train2014_{NAME}", ""),
        (f"pictures/{NAME}", "pictures"),
        (f"pictures/{NAME}", "pictures/"),
        (f"data/coco/train2017/{NAME}", "data/coco"),
        (f"data/coco/train2014/COCO_train2014_{NAME}", "data"),
        (f"train2017/{NAME}", "pictures"),
    ],
)
def test_where_a_bare_name_lies(tmp_path: Path, place: str, media: str) -> None:
    file = write(tmp_path / place)
    (sample,), bad = read(tmp_path, record(), media=media)
    assert not bad and picture(sample) == file.resolve()


def test_the_users_folder_goes_first(tmp_path: Path) -> None:
    for place in (f"train2017/{NAME}", f"pictures/{NAME}", NAME):
        write(tmp_path / place)
    assert picture(read(tmp_path, record(), media="pictures")[0][0]) == (tmp_path / "pictures" / NAME).resolve()


def test_names_with_folders_stand_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "train2017/vg/1.jpg")  # not a place for a name with a folder
    samples, bad = read(tmp_path, record("vg/1.jpg"), record("coco/train2017/2.jpg"))
    assert not bad
    assert [picture(s) for s in samples] == [tmp_path.resolve() / n for n in ("vg/1.jpg", "coco/train2017/2.jpg")]
    file = write(tmp_path / "pictures/vg/1.jpg")
    assert picture(read(tmp_path, record("vg/1.jpg"), media="pictures")[0][0]) == file.resolve()
    file = write(tmp_path / "vg/3.jpg")
    assert picture(read(tmp_path, record("vg/3.jpg"), media="pictures")[0][0]) == file.resolve()


def test_a_missing_picture_is_not_the_readers_problem(tmp_path: Path) -> None:
    (sample,), bad = read(tmp_path, record())
    assert not bad and picture(sample) == tmp_path.resolve() / NAME


def test_placeholder_at_the_end_and_no_picture(tmp_path: Path) -> None:
    plain = record(text="What is a bus?")
    del plain["image"]
    samples, bad = read(tmp_path, record(text="What is this?\n<image>"), plain)
    assert not bad
    assert samples[0].turns[0].parts[0] == "What is this?" and isinstance(samples[0].turns[0].parts[1], MediaRef)
    assert samples[1].turns[0].parts == ("What is a bus?",)


@pytest.mark.parametrize(
    ("bad_record", "field", "message"),
    [
        (record(["a.jpg"]), "image", "of type list"),
        (record("train2017"), "image", "a folder"),
        (record(None), "images", "1 <image> placeholder(s) in the text but 0"),
        (record(conversations=None), "messages", "it has 'id', 'image', 'conversations'"),
        (record(video="a.mp4") | {"conversations": "x"}, "conversations", "must be a list"),
        ([1], "", "no JSON object"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, bad_record: Any, field: str, message: str) -> None:
    (tmp_path / "train2017").mkdir()
    samples, bad = read(tmp_path, bad_record, record())
    assert len(samples) == 1
    assert [(one.origin, one.field) for one in bad] == [("llava_instruct_150k.json:2", field)]
    assert message in bad[0].message


def test_a_folder_of_files(tmp_path: Path) -> None:
    for name in ("conversation_58k.json", "more/detail_23k.json"):
        write(tmp_path / "instruct" / name, json.dumps([record()]))
    samples, bad = read_llava_instruct(tmp_path / "instruct", tmp_path)
    assert not bad
    assert [sample.origin for sample in samples] == ["conversation_58k.json:1", "more/detail_23k.json:1"]
    assert [sample.id for sample in samples] == ["000000033471", "000000033471#2"]
    with pytest.raises(UserError, match=r"no \.json files"):
        read_llava_instruct(write(tmp_path / "empty/x.txt").parent, tmp_path)
    with pytest.raises(UserError, match=r"gone\.json: no such file"):
        read_llava_instruct(tmp_path / "gone.json", tmp_path)
