"""Configurations of the released sizes: models for planning and benchmarks, without any file of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from vft.models import build_model
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import stretch_positions

PREPROCESSOR = {
    "min_pixels": 56 * 56,
    "max_pixels": 3584 * 3584,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""preprocessor_config.json of Qwen2.5-VL."""
TOKEN_IDS = {
    "bos_token_id": 597,
    "eos_token_id": 599,
    "vision_start_token_id": 606,
    "image_token_id": 609,
    "video_token_id": 610,
}
"""Below every vocabulary here; sizes and times do not depend on them."""
LARGE_ENCODER = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31]}


def qwen2_5_vl(
    hidden_size: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    mlp: int,
    vocabulary: int,
    tied: bool,
    vision: dict[str, Any],
) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL of these sizes; `vision` holds those of the vision encoder."""
    half = hidden_size // heads // 2
    fixed = {"in_chans": 3, "patch_size": 14, "spatial_patch_size": 14, "spatial_merge_size": 2}
    fixed |= {"temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 112}
    return {
        "model_type": "qwen2_5_vl",
        **TOKEN_IDS,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]},
        "vision_config": {**fixed, **vision, "out_hidden_size": hidden_size},
    }


def llava_next_video(
    hidden_size: int, layers: int, heads: int, key_value_heads: int, mlp: int, vocabulary: int
) -> dict[str, Any]:
    """config.json of a LLaVA-NeXT-Video of these sizes. The encoder is always CLIP's large one at 336 pixels, which is
    the default of its class."""
    text = {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
    }
    return {"model_type": "llava_next_video", "text_config": text}


def qwen3_vl(
    hidden_size: int,
    layers: int,
    heads: int,
    mlp: int,
    tied: bool,
    vision_depth: int,
    vision_hidden_size: int,
    vision_mlp: int,
    deepstack: list[int],
) -> dict[str, Any]:
    """config.json of a Qwen3-VL of these sizes; the others are the defaults of its class."""
    text = {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": mlp,
        "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    }
    vision = {
        "depth": vision_depth,
        "hidden_size": vision_hidden_size,
        "intermediate_size": vision_mlp,
        "out_hidden_size": hidden_size,
        "deepstack_visual_indexes": deepstack,
    }
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


def _large(mlp: int) -> dict[str, Any]:
    return {**LARGE_ENCODER, "intermediate_size": mlp}


RELEASED = {
    "Qwen2.5-VL-3B-": qwen2_5_vl(2048, 36, 16, 2, 11008, 151936, True, _large(3420)),
    "Qwen2.5-VL-7B-": qwen2_5_vl(3584, 28, 28, 4, 18944, 152064, False, _large(3420)),
    "Qwen2.5-VL-32B-": qwen2_5_vl(5120, 64, 40, 8, 27648, 152064, False, _large(3456)),
    "Qwen2.5-VL-72B-": qwen2_5_vl(8192, 80, 64, 8, 29568, 152064, False, _large(3456)),
    "LLaVA-NeXT-Video-7B": llava_next_video(4096, 32, 32, 32, 11008, 32064),
    "LLaVA-NeXT-Video-34B": llava_next_video(7168, 60, 56, 8, 20480, 64064),
    "Qwen3-VL-2B-": qwen3_vl(2048, 28, 16, 6144, True, 24, 1024, 4096, [5, 11, 17]),
    "Qwen3-VL-4B-": qwen3_vl(2560, 36, 32, 9728, True, 24, 1024, 4096, [5, 11, 17]),
    "Qwen3-VL-8B-": qwen3_vl(4096, 36, 32, 12288, False, 27, 1152, 4304, [8, 16, 24]),
    "Qwen3-VL-32B-": qwen3_vl(5120, 64, 64, 25600, False, 27, 1152, 4304, [8, 16, 24]),
}
"""config.json by a part of the model's name on the hub."""


def released_config(path: str) -> dict[str, Any] | None:
    """config.json of the released model that a path or hub name means; None if it is none of them."""
    return next((config for part, config in RELEASED.items() if part in path), None)


def build_from_config(
    config: dict[str, Any], dtype: torch.dtype, quantize: str = "none", rope_factor: float | None = None
) -> VideoLanguageModel:
    """The model of a config.json on the meta device; `quantize` and `rope_factor` are those of `[model]`."""
    parsed = AutoConfig.for_model(**config)
    stretch_positions(parsed, rope_factor)
    return build_model(parsed, PREPROCESSOR, dtype, quantize)
