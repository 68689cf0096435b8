"""Scanning and decoding, against the reference's hashes, PyAV's own decoder and clips whose frames are known."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.clips import level, make_clip, make_sound
from vft.common.types import MediaInfo, MediaOptions, MediaPlan, MediaRef
from vft.data.media import errors
from vft.data.media.decode import decode, decode_chunks, decode_in_sequence
from vft.data.media.errors import MediaError
from vft.data.media.scan import frame_times, open_container, scan


def planned(ref: MediaRef, info: MediaInfo, indices: list[int] | range) -> MediaPlan:
    return MediaPlan(ref, info, tuple(indices), info.height, info.width, (1, 1, 1), 1)


def fail(ref: MediaRef) -> MediaError:
    with pytest.raises(MediaError) as caught:
        scan(ref)
    named = ref.path if isinstance(ref.path, Path) else ref.path[0].parent
    assert str(named) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    return caught.value


def levels(ref: MediaRef, indices: list[int] | range) -> list[int]:
    """Which frames came back, as grey levels of the lower right corner."""
    frames_TCHW = decode(planned(ref, scan(ref), indices)).frames_TCHW
    return [round(float(frame[:, -8:, -8:].float().mean())) for frame in frames_TCHW]


def near(found: list[int], indices: list[int] | range) -> bool:
    return all(abs(grey - level(i)) <= 4 for grey, i in zip(found, indices, strict=True))


CASES = ["video_uniform", "two_videos", "clip_late_video", "lora_video", "images_multiturn"]


@pytest.mark.parametrize("case", CASES)
def test_reference(reference: Path, videos: Path, case: str) -> None:
    for medium in json.loads((reference / "cases" / f"{case}.json").read_text())["media"]:
        ref = MediaRef(medium["kind"], videos / medium["file"])
        info = scan(ref)
        assert (info.height, info.width) == (medium["height"], medium["width"])
        if info.kind == "image":
            continue
        assert (info.num_frames, info.stream_index) == (medium["total_frames"], medium["stream_index"])
        assert info.fps == medium["fps"] and info.times_s is None
        clip = decode(planned(ref, info, medium["frame_indices"]))
        assert clip.timestamps_s == pytest.approx(medium["timestamps"], abs=1e-9)
        found = [hashlib.sha256(frame.permute(1, 2, 0).numpy().tobytes()).hexdigest() for frame in clip.frames_TCHW]
        assert found == medium["frames_sha256"]


def test_real_files_against_pyav(videos: Path) -> None:
    """Other codecs and containers: the count is what really decodes, and frames agree with another FFmpeg's."""
    for path in sorted((videos / "odd_codecs").iterdir()):
        ref = MediaRef("video", path)
        info = scan(ref)
        with av.open(str(path)) as container:
            stream = container.streams[info.stream_index]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert info.num_frames == len(frames)
        assert (info.height, info.width) == frames[0].shape[:2]
        indices = [0, info.num_frames // 2, info.num_frames - 1]
        clip = decode(planned(ref, info, indices))
        expected_TCHW = torch.from_numpy(np.stack([frames[i] for i in indices])).permute(0, 3, 1, 2)
        difference = (clip.frames_TCHW.int() - expected_TCHW.int()).abs()
        if "10bits" in path.name:  # chroma is scaled in another way: edges of colour differ, the picture does not
            assert difference.float().mean() <= 4
        else:
            assert difference.max() <= 4


# ------------------------------------------------------------------------------------------------------- made clips


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.ts", "a.avi"])
def test_containers(tmp_path: Path, name: str) -> None:
    codec, options = ("mpeg4", {}) if name == "a.avi" else ("libx264", {"bf": "2", "g": "12"})
    ref = MediaRef("video", make_clip(tmp_path / name, range(25), codec=codec, options=options))
    info = scan(ref)
    assert (info.num_frames, info.fps, info.height, info.width, info.times_s) == (25, 10.0, 48, 64, None)
    assert info.duration_s == pytest.approx(2.5)
    assert near(levels(ref, range(25)), range(25))
    assert near(levels(ref, [3, 3, 17, 24]), [3, 3, 17, 24])


def test_avi_with_b_frames(tmp_path: Path) -> None:
    """torchcodec 0.13 silently returns neighbours of the frames asked for; frame 10 is the one that shows it."""
    path = make_clip(tmp_path / "b.avi", range(30), codec="mpeg4", options={"bf": "2", "g": "30"})
    wanted = [0, 10, 20, 29]
    assert near(levels(MediaRef("video", path), wanted), wanted)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_variable_rate(tmp_path: Path, name: str) -> None:
    ticks = [0, 1, 2, 3, 10, 20, 21, 50]
    ref = MediaRef("video", make_clip(tmp_path / name, ticks, fps=10, ticks_per_frame=2))
    info = scan(ref)
    assert info.times_s == pytest.approx([tick / 20 for tick in ticks], abs=1e-3)
    assert info.num_frames == 8 and 2.5 <= info.duration_s <= 3.0
    assert info.fps == pytest.approx(8 / info.duration_s, rel=0.02)
    clip = decode(planned(ref, info, range(8)))
    assert clip.timestamps_s == pytest.approx(info.times_s, abs=1e-6)
    assert near(levels(ref, range(8)), range(8))


def test_one_frame(tmp_path: Path) -> None:
    ref = MediaRef("video", make_clip(tmp_path / "one.mp4", [0]))
    info = scan(ref)
    assert (info.num_frames, info.times_s, info.time_of(0)) == (1, None, 0.0)
    assert near(levels(ref, [0]), [0])


def with_matrix(plain: Path, a: int, b: int, c: int, d: int) -> Path:
    """A copy whose track has the display matrix [a b; c d]."""
    data = bytearray(plain.read_bytes())
    matrix = data.index(b"tkhd") + 44
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 48 * one, 0, 1 << 30)
    turned = plain.with_name("turned.mp4")
    turned.write_bytes(data)
    return turned


