"""Paths in records that lead elsewhere, in every format: the record is refused by name, and nothing outside is opened.

Each format gets the same list of hostile paths beside a good one. What no file can be called is a missing file, which
the index then says.
"""

from __future__ import annotations

import csv
import io
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.formats import read_folders, read_kinetics, read_source, read_ucf101, read_video_mme, write
from tests.helpers.tars import write_tar
from vft.common.errors import UserError
from vft.common.types import MediaKind, MediaRef, Sample
from vft.data import formats
from vft.data.formats import kinetics, video_mme
from vft.data.media.errors import MediaError
from vft.data.media.index import build
from vft.data.media.video import scan_file
from vft.data.records.record import Records
from vft.data.streaming.archives import members

SAID = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
ANSWER = {"role": "assistant", "content": "A cat."}


# ------------------------------------------------------------------------------------------------ a record a format


def asked(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ANSWER], **more}


CLIP = {"label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]}
RECORDS: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "messages": ("messages", lambda name: asked("<video>What?", videos=[name])),
    "typed parts": ("messages", lambda name: asked([{"type": "video_url", "video_url": {"url": name}}])),
    "frames": ("messages", lambda name: asked([{"type": "video", "video": ["good.jpg", name]}])),
    "llava_video": ("llava_video", lambda name: {"conversations": SAID, "video": name}),
    "data_source": (
        "llava_video",
        lambda name: {"conversations": SAID, "video": "only-there.mp4", "data_source": name},
    ),
    "llava_instruct": ("llava_instruct", lambda name: {"conversations": SAID, "image": name}),
    "story": ("story", lambda name: {"video": name, "text": "A cat."}),
    "story pictures": ("story", lambda name: {"images": ["good.jpg", name], "text": "A cat."}),
    "ssv2": ("ssv2", lambda name: {"id": name, **CLIP}),
}
"""The format of a JSON list, and the record that names a file in it."""
FORMATS = (*RECORDS, "ucf101", "kinetics", "video_mme")


def read_names(format: str, root: Path, names: list[str]) -> Records:
    """A list that names these files, in a format."""
    if format == "ucf101":
        (root / "classInd.txt").write_text("1 good\n2 ..\n")
        return read_ucf101(write(root / "trainlist01.txt", "".join(f"{name}\n" for name in names)), root)
    if format == "kinetics":
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow([*kinetics.COLUMNS, "split"])
        table.writerows([["yoga", name, 0, 10, "val"] for name in names])
        return read_kinetics(write(root / "val.csv", text.getvalue()), root)
    if format == "video_mme":
        (root / "data").mkdir(exist_ok=True)
        row = dict.fromkeys(video_mme.TEXTS, "x") | {"options": ["A. 1", "B. 2"], "answer": "A"}
        path = root / "mme.parquet"
        pq.write_table(pa.Table.from_pylist([row | {"videoID": name} for name in names]), path)
        return read_video_mme(path, root, subtitles=True)
    own, record = RECORDS[format]
    write(root / "labels.json", {"Holding something": "0"})
    return read_source(own, write(root / "list.json", [record(name) for name in names]), root)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data beside a secret, with links that lead there, a pipe and a socket."""
    root = tmp_path / "data"
    (root / "good").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.mkdir()
    for suffix in (".mp4", ".jpg", ".webm", "_000000_000010.mp4", ".srt"):
        (secret / f"file{suffix}").write_bytes(b"secret")
    (secret / "only-there.mp4").write_bytes(b"secret")
    (root / "good.jpg").write_bytes(b"x")
    (root / "out").symlink_to(secret)
    (root / "up").symlink_to("..")
    (root / "round").symlink_to("round")
    for suffix in ("", ".mp4", ".webm", ".jpg", "_000000_000010.mp4"):
        (root / f"linked{suffix}").symlink_to(secret / f"file{suffix or '.mp4'}")
        (root / f"zero{suffix}").symlink_to("/dev/zero")
        os.mkfifo(root / f"pipe{suffix}")
        monkeypatch.chdir(root)  # a socket's name may have 108 characters at most
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"socket{suffix}")
        for kind in ("linked", "zero", "pipe", "socket"):
            os.link(root / f"{kind}{suffix}", root / "good" / f"{kind}{suffix}", follow_symlinks=False)
    return root


def hostile_names(root: Path) -> list[str]:
    """Each leads out of the folder, to what is no file, or to another host."""
    secret = root.parent / "secret"
    return [
        *("../secret/file.mp4", "good/../../secret/file.mp4", "./.././secret/file.jpg", "../secret/file"),
        *("../../secret/file", "../../secret/file.mp4", "good/../../../secret/file"),
        *(f"{secret}/file.mp4", f"{secret}/file", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/environ"),
        *("out/file.mp4", "out/file", "up/secret/file.jpg", "linked.mp4", "linked", "zero", "zero.mp4"),
        *("pipe", "pipe.mp4", "socket", "socket.mp4"),
        *("http://127.0.0.1:9/a.mp4", "https://x/a.mp4", "HTTPS://x/a.mp4", "s3://bucket/a.mp4", "hf://datasets/a/b"),
        *(f"file://{secret}/file.mp4", "file:a.mp4", "data:video/mp4;base64,AAAA", "ftp://x/a", "rtsp://x/a"),
        *("concat:a|b", "gs://b/a", "", "\0", "good\0.mp4", "../secret/file.mp4\0.jpg"),
    ]


MISSING = (
    "x" * 300,
    "y/" * 3000 + "a.mp4",
    "C:\\Windows\\a.mp4",
    "..\\secret\\file.mp4",
    "․․/secret/file.mp4",
    "~/a.mp4",
)
MISSING += (
    "‥/secret/file.mp4",
    "．．／secret／file.mp4",
    "%2e%2e/secret/file.mp4",
    "$HOME/a.mp4",
    "round",
    "\u202e4pm.a",
)
"""No way out: two dots that are other characters, and what a shell would make something of."""


def paths_of(sample: Sample) -> list[Path]:
    refs = [part for turn in sample.turns for part in turn.parts if isinstance(part, MediaRef)]
    return [path for ref in refs for path in (ref.path if isinstance(ref.path, tuple) else (ref.path,))]


@pytest.mark.parametrize("name", FORMATS)
def test_paths_that_lead_elsewhere(root: Path, tmp_path: Path, name: str) -> None:
    names = [one for one in hostile_names(root) if name != "ucf101" or "\0" not in one]
    if name == "ucf101":
        names = [one if one.startswith("../") else f"good/{one}" for one in names]
    samples, bad = read_names(name, root, names)
    assert len(samples) + len(bad) == len([one for one in names if name != "ucf101" or one.strip()])
    for one in bad:
        line = str(one)
        assert len(line.splitlines()) == 1 and one.field and one.origin.rpartition(":")[2].isdecimal(), line
    # A format that writes a folder before or a suffix behind the name makes a file inside of some: it isn't there.
    missing = [path for sample in samples for path in paths_of(sample) if path.name != "good.jpg"]
    assert all(path.is_relative_to(root.resolve()) and not path.exists() for path in missing), missing
    index = build([MediaRef("video", path) for path in missing], tmp_path / "cache", 1, 30.0, show_progress=False)
    for path in missing:
        with pytest.raises(MediaError):
            index.info(MediaRef("video", path))
    print(f"{name}: {len(bad)} of {len(names)} hostile paths refused by record, {len(missing)} no file")
    assert len(bad) >= 6


@pytest.mark.parametrize("name", FORMATS)
def test_paths_that_are_no_file(root: Path, name: str) -> None:
    names = [f"good/{one}" if name == "ucf101" else one for one in MISSING]
    samples, bad = read_names(name, root, names)
    assert len(samples) + len(bad) == len(names)
    for sample in samples:
        assert all(path.is_relative_to(root.resolve()) for path in paths_of(sample))


def test_folders_of_clips_with_links_pipes_and_sockets(root: Path) -> None:
    samples, bad = read_folders(root, root)
    assert {path for sample in samples for path in paths_of(sample)} <= {root / "good.jpg"}  # through `up`, back in
    assert {one.origin.rpartition("/")[2] for one in bad} >= {"linked.mp4", "zero.mp4", "pipe.mp4", "socket.mp4"}
    (root / "good" / "inner").symlink_to(root.parent / "secret")  # a folder that is a link isn't entered
    assert len(read_folders(root, root)[1]) == len(bad)


def test_a_name_in_a_record_is_never_opened_as_a_url(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket is made, whatever the record says."""
    made: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: made.append(address))
    for format in FORMATS:
        read_names(
            format, root, ["good/http://127.0.0.1:9/a.mp4", "http://127.0.0.1:9/a.mp4", "hf://datasets/a/b/c.mp4"]
        )
    assert made == []


