"""Video files and pictures: what is in them (`scan`, without decoding) and their frames (`decode`).

Everything that can be wrong with a file ends as a `MediaError` with a reason from a fixed set. FFmpeg is reached in
two ways: PyAV demuxes (packet times), torchcodec decodes. `T` frames, `C/H/W` channels, height, width of pixels.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor
from torchcodec.decoders import VideoDecoder

from vft.common.types import Clip, MediaInfo, MediaKind, MediaPlan, MediaRef
from vft.data.media.errors import MediaError, as_media_error, check_file, first_line

Times = tuple[float, ...] | None
"""Seconds from the first frame, one for each frame; None where the rate is constant."""

MAX_FRAME_PIXELS = 89_478_485
"""Pixels of one frame or picture beyond which it is refused (PIL's own limit against decompression bombs)."""
CHUNK_BYTES = 8 * 2**20
"""Decoded frames that a worker holds at once, at the size of the source. So little memory is used again for the next
ones: fresh memory for every chunk costs as much as the resize."""
LIST_FPS = 2.0
"""Rate of pictures that don't say theirs (qwen-vl-utils' default; also LLaVA-Video's for folders), in frames per
second."""
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What PIL may try: not the formats that call other programs."""
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation (1, and what is no orientation: nothing). PIL's exif_transpose
also writes the EXIF data anew, and fails where some other entry of them is broken."""
PLAYLISTS = frozenset({"hls", "dash", "concat", "concatf", "imf", "sdp", "rtsp"})
"""FFmpeg's demuxers that follow a file to other files or hosts: a video file must hold its own frames."""

_DECODER_ERRORS = (RuntimeError, ValueError, IndexError)
_PICTURE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error)


# -------------------------------------------------------------------------------------------------------- scanning


def scan(ref: MediaRef) -> MediaInfo:
    """Find size, frame count and presentation times of a medium without decoding it.

    Raises:
        MediaError: the medium can't be used.
    """
    found = [scan_file("image" if ref.is_list else ref.kind, file) for file in ref.files]
    return join_pictures(ref, found) if ref.is_list else found[0]


def join_pictures(ref: MediaRef, infos: Sequence[MediaInfo]) -> MediaInfo:
    """The video that consists of pictures. Their times are the record's `timestamps`, or follow from its `sample_fps`;
    where it has neither, `fps` is the rate that they have, as in qwen-vl-utils before 0.0.12.

    Raises:
        MediaError: `mixed_sizes` where the pictures differ in size.
    """
    assert isinstance(ref.path, tuple) and len(ref.path) == len(infos) > 0
    first, options = infos[0], ref.options
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
    """`scan` of one file. With `headers` a video's frame count is the header's, where that states it with a rate."""
    check_file(path)
    with as_media_error(path):
        info = _scan_video(path, headers) if kind == "video" else _scan_picture(path)
    if info.height * info.width > MAX_FRAME_PIXELS:
        raise _too_large(path, f"{info.width}x{info.height}")
    return info


def _scan_video(path: Path, headers: bool) -> MediaInfo:
    try:
        with _open(path) as container:
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
            if height * width > MAX_FRAME_PIXELS:
                raise _too_large(path, f"{width}x{height}")
            # Which stream is best and how large it is after rotation is the decoder's to say, but it wants a duration
            # in the header. Without (raw H.264, APNG) there is no rotation either.
            with suppress(*_DECODER_ERRORS):
                metadata = VideoDecoder(str(path), seek_mode="approximate", num_ffmpeg_threads=1).metadata
                index, height, width = metadata.stream_index, metadata.height or 0, metadata.width or 0
            found = _read_header(container, index) if headers else None
            num_frames, fps, duration_s, times_s = found or _scan_packets(path, container, index)
    except av.FFmpegError as error:
        raise _unopened(path, error) from error
    if not height or not width:
        raise MediaError("no_video_stream", f"{path}: its video stream has no size; encode it anew")
    return MediaInfo("video", height, width, num_frames, fps, index, duration_s, times_s)


