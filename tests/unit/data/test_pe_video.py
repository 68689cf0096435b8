"""PE-Video: which caption is learnt, pairs in any order, pairs that lack something, and clips unpacked once."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import read_pe_video
from tests.helpers.streaming import clip, damaged_clip, data_config, pe_pair, pe_shards, running, spools
from tests.helpers.tars import cut, write_tar
from tests.helpers.tiny import Tiny
from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample
from vft.data import formats as sources
from vft.data.dataset import load_dataset
from vft.data.formats import pe_video
from vft.data.formats.pe_video import TOGETHER
from vft.data.streaming.archives import ArchiveClip, DamagedArchive
from vft.recipes.caption import Caption

VIDEO = b"not looked at here"


def groups_of(archive: Path, spool: Path, place: int = 0) -> list[ArchiveClip]:
    spool.mkdir(exist_ok=True)
    return list(pe_video.read_clips(str(archive), place, spool))


def group_of(tmp_path: Path, *members: tuple[str, bytes]) -> ArchiveClip:
    """The only clip of an archive with these members."""
    (group,) = groups_of(write_tar(tmp_path / "s.tar", members), tmp_path / "spool")
    return group


def medium(sample: Sample) -> MediaRef:
    ref = sample.turns[0].parts[0]
    assert isinstance(ref, MediaRef)
    return ref


# --------------------------------------------------------------------------------------------------------- records

HUMAN, MODEL, PLAIN = "People wrote this.", "A model wrote this.", "This describes it."


@pytest.mark.parametrize(
    ("fields", "caption"),
    [
        ({"human_caption": HUMAN, "model_caption": MODEL, "description": PLAIN}, HUMAN),
        ({"human_caption": None, "model_caption": MODEL, "description": PLAIN}, MODEL),
        ({"human_caption": "", "model_caption": MODEL}, MODEL),
        ({"description": PLAIN, "model_caption": None}, PLAIN),
        ({"description": PLAIN, "keywords": ["a"], "num_frames": 3, "other": 1}, PLAIN),
    ],
)
def test_the_best_caption_there_is(tmp_path: Path, fields: dict[str, Any], caption: str) -> None:
    group = group_of(tmp_path, ("x/c1.mp4", VIDEO), ("x/c1.json", json.dumps(fields).encode()))
    (sample,) = group.samples
    assert not group.bad and (sample.id, sample.origin, sample.fields) == ("c1", "s.tar/x/c1.json", fields)
    assert [turn.role for turn in sample.turns] == ["user", "assistant"] and sample.turns[1].text == caption
    assert sample.unread == tuple(key for key in fields if key == "other")
    ref = medium(sample)
    assert (ref.kind, ref.name) == ("video", "s.tar/x/c1.mp4")
    assert isinstance(ref.path, Path) and ref.path.read_bytes() == VIDEO and ref.path in group.files.values()


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        (b"{", "", "is not JSON"),
        (b"\xff\xfe{}", "", "is not JSON"),
        (b"[" * 100_000, "", "is not JSON"),
        (b"[1]", "", "is no JSON object"),
        (b"null", "", "is no JSON object"),
        (b"{}", "", "no caption; the record has no keys, read are human_caption, model_caption, description"),
        (b'{"caption": "x"}', "", "no caption; the record has the keys 'caption', read are human_caption"),
        (b'{"description": " "}', "", "read are human_caption, model_caption, description (empty here)"),
        (b'{"human_caption": 3}', "human_caption", "of type int"),
        (b'{"human_caption": "\\ud800"}', "human_caption", "surrogate"),
    ],
)
def test_records_that_can_not_be_used(tmp_path: Path, record: bytes, field: str, message: str) -> None:
    """They say where they stand, and their clip is not kept."""
    group = group_of(tmp_path, ("c1.mp4", VIDEO), ("c1.json", record))
    assert not group.samples
    (bad,) = group.bad
    assert (bad.origin, bad.field) == ("s.tar/c1.json", field) and message in bad.message
    assert "\n" not in str(bad) and str(tmp_path) not in str(bad)


def test_halves_of_pairs(tmp_path: Path) -> None:
    (mp4, about), (_, alone), (video, _), last = (pe_pair(name, VIDEO) for name in "abcd")
    archive = write_tar(tmp_path / "s.tar", [mp4, about, alone, video, *last])
    groups = groups_of(archive, tmp_path / "spool")
    assert [[sample.id for sample in group.samples] for group in groups] == [["a"], [], [], ["d"]]
    assert [[str(bad) for bad in group.bad] for group in groups[1:3]] == [
        [f"s.tar/b.json: mp4: the clip has no video beside its .json; {TOGETHER}"],
        [f"s.tar/c.mp4: json: the clip has no .json beside its video; {TOGETHER}"],
    ]


@pytest.mark.parametrize("ending", [".webm", ".MOV", ".mkv", ".m4v"])
def test_videos_of_other_endings(tmp_path: Path, ending: str) -> None:
    """As people pack their own, streamed and unpacked."""
    (_, video), about = pe_pair("a")
    archive = write_tar(tmp_path / "pe" / "s.tar", [(f"a{ending}", video), about])
    (group,) = groups_of(archive, tmp_path / "spool")
    assert not group.bad and medium(group.samples[0]).name == f"s.tar/a{ending}"
    samples, bad = read_pe_video(str(tmp_path / "pe"), Path(), tmp_path / "cache", take="first:1")
    assert not bad and medium(samples[0]).name == f"s.tar/a{ending}"
    path = medium(samples[0]).path
    assert isinstance(path, Path) and path.read_bytes() == video


def test_any_order_and_other_members(tmp_path: Path) -> None:
    """Files that are none of ours neither end a pair nor make one; a dot in a name doesn't join two clips, and suffixes
    in upper case don't part them."""
    (mp4, about), (second, its), (third, record) = (pe_pair(name, VIDEO) for name in ("a", "v1.5_x", "v1.5_y"))
    about, mp4 = ("a.JSON", about[1]), ("a.MP4", mp4[1])
    extra = [("a.wav", b"1"), ("README.md", b"2"), ("._a.mp4", b"3"), ("__MACOSX/._a.json", b"4"), ("mp4", b"5")]
    members = [extra[1], about, extra[0], mp4, extra[2], extra[3], second, its, extra[4], record, third]
    groups = groups_of(write_tar(tmp_path / "s.tar", members), tmp_path / "spool")
    assert not [bad for group in groups for bad in group.bad]
    captions = [(sample.id, sample.turns[1].text) for group in groups for sample in group.samples]
    assert captions == [(name, f"Clip {name} is seen.") for name in ("a", "v1.5_x", "v1.5_y")]
    places = [group.place for group in groups]
    assert [len(groups_of(tmp_path / "s.tar", tmp_path / "spool", place)) for place in places] == [3, 2, 1]


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_a_shard_that_is_cut_off(tmp_path: Path, name: str) -> None:
    """Whole pairs are clips, also right before the cut; what the cut took is no fault of a clip's."""
    members = [member for clip_name in "abc" for member in pe_pair(clip_name, bytes(range(256)) * 5)]
    archive = write_tar(tmp_path / "whole" / name, members, **({"compresslevel": 0} if name != "s.tar" else {}))
    content, seen, spool = archive.read_bytes(), set(), tmp_path / "spool"
    spool.mkdir()
    for at in range(0, len(content) - 1100 if name == "s.tar" else len(content), 257):
        (tmp_path / name).write_bytes(content[:at])
        groups: list[ArchiveClip] = []
        with pytest.raises(DamagedArchive, match=rf"{name}: .*download it again"):
            for group in pe_video.read_clips(str(tmp_path / name), 0, spool):
                groups.append(group)
        assert not [bad for group in groups for bad in group.bad]
        ids = "".join(sample.id for group in groups for sample in group.samples)
        assert "abc".startswith(ids)
        seen.add(ids)
        assert sorted(spool.iterdir()) == sorted(file for group in groups for file in group.files.values())
        for file in spool.iterdir():
            file.unlink()
    assert seen == {"", "a", "ab", "abc"}