# --------------------------------------------------------------------------------------------------- lists and tables


def test_lists_that_are_pipes(root: Path) -> None:
    """Whoever opened one would wait for ever."""
    for name in ("list.json", "val.csv", "trainlist01.txt", "labels.json", "classInd.txt", "classes.txt", "a.parquet"):
        os.mkfifo(root / name)
    lists = [*dict.fromkeys((own, "list.json") for own, _ in RECORDS.values()), ("kinetics", "val.csv")]
    lists += [("ucf101", "trainlist01.txt"), ("video_mme", "a.parquet"), ("llava_video", ""), ("llava_instruct", "")]
    for format, name in lists:
        with pytest.raises(UserError) as caught:
            read_source(format, root / name, root)
        assert str(root) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_archives_that_are_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar"):
        list(members(str(tmp_path / "a.tar")))


# -------------------------------------------------------------------------------------------------- after the indexing


@pytest.mark.parametrize("medium", ["video", "image"])
def test_a_clip_that_becomes_something_else(tmp_path: Path, medium: MediaKind) -> None:
    """Between the index and the decoder: refused, neither followed nor waited for (see odd_clips.py too)."""
    clip = tmp_path / "a.mp4"
    for become in (lambda: clip.symlink_to("/dev/zero"), lambda: os.mkfifo(clip)):
        become()
        with pytest.raises(MediaError, match=str(clip)) as caught:
            scan_file(medium, clip, False)
        assert caught.value.reason == "not_a_file"
        clip.unlink()


# ------------------------------------------------------------------------------------------------------------ archives


def test_names_in_archives(root: Path, tmp_path: Path) -> None:
    """Members are copied under names of our own; records find them by name alone, and open nothing else."""
    names = ["../up.mp4", f"{root}/abs.mp4", "x/../../up2.mp4", "a\0b.mp4", "pipe.mp4", "http://x/a.mp4"]
    files = [(name.replace("\0", "_"), b"clip") for name in names]
    location, spool = tmp_path / "shards", tmp_path / "spool"
    spool.mkdir()
    write_tar(location / "a.tar", files)
    records = [{"id": str(i), "video": name, "conversations": SAID} for i, (name, _) in enumerate(files)]
    records += [{"id": "out", "video": str(root.parent / "secret" / "file.mp4"), "conversations": SAID}]
    (location / "a.json").write_text(json.dumps(records))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(spool)}
    archives = formats.find("llava_video").open_archives(str(location))
    groups = list(archives.clips(archives.shards[0], 0, spool, lambda number: True))
    found = [path for group in groups for sample in group.samples for path in paths_of(sample)]
    assert len(found) == len(files) and all(path.parent == spool for path in found)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(spool)} == before