def _read_header(container: InputContainer, index: int) -> tuple[int, float, float, Times] | None:
    """Frames, rate, duration and times as the header states them; None where it doesn't, or the rate may vary."""
    stream = container.streams[index]
    assert isinstance(stream, VideoStream)
    fps, base_fps = float(stream.average_rate or 0), float(stream.base_rate or 0)
    if not stream.frames or not fps or abs(fps - base_fps) > 0.01 * fps:
        return None
    return stream.frames, fps, stream.frames / fps, None


def _scan_packets(path: Path, container: InputContainer, index: int) -> tuple[int, float, float, Times]:
    """Frames, rate, duration and times of one stream, read from its packets: one packet is one frame.

    Packets that an edit list trims away are marked to be discarded; the decoder leaves them out too.
    """
    stream = container.streams[index]
    assert isinstance(stream, VideoStream)
    ticks: list[int | None] = []
    num_read, cut_off, last_ticks = 0, False, 0
    for packet in container.demux(stream):
        if not packet.size:  # the empty one that ends the stream
            continue
        num_read, cut_off = num_read + 1, packet.is_corrupt
        if not packet.is_discard:
            ticks.append(packet.pts if packet.pts is not None else packet.dts)
            last_ticks = packet.duration or last_ticks
    if not ticks:
        raise MediaError("empty", f"{path}: its video stream has no frames; download or encode it anew")
    if cut_off and num_read != stream.frames:  # 0 in containers that don't count
        found = f"holds {num_read} of {stream.frames or 'more'} frames"
        raise MediaError("truncated", f"{path}: ends early, {found}; download it again")
    known = sorted(tick for tick in ticks if tick is not None)
    if len(known) < len(ticks):
        known = []  # some frames have no time at all: trust the rate
    claimed_fps = float(stream.average_rate or 0)
    fps, duration_s, times_s = frame_times(known, float(stream.time_base or 0), last_ticks, claimed_fps)
    return len(ticks), fps, duration_s or (len(ticks) / fps if fps else 0.0), times_s