@pytest.mark.parametrize(
    ("matrix", "mirror"),
    [
        ((-1, 0, 0, 1), lambda frames_TCHW: frames_TCHW.flip(3)),
        ((1, 0, 0, -1), lambda frames_TCHW: frames_TCHW.flip(2)),
        ((0, 1, 1, 0), lambda frames_TCHW: frames_TCHW.transpose(2, 3)),
        ((0, -1, -1, 0), lambda frames_TCHW: frames_TCHW.transpose(2, 3).flip(2, 3)),
    ],
)
def test_mirrored(
    tmp_path: Path, matrix: tuple[int, int, int, int], mirror: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A camera that looks at its user: torchcodec would turn the frames instead."""
    plain = make_clip(tmp_path / "plain.mp4", range(5))
    ref, flat = MediaRef("video", with_matrix(plain, *matrix)), MediaRef("video", plain)
    mirrored_TCHW = decode(planned(ref, scan(ref), [1, 3])).frames_TCHW
    flat_TCHW = decode(planned(flat, scan(flat), [1, 3])).frames_TCHW
    assert (mirrored_TCHW.int() - mirror(flat_TCHW).int()).abs().max() <= 4


def test_a_file_that_can_not_be_sought_in_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pieces it is wanted in: a long recording would be read from its start for each."""
    ref = MediaRef("video", make_clip(tmp_path / "a.ts", range(30)))
    info, real, opened = scan(ref), open_container, []

    def spy(path: Path) -> Any:
        opened.append(path)
        return real(path)

    monkeypatch.setattr("vft.data.media.decode.open_container", spy)
    wanted = [0, 3, 3, 8, 8, 20, 29]
    pieces = list(decode_chunks(planned(ref, info, wanted), chunk_bytes=1))
    assert [len(piece.frames_TCHW) for piece in pieces] == [1] * 7 and len(opened) == 1
    greys = [round(float(piece.frames_TCHW[0, :, -8:, -8:].float().mean())) for piece in pieces]
    assert near(greys, wanted)


def test_rotation(tmp_path: Path) -> None:
    """A phone's upright clip: the display matrix of the track turned by 90 degrees."""
    plain = make_clip(tmp_path / "plain.mp4", range(5))
    turned = with_matrix(plain, 0, 1, -1, 0)
    ref, flat = MediaRef("video", turned), MediaRef("video", plain)
    info = scan(ref)
    assert (info.height, info.width) == (64, 48)
    upright_TCHW = decode(planned(ref, info, [2])).frames_TCHW
    flat_TCHW = decode(planned(flat, scan(flat), [2])).frames_TCHW
    assert torch.equal(upright_TCHW, torch.rot90(flat_TCHW, -1, (2, 3)))
    in_sequence = next(decode_in_sequence(turned, info, [[2]])).frames_TCHW
    assert (in_sequence.int() - upright_TCHW.int()).abs().max() <= 4


def test_in_sequence_equals_seeking(videos: Path) -> None:
    path = videos / "mllm_demo_data" / "3.mp4"
    info = scan(MediaRef("video", path))
    plan = planned(MediaRef("video", path), info, [0, 70, 145])
    a, b = decode(plan), next(decode_in_sequence(path, info, [plan.frame_indices]))
    assert (a.frames_TCHW.int() - b.frames_TCHW.int()).abs().max() <= 4
    assert a.timestamps_s == pytest.approx(b.timestamps_s)


def test_chunks_are_the_whole(tmp_path: Path) -> None:
    ref = MediaRef("video", make_clip(tmp_path / "a.mp4", range(12)))
    plan = planned(ref, scan(ref), [0, 1, 5, 5, 7, 11])
    pieces = list(decode_chunks(plan, chunk_bytes=2 * 3 * 64 * 48 + 1))
    assert [len(piece.frames_TCHW) for piece in pieces] == [2, 2, 2]
    whole = decode(plan)
    assert torch.equal(torch.cat([piece.frames_TCHW for piece in pieces]), whole.frames_TCHW)
    assert sum((piece.timestamps_s for piece in pieces), ()) == whole.timestamps_s
    assert len(list(decode_chunks(plan, chunk_bytes=1))) == 6


# ------------------------------------------------------------------------------------------------------------- rate


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
    found_fps, _, times_s = frame_times(ticks, tick_s, 1, claimed)
    assert found_fps == pytest.approx(fps)
    assert (times_s is not None) == varies
    if times_s is not None:
        assert times_s == pytest.approx([(tick - ticks[0]) * tick_s for tick in ticks])


# --------------------------------------------------------------------------------------------------------- pictures


def save_picture(path: Path, height: int, width: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def test_picture(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "p.png", 30, 50)
    ref = MediaRef("image", path)
    info = scan(ref)
    assert info == MediaInfo("image", 30, 50)
    clip = decode(planned(ref, info, [0]))
    expected_HWC = np.array(Image.open(path).convert("RGB"))
    assert np.array_equal(clip.frames_TCHW[0].permute(1, 2, 0).numpy(), expected_HWC)


def test_list_of_pictures(tmp_path: Path) -> None:
    paths = tuple(save_picture(tmp_path / f"{i}.png", 20, 30, seed=i) for i in range(5))
    ref = MediaRef("video", paths, MediaOptions(sample_fps=4.0))
    info = scan(ref)
    assert info == MediaInfo("video", 20, 30, 5, 4.0, duration_s=1.25)
    clip = decode(planned(ref, info, [0, 3, 4]))
    assert clip.timestamps_s == (0.0, 0.75, 1.0)
    for frame, path in zip(clip.frames_TCHW, (paths[0], paths[3], paths[4]), strict=True):
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), np.array(Image.open(path)))
    assert scan(MediaRef("video", paths)).fps == 2.0
    save_picture(paths[2], 20, 31)
    assert fail(ref).reason == "mixed_sizes"
    with pytest.raises(MediaError, match=r"is 20 x 31 .* when indexed 20 x 30"):
        decode(planned(ref, info, [1, 2]))


