"""LLaVA-Video-178K out of its tar parts: the same documents as out of extracted folders, whatever the order."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.formats import write
from tests.helpers.streaming import (
    clip,
    damaged_clip,
    data_config,
    llava_record,
    one_epoch,
    running,
    slot_stream,
    stream_context,
)
from tests.helpers.tars import write_tar
from tests.helpers.tiny import Tiny
from vft.common.errors import UserError
from vft.common.types import Document
from vft.data import formats
from vft.data.dataset import load_dataset
from vft.data.media.patches import load_patches
from vft.data.streaming.archives import DamagedArchive
from vft.data.streaming.stream import StreamSource
from vft.models.processor import VisionProcessor
from vft.recipes.caption import Caption

PART = "LLaVA/0_30_s_x"
STREAM = {"format": "llava_video", "path": PART, "stream": True}


def picture(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (56, 56), (level, level, level)).save(file, "JPEG")
    return file.getvalue()


VIDEOS = {f"academic/{name}.mp4": clip(frames) for name, frames in (("a", 8), ("b", 5), ("c", 12), ("d", 8))}
FRAMES = {f"hound/v{number}/{frame}.jpeg": picture(frame * 9) for number in (1, 2) for frame in (1, 2, 10, 3)}
LISTS: dict[str, list[dict[str, Any]]] = {
    "0_30_s_x_cap_processed.json": [
        llava_record("academic/c.mp4", 1),
        llava_record("hound/v1", 2),
        llava_record("academic/gone.mp4", 3),
        llava_record("academic/a.mp4", 4, id="twice"),
    ],
    "0_30_s_x_oe_processed.json": [
        llava_record("academic/a.mp4", 5, id="twice"),
        llava_record("academic/a.mp4", 6),
        llava_record("academic/b.mp4", 7, id=None),
        llava_record("academic/a.mp4", 8),
        llava_record("hound/v1", 9),
    ],
    "sub/0_30_s_x_mc.json": [
        llava_record("academic/c.mp4", 10, id=11, data_source=PART),
        llava_record("hound/v2", 12, data_source=PART),
    ],
}
TARS = {
    # In another order than the records, with a video that has none, and things that are no videos.
    "0_30_s_x_videos_1.tar.gz": ["academic/b.mp4", "notes.txt", "academic/d.mp4", "academic/c.mp4"],
    "0_30_s_x_videos_2.tar.gz": [*FRAMES, "academic/a.mp4"],
}


def publish(root: Path) -> Path:
    """The set as it is downloaded: lists and parts."""
    part = root / PART
    for name, records in LISTS.items():
        write(part / name, records)
    content = {**VIDEOS, **FRAMES, "notes.txt": b"no video"}
    for name, members in TARS.items():
        write_tar(part / name, {member: content[member] for member in members})
    return part


def about(document: Document, processor: VisionProcessor) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Its ids, and all else of it but where its files lie."""
    plans = [
        (plan.info, plan.frame_indices, plan.height, plan.width, plan.grid_thw, plan.num_tokens, plan.seconds_per_grid)
        for plan in document.media
    ]
    pixels = [load_patches(plan, processor).pixels_PD.tolist() for plan in document.media]
    tensors = {name: getattr(document, name).tolist() for name in ("ids_T", "labels_T", "positions_3T", "media_mask_T")}
    shape = {"trunk": document.prefix_length, "branches": document.suffix_lengths}
    return document.sample_ids, {"plans": plans, "pixels": pixels, **shape, **tensors}


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("slots", [1, 2])
def test_the_same_documents_as_extracted(tiny: Tiny, tmp_path: Path, slots: int, samples: int) -> None:
    """Ids, labels, positions, plans, pixels, and which questions share a video's trunk; some in several documents."""
    root, processor = tmp_path / "data", tiny.encoder.processor
    part = publish(root)
    config = data_config(root, STREAM, max_samples_per_pack=samples, pack_tokens=300)
    with stream_context(config, tiny.encoder, slots) as context:
        streams = [slot_stream(context, slot) for slot in range(slots)]
        streamed = [one for stream in streams for one in one_epoch(stream, lambda document: about(document, processor))]
    for archive in part.glob("*.gz"):
        shutil.unpack_archive(archive, part)  # made by this test; `filter` is new in 3.11.4
        archive.unlink()
    documents = load_dataset(
        config, [config.sources[0].model_copy(update={"stream": False})], Caption().conversations, tiny.encoder, seed=0
    )
    extracted = [documents.build(number) for number in range(len(documents.documents))]
    expected = dict(about(document, processor) for document in extracted)
    assert dict(streamed) == expected
    assert len(streamed) == len(expected)
    assert sum(len(ids) for ids in expected) == 10 and max(map(len, expected)) == (samples or 4)
    assert ("twice", "twice#2", "q6", "q8") in expected or samples
    # What no archive has is bad where it is looked for; a stream just never comes across it.
    assert [item.reason for item in documents.bad] == ["missing"]