# -------------------------------------------------------------------------------------------------------- unpacked


def take_first(root: Path, count: int) -> tuple[list[Sample], list[Any]]:
    source = {"format": "pe_video", "path": "pe", "take": f"first:{count}"}
    config = data_config(root, source)
    return sources.read(config.sources[0], config)


def test_clips_are_unpacked_once(tmp_path: Path) -> None:
    """In the order of the archives; then these are asked no more, and all is as before."""
    root = tmp_path / "data"
    names = pe_shards(root / "pe", [2, 3])
    samples, bad = take_first(root, 4)
    assert not bad and [sample.id for sample in samples] == names[:4]
    assert [medium(sample).name for sample in samples] == [f"{name[:3]}.tar/{name}.mp4" for name in names[:4]]
    assert [sample.origin for sample in samples] == [f"pe/{name[:3]}.tar/{name}.json" for name in names[:4]]
    files = [medium(sample).path for sample in samples]
    assert all(isinstance(file, Path) and file.read_bytes() == clip() for file in files)
    (unpacked,) = {file.parent for file in files if isinstance(file, Path)}
    assert len(list(unpacked.iterdir())) == 9  # a clip and its record each, and their list; no copy left over
    shutil.rmtree(root / "pe")
    assert take_first(root, 4) == (samples, bad)
    with pytest.raises(UserError, match="no such file"):
        take_first(root, 5)  # another number is another choice
    assert [path.name for path in unpacked.parent.iterdir() if path.is_dir()] == [unpacked.name]