# -------------------------------------------------------------------------------------------------------- bad files


def test_bad_files(tmp_path: Path) -> None:
    good = make_clip(tmp_path / "good.mp4", range(40), size=(320, 240)).read_bytes()
    moov = good.index(b"moov") - 4
    contents: dict[str, Any] = {
        "text.mp4": b"This is no video.\n" * 100,
        "empty.mp4": b"",
        "no_moov.mp4": good[:moov],
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n",
        "concat.mp4": b"ffconcat version 1.0\nfile 'good.mp4'\n",
        "text.jpg": b"no picture",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    make_sound(tmp_path / "sound.mp4")
    os.mkfifo(tmp_path / "fifo.mp4")
    reasons = {
        "text.mp4": "not_a_video",
        "empty.mp4": "empty",
        "no_moov.mp4": "truncated",
        "playlist.mp4": "not_a_video",
        "concat.mp4": "not_a_video",
        "sound.mp4": "no_video_stream",
        "fifo.mp4": "not_a_file",
        ".": "not_a_file",
        "gone.mp4": "missing",
        "good.mp4/x": "missing",
    }
    assert {name: fail(MediaRef("video", tmp_path / name)).reason for name in reasons} == reasons
    assert fail(MediaRef("image", tmp_path / "text.jpg")).reason == "not_a_picture"
    assert fail(MediaRef("image", tmp_path / "gone.jpg")).reason == "missing"


def test_cut_off_with_the_index_in_front(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", range(40), size=(320, 240), options={"bf": "0", "g": "1", "crf": "1"})
    fast = tmp_path / "fast.mp4"
    with av.open(str(path)) as source, av.open(str(fast), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data = fast.read_bytes()
    fast.write_bytes(data[: len(data) * 2 // 3])
    error = fail(MediaRef("video", fast))
    assert error.reason == "truncated" and "of 40 frames" in str(error)


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_picture(tmp_path / "p.png", 100, 100)
    ref = MediaRef("image", path)
    info = scan(ref)
    monkeypatch.setattr(errors, "MAX_FRAME_PIXELS", 9_999)
    assert fail(ref).reason == "too_large"
    with pytest.raises(MediaError) as caught:
        decode(planned(ref, info, [0]))
    assert caught.value.reason == "too_large"
    monkeypatch.setattr(errors, "MAX_FRAME_PIXELS", 10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    assert fail(ref).reason == "too_large"


def test_changed_between_index_and_decoding(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", range(12))
    ref = MediaRef("video", path)
    plan = planned(ref, scan(ref), [0, 11])
    make_clip(path, range(10))
    with pytest.raises(MediaError, match=r"has 10 frames of 48 x 64 .* when indexed 12 frames") as caught:
        decode(plan)
    assert caught.value.reason == "changed"
    path.unlink()
    with pytest.raises(MediaError) as caught:
        decode(plan)
    assert caught.value.reason == "missing"


def test_damage_inside(tmp_path: Path) -> None:
    """A cut picture, and a video whose frames are noise."""
    path = save_picture(tmp_path / "p.png", 100, 100)
    path.write_bytes(path.read_bytes()[:2000])
    ref = MediaRef("image", path)
    with pytest.raises(MediaError) as caught:
        decode(planned(ref, scan(ref), [0]))
    assert caught.value.reason == "decode_error"
    clip = make_clip(tmp_path / "a.mp4", range(40), size=(320, 240), options={"crf": "1"})
    data = bytearray(clip.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = bytes(end - start)
    clip.write_bytes(data)
    ref = MediaRef("video", clip)
    with pytest.raises(MediaError) as caught:
        decode(planned(ref, scan(ref), [0, 39]))
    assert caught.value.reason == "decode_error"


def test_media_error_travels() -> None:
    error = pickle.loads(pickle.dumps(MediaError("changed", "a.mp4: text")))
    assert (error.reason, error.message, str(error)) == ("changed", "a.mp4: text", "a.mp4: text")