def test_keys_and_system_of_streamed_records(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read as of extracted ones, and those that are not are told when the archives are opened."""
    caplog.set_level(logging.INFO)
    part = publish(tmp_path / "data")
    for name in LISTS:
        (part / name).unlink()
    keys = {"system": "Be brief.", "end": 0.5, "year": 1}
    record = llava_record("academic/b.mp4", 1, id=1, data_source=PART)
    bad = llava_record("academic/b.mp4", 1, id=2, data_source=PART)
    (part / next(iter(LISTS))).write_text(json.dumps([{**record, **keys}, {**bad, "clip": "other.mp4"}]))
    with stream_context(data_config(tmp_path / "data", STREAM), tiny.encoder, 1) as context:
        stream = slot_stream(context, 0)
        pack = stream.next_pack()
    document = pack.documents[0]
    assert document.document.media[0].frame_times_s[-1] <= 0.5
    assert "Be brief." in tiny.encoder.tokenizer.decode(document.document.ids_T)
    assert "clip: names 'other.mp4'" in pack.bad[0].message
    assert "keys that are not read, of 2 records: year (1), clip (1)" in caplog.text


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_a_part_that_is_cut_off(tmp_path: Path, name: str) -> None:
    """A video that is whole counts, also right before the cut; a folder of frames may lack some, and doesn't."""
    members = {**FRAMES, **dict.fromkeys(VIDEOS, b"x" * 1500)}
    archive = write_tar(tmp_path / name, members, **({"compresslevel": 0} if name != "s.tar" else {}))
    content, records, seen = archive.read_bytes(), [llava_record(v, 1) for v in ("hound/v1", "hound/v2", *VIDEOS)], {}
    (tmp_path / "all.json").write_text(json.dumps(records))
    archives = formats.find("llava_video").open_archives(str(tmp_path))
    spool = tmp_path / "spool"
    spool.mkdir()
    # A plain tar is whole with its first block of zeros, a compressed one with its checksum.
    for at in range(0, len(content.rstrip(b"\0")) + 500 if name == "s.tar" else len(content), 257):
        archive.write_bytes(content[:at])
        groups = []
        with pytest.raises(DamagedArchive):
            for group in archives.clips(str(archive), 0, spool, lambda number: True):
                groups.append(group)
        assert not [bad for group in groups for bad in group.bad]
        assert all(len(group.files) == 4 for group in groups[:2])
        seen[len(groups)] = at
        assert sorted(spool.iterdir()) == sorted(file for group in groups for file in group.files.values())
        for file in spool.iterdir():
            file.unlink()
    assert list(seen) == [0, 1, 2, 3, 4, 5, 6]


def test_records_that_can_not_be_used(tiny: Tiny, tmp_path: Path) -> None:
    """Those without a video are known at once, others when their video comes; each is named by its list and line."""
    part = tmp_path / "data" / PART
    broken = [
        llava_record("academic/a.mp4", 1),
        llava_record("academic/a.mp4", 2, conversations=[]),
        {"id": "x"},
        [1],
        llava_record(7, 3),
        llava_record("academic/a.mp4", 4, id=["odd"]),
        llava_record("academic/b.mp4", 5, conversations=[{"from": "human", "value": "<image>\n?"}]),
    ]
    write(part / "x.json", "[\n" + ",\n".join(map(json.dumps, broken)) + "\n]")
    write_tar(part / "v.tar.gz", VIDEOS)
    config = data_config(tmp_path / "data", STREAM)
    archives = StreamSource(config.sources[0], config)
    assert [(item.id, item.reason) for item in archives.bad] == [(f"x.json:{n}", "record") for n in (4, 5, 6, 7)]
    with running(config, tiny.encoder, slots=1) as run:
        assert {name for step in run.steps(1) for name in step[0][0]} == {"q1"}
        assert {(item.path, item.reason) for item in run.bad} == {("x.json:3", "record"), ("x.json:8", "record")}
    with pytest.raises(UserError, match=r"x\.json:4: video: .*\[4 of 7 samples can't be used"):
        StreamSource(config.sources[0], config.model_copy(update={"max_bad_fraction": 0.5}))


def test_a_video_that_can_not_be_used_is_told_once(tiny: Tiny, tmp_path: Path) -> None:
    """Of all its questions, also where they come in several rows, and of frames by the first of them."""
    part = tmp_path / "data" / PART
    records = [llava_record(video, i) for i, video in enumerate(["a.mp4", "b.mp4", "c.mp4", "f"] * 3)]
    write(part / "x.json", records)
    frames = {"f/1.jpg": picture(1), "f/2.jpg": b"no picture"}
    write_tar(part / "v.tar", {"a.mp4": damaged_clip(), "b.mp4": b"none", "c.mp4": clip(), **frames})
    config = data_config(tmp_path / "data", STREAM, max_samples_per_pack=1)
    with running(config, tiny.encoder, slots=1) as run:
        rows = [step[0][0] for step in run.steps(12)]
        assert rows == [*[()] * 3, ("q2",), ("q6",), ("q10",)] * 2
        assert [(item.path, item.reason) for item in run.bad] == [
            ("v.tar/a.mp4", "decode_error"),
            ("v.tar/b.mp4", "not_a_video"),
            ("v.tar/f/1.jpg", "not_a_picture"),
        ]
        assert not [item for item in run.bad if "/stream/" in item.line()]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.json": "[]"}, r"no \.tar or \.tar\.gz or \.tgz files there"),
        ({"v.tar": ""}, r"no \.json files there"),
        ({"v.tar": "", "x.json": "[{"}, r"x\.json:1: "),
        ({"v.tar": "", "x.json": "[]"}, "holds no records"),
    ],
)
def test_what_can_not_be_streamed(tiny: Tiny, tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        write(tmp_path / "data" / PART / name, content)
    with (
        pytest.raises(UserError, match=message),
        stream_context(data_config(tmp_path / "data", STREAM), tiny.encoder, 1) as context,
    ):
        slot_stream(context, 0).next_pack()
