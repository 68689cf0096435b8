"""Videos as users have them: broken, odd and hostile, each with what has to become of it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.helpers.clips import level
from tests.reliability.clip_makers import (
    Maker,
    changed,
    clip,
    content,
    cut,
    every_inverted,
    gif_canvas,
    overwritten,
    payload_inverted,
    picture,
    remuxed,
    size_changes,
    streams,
    turned,
    vp8_sizes,
)


def by_index(index: int, time_s: float) -> int:
    """Frames are numbered as they were made."""
    return index


def by_time(index: int, time_s: float) -> int:
    """At 10 frames a second, of which some are missing."""
    return round(10 * time_s)


@dataclass(frozen=True)
class Frames:
    """The clip is read: so many frames of so many pixels, after rotation."""

    count: int = 12
    width: int = 64
    height: int = 48
    number: Callable[[int, float], int] | None = by_index
    """Which frame was made for what is read as frame `index` at a time; None: greys don't tell."""
    grey: Callable[[int], int] = level
    """Of the lower right corner of frame `number`."""


@dataclass(frozen=True)
class Refused:
    """The clip is left out for this reason, by the index or, where it is `late`, by the worker that decodes."""

    reason: str
    says: str = ""
    """Part of the message."""
    late: bool = False


Corpus = Mapping[str, tuple[Maker, Frames | Refused]]

B_FRAMES = {"bf": "2", "g": "12"}
QUIET = {"x265-params": "log-level=error"}
FAST_AV1 = {"preset": "12", "svtav1-params": "tile-columns=0"}
INTRA = {"bf": "0", "g": "1", "crf": "1"}
NO_FRAMES = "its video stream has no frames"
LATE = Refused("decode_error", late=True)
KEYS = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "00112233445566778899aabbccddeeff",
    "encryption_kid": "112233445566778899aabbccddeeff00",
}

long = clip(40, size=(160, 120), options=B_FRAMES)
"""Four seconds, in GOPs of twelve frames."""
intra = clip(40, size=(160, 120), options=INTRA)
in_front = remuxed(long, movflags="faststart")
fragmented = remuxed(clip(40, size=(160, 120), options={**INTRA, "g": "10"}), movflags="frag_keyframe+empty_moov")
h265 = clip(codec="libx265", options=QUIET)
av1 = clip(codec="libsvtav1", size=(64, 64), options=FAST_AV1)
vp9 = clip(codec="libvpx-vp9")
long_vp9 = clip(40, size=(160, 120), codec="libvpx-vp9")
mjpeg = clip(codec="mjpeg", pix_fmt="yuvj420p")
gif = clip(codec="gif", pix_fmt="rgb8")
avi = clip(40, size=(160, 120), codec="mpeg4")
LONG = Frames(40, 160, 120)

