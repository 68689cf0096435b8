"""Frames of videos and lists of pictures, decoded exactly as planned.

torchcodec seeks and decodes. Files in which it cannot seek are read in sequence by PyAV. Whatever is wrong with a file
becomes a `MediaError`. `T` frames, `C/H/W` channels, height, width of pixels.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import torch
from av.video.stream import VideoStream
from torch import Tensor
from torchcodec.decoders import VideoDecoder

from vft.common.errors import first_line
from vft.common.types import MediaInfo, MediaPlan
from vft.data.media.errors import MediaError, check_file
from vft.data.media.pictures import load_picture
from vft.data.media.scan import DECODER_ERRORS, open_container, scan_file

CHUNK_BYTES = 8 * 2**20
"""Decoded frames that a worker holds at once, at the size of the source. So little memory is reused for the next chunk;
fresh memory for every chunk costs as much time as the resize."""


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