def frame_times(ticks: list[int], tick_s: float, last_ticks: int, claimed_fps: float) -> tuple[float, float, Times]:
    """Rate, duration in seconds and, where the rate varies, times of frames whose sorted time stamps are `ticks`.

    The rate is constant where no frame is further from an even spacing than time stamps are rounded: a tick, or 1 ms
    for a file copied out of Matroska, whose ticks these are; never more than a quarter of a frame, for AVI's ticks are
    whole frames. The container's claimed rate stands unless the time stamps contradict it by more than 1 %.
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


def _scan_picture(path: Path) -> MediaInfo:
    with _picture(path) as image:
        if image.mode[0] in "IF":  # the model's processor would clip them: all is white
            text = f"has grey levels of more than 8 bits (PIL's mode {image.mode}); convert it to 8 bits"
            raise MediaError("not_a_picture", f"{path}: {text}")
        sideways = image.format != "TIFF" and _orientation(path, image) >= 5  # PIL gives TIFF's size turned
        height, width = (image.width, image.height) if sideways else (image.height, image.width)
        return MediaInfo("image", height, width)


# -------------------------------------------------------------------------------------------------------- decoding


def decode(plan: MediaPlan) -> Clip:
    """The planned frames at the size of the source.

    Raises:
        MediaError: `changed` where the file isn't what the plan was made for; otherwise what is wrong with it.
    """
    clips = list(decode_chunks(plan, chunk_bytes=None))
    return clips[0]


def decode_chunks(plan: MediaPlan, chunk_bytes: int | None = CHUNK_BYTES, *, multiple: int = 1) -> Iterator[Clip]:
    """`decode` in pieces, in order: as many times `multiple` frames (the last piece: what is left) as `chunk_bytes` of
    pixels hold, at least once."""
    indices, path, info = plan.frame_indices, plan.ref.path, plan.info
    step = len(indices) if chunk_bytes is None else max(1, chunk_bytes // (3 * info.height * info.width * multiple))
    step *= multiple
    pieces = [indices[i : i + step] for i in range(0, len(indices), step)]
    if isinstance(path, tuple):
        if len(path) != info.num_frames:
            raise MediaError("changed", f"{path[0].parent}: {len(path)} pictures, {info.num_frames} when indexed")
        for piece in pieces:
            frames_TCHW = torch.stack([_load_picture(path[i], info) for i in piece])
            yield Clip(frames_TCHW, tuple(info.time_of(i) for i in piece))
    elif plan.ref.kind == "image":
        yield Clip(_load_picture(path, info)[None], (0.0,))
    else:
        check_file(path)
        decoder = _open_decoder(path, info)
        if decoder is None:
            _check_unchanged(path, info)
        for number, piece in enumerate(pieces):
            clip = None if decoder is None else _seek(decoder, info, piece)
            if clip is None:
                yield from _decode_in_sequence(path, info, pieces[number:])
                return
            yield clip


def _open_decoder(path: Path, info: MediaInfo) -> VideoDecoder | None:
    """torchcodec's; None where it can't open the file, finds other frames in it than the index, or mirrors none."""
    try:
        decoder = VideoDecoder(str(path), stream_index=info.stream_index, num_ffmpeg_threads=1, seek_mode="exact")
    except _DECODER_ERRORS:
        return None
    metadata = decoder.metadata
    if (len(decoder), metadata.height, metadata.width) != (info.num_frames, info.height, info.width):
        return None
    if metadata.rotation is not None:  # torchcodec 0.13 turns by a display matrix, but leaves out its mirroring
        with suppress(av.FFmpegError), _open(path) as container:
            first = next(container.decode(container.streams[info.stream_index]), None)
            if isinstance(first, av.VideoFrame) and _is_mirrored(first):
                return None
    return decoder


def _is_mirrored(frame: av.VideoFrame) -> bool:
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    return bool(a * d < b * c)


def _check_unchanged(path: Path, info: MediaInfo) -> None:
    now = scan_file("video", path)
    found, indexed = (now.num_frames, now.height, now.width), (info.num_frames, info.height, info.width)
    if found != indexed:
        text = "{} frames of {} x {} (height x width)"
        message = f"{path}: has {text.format(*found)}, when indexed {text.format(*indexed)}; index it again"
        raise MediaError("changed", message)


def _seek(decoder: VideoDecoder, info: MediaInfo, indices: Sequence[int]) -> Clip | None:
    """The frames at `indices`; None where the decoder can't get them.

    torchcodec 0.13 can't seek in MPEG-TS, and returns other frames than those asked for, or fails at the last one,
    where the packets of B-frames carry no presentation time (AVI): their times show it. Reading in sequence can.
    """
    try:
        batch = decoder.get_frames_at(list(indices))
    except _DECODER_ERRORS:
        return None
    begin_s = decoder.metadata.begin_stream_seconds or 0.0
    times_s = tuple(t - begin_s for t in batch.pts_seconds.tolist())
    half_frame_s = 0.5 / info.fps if info.fps else 1.0
    for index, time_s in zip(indices, times_s, strict=True):
        expected_s = info.time_of(index)  # from the container's rate, which is right within 1 %
        if abs(time_s - expected_s) > half_frame_s + 0.01 * expected_s:
            return None
    return Clip(batch.data, times_s)


def _decode_in_sequence(path: Path, info: MediaInfo, pieces: Sequence[Sequence[int]]) -> Iterator[Clip]:
    """Pieces of ascending frames, read once from the first to the last of the file by PyAV; it needs no seeking.

    Pixels are torchcodec's, except with 10 bits a channel: there edges of colour differ (another way to scale chroma).
    What is missing or of another size shows at the end at the latest.
    """
    waiting, frames, count = deque(pieces), dict[int, Tensor](), 0
    try:
        with _open(path) as container:
            stream = container.streams[info.stream_index]
            assert isinstance(stream, VideoStream)
            stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                if waiting and count in waiting[0]:
                    frames[count] = _upright(frame, path, info)
                count += 1
                while waiting and waiting[0][-1] < count:
                    piece = waiting.popleft()
                    yield Clip(torch.stack([frames[i] for i in piece]), tuple(info.time_of(i) for i in piece))
                    frames = {i: frames[i] for i in piece if waiting and i in waiting[0]}
    except (av.FFmpegError, ValueError) as error:
        what = f"frame {count} of {info.num_frames}: {first_line(error)}"
        raise MediaError("decode_error", f"{path}: {what}; download or encode it anew") from error
    if count != info.num_frames:  # a frame that is lost somewhere would shift all behind it
        lost = f"{count} of {info.num_frames} frames can be decoded"
        raise MediaError("decode_error", f"{path}: {lost}; download or encode it anew")


def _upright(frame: av.VideoFrame, path: Path, info: MediaInfo) -> Tensor:
    """uint8 [3, H, W]."""
    pixels_HWC = frame.to_ndarray(format="rgb24")
    upright_HWC = np.rot90(pixels_HWC[::-1] if _is_mirrored(frame) else pixels_HWC, k=round(frame.rotation / 90))
    if upright_HWC.shape[:2] != (info.height, info.width):
        raise MediaError("mixed_sizes", f"{path}: its frames change size midway; encode it anew with one size")
    return torch.from_numpy(np.ascontiguousarray(upright_HWC)).permute(2, 0, 1)


def _load_picture(path: Path, info: MediaInfo) -> Tensor:
    """uint8 [3, H, W]. Upright by its EXIF orientation, as transformers' `load_image` and viewers have it; what is
    transparent in it is white, as in qwen-vl-utils 0.0.14 (`to_rgb`)."""
    with _picture(path) as image:
        image.load()  # before its orientation is asked for: PIL turns TIFF itself, then
        rgb = _on_white(image)
        turn = TURNS.get(_orientation(path, image))
        rgb = rgb if turn is None else rgb.transpose(turn)
        if (rgb.height, rgb.width) != (info.height, info.width):
            sizes = f"is {rgb.height} x {rgb.width} (height x width), when indexed {info.height} x {info.width}"
            raise MediaError("changed", f"{path}: {sizes}; index it again")
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB, laid on white: also where a palette or one colour of it is transparent."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _orientation(path: Path, image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where there is none or it can't be read."""
    # PIL decodes a whole PNG picture to look for EXIF data behind the pixels: only where there is something.
    whole = image.format != "PNG" or _has_late_text(path)
    with suppress(*_PICTURE_ERRORS):
        found = (image.getexif() if whole else Image.Image.getexif(image)).get(EXIF_ORIENTATION)
        return int(found) if found in TURNS else 1
    return 1


