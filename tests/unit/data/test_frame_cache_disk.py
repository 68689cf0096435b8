"""Frames kept on disk: damaged files, several writers, little room, folders that can't be used."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.helpers.frames import GIB, cache_in, decoded, files_in, film, loaded, overwrite, plan_for
from tests.helpers.patches import SPEC
from vft.common.types import MediaPlan
from vft.data.media import frame_cache
from vft.data.media.frame_cache import FrameCache
from vft.data.media.patches import decode_resized, frames_of
from vft.data.workers import WorkerPool


@pytest.fixture
def plan(tmp_path: Path) -> MediaPlan:
    return plan_for(film(tmp_path / "clip.mp4"))


# --------------------------------------------------------------------------------------------- damage and two writers


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "header alone": lambda content: content[: frame_cache.HEADER_BYTES],
    "one byte less": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "zeros behind": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    **{
        f"bit {bit} of byte {at}": lambda whole, at=at, bit=bit: (
            whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at:][1:]
        )
        for at, bit in ((0, 0), (31, 7), (32, 0), (35, 3), (36, 0), (5000, 4), (-1, 7))
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_never_served_and_mended(
    plan: MediaPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache, expected = cache_in(tmp_path), decoded(plan)
    loaded(cache, plan)
    (file,) = files_in(cache)
    whole = file.read_bytes()
    for _ in range(2):
        file.write_bytes(DAMAGE[damage](whole))
        assert torch.equal(loaded(cache, plan), expected)
        assert file.read_bytes() == whole
    assert files_in(cache) == [file]
    assert caplog.text.count("held a damaged file, made anew") == 1


def test_another_entry_under_its_name_is_not_served(tmp_path: Path) -> None:
    path, cache = film(tmp_path / "clip.mp4"), cache_in(tmp_path)
    one, other = plan_for(path), plan_for(path, indices=(0, 1, 2, 3))
    loaded(cache, one)
    (first,) = files_in(cache)
    loaded(cache, other)
    (second,) = (file for file in files_in(cache) if file != first)
    first.replace(second)
    assert torch.equal(loaded(cache, other), decoded(other))


def test_the_form_of_a_file(plan: MediaPlan, tmp_path: Path) -> None:
    """Digest, checksum, and the frames as they are, resized by somebody else's hand."""
    cache = cache_in(tmp_path)
    loaded(cache, plan)
    (file,) = files_in(cache)
    digest, size = file.name.split("-")
    content = file.read_bytes()
    assert file.parent.name == digest[:2] and content[:32].hex() == digest and len(content) == int(size)
    frames_TCHW = torch.frombuffer(bytearray(content[36:]), dtype=torch.uint8).view(4, 3, 28, 56)
    assert torch.equal(frames_of(decoded(plan), plan, SPEC), frames_TCHW)


def write_and_read(folder: Path, plan: MediaPlan, times: int) -> int:
    """Run in several processes at once: what of that was read was not whole."""
    digest = frame_cache.digest_of(plan)
    assert digest is not None
    file, damaged = frame_cache.file_of(folder, digest, plan), 0
    frames_TCHW = decode_resized(plan)
    for _ in range(times):
        frame_cache.write(file, digest, frames_TCHW)
        read = frame_cache.read(file, digest, plan)
        damaged += read is None or not torch.equal(read, frames_TCHW)
    return damaged


def test_many_write_the_same_at_once(tmp_path: Path) -> None:
    """Whoever reads meanwhile gets all of it."""
    plan = plan_for(film(tmp_path / "clip.mp4"), (280, 420))
    cache, expected = cache_in(tmp_path), decoded(plan)
    assert cache.folder is not None
    with WorkerPool(4, 120.0) as pool:
        found = [cache.submit(pool, plan, SPEC) for _ in range(16)]
        assert all(torch.equal(one.result(120).pixels_PD, expected) for one in found)
        futures = [pool.submit(write_and_read, cache.folder, plan, 60) for _ in range(4)]
        assert [future.result(120) for future in futures] == [0] * 4
    assert len(files_in(cache)) == 1


# ----------------------------------------------------------------------------------------------------- room on disk

BYTES = frame_cache.HEADER_BYTES + 4 * 3 * 28 * 56
"""Of one entry here."""


def many(folder: Path, count: int) -> list[MediaPlan]:
    return [plan_for(film(folder / f"{i}.mp4", seed=i)) for i in range(count)]


def assert_all_load(cache: FrameCache, plans: list[MediaPlan]) -> None:
    for plan in plans:
        assert torch.equal(loaded(cache, plan), decoded(plan))


def as_in_another_process(cache: FrameCache) -> FrameCache:
    """The same folder, its bytes not counted yet."""
    return FrameCache(cache.folder, cache.limit_bytes)


def test_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only whole entries are added, the limit is reported once, and a run that starts with a full cache uses it."""
    plans = many(tmp_path, 6)
    cache = cache_in(tmp_path, 3 * BYTES + 1)
    for _ in range(2):
        assert_all_load(cache, plans)
    kept = files_in(cache)
    assert len(kept) == 3
    assert sum(file.stat().st_size for file in kept) == 3 * BYTES == frame_cache.count_bytes(tmp_path / "frames")
    assert caplog.text.count("data.cache_gib = ") == caplog.text.count(" is reached, no more is added; raise it") == 1
    assert_all_load(as_in_another_process(cache), plans[::-1])
    assert files_in(cache) == kept
    kept[0].write_bytes(b"")
    assert_all_load(cache, plans)
    assert files_in(cache) == kept and kept[0].stat().st_size == BYTES  # a damaged one is made anew all the same
    kept[1].unlink()  # by the user, to make room; noticed at the next count
    assert_all_load(as_in_another_process(cache), plans[3:])
    assert len(files_in(cache)) == 3


def test_what_others_add_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes fill a cache: the first counts again after a while."""
    plans, cache = many(tmp_path, 6), cache_in(tmp_path, 3 * BYTES)
    loaded(cache, plans[0])
    for plan in plans[1:3]:
        loaded(as_in_another_process(cache), plan)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    assert_all_load(cache, plans)
    assert len(files_in(cache)) == 3