CODECS: Corpus = {
    "h264.mp4": (clip(), Frames()),
    "h264_b_frames.mp4": (clip(options=B_FRAMES), Frames()),
    "h264_10_bits.mp4": (clip(pix_fmt="yuv420p10le"), Frames()),
    "h264_422.mp4": (clip(pix_fmt="yuv422p"), Frames()),
    "h264_444.mp4": (clip(pix_fmt="yuv444p"), Frames()),
    "h264_full_range.mp4": (clip(pix_fmt="yuvj420p"), Frames()),
    "h264_grey.mp4": (clip(pix_fmt="gray"), Frames(number=None)),  # its range is anybody's guess
    "h264_interlaced.mp4": (clip(options={"flags": "+ildct+ilme"}), Frames()),
    "h265.mp4": (h265, Frames()),
    "h265_10_bits.mp4": (clip(codec="libx265", pix_fmt="yuv420p10le", options=QUIET), Frames()),
    "av1.mp4": (av1, Frames(12, 64, 64)),
    "av1.webm": (av1, Frames(12, 64, 64)),
    "vp8.webm": (clip(codec="libvpx"), Frames()),
    "vp9.webm": (vp9, Frames()),
    "vp9_alpha.webm": (clip(codec="libvpx-vp9", pix_fmt="yuva420p"), Frames()),
    "mpeg4.mp4": (clip(codec="mpeg4"), Frames()),
    "mpeg4_b_frames.avi": (clip(codec="mpeg4", options=B_FRAMES), Frames()),
    "mpeg1.mpg": (clip(codec="mpeg1video", fps=25), Frames()),
    "mpeg2.mpg": (clip(codec="mpeg2video", fps=25), Frames()),
    "mpeg2_interlaced.ts": (clip(codec="mpeg2video", fps=25, options={"flags": "+ildct+ilme"}), Frames()),
    "prores.mov": (clip(codec="prores_ks", pix_fmt="yuv422p10le"), Frames()),
    "prores_alpha.mov": (clip(codec="prores_ks", pix_fmt="yuva444p10le"), Frames()),
    "mjpeg.avi": (mjpeg, Frames()),
    "gif.gif": (gif, Frames()),
    "gif_called.mp4": (clip(codec="gif", pix_fmt="rgb8", format="gif"), Frames()),
    "apng.apng": (clip(codec="apng", pix_fmt="rgb24"), Frames()),
    "png_alpha.mov": (clip(codec="png", pix_fmt="rgba"), Frames()),
    "animation_alpha.mov": (clip(codec="qtrle", pix_fmt="argb"), Frames()),
    "lossless.mkv": (clip(codec="ffv1"), Frames()),
    "uncompressed.avi": (clip(codec="rawvideo"), Frames()),
    "dv.avi": (clip(codec="dvvideo", size=(720, 576), fps=25), Frames(12, 720, 576)),
    "cinepak.mov": (clip(codec="cinepak", pix_fmt="rgb24"), Frames()),
    "windows_media.wmv": (clip(codec="wmv2"), Frames()),
    "flash.flv": (clip(codec="flv"), Frames()),
    "old_phone.3gp": (clip(codec="h263", size=(128, 96)), Frames(12, 128, 96)),
}
CONTAINERS: Corpus = {
    "h264.mkv": (clip(options=B_FRAMES), Frames()),
    "h264.mov": (clip(options=B_FRAMES), Frames()),
    "h264.avi": (clip(options=B_FRAMES), Frames()),
    "h264.ts": (clip(options=B_FRAMES), Frames()),
    "h264.flv": (clip(), Frames()),
    "mpeg2.mxf": (clip(codec="mpeg2video", fps=25), Frames()),
    "vp9.ivf": (vp9, Frames()),
    "bare.h264": (clip(options=B_FRAMES, format="h264"), Frames()),
    "bare.h265": (clip(codec="libx265", options=QUIET, format="hevc"), Frames()),
    "bare.mjpeg": (clip(codec="mjpeg", pix_fmt="yuvj420p", format="mjpeg"), Frames()),
    "fragmented.mp4": (fragmented, LONG),
    "no_suffix": (clip(format="mp4"), Frames()),
    "picture_suffix.jpg": (clip(format="mp4"), Frames()),
    "upper.MP4": (clip(), Frames()),
    "a\nline %03d é 你.mp4": (clip(), Frames()),
    "http:colon.mp4": (clip(), Frames()),
    "sound_first.mkv": (streams("sound", "video", "small", "sound"), Frames()),
    "cover_first.mp4": (streams("cover", "video"), Frames()),
    "cover.mp4": (streams("video", "cover"), Frames()),
    "two_videos.mp4": (streams("video", "small"), Frames()),
}
TIMES: Corpus = {
    "variable_rate.mp4": (clip(ticks=[0, 1, 2, 3, 10, 20, 21, 50]), Frames(8)),
    "variable_rate.mkv": (clip(ticks=[0, 1, 2, 3, 10, 20, 21, 50]), Frames(8)),
    "five_minutes_still.mp4": (clip(ticks=[*range(6), 3000, 3001]), Frames(8)),
    "240_fps.mp4": (clip(fps=240), Frames()),
    "1_fps.mp4": (clip(fps=1), Frames()),
    "one_frame.mp4": (clip(1), Frames(1)),
    "one_frame.mkv": (clip(1), Frames(1)),
    "one_frame.gif": (clip(1, codec="gif", pix_fmt="rgb8"), Frames(1)),
    "starts_late.mp4": (remuxed(clip(), shift=100_000), Frames()),
    "starts_late.mkv": (remuxed(clip(), shift=100_000), Frames()),
    "starts_late.ts": (remuxed(clip(), shift=100_000), Frames()),
    "edit_list_cuts_all.mp4": (remuxed(clip(), shift=-20_000), Refused("empty", NO_FRAMES)),
    "edit_list_cuts_half.mp4": (
        remuxed(clip(), shift=-6 * 1024),
        Frames(6, number=lambda index, time_s: index + 6),
    ),
    "ten_hours_at_1_fps.mp4": (
        remuxed(clip(60, fps=1, size=(32, 32)), rounds=600),
        Frames(36_000, 32, 32, lambda index, time_s: index % 60),
    ),
    "header_counts_9999.avi": (overwritten(avi, b"vids", offset=28, value=struct.pack("<I", 9999)), LONG),
    "header_counts_3.avi": (overwritten(avi, b"vids", offset=28, value=struct.pack("<I", 3)), LONG),
    "header_no_rate.avi": (overwritten(avi, b"vids", offset=16, value=bytes(8)), LONG),
    "header_90000_fps.avi": (overwritten(avi, b"vids", offset=16, value=struct.pack("<II", 1, 90_000)), LONG),
    "header_no_duration.mp4": (overwritten(clip(), b"mdhd", offset=16, value=b"\0\0\0\1"), Frames()),
    "frames_missing.mp4": (
        remuxed(intra, keep=lambda number: number % 7 != 3),
        Frames(34, 160, 120, by_time),
    ),
    # FFmpeg paints over what depends on the missing frame, and does not say so.
    "a_gop_lacks_one.mkv": (remuxed(long, keep=lambda number: number != 15), Frames(39, 160, 120, None)),
}
SIZES: Corpus = {
    "turned_0.mp4": (turned(clip(), 1, 0, 0, 1), Frames()),
    "turned_90.mp4": (turned(clip(), 0, 1, -1, 0), Frames(12, 48, 64)),
    "turned_180.mp4": (turned(clip(), -1, 0, 0, -1), Frames(grey=lambda number: 255 - level(number))),
    "turned_270.mp4": (turned(clip(), 0, -1, 1, 0), Frames(12, 48, 64)),
    "mirrored.mp4": (turned(clip(), -1, 0, 0, 1), Frames()),
    "matrix_of_zeros.mp4": (turned(clip(), 0, 0, 0, 0), Frames()),
    "1x1.mkv": (clip(size=(1, 1), codec="ffv1", pix_fmt="bgr0"), Frames(12, 1, 1)),
    "2x2.mp4": (clip(size=(2, 2)), Frames(12, 2, 2, None)),
    "odd.mp4": (clip(size=(33, 17), pix_fmt="yuv444p"), Frames(12, 33, 17)),
    "odd.mkv": (clip(size=(65, 49), codec="ffv1"), Frames(12, 65, 49)),
    "cropped.mp4": (clip(size=(34, 18)), Frames(12, 34, 18)),
    "wide.mp4": (clip(size=(2048, 16)), Frames(12, 2048, 16)),
    "tall.mp4": (clip(size=(16, 2048)), Frames(12, 16, 2048)),
    "8k.mov": (clip(2, size=(7680, 4320), codec="mjpeg", pix_fmt="yuvj420p"), Frames(2, 7680, 4320)),
    "track_says_60000x60000.mp4": (
        overwritten(clip(), b"tkhd", offset=76, value=struct.pack(">II", 60_000 << 16, 60_000 << 16)),
        Frames(),
    ),
    "sample_says_60000x60000.mp4": (
        overwritten(clip(), b"avc1", offset=24, value=struct.pack(">HH", 60_000, 60_000)),
        Frames(),
    ),
    "gif_65535x65535.gif": (gif_canvas(65_535, 65_535), Refused("no_video_stream", "has no size")),
    "gif_16000x16000.gif": (gif_canvas(16_000, 16_000), Refused("too_large", "16000x16000")),
    "vp8_16383x16383.ivf": (vp8_sizes(16_383), LATE),
    "vp8_grows_to_16383x16383.ivf": (vp8_sizes(16_383, frame=5), LATE),
    "vp8_grows.ivf": (vp8_sizes(100, frame=5), Refused("mixed_sizes", "change size midway", late=True)),
    "two_sizes.ts": (size_changes, Refused("mixed_sizes", "change size midway", late=True)),
}
NO_INDEX = Refused("truncated", "without its index (moov)")
EARLY = Refused("truncated", "ends early")
CUT: Corpus = {
    "nothing.mp4": (content(b""), Refused("empty", "0 bytes")),
    "one_byte.mp4": (content(b"a"), Refused("not_a_video")),
    "cut_header.mp4": (cut(long, 0.001), Refused("not_a_video")),
    "cut_10.mp4": (cut(long, 0.1), NO_INDEX),
    "cut_50.mp4": (cut(long, 0.5), NO_INDEX),
    "cut_90.mp4": (cut(long, 0.9), NO_INDEX),
    "cut_last_bytes.mp4": (cut(long, 0.999), LONG),  # what the muxer called itself
    "in_front_cut_10.mp4": (cut(in_front, 0.1), NO_INDEX),
    "in_front_cut_50.mp4": (cut(in_front, 0.5), Refused("truncated", "of 40 frames")),
    "in_front_cut_99.mp4": (cut(in_front, 0.99), Refused("truncated", "39 of 40 frames")),
    "fragmented_cut_50.mp4": (cut(fragmented, 0.5), Frames(17, 160, 120)),
    "fragmented_cut_90.mp4": (cut(fragmented, 0.9), EARLY),
    "cut_10.mkv": (cut(long, 0.1), EARLY),
    "cut_50.mkv": (cut(long, 0.5), Frames(12, 160, 120)),
    "cut_50.webm": (cut(long_vp9, 0.5), Frames(15, 160, 120)),
    "cut_50.ts": (cut(long, 0.5), Frames(19, 160, 120, by_time)),
    "cut_50.avi": (cut(avi, 0.5), Refused("truncated", "of 40 frames")),
    "cut_50.flv": (cut(clip(40, size=(160, 120)), 0.5), EARLY),
    "cut_50.gif": (cut(gif, 0.5), Frames(6, number=None)),  # the last is damaged, and nothing tells
    "cut_90.gif": (cut(gif, 0.9), Frames(11, number=None)),
    "starts_within_a_gop.ts": (remuxed(long, keep=lambda number: number >= 5), LATE),
    "starts_within_a_gop.mkv": (remuxed(long, keep=lambda number: number >= 5), LATE),
}
DAMAGED: Corpus = {
    "payload_inverted.mp4": (payload_inverted(long, 0, 1), LATE),
    "payload_half_inverted.mp4": (payload_inverted(long, 0.5, 1), LATE),
    "bytes_inverted.mp4": (payload_inverted(long, 0, 1, every=37), LATE),
    "few_bytes_inverted.mp4": (payload_inverted(long, 0, 1, every=1000), LATE),
    "bytes_inverted.webm": (changed(long_vp9, every_inverted(37, 600)), LATE),
    "bytes_inverted.mkv": (changed(long, every_inverted(37, 800)), LATE),
    "bytes_inverted.ts": (changed(long, every_inverted(37, 600)), LATE),
    "index_inverted.mp4": (changed(long, every_inverted(37, after=b"moov")), Refused("no_video_stream")),
    "no_sample_table.mp4": (overwritten(clip(), b"stts", value=bytes(20)), Refused("empty", NO_FRAMES)),
    "offsets_beyond_the_end.mp4": (
        overwritten(clip(), b"stco", offset=8, value=b"\x7f\xff\xff\xff"),
        Refused("empty", NO_FRAMES),
    ),
    "sample_sizes_absurd.mp4": (
        overwritten(clip(), b"stsz", offset=12, value=b"\xff" * 8),
        Refused("empty", NO_FRAMES),
    ),
    "no_parameter_sets.mp4": (overwritten(clip(), b"avcC", value=b"\xff" * 20), LATE),
    "encrypted.mp4": (clip(40, options=B_FRAMES, container_options=KEYS), LATE),
    "unknown_codec.mp4": (
        changed(clip(), lambda data: data.replace(b"avc1", b"zzz1")),
        Refused("decode_error", "knows no decoder"),
    ),
}
NO_VIDEO: Corpus = {
    "sound.mp4": (streams("sound"), Refused("no_video_stream", "no moving picture")),
    "sound_with_cover.mp4": (streams("sound", "cover"), Refused("no_video_stream", "no moving picture")),
    "sound_and_empty_track.mp4": (streams("sound", "empty"), Refused("no_video_stream")),
    "text.mp4": (content(b"The quick brown fox.\n" * 50), Refused("not_a_video")),
    "web_page.mp4": (content(b"<!DOCTYPE html><html><body>404 Not Found</body></html>"), Refused("not_a_video")),
    "error.mp4": (content(b'{"error": "rate limited"}'), Refused("not_a_video")),
    "subtitles.mp4": (content(b"1\n00:00:01,000 --> 00:00:02,000\nHello\n\n" * 9), Refused("no_video_stream")),
    "archive.mp4": (content(b"PK\3\4" + bytes(400)), Refused("not_a_video")),
    "noise.mp4": (content(np.random.default_rng(0).bytes(50_000)), Refused("not_a_video")),
    "noise.ts": (content(np.random.default_rng(0).bytes(50_000)), Refused("not_a_video")),
    "zeros.mp4": (content(bytes(50_000)), Refused("not_a_video")),
    "beginning_of_mp4.mp4": (content(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2"), NO_INDEX),
    "playlist.mp4": (
        content(b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nh264.mp4\n#EXT-X-ENDLIST\n"),
        Refused("not_a_video"),
    ),
    "list_of_files.mp4": (content(b"ffconcat version 1.0\nfile 'h264.mp4'\n"), Refused("not_a_video")),
    "jpeg.mp4": (picture("JPEG"), Refused("not_a_video", "is a picture")),
    "png.mp4": (picture("PNG"), Refused("not_a_video", "is a picture")),
    "webp.mp4": (picture("WEBP"), Refused("not_a_video", "is a picture")),
    "gone.mp4": (lambda path: None, Refused("missing")),
    "h264.mp4/in_a_file.mp4": (lambda path: None, Refused("missing")),
    "link_to_nothing.mp4": (lambda path: path.symlink_to("gone"), Refused("not_a_file", "has become a link")),
    "link_to_itself.mp4": (lambda path: path.symlink_to(path.name), Refused("not_a_file", "has become a link")),
    "link.mp4": (lambda path: path.symlink_to("h264.mp4"), Refused("not_a_file", "has become a link")),
    "folder.mp4": (Path.mkdir, Refused("not_a_file")),
    "pipe.mp4": (os.mkfifo, Refused("not_a_file")),
    "y" * 300 + ".mp4": (lambda path: None, Refused("unreadable", "too long")),
    os.fsdecode(b"Pr\xfcfung.mp4"): (clip(), Refused("unreadable", "UTF-8")),
}
CORPUS: Corpus = {**CODECS, **CONTAINERS, **TIMES, **SIZES, **CUT, **DAMAGED, **NO_VIDEO}

SLOW: Corpus = {
    "8k_h264.mp4": (clip(4, size=(7680, 4320), options={"preset": "ultrafast"}), Frames(4, 7680, 4320)),
    "ten_hours_at_30_fps.mkv": (
        remuxed(clip(60, fps=30, size=(32, 32)), rounds=18_000),
        Frames(1_080_000, 32, 32, lambda index, time_s: index % 60),
    ),
    "ten_hours_at_1_fps.ts": (
        remuxed(clip(60, fps=1, size=(32, 32)), rounds=600),
        Frames(36_000, 32, 32, lambda index, time_s: index % 60),
    ),
    "vp8_6000x6000_then_64x48.ivf": (vp8_sizes(6000), Refused("mixed_sizes", late=True)),
}
"""What takes seconds each."""

REAL: Mapping[str, Frames] = {
    "av1_video.mkv": Frames(125, 640, 360, None),
    "bt709_full_range.mp4": Frames(30, 1280, 720, None),
    "h264_10bits.mp4": Frames(30, 200, 200, None),
    "h265_10bits.mp4": Frames(30, 200, 200, None),
    "h265_video.mp4": Frames(10, 128, 128, None),
    "nasa_13013.mp4": Frames(390, 480, 270, None),
}
"""Of the folder of real clips."""