def test_bad_clips_among_the_first(tmp_path: Path) -> None:
    root = tmp_path / "data"
    members = [*pe_pair("a"), pe_pair("b")[0], ("c.mp4", VIDEO), ("c.json", b"{"), *pe_pair("d")]
    write_tar(root / "pe" / "s.tar", members)
    for _ in range(2):
        samples, bad = take_first(root, 4)
        assert [sample.id for sample in samples] == ["a", "d"]
        assert [one.origin for one in bad] == ["pe/s.tar/b.mp4", "pe/s.tar/c.json"]


def test_damage_before_and_behind_the_first(tmp_path: Path) -> None:
    """What is asked for is unpacked, though more of the archive is missing; less than that is never kept."""
    root = tmp_path / "data"
    pe_shards(root / "pe", [4])
    with tarfile.open(root / "pe" / "000.tar") as tar:
        within_the_third = tar.getmember("000-02.mp4").offset + 700
    cut(root / "pe" / "000.tar", within_the_third)
    assert [sample.id for sample in take_first(root, 2)[0]] == ["000-00", "000-01"]
    with pytest.raises(UserError, match=r"000\.tar: .*download it again"):
        take_first(root, 3)
    pe_shards(root / "pe", [4])
    assert len(take_first(root, 3)[0]) == 3


def test_the_same_name_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path relative to the current folder: other folders' clips must not come out of the cache."""
    cache = tmp_path / "cache"
    for place, name in (("one", "a"), ("two", "b")):
        write_tar(tmp_path / place / "pe" / "s.tar", pe_pair(name))
        monkeypatch.chdir(tmp_path / place)
        samples, _ = read_pe_video("pe", Path(), cache, take="first:1")
        assert [sample.id for sample in samples] == [name]


def test_a_cache_that_can_not_be_written(tmp_path: Path) -> None:
    pe_shards(tmp_path / "pe", [1])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't be written .*data\.cache_dir"):
        read_pe_video(str(tmp_path / "pe"), Path(), tmp_path / "file", take="first:1")


def unpack_there(folder: Path, answers: Any) -> None:
    samples, bad = read_pe_video(str(folder / "pe"), Path(), folder / "cache", take="first:40")
    paths = [medium(sample).path for sample in samples]
    answers.put((len(bad), [sample.id for sample in samples], all(isinstance(p, Path) and p.exists() for p in paths)))


def test_two_processes_unpack_at_once(tmp_path: Path) -> None:
    """One does it and the other waits: both see all clips, and nothing half-written stays."""
    names = pe_shards(tmp_path / "pe", [20, 20])
    forked = multiprocessing.get_context("fork")
    answers = forked.Queue()
    processes = [forked.Process(target=unpack_there, args=(tmp_path, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert found == [(0, names, True)] * 3
    folders = [path for path in (tmp_path / "cache" / "unpacked").iterdir() if path.is_dir()]
    assert len(folders) == 1 and len(list(folders[0].iterdir())) == 81


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_quarantine_names_members_and_no_passing_copies(tiny: Tiny, tmp_path: Path) -> None:
    """Copies have another name each time: whoever reads the file later must find the clip in its archive."""
    root = tmp_path / "data"
    members = [*pe_pair("a"), *pe_pair("broken", damaged_clip()), *pe_pair("none", b"no video"), *pe_pair("b")]
    write_tar(root / "pe" / "s.tar", [*members, ("x.mp4", clip()), ("x.json", b"{"), *pe_pair("empty", b"")])
    config = data_config(root, {"format": "pe_video", "path": "pe", "stream": True}, max_samples_per_pack=1)
    lines = []
    for _ in range(2):
        with running(config, tiny.encoder, slots=1) as run:
            ids = [step[0][0] for step in run.steps(6)]
            lines.append([item.line() for item in run.bad])
            assert len(spools(config)) < 20
        assert ids == [("a",), (), ("b",), ("a",), (), ("b",)]
    assert lines[0] == lines[1]
    found = {(item["path"], item["reason"]) for item in map(json.loads, lines[0])}
    assert found == {
        ("s.tar/broken.mp4", "decode_error"),
        ("s.tar/none.mp4", "not_a_video"),
        ("s.tar/empty.mp4", "empty"),
        ("s.tar/x.json", "record"),
    }
    assert not [line for line in lines[0] if str(config.cache_path) in line]
    assert all(json.loads(line)["message"].count("s.tar/") for line in lines[0])


def test_unpacked_clips_are_named_by_their_member(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_tar(root / "pe" / "s.tar", [*pe_pair("a"), *pe_pair("none", b"no video")])
    config = data_config(root, {"format": "pe_video", "path": "pe", "take": "first:9"})
    documents = load_dataset(config, config.sources, Caption().conversations, tiny.encoder, seed=0)
    assert [(item.id, item.path, item.reason) for item in documents.bad] == [("none", "s.tar/none.mp4", "not_a_video")]
