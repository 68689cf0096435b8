"""What the worker processes of data.py run beside vft's own data path. Each function returns the number of frames.

In a module of its own, because a worker doesn't import the program that it serves.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torchcodec.decoders import VideoDecoder

from vft.common.types import MediaPlan
from vft.data.media.frame_cache import load_cached
from vft.data.media.patches import load_patches
from vft.models.processor import VisionProcessor

QUESTION, ANSWER = "What happens in the video?", "A red disc moves slowly to the left on a dark field."


def start_on(cores: Sequence[int]) -> None:
    """Keep this process on `cores` and to one thread."""
    os.sched_setaffinity(0, cores)
    os.environ["TORCHCODEC_NUM_THREADS"] = "1"  # qwen-vl-utils' own default is 8 of FFmpeg's threads
    torch.set_num_threads(1)


def decode_bare(plan: MediaPlan) -> int:
    """Decode the frames, and no more."""
    decoder = VideoDecoder(str(plan.ref.path), stream_index=plan.info.stream_index, num_ffmpeg_threads=1)
    return len(decoder.get_frames_at(list(plan.frame_indices)))


def decode_to_patches(plan: MediaPlan, processor: VisionProcessor) -> int:
    """Decode, resize and cut into patches, as a worker of a run."""
    load_patches(plan, processor)
    return len(plan.frame_indices)


def read_cache(plan: MediaPlan, processor: VisionProcessor, folder: Path) -> int:
    """The same out of the frame cache, into which the first call puts them."""
    load_cached(plan, processor, folder)
    return len(plan.frame_indices)


def fetch_and_process(plan: MediaPlan, base: Path) -> int:
    """`fetch_video` and one call of the checkpoint's processor, as the model's README has it.

    Raises:
        ValueError: it does not take the same frames at the same size.
    """
    fetch_video, processor = _usual(base)
    size = {"resized_height": plan.height, "resized_width": plan.width}
    element = {"video": str(plan.ref.path), "nframes": len(plan.frame_indices), **size}
    frames_TCHW, metadata = fetch_video(element, return_video_metadata=True)
    found = list(metadata["frames_indices"])
    if (found, metadata["video_backend"]) != (list(plan.frame_indices), "torchcodec"):
        raise ValueError(f"qwen-vl-utils takes other frames: {found[:4]}... by {metadata['video_backend']}")
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
    made = processor(
        text=[processor.apply_chat_template(turns, tokenize=False)],
        videos=[frames_TCHW],
        video_metadata=[metadata],
        do_resize=False,  # they have their size
        do_sample_frames=False,
        return_tensors="pt",
    )
    if made["video_grid_thw"][0].tolist() != list(plan.grid_thw):
        raise ValueError(f"the processor makes {made['video_grid_thw'][0].tolist()} patches, vft {plan.grid_thw}")
    return len(plan.frame_indices)


@lru_cache(maxsize=1)
def _usual(base: Path) -> tuple[Any, Any]:
    """`fetch_video` and the processor."""
    import_torchvision()
    processor = importlib.import_module("transformers").AutoProcessor.from_pretrained(base)
    return importlib.import_module("qwen_vl_utils").fetch_video, processor


def import_torchvision() -> None:
    """For transformers' processors."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # It was built for another torch, and its compiled operators are missing. Its transforms need none of them, but
        # the import registers one.
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        importlib.import_module("torchvision")
        _kept.append(library)


_kept: list[Any] = []
"""Kept alive, because a library's definitions end with it."""
