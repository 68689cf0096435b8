"""Files and commands with which others serve a trained model as it was scored: greedy, same frames and pixels.

The rules are those of vLLM 0.33 (the files named here) and transformers 5; docs/use/adapters.md says how they were
checked.
"""

from __future__ import annotations

import copy
import json
import math
import shlex
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from vft.adapters.peft_format import ABOUT_FILE
from vft.config.data import ImageConfig, VideoConfig
from vft.config.toml import validated
from vft.data.chat import ChatEncoder
from vft.data.template import SHOWN, ChatTemplate
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import TEMPLATE_FILES, Pretrained, find_file
from vft.models.qwen3_vl.processor import Qwen3Processor

Limits = TypeVar("Limits", VideoConfig, ImageConfig)

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that `vllm serve --max-lora-rank` accepts (vllm/config/lora.py)."""
GPU_WEIGHT_BYTES = 56e9
"""Bytes of weights on a GPU of 80 GB; the rest is for the key-value cache."""
KEPT_OF_GENERATION = ("bos_token_id", "pad_token_id", "transformers_version")
"""Fields of the base's generation_config.json that do not change the answers."""
VIDEO_PROCESSORS = {
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "qwen3_vl_moe": "Qwen3VLVideoProcessor",
    "qwen3_5": "Qwen3VLVideoProcessor",
    "qwen3_5_moe": "Qwen3VLVideoProcessor",
    "llava_next_video": "LlavaNextVideoVideoProcessor",
}
FRAME_KEYS = ("fps", "num_frames", "min_frames", "max_frames")
"""Settings of sampling. Some go with a rate, others with a number of frames."""
IMAGE_KEYS = frozenset({"image_processor_type", "min_pixels", "max_pixels", "size", "image_grid_pinpoints"})
"""Keys of preprocessor_config.json that do not concern videos."""
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
PAIR, PAD = Qwen3Processor.video_text, "<|video_pad|>"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES_IN_JSON = (*(name for name in TEMPLATE_FILES if name != TEMPLATE_FILE), "tokenizer_config.json")
PAIR_IS_LEFT = f"# transformers from 5.10 adds 2 tokens a video to those of training: take {PAD} out of its pair"


def served_files(
    pretrained: Pretrained, model: VideoLanguageModel, about: Mapping[str, Any], generation: str = "greedy"
) -> dict[str, str]:
    """Texts of files by name, which replace those of the release beside an exported model.

    They have the facts of the training, `about`, and make other programs sample frames and pixels and write videos as
    in training, and generate text greedily as in evaluation. With `generation` = "base" text is generated as the
    release says.
    """
    files: dict[str, Mapping[str, Any]] = {ABOUT_FILE: about}
    if generation == "greedy":
        end_ids = ChatEncoder(pretrained.tokenizer, model.processor, pretrained.end_ids).end_ids
        files["generation_config.json"] = greedy(pretrained.json_file("generation_config.json"), end_ids)
    if about.get("video"):  # unknown for an adapter of another program
        release = {name: pretrained.json_file(name) for name in PROCESSOR_FILES}
        files |= processor_files(pretrained.config.model_type, release, about["video"], about.get("image", {}))
    corrects = served_template(pretrained, about.get("video", {}))
    if corrects:
        files |= {name: files.get(name) or pretrained.json_file(name) for name in TEMPLATES_IN_JSON}
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items() if content}
    if corrects and (file := find_file(pretrained.path, TEMPLATE_FILE)):
        texts[TEMPLATE_FILE] = file.read_text(encoding="utf-8")
    return {name: text.replace(PAIR, PAD) if corrects else text for name, text in texts.items()}


def served_template(pretrained: Pretrained, video: Mapping[str, Any]) -> str | None:
    """The chat template with which other programs write videos as a training with `[data.video]` did. Empty if that is
    the model's own; None if it could not be made.

    transformers from 5.10, and vLLM beside it, leave the template's vision_start and vision_end around a video of
    Qwen3-VL (transformers/models/qwen3_vl/processing_qwen3_vl.py, vllm/model_executor/models/qwen3_vl.py).
    """
    keeps = not video or video.get("keep_outer_pair")
    if keeps or VIDEO_PROCESSORS[pretrained.config.model_type] != "Qwen3VLVideoProcessor":
        return ""
    own, tokenizer = pretrained.tokenizer.get_chat_template(), copy.copy(pretrained.tokenizer)
    tokenizer.chat_template = template = own.replace(PAIR, PAD)
    if PAIR in ChatTemplate(tokenizer, "", ()).apply(SHOWN, False):
        return None
    return "" if template == own else template


