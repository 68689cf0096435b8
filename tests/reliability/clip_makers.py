"""Makers of odd video files, for test_odd_clips.py: what encoders, muxers and accidents bring about."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from tests.helpers.clips import level, make_clip

Maker = Callable[[Path], object]


def clip(frames: int = 12, ticks: Sequence[int] = (), **more: Any) -> Maker:
    """`make_clip` with so many frames, or frames at `ticks`."""
    return lambda path: make_clip(path, ticks or range(frames), **more)


def content(data: bytes) -> Maker:
    """A file of these bytes."""
    return lambda path: path.write_bytes(data)


def changed(make: Maker, change: Callable[[bytes], bytes]) -> Maker:
    """A file with its bytes changed afterwards."""

    def spoil(path: Path) -> None:
        make(path)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def cut(make: Maker, share: float) -> Maker:
    """The first `share` of a file: a download that broke off."""
    return changed(make, lambda data: data[: int(len(data) * share)])


def overwritten(make: Maker, mark: bytes, value: bytes, offset: int = 0) -> Maker:
    """`value` in a file, `offset` bytes behind the first `mark`."""

    def change(data: bytes) -> bytes:
        start = data.index(mark) + len(mark) + offset
        return data[:start] + value + data[start + len(value) :]

    return changed(make, change)


def payload_inverted(make: Maker, start: float, end: float, every: int = 1) -> Maker:
    """An MP4 file in whose frames each `every`-th byte from `start` to `end` (shares of the payload) is inverted."""

    def change(data: bytes) -> bytes:
        spoilt = bytearray(data)
        begin = data.index(b"mdat") + 4
        length = int.from_bytes(data[begin - 8 : begin - 4], "big") - 8
        for i in range(begin + int(length * start), begin + int(length * end), every):
            spoilt[i] ^= 0xFF
        return bytes(spoilt)

    return changed(make, change)


def every_inverted(every: int, start: int = 0, after: bytes = b"") -> Callable[[bytes], bytes]:
    """Invert each `every`-th byte from `start`, or from `after` on."""

    def change(data: bytes) -> bytes:
        spoilt = bytearray(data)
        for i in range(data.index(after) + start + every - 1, len(data), every):
            spoilt[i] ^= 0xFF
        return bytes(spoilt)

    return change


def remuxed(
    make: Maker,
    shift: int = 0,
    keep: Callable[[int], bool] = lambda number: True,
    rounds: int = 1,
    **options: str,
) -> Maker:
    """The packets of another clip, copied: those to `keep` by number, `shift` ticks later, `rounds` times in a row."""

    def copy(path: Path) -> None:
        original = path.with_name(f"{path.name}.source.mp4")
        make(original)
        with av.open(str(original)) as file, av.open(str(path), "w", options=options) as target:
            video = file.streams.video[0]
            stream = target.add_stream_from_template(video)
            packets = [packet for packet in file.demux(video) if packet.size]
            length = sum(packet.duration or 0 for packet in packets)
            times = [(packet.pts, packet.dts) for packet in packets]
            for number in range(rounds):
                for i, packet in enumerate(packets):
                    if not keep(i):
                        continue
                    packet.stream, packet.time_base = stream, video.time_base
                    packet.pts, packet.dts = (t + shift + number * length for t in times[i])
                    target.mux(packet)
        original.unlink()

    return copy


def turned(make: Maker, a: int, b: int, c: int, d: int) -> Maker:
    """An MP4 file with another display matrix: [a b; c d]."""
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 48 * one, 48 * one, 1 << 30)
    return overwritten(make, b"tkhd", offset=40, value=matrix)


def streams(*kinds: str) -> Maker:
    """A file of several streams: `video` (64x48), `small` (32x32) videos, `sound`, `cover` art, `empty` video."""

    def make(path: Path) -> None:
        with av.open(str(path), "w") as container:
            made = [_add_stream(container, kind) for kind in kinds]
            for kind, stream in zip(kinds, made, strict=True):
                for frame in _frames_of(kind, stream):
                    container.mux(stream.encode(frame))
                if kind != "empty":
                    container.mux(stream.encode(None))

    return make


def _add_stream(container: Any, kind: str) -> Any:
    if kind == "sound":
        return container.add_stream("aac", rate=16000, layout="mono")
    if kind == "cover":
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        return stream
    stream = container.add_stream("libx264", rate=10)
    stream.width, stream.height = (32, 32) if kind == "small" else (64, 48)
    stream.pix_fmt = "yuv420p"
    return stream


def _frames_of(kind: str, stream: Any) -> Iterable[Any]:
    if kind == "sound":
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        yield frame
        return
    for i in range({"cover": 1, "empty": 0}.get(kind, 12)):
        pixels = np.full((stream.height, stream.width, 3), level(i), np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = i, Fraction(1, 10)
        yield frame


def size_changes(path: Path) -> None:
    """MPEG-TS whose picture is 64x48 first and 128x96 then, as from one recording appended to another."""
    parts = []
    for number, size in enumerate([(64, 48), (128, 96)]):
        part = path.with_name(f"{path.name}.{number}.ts")
        make_clip(part, range(12 * number, 12 * number + 12), size=size, format="mpegts")
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))


def vp8_sizes(side: int, frame: int = 0) -> Maker:
    """A clip whose key frame `frame` claims `side` x `side` pixels; the first one's claim is the file's too."""

    def change(data: bytes) -> bytes:
        spoilt, size = bytearray(data), struct.pack("<HH", side, side)
        if frame == 0:
            spoilt[12:16] = size
        starts = [i for i in range(len(data)) if data[i : i + 3] == b"\x9d\x01\x2a"]
        spoilt[starts[frame] + 3 : starts[frame] + 7] = size
        return bytes(spoilt)

    return changed(clip(codec="libvpx", options={"g": "1"}, format="ivf"), change)


def gif_canvas(width: int, height: int) -> Maker:
    """35 bytes: a picture of one pixel on a canvas of many."""
    canvas = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return content(canvas + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0\x3b")


def picture(format: str) -> Maker:
    """A picture file."""
    return lambda path: Image.new("RGB", (64, 48), (200, 100, 50)).save(path, format=format)
