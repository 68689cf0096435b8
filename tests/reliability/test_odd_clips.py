"""Broken, odd and hostile videos through the index, the worker pool and the decoder: each ends as declared.

A clip has its declared frames, told by their grey, or its declared reason; within a bound on time and on the memory
of the worker process.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from av.codec.codec import UnknownCodecError

from tests.helpers.patches import SPEC, plan_of
from tests.reliability.in_workers import import_all, measured, scan_or_hang
from tests.reliability.odd_clips import CORPUS, REAL, SLOW, Corpus, Frames, Refused
from vft.common.types import MediaInfo, MediaRef
from vft.data.media import index
from vft.data.media.errors import MediaError
from vft.data.media.patches import frames_of, load_patches
from vft.data.workers import WorkerPool

SIDE = 56
"""Pixels of the frames that are asked for."""
MOST_FRAMES = 64
DEADLINE_S = 60.0
SECONDS = 20.0
"""To scan and to decode a clip; most take a hundredth."""
PEAK_MIB = 768
"""That a worker may take for a clip over what it has when idle; most take a hundredth."""


@dataclass
class Found:
    """What became of a clip."""

    info: MediaInfo | None = None
    error: MediaError | None = None
    late: bool = False
    """The error came from decoding."""
    greys: tuple[int, ...] = ()
    times_s: tuple[float, ...] = ()
    indices: tuple[int, ...] = ()
    seconds: float = 0.0
    peak_mib: float = 0.0
    why_not: str = ""
    """Why the clip could not be made."""


def judge(corpus: Corpus, folder: Path) -> dict[str, Found]:
    """Make the clips, index them together, and have a worker decode what the index lets pass."""
    found = {name: Found() for name in corpus}
    for name, (make, _) in corpus.items():
        try:
            make(folder / name)
        except UnknownCodecError as error:
            found[name].why_not = f"this FFmpeg has no encoder {error}"
    refs = {name: MediaRef("video", folder / name) for name in corpus if not found[name].why_not}
    indexed = index.build(refs.values(), folder / "cache", 1, DEADLINE_S, show_progress=False)
    with WorkerPool(1, DEADLINE_S) as pool:
        for name, ref in refs.items():
            _judge_one(ref, indexed, pool, found[name])
    return found


def _judge_one(ref: MediaRef, indexed: index.Index, pool: WorkerPool, found: Found) -> None:
    # The index has scanned it; here once more, where time and memory can be seen.
    _, found.seconds, found.peak_mib = pool.submit(measured, index.scan_file, "video", ref.path).result()
    try:
        found.info = info = indexed.info(ref)
    except MediaError as error:
        found.error = error
        return
    count = min(info.num_frames, MOST_FRAMES)
    found.indices = tuple(i * (info.num_frames - 1) // max(1, count - 1) for i in range(count))
    plan = plan_of(ref, info, found.indices, SIDE, SIDE)
    found.times_s = plan.frame_times_s
    result, seconds, peak_mib = pool.submit(measured, load_patches, plan, SPEC).result()
    found.seconds, found.peak_mib = found.seconds + seconds, max(found.peak_mib, peak_mib)
    if isinstance(result, MediaError):
        found.error, found.late = result, True
        return
    frames_TCHW = frames_of(result.pixels_PD, plan, SPEC)[:count]
    found.greys = tuple(round(float(frame[:, -8:, -8:].float().mean())) for frame in frames_TCHW)


def check(found: Found, declared: Frames | Refused, path: Path) -> None:
    """A clip is what was declared, in time, in bounds."""
    if found.why_not:
        pytest.skip(found.why_not)
    assert found.seconds < SECONDS and found.peak_mib < PEAK_MIB, found
    if isinstance(declared, Refused):
        assert found.error is not None, found
        message = str(found.error)
        assert (found.error.reason, found.late) == (declared.reason, declared.late), message
        assert str(path) in message or ascii(str(path))[1:-1] in message
        assert declared.says in message and "torchcodec" not in message and "Errno" not in message
        assert len(message.replace(path.name, "").splitlines()) == 1
        return
    assert found.error is None and found.info is not None, found.error
    info = found.info
    assert (info.num_frames, info.width, info.height) == (declared.count, declared.width, declared.height)
    if declared.number is not None:
        numbers = [declared.number(i, time_s) for i, time_s in zip(found.indices, found.times_s, strict=True)]
        wrong = [
            (number, grey, declared.grey(number))
            for number, grey in zip(numbers, found.greys, strict=True)
            if abs(grey - declared.grey(number)) > 4
        ]
        assert not wrong, f"frame, grey found, grey made: {wrong}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Found]:
    judged = judge(CORPUS, folder)
    assert sum(not one.why_not for one in judged.values()) >= 60
    return judged


@pytest.mark.parametrize("name", CORPUS, ids=ascii)
def test_clip(found: dict[str, Found], folder: Path, name: str) -> None:
    check(found[name], CORPUS[name][1], folder / name)


@pytest.mark.slow
def test_slow_clips(tmp_path: Path) -> None:
    found = judge(SLOW, tmp_path)
    for name, (_, declared) in SLOW.items():
        check(found[name], declared, tmp_path / name)


def test_real_clips(videos: Path, tmp_path: Path) -> None:
    corpus: Corpus = {
        name: (lambda path: shutil.copy(videos / "odd_codecs" / path.name, path), declared)
        for name, declared in REAL.items()
    }
    assert {path.name for path in (videos / "odd_codecs").iterdir()} == set(REAL)
    found = judge(corpus, tmp_path)
    for name, declared in REAL.items():
        check(found[name], declared, tmp_path / name)


# ----------------------------------------------------------------------------------------------------------- hanging


def test_a_scan_that_hangs(folder: Path, found: dict[str, Found], monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs its deadline; the clips beside it are indexed."""
    names = [f"{kind}_{number}.mp4" for number in range(3) for kind in ("hangs", "good")]
    for name in names:
        shutil.copy(folder / "h264.mp4", folder / name)
    monkeypatch.setattr(index, "scan_file", scan_or_hang)
    refs = [MediaRef("video", folder / name) for name in names]
    start = time.monotonic()
    indexed = index.build(refs, folder / "hanging", 2, 1.0, show_progress=False)
    assert time.monotonic() - start < SECONDS
    for ref in refs:
        if ref.path.name.startswith("good"):  # type: ignore[union-attr]
            assert indexed.info(ref).num_frames == 12
            continue
        with pytest.raises(MediaError) as caught:
            indexed.info(ref)
        assert caught.value.reason == "deadline" and str(ref.path) in str(caught.value)


def test_a_clip_that_takes_longer_than_its_deadline(folder: Path, found: dict[str, Found]) -> None:
    """Real decoding is ended, and the next clip is decoded."""
    large, small = found["8k.mov"].info, found["h264.mp4"].info
    assert large is not None and small is not None
    path = folder / "8k.mov"
    plans = [
        plan_of(MediaRef("video", path), large, (0,) * 200 + (1,) * 200, SIDE, SIDE),
        plan_of(MediaRef("video", folder / "h264.mp4"), small, tuple(range(12)), SIDE, SIDE),
    ]
    with WorkerPool(1, 4.0, import_all) as pool:
        first, second = [pool.submit(load_patches, plan, SPEC) for plan in plans]
        with pytest.raises(MediaError) as caught:
            first.result(6 * SECONDS)  # a worker has to start, too
        assert caught.value.reason == "deadline" and str(path) in str(caught.value)
        assert len(second.result(6 * SECONDS).pixels_PD)