def greedy(release: Mapping[str, Any], end_ids: Collection[int]) -> dict[str, Any]:
    """A `generation_config.json` for greedy decoding as in evaluation, to replace that of the base (`release`).

    transformers reads `do_sample`; vLLM ignores it and reads temperature, top_k, top_p, min_p, penalties and
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
    """The processor files with the frames and pixels of training; `files` are those of the base, by name.

    `video` and `image` are `[data.video]` and `[data.image]` as recorded by the run. transformers samples frames by
    these settings. vLLM reads only the sizes, and must be told not to sample again (`vllm_serve`).
    """
    frames, sizes = _limits(VideoConfig, video), _sizes(model_type, video, image)
    pictures = dict(files.get("preprocessor_config.json", {}))
    films = dict(files.get("video_preprocessor_config.json", {}))
    films = films or {key: value for key, value in pictures.items() if key not in IMAGE_KEYS}
    films = {key: value for key, value in films.items() if key not in FRAME_KEYS}
    films |= {"video_processor_type": VIDEO_PROCESSORS[model_type]}
    films |= _sampled(frames)
    for content, scope in ((pictures, "images_kwargs"), (films, "videos_kwargs")):
        content |= sizes[scope]
        if size := sizes[scope].get("size"):  # for older versions
            content |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    own = {"image_processor": pictures, "video_processor": films}
    whole = dict(files.get("processor_config.json", {}))
    nested = {key: whole[key] for key in own if isinstance(whole.get(key), dict)}
    # If transformers 5 has saved both in one file, that file counts.
    names = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
    made = {name: own[key] for key, name in names.items() if key not in nested or files.get(name)}
    for key, content in nested.items():
        whole[key] = {name: value for name, value in content.items() if name not in FRAME_KEYS} | own[key]
    return {**made, "processor_config.json": whole} if nested else made


def processor_kwargs(model_type: str, video: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same for the base's own files, as `processor_kwargs` of transformers."""
    sizes = _sizes(model_type, video, image)
    return {**sizes, "videos_kwargs": sizes["videos_kwargs"] | _sampled(_limits(VideoConfig, video))}


def _sampled(video: VideoConfig) -> dict[str, Any]:
    """How a processor of transformers samples frames."""
    frames = {"num_frames": video.frames, "fps": None} if video.frames else {"fps": video.fps, **_bounds(video)}
    return {"do_sample_frames": True, **frames}


def vllm_serve(
    model: str,
    model_type: str,
    video: Mapping[str, Any],
    image: Mapping[str, Any],
    weight_bytes: int = 0,
    adapter: str = "",
    lora: Mapping[str, Any] | None = None,
    template: str | None = "",
    template_options: Mapping[str, Any] | None = None,
) -> str:
    """The command `vllm serve` for a model, or for an adapter on it, a folder with its `[lora]` table.

    It decodes greedily, with the frames and pixels of training. `video` and `image` are as for `processor_files`; if
    they are empty, the command does not set them. `template` is the file of a chat template in place of the model's,
    None if there should be one (`served_template`); `template_options` are keywords for it.
    """
    gpus = 1 << max(0, math.ceil(math.log2(weight_bytes / GPU_WEIGHT_BYTES))) if weight_bytes > GPU_WEIGHT_BYTES else 1
    name = model.rstrip("/").rpartition("/")[2] or model
    words = ["vllm", "serve", model, "--served-model-name", name, "--tensor-parallel-size", str(gpus)]
    # "vllm": of the folder's generation_config.json only the end tokens count.
    words += ["--generation-config", "vllm", "--override-generation-config", json.dumps({"temperature": 0.0})]
    if lora:
        # PiSSA is exported with twice its rank.
        largest = max([lora["rank"], *(lora.get("ranks") or {}).values()]) * (1 if lora["init"] == "kaiming" else 2)
        limit = next((rank for rank in MAX_RANKS if rank >= largest), largest)
        words += ["--enable-lora", "--max-lora-rank", str(limit)]
        if any(name.partition(".")[0] != "language_model" for name in lora["targets"]):
            words += ["--enable-tower-connector-lora"]
        words += ["--lora-modules", f"tuned={adapter}"]
    if video:
        words += ["--media-io-kwargs", json.dumps({"video": _frames(model_type, _limits(VideoConfig, video))})]
        sizes = _sizes(model_type, video, image)
        if model_type == "qwen2_5_vl":
            # vLLM's loader has sampled the frames already; the class of Qwen3-VL sets this itself.
            sizes["videos_kwargs"]["do_sample_frames"] = False
        pixels = {scope: values for scope, values in sizes.items() if values}
        words += ["--mm-processor-kwargs", json.dumps(pixels)]
    words += ["--chat-template", template] if template else []
    words += ["--default-chat-template-kwargs", json.dumps(dict(template_options))] if template_options else []
    return shlex.join(words) + ("" if template is not None else f"\n{PAIR_IS_LEFT}")


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
    """Fewest and most frames of a rate, as even numbers (as in qwen-vl-utils)."""
    return {"min_frames": math.ceil(video.min_frames / 2) * 2, "max_frames": max(2, video.max_frames // 2 * 2)}


def _sizes(model_type: str, video: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`size` of pictures and videos as the processors in transformers read it; empty for LLaVA, whose frames are
    squares."""
    if model_type == "llava_next_video":
        return {"images_kwargs": {}, "videos_kwargs": {}}
    pictures, films = _limits(ImageConfig, image), _limits(VideoConfig, video)
    count = films.frames or max(2, films.max_frames // 2 * 2)
    most = films.max_pixels
    if films.total_pixels is not None:  # exact for a fixed number of frames, and for videos with the most frames
        share = films.total_pixels / -(-count // 2)
        most = int(min(most, max(share, int(films.min_pixels * 1.05))))
    least = films.min_pixels
    own: dict[str, Any] = {}
    if VIDEO_PROCESSORS[model_type] == "Qwen3VLVideoProcessor":
        # Its sizes are for all frames together. With a rate, each frame also has its own limit, in tokens.
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
    return validated(section, recorded, "vft.json: {}: not limits that this version knows; correct them")