def test_an_entry_larger_than_the_limit(plan: MediaPlan, tmp_path: Path) -> None:
    """What is small still finds its place."""
    cache = cache_in(tmp_path, BYTES)
    large = plan_for(plan.ref.path, (56, 56))  # type: ignore[arg-type]
    assert_all_load(cache, [large, plan])
    assert [file.stat().st_size for file in files_in(cache)] == [BYTES]


def test_only_own_leftovers_are_removed(plan: MediaPlan, tmp_path: Path) -> None:
    """Those of a process killed long ago; nothing that somebody else put there."""
    cache = cache_in(tmp_path)
    assert cache.folder is not None
    names = ("ab/.partial-old", "ab/.partial-young", "ab/notes.txt", "ab/0123-7", "readme", "zz/.partial-old", "abc/x")
    for name in names:
        path = cache.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1234567")
        if "young" not in name:
            os.utime(path, (0, 0))
    loaded(cache, plan)
    assert {str(path.relative_to(cache.folder)) for path in files_in(cache)} >= {*names} - {"ab/.partial-old"}
    assert not (cache.folder / "ab/.partial-old").exists()
    assert frame_cache.count_bytes(cache.folder) == BYTES


def test_it_tells_how_much_there_is(plan: MediaPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = "ab" * 32
    (tmp_path / "frames" / "ab").mkdir(parents=True)
    (tmp_path / "frames" / "ab" / f"{digest}-{3 * GIB // 2}").touch()
    with caplog.at_level("INFO", "vft"):
        for _ in range(3):
            cache_in(tmp_path, 40 * GIB)
    assert caplog.messages == [f"{tmp_path / 'frames'}: 1.5 of 40 GiB of frames"]


# ------------------------------------------------------------------------------------------- folders that can't be used


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own; skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def assert_goes_on(cache: FrameCache, plans: list[MediaPlan], caplog: pytest.LogCaptureFixture, why: str) -> None:
    """Right pixels, and one line for all of it, also out of several workers."""
    caplog.clear()
    with WorkerPool(2, 60.0) as pool:
        for _ in range(2):
            found = [cache.submit(pool, plan, SPEC) for plan in plans]
            for plan, one in zip(plans, found, strict=True):
                assert torch.equal(one.result(60).pixels_PD, decoded(plan))
    (message,) = caplog.messages
    assert message.startswith(f"{cache.folder}: ") and why in message


@pytest.mark.parametrize(
    ("count", "options", "why"),
    [
        (20, "size=256k", "the disk is 95% full, no more is added; free space"),
        (8, "size=1m,nr_inodes=8", "can't be written (No space left on device)"),
    ],
)
def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, options: str, why: str) -> None:
    """Of bytes, or of inodes. Some room is left to others: a checkpoint may have to go there too."""
    plans = many(tmp_path, count)
    with mounted(tmp_path / "disk", options):
        cache = cache_in(tmp_path / "disk")
        assert_goes_on(cache, plans, caplog, why)
        kept = files_in(cache)
        assert all(file.stat().st_size == BYTES for file in kept)
        assert count == 8 or 5 < len(kept) < 14
        status = os.statvfs(tmp_path / "disk")
        assert status.f_bavail > 0.04 * status.f_blocks


def test_a_read_only_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is there is used."""
    plans = many(tmp_path, 4)
    with mounted(tmp_path / "disk", "size=1m"):
        cache = cache_in(tmp_path / "disk")
        loaded(cache, plans[0])
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        first = plans[0].ref.path
        assert isinstance(first, Path)
        expected = decoded(plans[0])
        overwrite(first)
        assert torch.equal(loaded(cache, plans[0]), expected)
        assert_goes_on(cache, plans[1:], caplog, "can't be written (Read-only file system)")


@pytest.mark.parametrize(
    ("name", "mode", "why"),
    [
        ("frames", None, "File exists"),  # a file in the folder's place
        ("", None, "Not a directory"),  # the folder cannot be made
        ("", 0o555, "Permission denied"),  # a folder of others
    ],
)
def test_no_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, mode: int | None, why: str) -> None:
    place = tmp_path / "cache" / name
    if mode is not None:
        if not os.geteuid():
            pytest.skip("root may write everywhere")
        place.mkdir(mode=mode)
    else:
        place.parent.mkdir(exist_ok=True)
        place.write_text("mine")
    assert_goes_on(cache_in(tmp_path / "cache"), many(tmp_path, 3), caplog, f"can't be written ({why})")
    assert mode is not None or place.read_text() == "mine"


def test_a_write_that_fails_midway_leaves_nothing(
    plan: MediaPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, before = cache_in(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = decoded(plan)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        for _ in range(2):
            assert torch.equal(loaded(cache, plan), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not files_in(cache)
    assert caplog.text.count("can't be written (File too large)") == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_that_cannot_be_read_is_decoded(
    plan: MediaPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    cache, expected = cache_in(tmp_path), decoded(plan)
    loaded(cache, plan)

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(frame_cache, "read", fail)
    assert torch.equal(loaded(cache, plan), expected)
    assert len(files_in(cache)) == 1
