"""What is in a video file or picture, found without decoding: size, frame count, rate and presentation times.

PyAV demuxes: one packet is one frame. Whatever is wrong with a file becomes a `MediaError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from torchcodec.decoders import VideoDecoder

from vft.common.types import MediaInfo, MediaKind, MediaRef
from vft.data.media import errors
from vft.data.media.errors import MediaError, as_media_error, check_file, check_size
from vft.data.media.pictures import scan_picture

LIST_FPS = 2.0
"""Frames per second of a list of pictures that does not state its rate (the default of qwen-vl-utils, and
LLaVA-Video's for folders)."""
PLAYLISTS = frozenset({"hls", "dash", "concat", "concatf", "imf", "sdp", "rtsp"})
"""FFmpeg's demuxers that open further files or hosts: a video file must hold its own frames."""
DECODER_ERRORS = (RuntimeError, ValueError, IndexError)
"""What torchcodec raises."""


def scan(ref: MediaRef) -> MediaInfo:
    """Find size, frame count and presentation times of a medium without decoding it.

    Raises:
        MediaError: the medium cannot be used.
    """
    return join_scans(ref, [scan_file(ref.file_kind, file) for file in ref.files])


def join_scans(ref: MediaRef, infos: Sequence[MediaInfo]) -> MediaInfo:
    """The result for a medium, given the scans of its files. Several pictures are one video.

    Their times are the record's `timestamps`, or follow from its `sample_fps`; without both, `fps` is their rate, as in
    qwen-vl-utils before 0.0.12.

    Raises:
        MediaError: `mixed_sizes` if the pictures differ in size.
    """
    first, options = infos[0], ref.options
    if not isinstance(ref.path, tuple):
        return first
    for path, info in zip(ref.path, infos, strict=True):
        if (info.height, info.width) != (first.height, first.width):
            sizes = f"{info.width}x{info.height} but {ref.path[0].name} is {first.width}x{first.height}"
            raise MediaError("mixed_sizes", f"{path}: is {sizes}; the pictures of a video must have one size")
    times_s = options.timestamps
    fps = options.sample_fps or (options.fps if not ref.is_folder and not times_s else None) or LIST_FPS
    if times_s and times_s[-1] > times_s[0]:
        fps = (len(times_s) - 1) / (times_s[-1] - times_s[0])
    duration_s = times_s[-1] + 1 / fps if times_s else len(infos) / fps
    return MediaInfo("video", first.height, first.width, len(infos), fps, duration_s=duration_s, times_s=times_s)


def scan_file(kind: MediaKind, path: Path, headers: bool = False) -> MediaInfo:
    """`scan` of one file. With `headers`, the header of a video counts its frames if it gives their number and rate."""
    check_file(path)
    with as_media_error(path):
        return _scan_video(path, headers) if kind == "video" else scan_picture(path)


def _scan_video(path: Path, headers: bool) -> MediaInfo:
    try:
        with open_container(path) as container:
            if PLAYLISTS.intersection(container.format.name.split(",")):
                raise MediaError("not_a_video", f"{path}: is a playlist ({container.format.name}); name a video file")
            if container.format.name.endswith("_pipe"):  # FFmpeg's demuxers of single pictures
                raise MediaError("not_a_video", f"{path}: is a picture ({container.format.name}); name a video file")
            best = container.streams.best("video")
            if best is None or best.disposition & Disposition.attached_pic:
                raise MediaError("no_video_stream", f"{path}: has no moving picture; take the record out")
            assert isinstance(best, VideoStream)
            if best.codec_context is None:
                raise MediaError("decode_error", f"{path}: FFmpeg knows no decoder for it; encode it anew, as MP4 say")
            index, height, width = best.index, best.height, best.width
            check_size(path, width, height)
            # The decoder decides which stream is best and how large it is after rotation, but it needs a duration in
            # the header. Files without one (raw H.264, APNG) have no rotation either.
            with suppress(*DECODER_ERRORS):
                metadata = VideoDecoder(str(path), seek_mode="approximate", num_ffmpeg_threads=1).metadata
                index, height, width = metadata.stream_index, metadata.height or 0, metadata.width or 0
            stream = container.streams[index]
            assert isinstance(stream, VideoStream)
            info = _read_header(stream, height, width) if headers else None
            info = info or _scan_packets(path, container, stream, height, width)
    except av.FFmpegError as error:
        raise _cannot_open(path, error) from error
    if not height or not width:
        raise MediaError("no_video_stream", f"{path}: its video stream has no size; encode it anew")
    check_size(path, width, height)
    return info


def _read_header(stream: VideoStream, height: int, width: int) -> MediaInfo | None:
    """Frames and rate as the header gives them; None if it does not, or if the rate may vary."""
    fps, base_fps = float(stream.average_rate or 0), float(stream.base_rate or 0)
    if not stream.frames or not fps or abs(fps - base_fps) > 0.01 * fps:
        return None
    return MediaInfo("video", height, width, stream.frames, fps, stream.index, stream.frames / fps)


def _scan_packets(path: Path, container: InputContainer, stream: VideoStream, height: int, width: int) -> MediaInfo:
    """Frames, rate and times of a stream, from its packets: one packet is one frame.

    Packets that an edit list trims away are marked to be discarded, and the decoder leaves them out too.
    """
    ticks: list[int | None] = []
    num_read, is_cut_off, last_ticks = 0, False, 0
    for packet in container.demux(stream):
        if not packet.size:  # the empty packet that ends the stream
            continue
        num_read, is_cut_off = num_read + 1, packet.is_corrupt
        if not packet.is_discard:
            ticks.append(packet.pts if packet.pts is not None else packet.dts)
            last_ticks = packet.duration or last_ticks
    if not ticks:
        raise MediaError("empty", f"{path}: its video stream has no frames; download or encode it anew")
    if is_cut_off and num_read != stream.frames:  # 0 if the container does not count
        count = f"holds {num_read} of {stream.frames or 'more'} frames"
        raise MediaError("truncated", f"{path}: ends early, {count}; download it again")
    known = sorted(tick for tick in ticks if tick is not None)
    if len(known) < len(ticks):
        known = []  # some frames have no time: rely on the rate
    claimed_fps = float(stream.average_rate or 0)
    fps, duration_s, times_s = frame_times(known, float(stream.time_base or 0), last_ticks, claimed_fps)
    duration_s = duration_s or (len(ticks) / fps if fps else 0.0)
    return MediaInfo("video", height, width, len(ticks), fps, stream.index, duration_s, times_s)


def frame_times(
    ticks: list[int], tick_s: float, last_ticks: int, claimed_fps: float
) -> tuple[float, float, tuple[float, ...] | None]:
    """Rate, duration and, if the rate varies, times (in seconds) of frames with the sorted time stamps `ticks`.

    The rate is constant if no frame is further from even spacing than time stamps are rounded. That is one tick, or
    1 ms for a file copied from Matroska, whose ticks these are; but at most a quarter of a frame, since AVI's ticks are
    whole frames. The rate that the container claims is taken unless the time stamps contradict it by more than 1 %.
    """
    if len(ticks) < 2 or ticks[-1] == ticks[0]:
        return claimed_fps, 0.0, None
    period = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    tolerance = min(max(1.0, 1e-3 / tick_s), period / 4) + 1e-6
    is_constant = all(abs(tick - ticks[0] - i * period) <= tolerance for i, tick in enumerate(ticks))
    span_s = (ticks[-1] - ticks[0]) * tick_s
    last_s = period * tick_s if is_constant else (last_ticks or period) * tick_s
    fps = len(ticks) / (span_s + last_s)
    if claimed_fps and abs(len(ticks) / claimed_fps - (span_s + last_s)) <= 0.01 * span_s + tolerance * tick_s:
        fps = claimed_fps
    if is_constant:
        return fps, len(ticks) / fps, None
    return fps, span_s + last_s, tuple((tick - ticks[0]) * tick_s for tick in ticks)


def open_container(path: Path) -> InputContainer:
    """A video file opened by PyAV; no other file and no address is followed."""
    options = {"protocol_whitelist": "file", "max_pixels": str(errors.MAX_FRAME_PIXELS)}
    container: InputContainer = av.open(str(path), options=options, metadata_errors="ignore")
    return container


def _cannot_open(path: Path, error: av.FFmpegError) -> MediaError:
    """What it means that FFmpeg could not open or read `path`."""
    if isinstance(error, OSError) and not isinstance(error, ValueError):
        try:  # Matroska's demuxer reports a missing end as an error of the disk
            with path.open("rb") as file:
                while file.read(1 << 23):
                    pass
        except OSError:
            return MediaError("unreadable", f"{path}: {error.strerror}; check the file's permissions and its disk")
        return MediaError("truncated", f"{path}: ends early; download it again")
    with path.open("rb") as file:
        is_mp4 = file.read(8)[4:] == b"ftyp"
    if is_mp4:
        return MediaError("truncated", f"{path}: is an MP4 file without its index (moov); download it again")
    return MediaError("not_a_video", f"{path}: holds no video that FFmpeg can read; name a video file")
