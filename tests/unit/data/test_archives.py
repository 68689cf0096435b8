"""Tar archives read in sequence: every member, from every place on, and what comes before any damage, never more.

What the archives hold is known, for the tests write them with the standard library; cuts and garbled bytes fall
everywhere.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.formats import write
from tests.helpers.tars import cut, plain, write_entries, write_tar
from vft.common.errors import UserError
from vft.data.streaming.archives import DamagedArchive, Member, copy_clips, list_files, members, read_bytes

KINDS = ["a.tar", "a.tar.gz", "a.tgz"]
CONTENTS = {
    "a.mp4": random.Random(1).randbytes(1300),
    "a.json": b"{}",
    "b/empty.mp4": b"",
    "b/block.mp4": random.Random(2).randbytes(512),
    "b/more.mp4": random.Random(3).randbytes(513),
    "c.json": b"text " * 300,
}
LONG = {f"{'deep/' * 30}{number}{'n' * 120}.mp4": bytes([number]) * 700 for number in range(4)}


def read_all(archive: Path | str, place: int = 0) -> Iterator[tuple[str, bytes, int]]:
    for member in members(str(archive), place):
        yield member.name, member.read(), member.place


def until_damage(archive: Path, place: int = 0) -> tuple[list[tuple[str, bytes, int]], DamagedArchive | None]:
    """What can be read, and how it ended; any other exception than the archive's own passes through."""
    found = []
    try:
        for one in read_all(archive, place):
            found.append(one)
    except DamagedArchive as error:
        assert str(error).startswith(str(archive)) and "\n" not in str(error)
        return found, error
    return found, None


def offsets(archive: Path) -> list[tuple[int, int]]:
    """Where each member's header begins and its content ends, in the uncompressed tar, by the standard library."""
    with tarfile.open(archive) as tar:
        return [(entry.offset, entry.offset_data + entry.size) for entry in tar.getmembers()]


# ------------------------------------------------------------------------------------------------ whole archives


