"""What a trained model needs so that others serve it as it was scored: sampling, frames and pixels.

Rules are those of vLLM 0.33 (the files named here) and transformers 5; docs/use/adapters.md says how they were
checked.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from vft.common.errors import UserError
from vft.config.data import ImageConfig, VideoConfig
from vft.config.toml import explain

Limits = TypeVar("Limits", VideoConfig, ImageConfig)

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""That `vllm serve --max-lora-rank` takes (vllm/config/lora.py)."""
GPU_WEIGHT_BYTES = 56e9
"""Weights that a GPU of 80 GB holds beside its cache of keys and values."""
KEPT_OF_GENERATION = ("bos_token_id", "pad_token_id", "transformers_version")
"""Fields of a release's generation_config.json that don't change what is said."""
VIDEO_PROCESSORS = {
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "llava_next_video": "LlavaNextVideoVideoProcessor",
}
FRAME_KEYS = ("fps", "num_frames", "min_frames", "max_frames")
"""Of which a rate goes with some and a number of frames with others."""
IMAGE_KEYS = frozenset({"image_processor_type", "min_pixels", "max_pixels", "size", "image_grid_pinpoints"})
"""Of preprocessor_config.json, that say nothing about videos."""


def greedy(release: Mapping[str, Any], end_ids: Collection[int]) -> dict[str, Any]:
    """`generation_config.json` that gives what evaluation gave, in place of the `release`'s.

    transformers goes by `do_sample`; vLLM ignores it and reads temperature, top_k, top_p, min_p, penalties and
    max_new_tokens (vllm/config/model.py, `get_diff_sampling_param`). `top_k` = 1 alone is not enough: both draw among
    tokens of equal logits, which are frequent in bfloat16 (`TopKLogitsWarper`, `apply_top_k_only`), where `do_sample`
    = false and `temperature` = 0 take the first. `top_k` is for requests with a temperature of their own.
    """
    kept = {key: release[key] for key in KEPT_OF_GENERATION if key in release}
    sampling = {"do_sample": False, "temperature": 0.0, "top_k": 1, "repetition_penalty": 1.0}
    return {**kept, **sampling, "eos_token_id": sorted(end_ids)}


