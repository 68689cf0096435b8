"""Scanning and decoding, against PyAV's own decoder and clips whose frames are known.

The reference's hashes are in tests/parity/test_reference_cases.py; damaged and odd files in tests/reliability.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.clips import level, make_clip
from tests.helpers.patches import decode
from vft.common.types import MediaInfo, MediaOptions, MediaPlan, MediaRef
from vft.data.media import errors
from vft.data.media.errors import MediaError
from vft.data.media.video import decode_chunks, decode_in_sequence, frame_times, open_container, scan


def planned(ref: MediaRef, indices: Sequence[int]) -> MediaPlan:
    info = scan(ref)
    return MediaPlan(ref, info, tuple(indices), info.height, info.width, (1, 1, 1), 1)


def error_of(work: Callable[[], object]) -> MediaError:
    with pytest.raises(MediaError) as caught:
        work()
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def assert_shows(frames_TCHW: Tensor, numbers: Sequence[int]) -> None:
    """These frames of a made clip, as the grey of the lower right corner tells."""
    assert [float(frame[:, -8:, -8:].float().mean()) for frame in frames_TCHW] == pytest.approx(
        [level(number) for number in numbers], abs=4
    )


def test_real_files_against_pyav(videos: Path) -> None:
    """Other codecs and containers: the count is that of PyAV, and so are the frames."""
    for path in sorted((videos / "odd_codecs").iterdir()):
        info = scan(MediaRef("video", path))
        with av.open(str(path)) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(container.streams[info.stream_index])]
        assert info.num_frames == len(frames)
        assert (info.height, info.width) == frames[0].shape[:2]
        indices = [0, info.num_frames // 2, info.num_frames - 1]
        expected_TCHW = torch.from_numpy(np.stack([frames[i] for i in indices])).permute(0, 3, 1, 2)
        difference = (decode(planned(MediaRef("video", path), indices)).int() - expected_TCHW.int()).abs()
        # With 10 bits, chroma is scaled in another way: edges of colours differ.
        assert difference.float().mean() <= 4 if "10bits" in path.name else difference.max() <= 4


# ------------------------------------------------------------------------------------------------------- made clips

B_FRAMES = {"bf": "2", "g": "12"}


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        *[(f"a.{suffix}", "libx264", B_FRAMES) for suffix in ("mp4", "mkv", "mov", "ts")],
        ("a.avi", "mpeg4", {}),
        ("b.avi", "mpeg4", {"bf": "2", "g": "30"}),  # torchcodec 0.13 returns neighbours of frames such as number 10
    ],
)
def test_containers(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    ref = MediaRef("video", make_clip(tmp_path / name, range(30), codec=codec, options=options))
    info = scan(ref)
    assert (info.num_frames, info.fps, info.height, info.width, info.times_s) == (30, 10.0, 48, 64, None)
    assert info.duration_s == pytest.approx(3)
    every = [*range(30)] if name != "b.avi" else [0]  # MPEG-4 with long GOPs changes some greys
    for indices in (every, [3, 3, 17, 29], [0, 10, 20, 29]):
        assert_shows(decode(planned(ref, indices)), indices)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_variable_rate(tmp_path: Path, name: str) -> None:
    ticks = [0, 1, 2, 3, 10, 20, 21, 50]
    plan = planned(MediaRef("video", make_clip(tmp_path / name, ticks, fps=10, ticks_per_frame=2)), range(8))
    info = plan.info
    assert info.times_s == pytest.approx([tick / 20 for tick in ticks], abs=1e-3)
    assert info.num_frames == 8 and 2.5 <= info.duration_s <= 3.0
    assert info.fps == pytest.approx(8 / info.duration_s, rel=0.02)
    assert_shows(decode(plan), range(8))


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((0, 1, -1, 0), lambda frames_TCHW: frames_TCHW.rot90(-1, (2, 3))),  # a phone held upright
        ((-1, 0, 0, 1), lambda frames_TCHW: frames_TCHW.flip(3)),  # a camera that faces its user
        ((1, 0, 0, -1), lambda frames_TCHW: frames_TCHW.flip(2)),
        ((0, 1, 1, 0), lambda frames_TCHW: frames_TCHW.transpose(2, 3)),
        ((0, -1, -1, 0), lambda frames_TCHW: frames_TCHW.transpose(2, 3).flip(2, 3)),
    ],
)
def test_turned_and_mirrored(tmp_path: Path, matrix: tuple[int, ...], turn: Callable[[Tensor], Tensor]) -> None:
    """By the display matrix of the track, of which torchcodec knows the rotation alone."""
    plain = make_clip(tmp_path / "plain.mp4", range(5))
    data = bytearray(plain.read_bytes())
    start, (a, b, c, d) = data.index(b"tkhd") + 44, (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 48 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    expected_TCHW = turn(decode(planned(MediaRef("video", plain), [1, 3]))).int()
    plan = planned(MediaRef("video", tmp_path / "turned.mp4"), [1, 3])
    frames_TCHW = decode(plan)
    assert (frames_TCHW.int() - expected_TCHW).abs().max() <= (0 if a == 0 and b == -c else 4)
    in_sequence_TCHW = next(decode_in_sequence(tmp_path / "turned.mp4", plan.info, [[1, 3]]))
    assert (in_sequence_TCHW.int() - expected_TCHW).abs().max() <= 4


def test_a_file_without_seeking_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of chunks: a long recording would be read from its start for each."""
    indices = [0, 3, 3, 8, 8, 20, 29]
    plan = planned(MediaRef("video", make_clip(tmp_path / "a.ts", range(30))), indices)
    opened = []

    def spy(path: Path) -> Any:
        opened.append(path)
        return open_container(path)

    monkeypatch.setattr("vft.data.media.video.open_container", spy)
    chunks = list(decode_chunks(plan, chunk_bytes=1))
    assert [len(chunk) for chunk in chunks] == [1] * 7 and len(opened) == 1
    assert_shows(torch.cat(chunks), indices)


