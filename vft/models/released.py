"""Configurations of the released sizes: models for planning and benchmarks, without any file of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from vft.models import build_model
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import stretch_positions

TOKEN_IDS = {
    "bos_token_id": 597,
    "eos_token_id": 599,
    "vision_start_token_id": 606,
    "image_token_id": 609,
    "video_token_id": 610,
}
"""Below every vocabulary here; sizes and times do not depend on them."""


def language_model(
    hidden_size: int, layers: int, heads: int, key_value_heads: int, mlp: int, vocabulary: int
) -> dict[str, Any]:
    """Sizes of a decoder, by their names in config.json."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
    }


def qwen2_5_vl(text: dict[str, Any], tied: bool, vision: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL of these sizes. What is not given is the default of transformers' class, here and in
    the other families."""
    width, half = text["hidden_size"], text["hidden_size"] // text["num_attention_heads"] // 2
    return {
        "model_type": "qwen2_5_vl",
        **TOKEN_IDS,
        **text,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]},
        "vision_config": {"tokens_per_second": 2, "hidden_size": 1280, "out_hidden_size": width, **vision},
    }


def llava_next_video(text: dict[str, Any]) -> dict[str, Any]:
    """config.json of a LLaVA-NeXT-Video. The encoder is always CLIP's large one at 336 pixels."""
    return {
        "model_type": "llava_next_video",
        "text_config": {"model_type": "llama", **text, "max_position_embeddings": 4096},
    }


def qwen3_vl(text: dict[str, Any], tied: bool, **vision: Any) -> dict[str, Any]:
    """config.json of a Qwen3-VL."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    return {
        "model_type": "qwen3_vl",
        "text_config": {**text, "rope_parameters": rope},
        "vision_config": {**vision, "out_hidden_size": text["hidden_size"]},
        "tie_word_embeddings": tied,
    }


def with_experts(dense: dict[str, Any], hidden: int, experts: int, chosen: int, **more: Any) -> dict[str, Any]:
    """config.json of a Qwen3-VL or Qwen3.5 with experts of this width in the place of each MLP; `more` of its text."""
    sizes = {"moe_intermediate_size": hidden, "num_experts": experts, "num_experts_per_tok": chosen}
    text = {**dense["text_config"], **sizes, **more}
    return {**dense, "model_type": f"{dense['model_type']}_moe", "text_config": text}


def qwen3_5(text: dict[str, Any], tied: bool, linear_heads: tuple[int, int], **vision: Any) -> dict[str, Any]:
    """config.json of a Qwen3.5 with so many heads of keys and of values in its recurrent layers."""
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    rope |= {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    keys, values = linear_heads
    heads = {"head_dim": 256, "linear_num_key_heads": keys, "linear_num_value_heads": values}
    positions = {"max_position_embeddings": 262144, "rope_parameters": rope}
    return {
        "model_type": "qwen3_5",
        "text_config": {**text, **heads, **positions},
        "vision_config": {**vision, "out_hidden_size": text["hidden_size"]},
        "tie_word_embeddings": tied,
    }


SMALL_ENCODER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
SMALL_QWEN3_5_ENCODER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
RELEASED = {
    "Qwen2.5-VL-3B-": qwen2_5_vl(language_model(2048, 36, 16, 2, 11008, 151936), True, {}),
    "Qwen2.5-VL-7B-": qwen2_5_vl(language_model(3584, 28, 28, 4, 18944, 152064), False, {}),
    "Qwen2.5-VL-32B-": qwen2_5_vl(language_model(5120, 64, 40, 8, 27648, 152064), False, {"intermediate_size": 3456}),
    "Qwen2.5-VL-72B-": qwen2_5_vl(language_model(8192, 80, 64, 8, 29568, 152064), False, {"intermediate_size": 3456}),
    "LLaVA-NeXT-Video-7B": llava_next_video(language_model(4096, 32, 32, 32, 11008, 32064)),
    "LLaVA-NeXT-Video-34B": llava_next_video(language_model(7168, 60, 56, 8, 20480, 64064)),
    "Qwen3-VL-2B-": qwen3_vl(language_model(2048, 28, 16, 8, 6144, 151936), True, **SMALL_ENCODER),
    "Qwen3-VL-4B-": qwen3_vl(language_model(2560, 36, 32, 8, 9728, 151936), True, **SMALL_ENCODER),
    "Qwen3-VL-8B-": qwen3_vl(language_model(4096, 36, 32, 8, 12288, 151936), False),
    "Qwen3-VL-30B-A3B-": with_experts(
        qwen3_vl(language_model(2048, 48, 32, 4, 6144, 151936), False), 768, 128, 8, head_dim=128, norm_topk_prob=True
    ),
    "Qwen3-VL-32B-": qwen3_vl(language_model(5120, 64, 64, 8, 25600, 151936), False),
    "Qwen3.5-2B": qwen3_5(language_model(2048, 24, 8, 2, 6144, 248320), True, (16, 16), **SMALL_QWEN3_5_ENCODER),
    "Qwen3.5-4B": qwen3_5(language_model(2560, 32, 16, 4, 9216, 248320), True, (16, 32), **SMALL_QWEN3_5_ENCODER),
    "Qwen3.5-9B": qwen3_5(language_model(4096, 32, 16, 4, 12288, 248320), False, (16, 32)),
    "Qwen3.5-27B": qwen3_5(language_model(5120, 64, 24, 4, 17408, 248320), False, (16, 48)),
    "Qwen3.5-35B-A3B": with_experts(
        qwen3_5(language_model(2048, 40, 16, 2, 0, 248320), False, (16, 32)),
        *(512, 256, 8),
        shared_expert_intermediate_size=512,
    ),
}
"""config.json by a part of the model's name on the hub."""


def build_from_config(
    config: dict[str, Any], dtype: torch.dtype, quantize: str = "none", rope_factor: float | None = None
) -> VideoLanguageModel:
    """The model of a config.json on the meta device; `quantize` and `rope_factor` are those of `[model]`."""
    parsed = AutoConfig.for_model(**config)
    stretch_positions(parsed, rope_factor)
    return build_model(parsed, {}, dtype, quantize)