def _has_late_text(path: Path) -> bool:
    """Whether a PNG file has chunks that may hold EXIF or XMP data behind its pixels."""
    with path.open("rb") as file:
        file.seek(8)
        late = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if late and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            late |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


# --------------------------------------------------------------------------------------------------------- opening


def _open(path: Path) -> InputContainer:
    options = {"protocol_whitelist": "file", "max_pixels": str(MAX_FRAME_PIXELS)}
    container: InputContainer = av.open(str(path), options=options, metadata_errors="ignore")
    return container


@contextmanager
def _picture(path: Path) -> Iterator[Image.Image]:
    """An open picture, its size known and its pixels not yet read; what PIL raises is a MediaError."""
    check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is an error
            image = Image.open(path, formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(path, "the picture") from error
    except _PICTURE_ERRORS as error:
        reason = f"can't be read as a picture of {', '.join(PICTURE_FORMATS)}"
        raise MediaError("not_a_picture", f"{path}: {reason}; download or convert it") from error
    with image:
        if image.width * image.height > MAX_FRAME_PIXELS:
            raise _too_large(path, f"{image.width}x{image.height}")
        try:
            yield image
        except _PICTURE_ERRORS as error:
            raise MediaError("decode_error", f"{path}: {first_line(error)}; download it again") from error


def _too_large(path: Path, what: str) -> MediaError:
    return MediaError("too_large", f"{path}: {what} is over the limit of {MAX_FRAME_PIXELS} pixels; make it smaller")


def _unopened(path: Path, error: av.FFmpegError) -> MediaError:
    """What it means that FFmpeg could not open or read `path`."""
    if isinstance(error, OSError) and not isinstance(error, ValueError):
        try:  # Matroska's demuxer calls a missing end an error of the disk
            with path.open("rb") as file:
                while file.read(CHUNK_BYTES):
                    pass
        except OSError:
            return MediaError("unreadable", f"{path}: {error.strerror}; check the file's permissions and its disk")
        return MediaError("truncated", f"{path}: ends early; download it again")
    with path.open("rb") as file:
        is_mp4 = file.read(8)[4:] == b"ftyp"
    if is_mp4:
        return MediaError("truncated", f"{path}: is an MP4 file without its index (moov); download it again")
    return MediaError("not_a_video", f"{path}: holds no video that FFmpeg can read; name a video file")
