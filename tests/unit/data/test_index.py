"""The index: each file scanned once, changes seen, bad files kept with their reason, nothing lost or half written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image

from tests.helpers.clips import make_clip
from vft.common import files
from vft.common.types import MediaInfo, MediaKind, MediaOptions, MediaRef
from vft.data.media import index
from vft.data.media.errors import MediaError
from vft.data.media.index import Index, build
from vft.data.media.video import scan


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were really scanned, in order."""
    names: list[str] = []
    real = index.scan_file

    def spy(kind: MediaKind, path: Path, headers: bool) -> MediaInfo:
        names.append(path.name)
        return real(kind, path, headers)

    monkeypatch.setattr(index, "scan_file", spy)
    return names


def build_here(refs: list[MediaRef], cache: Path) -> Index:
    return build(refs, cache, workers=0, timeout_s=10.0, show_progress=False)


def reason(found: Index, ref: MediaRef) -> str:
    with pytest.raises(MediaError) as caught:
        found.info(ref)
    return caught.value.reason


def test_each_file_once_and_again_when_changed(tmp_path: Path, scanned: list[str]) -> None:
    clip = make_clip(tmp_path / "a.mp4", range(10))
    varying = make_clip(tmp_path / "v.mp4", [0, 1, 5, 20])
    Image.new("RGB", (30, 20)).save(tmp_path / "p.png")
    (tmp_path / "bad.mp4").write_text("no video")
    cache = tmp_path / "cache" / "deep"
    picture = tmp_path / "p.png"
    frames = MediaRef("video", (picture, picture, picture), MediaOptions(sample_fps=4.0))
    good = [MediaRef("video", clip), MediaRef("video", varying), MediaRef("image", picture), frames]
    bad, gone = MediaRef("video", tmp_path / "bad.mp4"), MediaRef("video", tmp_path / "gone.mp4")
    refs = [*good, bad, gone, *good]
    found = build_here(refs, cache)
    assert sorted(scanned) == ["a.mp4", "bad.mp4", "p.png", "v.mp4"]
    for again in (found, build_here(refs, cache), build_here(refs[:1] + refs, cache)):
        assert [again.info(ref) for ref in good] == [scan(ref) for ref in good]
        assert (reason(again, bad), reason(again, gone)) == ("not_a_video", "missing")
    assert len(scanned) == 4

    make_clip(tmp_path / "gone.mp4", range(3))
    make_clip(clip, range(7))
    found = build_here(refs, cache)
    assert sorted(scanned[4:]) == ["a.mp4", "gone.mp4"]
    assert (found.info(gone).num_frames, found.info(good[0]).num_frames) == (3, 7)
    assert sorted(path.name for path in cache.iterdir()) == ["media.lock", "media.parquet"]
    assert pq.read_table(cache / "media.parquet").num_rows == 5
    with pytest.raises(KeyError):
        found.info(MediaRef("video", tmp_path / "other.mp4"))


def test_an_interrupted_scan_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned: list[str]) -> None:
    refs = [MediaRef("video", make_clip(tmp_path / f"{i}.mp4", [0])) for i in range(5)]
    spy = index.scan_file

    def interrupt(kind: MediaKind, path: Path, headers: bool) -> MediaInfo:
        if path.name == "3.mp4":
            raise KeyboardInterrupt
        return spy(kind, path, headers)

    monkeypatch.setattr(index, "scan_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_here(refs, tmp_path / "cache")
    monkeypatch.setattr(index, "scan_file", spy)
    build_here(refs, tmp_path / "cache")
    assert scanned == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4"]


def test_progress_is_saved_before_a_kill(tmp_path: Path) -> None:
    """What was saved before a SIGKILL, which runs no `finally`, is not scanned again."""
    for i in range(5):
        make_clip(tmp_path / f"{i}.mp4", [0])
    script = (
        "import os, signal; from pathlib import Path\n"
        "from vft.data.media import index; from vft.common.types import MediaRef\n"
        "real, index.SAVE_EVERY = index.scan_file, 2\n"
        "def scan(kind, path, headers):\n"
        "    if path.name == '4.mp4': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(kind, path, headers)\n"
        "index.scan_file = scan\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "index.build([MediaRef('video', folder / f'{i}.mp4') for i in range(5)], folder / 'cache', 0, 9.0)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr
    assert pq.read_table(tmp_path / "cache" / "media.parquet").num_rows == 4


def test_what_may_pass_is_scanned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = MediaRef("video", make_clip(tmp_path / "a.mp4", [0, 1]))
    real = index.scan_file

    def failing(with_reason: str) -> Callable[[MediaKind, Path], MediaInfo]:
        def fail(kind: MediaKind, path: Path, headers: bool) -> MediaInfo:
            raise MediaError(with_reason, f"{path}: {with_reason}")  # type: ignore[arg-type]

        return fail

    monkeypatch.setattr(index, "scan_file", failing("crashed"))
    assert reason(build_here([ref], tmp_path / "cache"), ref) == "crashed"
    monkeypatch.setattr(index, "scan_file", failing("deadline"))
    assert reason(build_here([ref], tmp_path / "cache"), ref) == "deadline"
    monkeypatch.setattr(index, "scan_file", real)
    assert reason(build_here([ref], tmp_path / "cache"), ref) == "deadline"
    found = build([ref], tmp_path / "cache", workers=0, timeout_s=11.0)
    assert found.info(ref).num_frames == 2


@pytest.mark.parametrize("damage", ["garbage", "other version", "other columns", "other types"])
def test_a_cache_that_cannot_be_used(tmp_path: Path, damage: str, scanned: list[str]) -> None:
    ref = MediaRef("video", make_clip(tmp_path / "a.mp4", [0, 1]))
    build_here([ref], tmp_path / "cache")
    path = tmp_path / "cache" / "media.parquet"
    if damage == "garbage":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "other version":
        pq.write_table(pq.read_table(path).replace_schema_metadata({"scan_version": "0"}), path)
    elif damage == "other columns":
        pq.write_table(pa.table({"path": ["a"]}), path)
    else:
        table = pq.read_table(path)
        pq.write_table(table.set_column(2, "size_bytes", pa.array(["many"])), path)
    assert build_here([ref], tmp_path / "cache").info(ref).num_frames == 2
    assert len(scanned) == 2


def test_waits_for_another_process(
    tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vft")
    monkeypatch.setattr(files, "LOCK_PATIENCE_S", 0.05)
    ref = MediaRef("video", make_clip(tmp_path / "a.mp4", [0, 1]))
    cache = tmp_path / "cache"
    cache.mkdir()
    with FileLock(cache / "media.lock"):
        other = threading.Thread(target=build_here, args=([ref], cache))
        other.start()
        other.join(0.5)
        assert other.is_alive() and not scanned
    other.join(10)
    assert scanned == ["a.mp4"]
    assert "waiting for another process" in caplog.text
    FileLock(cache / "media.lock").acquire(timeout=0).lock.release()  # given back