@pytest.mark.parametrize("files", [CONTENTS, LONG], ids=["sizes", "long names"])
@pytest.mark.parametrize(
    "options",
    [
        {"format": tarfile.GNU_FORMAT},
        {"format": tarfile.PAX_FORMAT},
        {"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "of all"}},
    ],
    ids=["gnu", "pax", "pax global"],
)
@pytest.mark.parametrize("name", KINDS)
def test_every_member_from_every_place_on(
    tmp_path: Path, name: str, options: dict[str, object], files: dict[str, bytes]
) -> None:
    """A place that pointed at a content, or behind a long name's own header, would lose or rename the member."""
    archive = write_tar(tmp_path / name, files, **options)
    found = list(read_all(archive))
    assert [(name, content) for name, content, _ in found] == list(files.items())
    places = [place for _, _, place in found]
    assert places == [start for start, _ in offsets(archive)]
    for number, place in enumerate(places):
        assert list(read_all(archive, place)) == found[number:]


def test_what_lies_before_a_place_is_not_read(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", CONTENTS)
    found = list(read_all(archive))
    content = bytearray(archive.read_bytes())
    content[: found[3][2]] = b"\xff" * found[3][2]
    archive.write_bytes(content)
    assert list(read_all(archive, found[3][2])) == found[3:]


def test_members_that_are_not_read(tmp_path: Path) -> None:
    """Going on without reading a content, or having read a part of it, leads to the next member all the same."""
    for name in KINDS:
        archive = write_tar(tmp_path / name, CONTENTS)
        assert [member.name for member in members(str(archive))] == list(CONTENTS)
        assert [member.read(100) for member in members(str(archive))] == [c[:100] for c in CONTENTS.values()]


def test_a_gzip_file_in_several_parts(tmp_path: Path) -> None:
    """As parallel compressors write it; reading the first part alone would look like the archive's end."""
    archive = write_tar(tmp_path / "a.tar", CONTENTS)
    content = archive.read_bytes()
    parts = [content[i : i + 700] for i in range(0, len(content), 700)]
    (tmp_path / "b.tar.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    assert list(read_all(tmp_path / "b.tar.gz")) == list(read_all(archive))


def test_names_as_tar_writes_them(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", {"./x/a.mp4": b"1", "x/./b.mp4": b"2", "été/名.mp4": b"3"})
    assert [name for name, _, _ in read_all(archive)] == ["x/a.mp4", "x/./b.mp4", "été/名.mp4"]


def test_memory_stays_flat(tmp_path: Path) -> None:
    """tarfile keeps the header of every member it has seen, a gigabyte of them in the end."""
    archive = write_tar(tmp_path / "a.tar", ((f"{i}.mp4", b"x") for i in range(1500)))
    reading = read_all(archive)
    tracemalloc.start()
    try:
        for _ in range(300):
            next(reading)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1100):
            next(reading)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 50_000  # 1,100 headers would be 20 times as much


def test_a_large_member_is_copied_in_pieces(tmp_path: Path) -> None:
    big = bytes(24 << 20)
    archive = write_tar(tmp_path / "a.tar.gz", {"big.mp4": big, "end.mp4": b"x"}, compresslevel=1)
    tracemalloc.start()
    try:
        clips = list(copy_clips(str(archive), 0, tmp_path, lambda name: name))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [next(iter(clip.files.values())).read_bytes() for clip in clips] == [big, b"x"]
    assert peak < 8 << 20


# ------------------------------------------------------------------------------------------------------ damage


def cuts_of(length: int) -> list[int]:
    """Offsets to cut at: around every block boundary, and in between."""
    around = {block + step for block in range(0, length, 512) for step in (-1, 0, 1)}
    return sorted(n for n in around | set(range(0, length, 173)) | {length - 8, length - 4} if 0 <= n < length)


@pytest.mark.parametrize("files", [CONTENTS, LONG], ids=["sizes", "long names"])
@pytest.mark.parametrize("name", KINDS[:2])
def test_cut_off_anywhere(tmp_path: Path, name: str, files: dict[str, bytes]) -> None:
    """All members whose content is there, and then the damage: it is never taken for the archive's end."""
    archive = write_tar(tmp_path / "whole" / name, files, format=tarfile.GNU_FORMAT)
    found, ends = list(read_all(archive)), [end for _, end in offsets(archive)]
    content, length = archive.read_bytes(), len(plain(archive))
    end_of_members = len(plain(archive).rstrip(b"\0"))
    broken = tmp_path / name
    for at in cuts_of(len(content)):
        broken.write_bytes(content[:at])
        # How much of the tar is left, found without the gzip module.
        left = at if name == "a.tar" else len(zlib.decompressobj(31).decompress(content[:at]))
        got, error = until_damage(broken)
        assert got == found[: sum(end <= left for end in ends)], at
        if name == "a.tar":
            # The first block of zeros says that this was all.
            assert (error is None) == (at >= -(-end_of_members // 512) * 512 + 512), at
        else:
            assert error is not None, at
    assert length > end_of_members + 1024  # so that cuts fell behind the end, too


@pytest.mark.parametrize("name", KINDS[:2])
def test_cut_off_and_entered_at_a_place(tmp_path: Path, name: str) -> None:
    archive = write_tar(tmp_path / name, CONTENTS)
    found = list(read_all(archive))
    cut(archive, len(archive.read_bytes()) * 3 // 5)
    got, error = until_damage(archive)
    assert error is not None and 0 < len(got) < len(found)
    assert until_damage(archive, got[-1][2])[0] == got[-1:]
    for place in (found[-1][2], 10**7):  # behind the cut
        rest, error = until_damage(archive, place)
        assert rest == [] and error is not None


@pytest.mark.parametrize("name", KINDS[:2])
def test_garbled_bytes(tmp_path: Path, name: str) -> None:
    """A few bytes overwritten anywhere: members before them are whole, and it ends in damage or not at all."""
    archive = write_tar(tmp_path / "whole" / name, {**CONTENTS, **LONG})
    found, ends = list(read_all(archive)), [end for _, end in offsets(archive)]
    content, chance = archive.read_bytes(), random.Random(7)
    broken = tmp_path / name
    damaged = 0
    for _ in range(150):
        at, changed = chance.randrange(len(content)), bytearray(content)
        changed[at : at + 3] = chance.randbytes(3)
        broken.write_bytes(changed)
        got, error = until_damage(broken)
        if name == "a.tar":
            whole = sum(end <= at for end in ends)
            assert got[:whole] == found[:whole], at
        damaged += error is not None
    # A byte of a content can't be missed in a plain tar; of a compressed one hardly any goes unnoticed.
    assert damaged > (20 if name == "a.tar" else 120)


def header(name: str, size_field: bytes) -> bytes:
    """A member's header with this in the field of its size, and a checksum that is right."""
    entry = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    entry[124:136] = size_field
    entry[148:156] = b" " * 8
    entry[148:156] = b"%06o\0 " % sum(entry)
    return bytes(entry)


@pytest.mark.parametrize(
    "size_field",
    [
        b"\xff" * 10 + b"\xfc\x00",
        b"\xff" * 12,
        b"\x80" + b"\xff" * 11,
        b"\x80" + b"\0" * 3 + b"\x7f" * 8,
        b"abcdefghijk\0",
    ],
    ids=["-1024", "-1", "2^88", "2^63", "no number"],
)
@pytest.mark.parametrize("name", KINDS[:2])
def test_absurd_sizes(tmp_path: Path, name: str, size_field: bytes) -> None:
    """A negative one would lead back to its own header, for ever."""
    content = tarfile.TarInfo("a.mp4").tobuf() + header("b.mp4", size_field) + bytes(2048)
    archive = tmp_path / name
    archive.write_bytes(content if name == "a.tar" else gzip.compress(content))
    names = []
    with pytest.raises((DamagedArchive, UserError)) as caught:
        for member in members(str(archive)):
            names.append(member.name)
            assert len(names) < 3
            for _ in range(10):
                member.read(1000)
    assert names[0] == "a.mp4" and "\n" not in str(caught.value)


NO_ARCHIVES = {
    "empty": b"",
    "letter": b"x",
    "text": b"no archive at all" * 100,
    "gzipped text": gzip.compress(b"no archive", mtime=0),
    "half a header": b"\x1f\x8b",
}


@pytest.mark.parametrize("content", NO_ARCHIVES.values(), ids=NO_ARCHIVES.keys())
@pytest.mark.parametrize("name", KINDS[:2])
def test_no_archive_at_all(tmp_path: Path, name: str, content: bytes) -> None:
    archive = tmp_path / name
    archive.write_bytes(content)
    found, error = until_damage(archive)
    assert found == [] and error is not None and "download it again" in str(error)


@pytest.mark.parametrize(("name", "packed"), [("a.tar", True), ("a.tar.gz", False), ("a.tgz", False)])
def test_its_first_bytes_say_whether_it_is_packed(tmp_path: Path, name: str, packed: bool) -> None:
    """Not the name that someone gave it; from its second member on, too."""
    write_tar(tmp_path / "x.tar", {"BZh.mp4": b"one", "PK.mp4": b"two"})
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    found = [(one.name, one.place, one.read()) for one in members(str(tmp_path / name))]
    assert [(one, text) for one, _, text in found] == [("BZh.mp4", b"one"), ("PK.mp4", b"two")]
    assert [one.read() for one in members(str(tmp_path / name), found[1][1])] == [b"two"]


@pytest.mark.parametrize("kind", ["bzip2", "xz", "zip"])
def test_what_is_packed_otherwise_is_named(tmp_path: Path, kind: str) -> None:
    """Fetching it again would not help."""
    write_tar(tmp_path / "x.tar", {"a.mp4": b"one"})
    content = (tmp_path / "x.tar").read_bytes()
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "a.tar", "w") as file:
            file.writestr("a.mp4", b"one")
    else:
        (tmp_path / "a.tar").write_bytes(bz2.compress(content) if kind == "bzip2" else lzma.compress(content))
    with pytest.raises(DamagedArchive, match=f"is packed by {kind}, which is not read; pack it as .tar or .tar.gz"):
        next(members(str(tmp_path / "a.tar")))


# --------------------------------------------------------------------------------------------- copying members out


def test_nothing_is_written_outside_the_spool(tmp_path: Path) -> None:
    """Whatever members are called, and links and devices make no files at all."""
    spool = tmp_path / "spool"
    spool.mkdir()
    (tmp_path / "secret").write_text("mine")
    names = ["../up.mp4", "/tmp/../abs.mp4", "x/../../../up2.mp4", "ok.mp4", f"long.{'e' * 150}", "none"]
    entries = []
    for name in names:
        entry = tarfile.TarInfo(name)
        entry.size = len(name)
        entries.append((entry, name.encode()))
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    for kind in kinds:
        entry = tarfile.TarInfo(f"special{kind!r}.mp4")
        entry.type, entry.linkname = kind, str(tmp_path / "secret")
        entries.append((entry, b""))
    archive = write_entries(tmp_path / "a.tar", entries)
    before = set(tmp_path.rglob("*"))
    clips = list(copy_clips(str(archive), 0, spool, lambda name: name))
    assert [clip.key for clip in clips] == names
    files = [path for clip in clips for path in clip.files.values()]
    assert [path.read_bytes().decode() for path in files] == names
    assert set(tmp_path.rglob("*")) - before == set(files) and len(set(files)) == len(files)
    assert all(path.parent == spool and not path.is_symlink() for path in files)
    assert (tmp_path / "secret").read_text() == "mine"
    assert [path.suffix for path in files] == [".mp4"] * 4 + ["", ""]  # what FFmpeg may go by


def key_of(name: str) -> str | None:
    """Of these tests: what comes before the dot; nothing where that begins with x."""
    return None if name.startswith("x") else name.partition(".")[0]


def test_members_that_belong_together(tmp_path: Path) -> None:
    """Of one key and one behind another; others between them, and a member that comes twice, do no harm."""
    spool = tmp_path / "spool"
    spool.mkdir()
    names = ["a.mp4", "x.txt", "a.json", "x2.txt", "b.mp4", "b.mp4", "a.json"]
    files = [(name, f"{number}".encode()) for number, name in enumerate(names)]
    archive = write_tar(tmp_path / "s.tar", files)
    found = []
    for clip in copy_clips(str(archive), 0, spool, key_of):
        found.append((clip.key, {name: path.read_text() for name, path in clip.files.items()}, clip.place))
        assert not clip.is_cut_off and clip.title("n") == "s.tar/n"
        assert len(list(spool.iterdir())) <= 2  # of the next clip nothing is there yet
        clip.remove()
    starts = [start for start, _ in offsets(archive)]
    assert found == [
        ("a", {"a.mp4": "0", "a.json": "2"}, starts[0]),
        ("b", {"b.mp4": "5"}, starts[4]),
        ("a", {"a.json": "6"}, starts[6]),
    ]
    assert not list(spool.iterdir())
    assert [clip.place for clip in copy_clips(str(archive), starts[4], spool, key_of)] == [starts[4], starts[6]]
    found = [
        (clip.place, clip.is_skipped, len(clip.files)) for clip in copy_clips(str(archive), 0, spool, key_of, bool)
    ]
    assert found == [(starts[0], True, 0), (starts[4], False, 1), (starts[6], False, 1)]


@pytest.mark.parametrize("name", KINDS[:2])
def test_copies_of_an_archive_that_is_cut_off(tmp_path: Path, name: str) -> None:
    """Runs before the one that the cut falls into are whole, that one says so, and half a member is no file."""
    files = {f"{i // 2}.{'mp4' if i % 2 else 'json'}": random.Random(i).randbytes(900) for i in range(8)}
    archive = write_tar(tmp_path / "whole" / name, files)
    content, broken, ends = archive.read_bytes(), tmp_path / name, [end for _, end in offsets(archive)]
    most = 0
    for at in range(0, ends[-1] + 100 if name == "a.tar" else len(content), 331):
        broken.write_bytes(content[:at])
        left = at if name == "a.tar" else len(zlib.decompressobj(31).decompress(content[:at]))
        spool = tmp_path / f"spool{at}"
        spool.mkdir()
        clips = []
        with pytest.raises(DamagedArchive):
            for clip in copy_clips(str(broken), 0, spool, key_of):
                clips.append(clip)
        got = {name: path.read_bytes() for clip in clips for name, path in clip.files.items()}
        most = sum(end <= left for end in ends)
        assert list(got.items()) == list(files.items())[:most]
        assert all(len(clip.files) == 2 and not clip.is_cut_off for clip in clips[:-1])
        assert len(list(spool.iterdir())) == len(got)
        assert not clips or clips[-1].is_cut_off
    assert most >= 7


def test_a_spool_that_can_not_be_written(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", CONTENTS)
    with pytest.raises(UserError, match=r"gone: can't be written \(No such file.*free space"):
        list(copy_clips(str(archive), 0, tmp_path / "gone", lambda name: name))


# ------------------------------------------------------------------------------------------ listing and the network


def test_listing(tmp_path: Path) -> None:
    for name in ("b.tar", "a/z.tar.gz", "a/y.tgz", "a/deep/er.tar", "c.json", "d.tar.txt", "with::colons [1]/e.tar"):
        write(tmp_path / name, name)
    (tmp_path / "link.tar").symlink_to(tmp_path / "b.tar")
    names = ["a/deep/er.tar", "a/y.tgz", "a/z.tar.gz", "b.tar", "link.tar", "with::colons [1]/e.tar"]
    found = list_files(str(tmp_path), (".tar", ".tar.gz", ".tgz"))
    assert found == [str(tmp_path / name) for name in names]
    assert [read_bytes(name) for name in found] == [n.replace("link", "b").encode() for n in names]
    assert list_files(str(tmp_path / "b.tar"), (".tar",)) == [str(tmp_path / "b.tar")]
    odd = tmp_path / "with::colons [1]"
    assert list_files(str(odd), (".tar",)) == [str(odd / "e.tar")]
    with pytest.raises(UserError, match=r"no \.webm or \.avi files there; check data\.root"):
        list_files(str(tmp_path), (".webm", ".avi"))
    with pytest.raises(UserError, match=r"nowhere: no \.tar files there"):
        list_files(str(tmp_path / "nowhere"), (".tar",))


def test_relative_to_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "set" / "a.tar", CONTENTS)
    monkeypatch.chdir(tmp_path)
    (shard,) = list_files("set", (".tar",))
    monkeypatch.chdir("/")
    assert [name for name, _, _ in read_all(shard)] == list(CONTENTS)


def raising(error: Exception) -> Callable[..., bytes]:
    def fail(*_: object) -> bytes:
        raise error

    return fail


class NetworkError(Exception):
    """As the network libraries raise them: no OSError, and of several lines."""


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), NetworkError("timed out\nafter 10 s")])
def test_a_disk_or_network_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """That is no damage of the archive: the clip ends with one line and can go on later."""
    file = io.BytesIO()
    file.read = raising(error)  # type: ignore[method-assign, assignment]
    with pytest.raises(UserError, match=r"^hf://x/a\.tar: can't be read \((timed out|.*Input/output error)\); check"):
        Member("hf://x/a.tar", "a.mp4", 0, file).read()
    archive = write_tar(tmp_path / "a.tar", CONTENTS)
    reading = read_all(archive)
    next(reading)
    monkeypatch.setattr("tarfile._FileInFile.read", raising(error))
    monkeypatch.setattr("tarfile.TarInfo.fromtarfile", raising(error))
    with pytest.raises(UserError, match=r"a\.tar: can't be read"):
        next(reading)


def test_missing_and_unreadable_archives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.tar: can't be opened \(.*No such file"):
        list(members(str(tmp_path / "gone.tar")))
    with pytest.raises(UserError, match=r"gone\.json: can't be opened"):
        read_bytes(str(tmp_path / "gone.json"))


OFFLINE = """
from vft.common.errors import UserError
from vft.data.streaming.archives import list_files, members, read_bytes
where = "hf://datasets/someone/some-set"
asks = (lambda at: list_files(at, (".tar",)), lambda at: list(members(at)), read_bytes)
for ask, name in zip(asks, ("", "/a.tar", "/a")):
    try:
        ask(where + name)
    except UserError as error:
        print(error)
"""


def test_the_hub_while_offline() -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stderr
    for line, what in zip(lines, ("listed", "opened", "opened"), strict=True):
        assert line.startswith("hf://datasets/someone/some-set") and f"can't be {what}" in line and "offline" in line
