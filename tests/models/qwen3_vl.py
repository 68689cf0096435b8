"""Small random Qwen3-VLs, made and written by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.helpers import CHAT_TEMPLATE, SPECIAL_TOKENS, Tiny, make_tokenizer

TEMPLATE = CHAT_TEMPLATE.replace(
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}",
    "",
)
"""The released template says nothing of its own before the first message."""
assert len(TEMPLATE) < len(CHAT_TEMPLATE)

PREPROCESSOR = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": 16, "merge_size": 2}'


def save_checkpoint(
    folder: Path, tied: bool = True, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", seed: int = 0
) -> Path:
    """A random Qwen3-VL with its tokenizer in `folder`."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = {token.strip("<|>"): tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 5,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        bos_token_id=ids["endoftext"],
        eos_token_id=ids["im_end"],
        tie_word_embeddings=tied,
    )
    model = Qwen3VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far wider than an initialiser's, so that every part moves the logits far more than rounding does.
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif "embed_tokens" in name or "pos_embed" in name or parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 1.3 * parameter[0].numel() ** -0.5)
            if "embed_tokens" in name or "lm_head" in name:
                # A generated placeholder would make transformers ask for more media.
                parameter[[ids["image_pad"], ids["video_pad"]]] = 0
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(PREPROCESSOR)
    return folder


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3VLForConditionalGeneration:
    """transformers' own model of a checkpoint, ready to compare with."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


@dataclass
class TinyQwen3(Tiny):
    """A small checkpoint of this family."""

    @cached_property
    def theirs(self) -> Any:
        """transformers' model; tests leave it as it is."""
        return transformers_model(self.path)