def processor_files(
    model_type: str, files: Mapping[str, Mapping[str, Any]], video: Mapping[str, Any], image: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The processors' files of a folder with the frames and pixels of training; `files` are the release's, by name.

    `video` and `image` are `[data.video]` and `[data.image]` as they were recorded. transformers samples frames by
    these settings; vLLM reads the sizes alone, and must be told not to sample again (`vllm_serve`).
    """
    frames, sizes = _limits(VideoConfig, video), _sizes(model_type, video, image)
    pictures = dict(files.get("preprocessor_config.json", {}))
    films = dict(files.get("video_preprocessor_config.json", {}))
    if not films:
        films = {key: value for key, value in pictures.items() if key not in IMAGE_KEYS}
    for key in FRAME_KEYS:
        films.pop(key, None)
    films |= {"video_processor_type": VIDEO_PROCESSORS[model_type], "do_sample_frames": True}
    if frames.frames is not None:
        films |= {"num_frames": frames.frames, "fps": None}
    else:
        films |= {"fps": frames.fps, **_bounds(frames)}
    pictures |= sizes["images_kwargs"]
    films |= sizes["videos_kwargs"]
    for content, scope in ((pictures, "images_kwargs"), (films, "videos_kwargs")):
        if size := sizes[scope].get("size"):  # older versions read these
            content |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    whole = dict(files.get("processor_config.json", {}))
    nested = {key: whole[key] for key in ("image_processor", "video_processor") if isinstance(whole.get(key), dict)}
    # Where transformers 5 saved both in one file, that one counts.
    made: dict[str, dict[str, Any]] = {}
    if "image_processor" not in nested or files.get("preprocessor_config.json"):
        made["preprocessor_config.json"] = pictures
    if "video_processor" not in nested or files.get("video_preprocessor_config.json"):
        made["video_preprocessor_config.json"] = films
    if nested:
        own = {"image_processor": pictures, "video_processor": films}
        for key, content in nested.items():
            whole[key] = {**{name: value for name, value in content.items() if name not in FRAME_KEYS}, **own[key]}
        made["processor_config.json"] = whole
    return made


def vllm_serve(
    model: str,
    model_type: str,
    video: Mapping[str, Any],
    image: Mapping[str, Any],
    weight_bytes: int = 0,
    adapter: Mapping[str, Any] | None = None,
) -> str:
    """`vllm serve` of a model, or of an `adapter` (`path`, `rank`, `components`) on it, greedy and with the frames and
    pixels of training. `video` and `image` as for `processor_files`; nothing is said of them where they are empty."""
    gpus = 1 << max(0, math.ceil(math.log2(weight_bytes / GPU_WEIGHT_BYTES))) if weight_bytes > GPU_WEIGHT_BYTES else 1
    name = model.rstrip("/").rpartition("/")[2] or model
    words = ["vllm", "serve", model, "--served-model-name", name, "--tensor-parallel-size", str(gpus)]
    # "vllm": nothing of the folder's generation_config.json but its end tokens counts.
    words += ["--generation-config", "vllm", "--override-generation-config", json.dumps({"temperature": 0.0})]
    if adapter is not None:
        limit = next((one for one in MAX_RANKS if one >= adapter["rank"]), adapter["rank"])
        words += ["--enable-lora", "--max-lora-rank", str(limit)]
        words += ["--enable-tower-connector-lora"] if adapter["components"] else []
        words += ["--lora-modules", f"tuned={adapter['path']}"]
    if video:
        words += ["--media-io-kwargs", json.dumps({"video": _frames(model_type, _limits(VideoConfig, video))})]
        words += ["--mm-processor-kwargs", json.dumps(request_pixels(model_type, video, image))]
    return shlex.join(words)


def request_pixels(model_type: str, video: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's `mm_processor_kwargs`, of the command or of one request: the pixels of training."""
    sizes = _sizes(model_type, video, image)
    if model_type == "qwen2_5_vl":
        # Of frames that the loader took already; Qwen3-VL's class says so itself.
        sizes["videos_kwargs"]["do_sample_frames"] = False
    return {scope: values for scope, values in sizes.items() if values}


def _frames(model_type: str, video: VideoConfig) -> dict[str, Any]:
    """vLLM's `--media-io-kwargs` for videos (vllm/multimodal/video.py).

    The loader of Qwen2.5-VL's own name ignores `num_frames` and takes frame int(i x n / frames). Qwen3-VL's spreads the
    frames as training does, from the first to the last, but takes odd counts: it serves a fixed number of frames, the
    other one a rate, whose frames are as many as in training and lie up to a frame's time before those.
    """
    if model_type == "llava_next_video":
        return {"num_frames": video.frames} if video.frames else {"fps": video.fps, "num_frames": video.max_frames}
    if video.frames is not None:
        count = video.frames
        return {"video_backend": "qwen3_vl", "num_frames": count, "min_frames": count, "max_frames": count}
    return {"video_backend": "qwen2_vl", "fps": video.fps, **_bounds(video)}


def _bounds(video: VideoConfig) -> dict[str, int]:
    """Fewest and most frames of a rate; even, as qwen-vl-utils makes them."""
    return {"min_frames": math.ceil(video.min_frames / 2) * 2, "max_frames": max(2, video.max_frames // 2 * 2)}


def _sizes(model_type: str, video: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`size` of pictures and of videos as the family's processors in transformers read it; none for LLaVA's squares."""
    if model_type == "llava_next_video":
        return {"images_kwargs": {}, "videos_kwargs": {}}
    pictures, films = _limits(ImageConfig, image), _limits(VideoConfig, video)
    count = films.frames or max(2, films.max_frames // 2 * 2)
    most = films.max_pixels
    if films.total_pixels is not None:  # exact for a fixed number of frames, and for videos of the most frames
        share = films.total_pixels / -(-count // 2)
        most = int(min(most, max(share, int(films.min_pixels * 1.05))))
    least = films.min_pixels
    own: dict[str, Any] = {}
    if model_type == "qwen3_vl":
        # Its sizes are of all frames together. For a rate each frame has a limit of its own, in tokens.
        if films.frames is None:
            own = {"cap_pixels_per_frame": True, "max_video_tokens": max(1, most // 32**2)}
        else:
            least *= count
        most *= count
    return {
        "images_kwargs": {"size": {"shortest_edge": pictures.min_pixels, "longest_edge": pictures.max_pixels}},
        "videos_kwargs": {"size": {"shortest_edge": least, "longest_edge": most}, **own},
    }


def _limits(section: type[Limits], recorded: Mapping[str, Any]) -> Limits:
    try:
        return section.model_validate(recorded)
    except ValidationError as error:
        said = explain(section, error)[1]
        raise UserError(f"vft.json: {said}: not limits that this version knows; correct them") from error


def ranks_of(lora: Mapping[str, Any]) -> int:
    """The largest rank among an exported adapter's layers, by `[lora]`: PiSSA's is written with twice its rank."""
    largest = max([lora["rank"], *(lora.get("ranks") or {}).values()])
    return int(largest) * (1 if lora["init"] == "kaiming" else 2)


def components_of(lora: Mapping[str, Any]) -> Sequence[str]:
    """The parts beside the language model that have adapters, by `[lora]`."""
    return sorted({name.partition(".")[0] for name in lora["targets"]} - {"language_model"})


def not_served(lora: Mapping[str, Any]) -> str:
    """Why vLLM doesn't serve an adapter of these settings (`[lora]`) as it is (vllm/lora/peft_helper.py); empty where
    it does."""
    return "DoRA is not served" if lora.get("dora") else ""
