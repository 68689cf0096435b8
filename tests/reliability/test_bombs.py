"""Archives and tables that are small on disk and without end when read: refused under caps, nothing written outside.

Where names, links and cut-off archives are concerned see tests/unit/data/test_archives.py; giant headers of weights
are in test_hostile_models.py.
"""

from __future__ import annotations

import gzip
import resource
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.formats import (
    read_llava_instruct,
    read_llava_video,
    read_messages,
    read_ssv2,
    read_story,
    read_video_mme,
)
from tests.helpers.tars import write_entries, write_tar
from vft.common.errors import UserError
from vft.data.formats import pe_video, video_mme
from vft.data.streaming import archives
from vft.data.streaming.archives import DamagedArchive, copy_clips, members

GIB = 1 << 30


def entry(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    one = tarfile.TarInfo(name)
    one.size, one.type = size, kind
    for key, value in fields.items():
        setattr(one, key, value)
    return one


def damage_of(archive: Path, spool: Path, at_most: int = 2) -> str:
    """The one line with which reading ends, within `at_most` members, hardly any memory, and nothing left in `spool`
    but what came before."""
    spool.mkdir(exist_ok=True)
    outside = {path for path in spool.parent.rglob("*") if not path.is_relative_to(spool)}
    number = 0
    tracemalloc.start()
    try:
        with pytest.raises(DamagedArchive) as caught:
            for clip in copy_clips(str(archive), 0, spool, lambda name: name):
                number += 1
                clip.remove()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert number <= at_most and list(spool.iterdir()) == []
    assert {path for path in spool.parent.rglob("*") if not path.is_relative_to(spool)} == outside
    line = str(caught.value)
    assert line.startswith(str(archive)) and len(line.splitlines()) == 1
    return line


def test_members_beyond_the_cap(tmp_path: Path) -> None:
    """By their own header, before anything is copied."""
    for size in (archives.MAX_MEMBER_BYTES + 1, 1 << 60):
        path = tmp_path / "a.tar"
        path.write_bytes(entry("a.mp4", size).tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        assert "too large" in damage_of(path, tmp_path / "spool", 0)


def sparse_entry(real_size: int) -> bytes:
    """GNU's old form: a member of no bytes that stands for any number of zeros."""
    block = bytearray(entry("a.mp4", 0, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"%011o\0" % real_size, b"%011o\0" % 0
    block[483:495] = b"%011o\0" % real_size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_sparse_members(tmp_path: Path) -> None:
    (tmp_path / "old.tar").write_bytes(sparse_entry(4 * GIB) + bytes(1024))
    assert "sparse" in damage_of(tmp_path / "old.tar", tmp_path / "spool", 0)
    headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40), "GNU.sparse.numblocks": "1"}
    write_entries(tmp_path / "new.tar", [(entry("a.mp4", pax_headers=headers), b"")], format=tarfile.PAX_FORMAT)
    assert "sparse" in damage_of(tmp_path / "new.tar", tmp_path / "spool", 0)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_remarks_that_would_fill_the_memory(tmp_path: Path, kind: bytes) -> None:
    """tarfile reads a long name whole: of zeros, a gigabyte packs to one megabyte."""
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(entry("x", GIB, kind).tobuf(tarfile.GNU_FORMAT))
        for _ in range(128):
            file.write(bytes(1 << 20))
    assert "remarks" in damage_of(path, tmp_path / "spool", 0)


def test_remarks_on_remarks(tmp_path: Path) -> None:
    """Each is read within the one before."""
    content = entry("x", 0, tarfile.XGLTYPE).tobuf(tarfile.GNU_FORMAT) * 5000
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    assert damage_of(tmp_path / "a.tar", tmp_path / "spool", 0)


@pytest.fixture
def small_suspicion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios are looked at from 8 MB on, so that the test needs no gigabyte."""
    monkeypatch.setattr(archives, "SUSPECT_BYTES", 8 << 20)


def zeros(count: int) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for number in range(count):
        yield entry(f"{number}.mp4", 1 << 20), bytes(1 << 20)


@pytest.mark.usefixtures("small_suspicion")
@pytest.mark.parametrize("skipped", [False, True])
def test_what_unpacks_a_thousandfold(tmp_path: Path, skipped: bool) -> None:
    """Whether its members are copied or passed over."""
    path = write_entries(tmp_path / "a.tar.gz", zeros(48))
    assert path.stat().st_size < 100_000
    if not skipped:
        assert f"{archives.MAX_RATIO} times" in damage_of(path, tmp_path / "spool", 20)
        return
    seen = 0
    with pytest.raises(DamagedArchive, match="times its size"):
        for _ in members(str(path)):
            seen += 1
    assert seen <= 20
    with pytest.raises(DamagedArchive, match="times its size"):
        list(members(str(path), place=40 << 20))


@pytest.mark.usefixtures("small_suspicion")
def test_one_member_that_unpacks_a_thousandfold(tmp_path: Path) -> None:
    write_entries(tmp_path / "a.tar.gz", [(entry("a.mp4", 64 << 20), bytes(64 << 20))])
    assert "times its size" in damage_of(tmp_path / "a.tar.gz", tmp_path / "spool", 1)  # it is cut off


@pytest.mark.usefixtures("small_suspicion")
def test_text_that_packs_well_is_no_bomb(tmp_path: Path) -> None:
    text = "".join(f"A dog of {number * 7919 % 1000} catches a ball.\n" for number in range(400_000)).encode()
    path = write_tar(tmp_path / "a.tar.gz", {"a.json": text})
    assert len(text) > archives.SUSPECT_BYTES and path.stat().st_size * 4 < len(text)
    assert [member.read() for member in members(str(path))] == [text]


def test_more_members_of_one_video_than_any_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILES", 50)
    spool = tmp_path / "spool"
    spool.mkdir()
    write_tar(tmp_path / "a.tar", ((f"{number}.jpg", b"x") for number in range(60)))
    with pytest.raises(DamagedArchive, match="more than 50 members of 'one'"):
        for clip in copy_clips(str(tmp_path / "a.tar"), 0, spool, lambda name: "one"):
            assert clip.is_cut_off and len(clip.files) == 50


def test_a_record_in_an_archive_that_is_too_large(tmp_path: Path) -> None:
    text = b'{"human_caption": "' + b"a" * pe_video.MAX_RECORD_BYTES + b'"}'
    write_tar(tmp_path / "a.tar", {"a.mp4": b"x", "a.json": text})
    (group,) = pe_video.read_clips(str(tmp_path / "a.tar"), 0, tmp_path)
    assert group.samples == [] and "bytes, more than" in str(group.bad[0])


# ----------------------------------------------------------------------------------------------------------- nesting

READERS = {
    "messages": read_messages,
    "llava_video": read_llava_video,
    "llava_instruct": read_llava_instruct,
    "story": read_story,
    "ssv2": read_ssv2,
}
DEPTHS = (100, 500, *range(900, 1010, 5), 100_000)
FIELDS = ("messages", "conversations", "video", "image", "images", "id", "segments", "text", "template", "other")


@pytest.mark.parametrize("name", READERS)
def test_nesting_of_any_depth(tmp_path: Path, name: str) -> None:
    """From what the reader takes in its stride to what its messages, and then the decoder, can't follow."""
    (tmp_path / "labels.json").write_text('{"Holding something": "0"}')
    good = '{"id": "g", "template": "x", "text": "x"}'
    lines = 0
    for opening, closing in ("[]", ('{"a":', "}")):
        for depth in DEPTHS:
            value = opening * depth + ("1" if closing == "}" else "") + closing * depth
            records = [good, *(f'{{"{field}": {value}}}' for field in FIELDS)] if depth < 5000 else [good, value]
            (tmp_path / "a.jsonl").write_text("\n".join(records))
            samples, bad = READERS[name](tmp_path / "a.jsonl", tmp_path)
            assert len(samples) + len(bad) == len(records)
            for one in bad:
                assert len(str(one).splitlines()) == 1 and len(str(one)) < 600, one
            lines += len(records)
    print(f"{name}: {lines} nested records, each a sample or one line")


def test_nesting_in_an_archive(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for depth in DEPTHS:
        files[f"{depth}.mp4"] = b"x"
        files[f"{depth}.json"] = b'{"human_caption": ' + b"[" * depth + b"]" * depth + b"}"
    write_tar(tmp_path / "a.tar", files)
    groups = list(pe_video.read_clips(str(tmp_path / "a.tar"), 0, tmp_path))
    assert [len(group.bad) for group in groups] == [1] * (len(files) // 2)


# ----------------------------------------------------------------------------------------------------------- Parquet


def test_a_table_of_absurdly_many_rows(tmp_path: Path) -> None:
    """A column that says the same again and again takes no place on disk, and all of the memory."""
    row = dict.fromkeys(video_mme.TEXTS, "x") | {"options": ["A. 1", "B. 2"], "answer": "A"}
    path = tmp_path / "a.parquet"
    names = [*video_mme.TEXTS, "options"]
    count = video_mme.MAX_ROWS + 1
    columns = [pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [str(row[name])]) for name in names]
    pq.write_table(pa.table(dict(zip(names, columns, strict=True))), path)
    assert path.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"a\.parquet: can't be read .*{count} rows, more than {video_mme.MAX_ROWS}"):
        read_video_mme(path, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB, of datasets' import in the main


@pytest.mark.parametrize("rows", [2**31 + 1, 2**62, -1])
def test_a_table_that_lies_about_its_rows(tmp_path: Path, rows: int) -> None:
    """In the footer, in Thrift's variable-length numbers, where the true count is a number as long."""
    path = tmp_path / "a.parquet"
    row = dict.fromkeys(video_mme.TEXTS, "x") | {"options": ["A. 1", "B. 2"], "answer": "A"}
    true = 77
    pq.write_table(pa.Table.from_pylist([row] * true), path)
    content = path.read_bytes()
    zigzag = rows << 1 if rows >= 0 else -2 * rows - 1
    varint = b""
    while True:
        varint, zigzag = varint + bytes([zigzag & 127 | (128 if zigzag > 127 else 0)]), zigzag >> 7
        if not zigzag:
            break
    footer = int.from_bytes(content[-8:-4], "little")
    start = len(content) - 8 - footer
    old = bytes([true << 1 & 127 | 128, true << 1 >> 7])
    changed = content[start:-8].replace(old, varint)
    assert changed != content[start:-8]
    path.write_bytes(content[:start] + changed + len(changed).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(UserError) as caught:
        read_video_mme(path, tmp_path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
