"""Videos and pictures: what is in a file, found without decoding, and its frames, decoded exactly as planned.

A scan demuxes with PyAV: one packet is one frame. torchcodec seeks and decodes. Files in which it cannot seek are read
in sequence by PyAV. Pictures are upright by EXIF, and on white where transparent. Whatever is wrong with a file becomes
a `MediaError`. `T` frames, `C/H/W` channels, height, width of pixels.
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

from vft.common.errors import first_line
from vft.common.types import MediaInfo, MediaKind, MediaPlan, MediaRef
from vft.data.media import errors
from vft.data.media.errors import MediaError, as_media_error, check_file, check_size, too_large

LIST_FPS = 2.0
"""Frames per second of a list of pictures that does not state its rate (the default of qwen-vl-utils, and
LLaVA-Video's for folders)."""
PLAYLISTS = frozenset({"hls", "dash", "concat", "concatf", "imf", "sdp", "rtsp"})
"""FFmpeg's demuxers that open further files or hosts: a video file must hold its own frames."""
DECODER_ERRORS = (RuntimeError, ValueError, IndexError)
"""What torchcodec raises."""
CHUNK_BYTES = 8 * 2**20
"""Decoded frames that a worker holds at once, at the size of the source. So little memory is reused for the next chunk;
fresh memory for every chunk costs as much time as the resize."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that PIL may try: none that runs other programs."""
EXIF_ORIENTATION = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by EXIF orientation; with any other value it is upright. PIL's exif_transpose also
rewrites the EXIF data, and fails if another entry in them is broken."""

_PIL_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error)


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


# ------------------------------------------------------------------------------------------------------------- decoding


def decode_chunks(plan: MediaPlan, chunk_bytes: int = CHUNK_BYTES, *, multiple: int = 1) -> Iterator[Tensor]:
    """The planned frames in order, uint8 [T, 3, H, W] at the size of the source, in chunks of at most `chunk_bytes`.

    All chunks but the last have a number of frames that is divisible by `multiple`, and at least that many.

    Raises:
        MediaError: `changed` if the file is not the one that was planned for; otherwise what is wrong with it.
    """
    indices, path, info = plan.frame_indices, plan.ref.path, plan.info
    step = multiple * max(1, chunk_bytes // (3 * info.height * info.width * multiple))
    chunks = [indices[i : i + step] for i in range(0, len(indices), step)]
    if isinstance(path, tuple):
        if len(path) != info.num_frames:
            raise MediaError("changed", f"{path[0].parent}: {len(path)} pictures, {info.num_frames} when indexed")
        for chunk in chunks:
            yield torch.stack([load_picture(path[i], info) for i in chunk])
    elif plan.ref.kind == "image":
        yield load_picture(path, info)[None]
    else:
        check_file(path)
        decoder = _open_decoder(path, info)
        if decoder is None:
            _check_unchanged(path, info)
        for number, chunk in enumerate(chunks):
            frames_TCHW = None if decoder is None else _seek(decoder, info, chunk)
            if frames_TCHW is None:
                yield from decode_in_sequence(path, info, chunks[number:])
                return
            yield frames_TCHW


def _open_decoder(path: Path, info: MediaInfo) -> VideoDecoder | None:
    """torchcodec's decoder; None if it cannot open the file, disagrees with the index, or would not mirror."""
    try:
        decoder = VideoDecoder(str(path), stream_index=info.stream_index, num_ffmpeg_threads=1, seek_mode="exact")
    except DECODER_ERRORS:
        return None
    metadata = decoder.metadata
    if (len(decoder), metadata.height, metadata.width) != (info.num_frames, info.height, info.width):
        return None
    if metadata.rotation is not None:  # torchcodec 0.13 applies the rotation of a display matrix, not its mirroring
        with suppress(av.FFmpegError), open_container(path) as container:
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
    current = scan_file("video", path)
    sizes = [(each.num_frames, each.height, each.width) for each in (current, info)]
    if sizes[0] != sizes[1]:
        has, had = ("{} frames of {} x {} (height x width)".format(*size) for size in sizes)
        raise MediaError("changed", f"{path}: has {has}, when indexed {had}; index it again")


def _seek(decoder: VideoDecoder, info: MediaInfo, indices: Sequence[int]) -> Tensor | None:
    """The frames at `indices`; None if the decoder cannot get them.

    torchcodec 0.13 cannot seek in MPEG-TS. If packets of B-frames carry no presentation time (AVI), it returns other
    frames than those asked for, which their times show, or fails at the last one. Reading in sequence gets them right.
    """
    try:
        batch = decoder.get_frames_at(list(indices))
    except DECODER_ERRORS:
        return None
    begin_s = decoder.metadata.begin_stream_seconds or 0.0
    half_frame_s = 0.5 / info.fps if info.fps else 1.0
    for index, time_s in zip(indices, batch.pts_seconds.tolist(), strict=True):
        expected_s = info.time_of(index)  # from the container's rate, which is right within 1 %
        if abs(time_s - begin_s - expected_s) > half_frame_s + 0.01 * expected_s:
            return None
    return batch.data


def decode_in_sequence(path: Path, info: MediaInfo, chunks: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Chunks of ascending frames from one pass through the whole file by PyAV, which needs no seeking.

    Pixels are those of torchcodec, except for 10 bits a channel: there the edges of colours differ, as chroma is scaled
    in another way. Frames that are missing or of another size are reported at the end at the latest.
    """
    waiting, frames, count = deque(chunks), dict[int, Tensor](), 0
    try:
        with open_container(path) as container:
            stream = container.streams[info.stream_index]
            assert isinstance(stream, VideoStream)
            stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                if waiting and count in waiting[0]:
                    frames[count] = _upright(frame, path, info)
                count += 1
                while waiting and waiting[0][-1] < count:
                    chunk = waiting.popleft()
                    yield torch.stack([frames[i] for i in chunk])
                    frames = {i: frames[i] for i in chunk if waiting and i in waiting[0]}
    except (av.FFmpegError, ValueError) as error:
        text = f"frame {count} of {info.num_frames}: {first_line(error)}"
        raise MediaError("decode_error", f"{path}: {text}; download or encode it anew") from error
    if count != info.num_frames:  # a frame that is lost somewhere would shift all those behind it
        text = f"{count} of {info.num_frames} frames can be decoded"
        raise MediaError("decode_error", f"{path}: {text}; download or encode it anew")


def _upright(frame: av.VideoFrame, path: Path, info: MediaInfo) -> Tensor:
    """uint8 [3, H, W]."""
    pixels_HWC = frame.to_ndarray(format="rgb24")
    upright_HWC = np.rot90(pixels_HWC[::-1] if _is_mirrored(frame) else pixels_HWC, k=round(frame.rotation / 90))
    if upright_HWC.shape[:2] != (info.height, info.width):
        raise MediaError("mixed_sizes", f"{path}: its frames change size midway; encode it anew with one size")
    return torch.from_numpy(np.ascontiguousarray(upright_HWC)).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------------------- pictures


def scan_picture(path: Path) -> MediaInfo:
    """The size of a picture, upright.

    Raises:
        MediaError: the picture cannot be used.
    """
    with _open(path) as image:
        if image.mode[0] in "IF":  # the model's processor would clip these levels, which makes everything white
            text = f"has grey levels of more than 8 bits (PIL's mode {image.mode}); convert it to 8 bits"
            raise MediaError("not_a_picture", f"{path}: {text}")
        is_turned = image.format != "TIFF" and _orientation(path, image) >= 5  # PIL gives the turned size of a TIFF
        height, width = (image.width, image.height) if is_turned else (image.height, image.width)
        return MediaInfo("image", height, width)


def load_picture(path: Path, info: MediaInfo) -> Tensor:
    """The pixels, uint8 [3, H, W].

    Upright by EXIF orientation, as in transformers' `load_image` and in viewers; transparent parts are white, as in
    qwen-vl-utils 0.0.14 (`to_rgb`).

    Raises:
        MediaError: `changed` if the picture does not have the size of `info`; otherwise what is wrong with it.
    """
    with _open(path) as image:
        image.load()  # before reading its orientation: PIL turns a TIFF itself while loading
        rgb = _on_white(image)
        transposition = TRANSPOSITIONS.get(_orientation(path, image))
        rgb = rgb if transposition is None else rgb.transpose(transposition)
        if (rgb.height, rgb.width) != (info.height, info.width):
            sizes = f"is {rgb.height} x {rgb.width} (height x width), when indexed {info.height} x {info.width}"
            raise MediaError("changed", f"{path}: {sizes}; index it again")
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB on white, also if a palette or one colour of it is transparent."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _orientation(path: Path, image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or it cannot be read."""
    # PIL decodes a PNG to look for EXIF data behind the pixels: allow that only if there are some.
    may_decode = image.format != "PNG" or _has_late_text(path)
    with suppress(*_PIL_ERRORS):
        value = (image.getexif() if may_decode else Image.Image.getexif(image)).get(EXIF_ORIENTATION)
        return int(value) if value in TRANSPOSITIONS else 1
    return 1


def _has_late_text(path: Path) -> bool:
    """Whether a PNG file has chunks behind its pixels that may hold EXIF or XMP data."""
    with path.open("rb") as file:
        file.seek(8)
        after_pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if after_pixels and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            after_pixels |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """An open picture whose size is known and whose pixels are not read yet. PIL's errors become MediaErrors."""
    check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size raises an error instead
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise too_large(path, "the picture") from error
    except _PIL_ERRORS as error:
        text = f"can't be read as a picture of {', '.join(FORMATS)}"
        raise MediaError("not_a_picture", f"{path}: {text}; download or convert it") from error
    with image:
        check_size(path, image.width, image.height)
        try:
            yield image
        except _PIL_ERRORS as error:
            raise MediaError("decode_error", f"{path}: {first_line(error)}; download it again") from error