def test_chunks_are_the_whole(tmp_path: Path) -> None:
    plan = planned(MediaRef("video", make_clip(tmp_path / "a.mp4", range(12))), [0, 1, 5, 5, 7, 11])
    chunks = list(decode_chunks(plan, chunk_bytes=2 * 3 * 64 * 48 + 1))
    assert [len(chunk) for chunk in chunks] == [2, 2, 2]
    assert torch.equal(torch.cat(chunks), decode(plan))
    assert len(list(decode_chunks(plan, chunk_bytes=1))) == 6


@pytest.mark.parametrize(
    ("ticks", "tick_s", "claimed", "fps", "varies"),
    [
        ([0, 33, 67, 100, 133], 1e-3, 30.0, 30.0, False),  # Matroska's rounding
        ([0, 528, 1072, 1600, 2128], 1 / 16000, 30.0, 30.0, False),  # the same, copied into MP4
        (list(range(0, 24024, 1001)), 1 / 24000, 24000 / 1001, 24000 / 1001, False),
        ([0, 1, 2, 3], 1 / 30, 90000.0, 30.0, False),  # an absurd claim
        ([0, 1, 2, 3], 1 / 30, 0.0, 30.0, False),  # none
        ([0, 1, 2, 4, 5], 1 / 30, 30.0, 25.0, True),  # AVI: one frame left out
        ([5, 6, 7, 17], 1 / 30, 30.0, 4 / (13 / 30), True),
        ([7], 1 / 30, 30.0, 30.0, False),
        ([], 1 / 30, 30.0, 30.0, False),
    ],
)
def test_frame_times(ticks: list[int], tick_s: float, claimed: float, fps: float, varies: bool) -> None:
    actual_fps, _, times_s = frame_times(ticks, tick_s, 1, claimed)
    assert actual_fps == pytest.approx(fps)
    assert (times_s is not None) == varies
    if times_s is not None:
        assert times_s == pytest.approx([(tick - ticks[0]) * tick_s for tick in ticks])


# ------------------------------------------------------------------------------------------ pictures, changed files


def save_picture(path: Path, height: int, width: int, seed: int = 0) -> Path:
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels_HWC).save(path)
    return path


def test_list_of_pictures(tmp_path: Path) -> None:
    paths = tuple(save_picture(tmp_path / f"{i}.png", 20, 30, seed=i) for i in range(5))
    ref = MediaRef("video", paths, MediaOptions(sample_fps=4.0))
    plan = planned(ref, [0, 3, 4])
    assert plan.info == MediaInfo("video", 20, 30, 5, 4.0, duration_s=1.25)
    assert plan.frame_times_s == (0.0, 0.75, 1.0)
    expected = [np.array(Image.open(paths[i])) for i in plan.frame_indices]
    assert np.array_equal(decode(plan).permute(0, 2, 3, 1).numpy(), np.stack(expected))
    assert scan(MediaRef("video", paths)).fps == 2.0
    save_picture(paths[3], 20, 31)
    assert error_of(lambda: scan(ref)).reason == "mixed_sizes"
    assert "is 20 x 31 (height x width), when indexed 20 x 30" in str(error_of(lambda: decode(plan)))


def test_pictures_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = MediaRef("image", save_picture(tmp_path / "p.png", 100, 100))
    plan = planned(ref, [0])
    monkeypatch.setattr(errors, "MAX_FRAME_PIXELS", 9_999)
    assert error_of(lambda: scan(ref)).reason == error_of(lambda: decode(plan)).reason == "too_large"
    monkeypatch.setattr(errors, "MAX_FRAME_PIXELS", 10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    assert error_of(lambda: scan(ref)).reason == "too_large"


def test_changed_between_index_and_decoding(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", range(12))
    plan = planned(MediaRef("video", path), [0, 11])
    make_clip(path, range(10))
    error = error_of(lambda: decode(plan))
    assert error.reason == "changed" and str(error).startswith(f"{path}: has 10 frames of 48 x 64 (height x width)")
    assert "when indexed 12 frames" in str(error)
    path.unlink()
    assert error_of(lambda: decode(plan)).reason == "missing"


def test_media_error_travels() -> None:
    error = pickle.loads(pickle.dumps(MediaError("changed", "a.mp4: text")))
    assert (error.reason, error.message, str(error)) == ("changed", "a.mp4: text", "a.mp4: text")
