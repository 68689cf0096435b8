"""`data.index = "header"`: frames counted from containers' headers, where these can be trusted, else by scanning."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.clips import make_clip
from tests.helpers.patches import decode
from tests.helpers.streaming import MAKE, data_config, running
from tests.helpers.tiny import Tiny
from vft.common.types import MediaInfo, MediaRef, VisionLimits
from vft.data.dataset import load_dataset
from vft.data.media import video
from vft.data.media.errors import MediaError
from vft.data.media.index import build
from vft.data.media.video import scan_file

LIMITS = VisionLimits(
    fps=2.0, frames=None, min_frames=2, max_frames=16, min_pixels=784, max_pixels=56 * 56, total_pixels=None
)
CHOICES = [LIMITS, replace(LIMITS, fps=None, frames=6), replace(LIMITS, fps=3.7), replace(LIMITS, start_s=0.5, end_s=2)]


@pytest.fixture
def demuxed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read in full."""
    names: list[str] = []
    real = video._scan_packets

    def spy(path: Path, *rest: Any) -> Any:
        names.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(video, "_scan_packets", spy)
    return names


ORDINARY: dict[str, dict[str, Any]] = {
    "h264.mp4": {"fps": 10},
    "slow.mp4": {"fps": 4},
    "reordered.mp4": {"fps": 25, "options": {"bf": "3"}},
    "fast.mov": {"fps": 60},
    "mpeg4.mp4": {"fps": 24, "codec": "mpeg4"},
    "fine.mp4": {"fps": 25, "ticks_per_frame": 512},
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("frames", [1, 2, 37])
def test_ordinary_clips_get_the_same_plans(
    tiny: Tiny, tmp_path: Path, demuxed: list[str], name: str, frames: int
) -> None:
    ticks = [i * ORDINARY[name].get("ticks_per_frame", 1) for i in range(frames)]
    path = make_clip(tmp_path / name, ticks, **ORDINARY[name])
    scanned, read = scan_file("video", path), scan_file("video", path, headers=True)
    assert demuxed == [name]
    assert read.num_frames == scanned.num_frames == frames
    assert (read.height, read.width, read.stream_index, read.times_s) == (48, 64, scanned.stream_index, None)
    assert read.fps == pytest.approx(scanned.fps) and read.duration_s == pytest.approx(scanned.duration_s)
    ref, processor = MediaRef("video", path), tiny.encoder.processor
    for limits in CHOICES if frames > 30 else CHOICES[:3]:
        found, expected = processor.plan(ref, read, limits), processor.plan(ref, scanned, limits)
        assert replace(found, info=scanned, seconds_per_grid=0) == replace(expected, seconds_per_grid=0)
        assert found.seconds_per_grid == pytest.approx(expected.seconds_per_grid)
        assert decode(found).equal(decode(expected))


def jitter(count: int, seed: int = 3) -> list[int]:
    chance, ticks = random.Random(seed), [0]
    while len(ticks) < count:
        ticks.append(ticks[-1] + chance.choice([60, 90, 100, 110, 180]))
    return ticks


@pytest.mark.parametrize(
    ("ticks", "per_frame"),
    [
        ([0, 1, 5, 20], 1),
        ([*range(20), *range(40, 60)], 1),
        ([i * 100 + (i % 2) * 50 for i in range(40)], 100),
        (jitter(40), 100),
        ([*range(0, 2000, 100), *range(2000, 6000, 200)], 100),
    ],
    ids=["sparse", "a pause", "two and one", "jitter", "slower later"],
)
def test_clips_of_a_varying_rate_are_scanned(
    tmp_path: Path, demuxed: list[str], ticks: Sequence[int], per_frame: int
) -> None:
    """Their frames' times stand in no header: with the average rate, other moments would be sampled than meant."""
    path = make_clip(tmp_path / "v.mp4", ticks, fps=10, ticks_per_frame=per_frame)
    scanned = scan_file("video", path)
    assert scanned.times_s is not None
    assert scan_file("video", path, headers=True) == scanned
    assert len(demuxed) == 2


@pytest.mark.parametrize("name", ["x.mkv", "x.webm", "x.ts"])
def test_containers_that_count_no_frames(tmp_path: Path, demuxed: list[str], name: str) -> None:
    path = make_clip(tmp_path / name, range(15), codec="libvpx" if name == "x.webm" else "libx264")
    assert scan_file("video", path, headers=True) == scan_file("video", path)
    assert demuxed == [name] * 2


def lying_clip(path: Path) -> Path:
    """Its header, which comes first, counts 40 frames; the last ones are missing, as after a broken download."""
    whole = make_clip(path.with_suffix(".whole.mp4"), range(40), options={"x264-params": "keyint=5"})
    content = whole.read_bytes()
    whole.unlink()
    moov, mdat = content.find(b"moov") - 4, content.find(b"mdat") - 4
    assert mdat < moov
    path.write_bytes(_fast_start(content, moov, mdat)[:-600])
    return path


def _fast_start(content: bytes, moov: int, mdat: int) -> bytes:
    """The index moved to the front, with its offsets of chunks moved along."""
    index = bytearray(content[moov:])
    at = index.find(b"stco") + 8
    for number in range(int.from_bytes(index[at : at + 4], "big")):
        place = at + 4 + 4 * number
        index[place : place + 4] = (int.from_bytes(index[place : place + 4], "big") + len(index)).to_bytes(4, "big")
    return content[:mdat] + bytes(index) + content[mdat:moov]


def write_records(root: Path) -> None:
    """Two clips, of which one's header lies."""
    root.mkdir()
    make_clip(root / "good.mp4", range(12))
    lying_clip(root / "lie.mp4")
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "That."}]
    records = [{"id": name, "messages": turns, "videos": [f"{name}.mp4"]} for name in ("good", "lie")]
    (root / "clips.json").write_text(json.dumps(records))


def test_a_clip_that_turns_out_shorter_is_replaced(tiny: Tiny, tmp_path: Path) -> None:
    """Quarantined as `truncated`, in the place of which a good one is trained on; the run goes on."""
    root = tmp_path / "data"
    write_records(root)
    config = data_config(root, {"format": "messages", "path": "clips.json"}, index="header", max_samples_per_pack=1)
    with running(config, tiny.encoder, slots=2) as run:
        assert [ids for ids, _, _ in run.step().values()] == [("good",)] * 2
        assert [(item.id, item.path, item.reason) for item in run.bad] == [("lie", str(root / "lie.mp4"), "truncated")]


def test_headers_and_scans_are_kept_apart(tiny: Tiny, tmp_path: Path) -> None:
    """In one cache folder: whoever asks for a scan shall not get what a header claimed, nor the other way round."""
    root, cache = tmp_path / "data", tmp_path / "cache"
    write_records(root)
    ref = MediaRef("video", root / "lie.mp4")

    def found(headers: bool) -> MediaInfo | str:
        index = build([ref], cache, 0, 10.0, headers, show_progress=False)
        try:
            return index.info(ref)
        except MediaError as error:
            return error.reason

    first = found(headers=True)
    assert isinstance(first, MediaInfo) and first.num_frames == 40
    assert found(headers=False) == "truncated"
    assert found(headers=True) == first and found(headers=False) == "truncated"
    source = {"format": "messages", "path": "clips.json"}
    counts = []
    for kind in ("header", "scan", "header"):
        config = data_config(root, source, index=kind)
        counts.append(load_dataset(config, config.sources, MAKE, tiny.encoder, seed=0).num_samples)
    assert counts == [2, 1, 2]
