"""What the worker processes of data.py run beside vft's own `load_patches`: bare decoding, and the usual processor.

In a module of its own, because a worker doesn't import the program that it serves.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import types
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torchcodec.decoders import VideoDecoder

QUESTION, ANSWER = "What happens in the video?", "A red disc moves slowly to the left on a dark field."
MODULES = ("qwen_vl_utils", "torchvision")
"""What the usual processor needs beside transformers."""


def start_on(cores: Sequence[int]) -> None:
    """Keep this process on `cores` and to one thread."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)


def start_processor(cores: Sequence[int]) -> None:
    """`start_on`, and import what `fetch_and_process` needs."""
    start_on(cores)
    os.environ["TORCHCODEC_NUM_THREADS"] = "1"  # qwen-vl-utils' own default is 8 of FFmpeg's threads
    import_torchvision()
    importlib.import_module("qwen_vl_utils")


def pid_after(seconds: float) -> int:
    """The worker's process number. It waits `seconds`, so that the other workers get a task too."""
    time.sleep(seconds)
    return os.getpid()


def decode_bare(path: Path, stream_index: int, indices: Sequence[int]) -> int:
    """Decode the frames at `indices`; returns their number."""
    decoder = VideoDecoder(str(path), stream_index=stream_index, num_ffmpeg_threads=1)
    return len(decoder.get_frames_at(list(indices)))


def fetch_and_process(folder: Path, path: Path, indices: Sequence[int], height: int, width: int) -> int:
    """`fetch_video` and one call of the checkpoint's processor, as the model's README has it; returns the number of
    frames.

    Raises:
        ValueError: it does not take the same frames at the same size.
    """
    element = {"video": str(path), "nframes": len(indices), "resized_height": height, "resized_width": width}
    fetch = importlib.import_module("qwen_vl_utils").fetch_video
    frames_TCHW, metadata = fetch(element, return_video_metadata=True)
    found = list(metadata["frames_indices"])
    if (found, metadata["video_backend"]) != (list(indices), "torchcodec"):
        raise ValueError(
            f"{path.name}: qwen-vl-utils takes other frames: {found[:4]}... by {metadata['video_backend']}"
        )
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
    processor = _processor(folder)
    made = processor(
        text=[processor.apply_chat_template(turns, tokenize=False)],
        videos=[frames_TCHW],
        video_metadata=[metadata],
        do_resize=False,  # they have their size
        do_sample_frames=False,
        return_tensors="pt",
    )
    patches, patch = made["pixel_values_videos"], processor.video_processor.patch_size
    wanted = -(-len(indices) // 2) * (height // patch) * (width // patch)
    if len(patches) != wanted:
        raise ValueError(f"{path.name}: the processor makes {len(patches)} patches, vft {wanted}")
    return len(indices)


@lru_cache(maxsize=1)
def _processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def import_torchvision() -> None:
    """Import torchvision, even if it was built for another torch.

    Its compiled operators are missing then. Its transforms need none of them, but the import registers one (nms).
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        importlib.import_module("torchvision")
        _kept.append(library)


_kept: list[Any] = []
"""Kept alive, because a library's definitions end with it."""
