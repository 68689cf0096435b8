"""Qwen3-VL with a mixture of experts: Qwen3-VL in all but the MLPs of its decoder.

Rules are those of the released model (Qwen3-VL technical report, arXiv 2511.21631).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vft.common.errors import UserError
from vft.models.decoder import DecoderLayer, require
from vft.models.experts import EXPERT_MATRICES, Experts
from vft.models.qwen3_vl import model as qwen3_vl

MODEL_TYPE = "qwen3_vl_moe"


class Qwen3VLMoe(qwen3_vl.Qwen3VL):
    """The model."""

    turned = EXPERT_MATRICES

    def make_layer(self, index: int) -> nn.Module:
        """A layer with experts, or one of the dense ones that config.json names."""
        text = self.config
        mlp = None
        if index not in text.mlp_only_layers and (index + 1) % text.decoder_sparse_step == 0:
            normalise = getattr(text, "norm_topk_prob", None) is not False  # no field of transformers 5: it always does
            sizes = text.hidden_size, text.moe_intermediate_size, text.num_experts, text.num_experts_per_tok
            mlp = Experts(*sizes, normalise)
        return DecoderLayer(text, qkv_bias=False, qk_norm=True, mlp=mlp)


def build(config: Any, preprocessor: dict[str, Any], dtype: torch.dtype) -> qwen3_vl.Qwen3VL:
    """The model of transformers' configuration object; parameters (not set) and computation in `dtype`."""
    require(config, "text_config.hidden_act", "silu")
    require(config, "text_config.attention_bias", False, None)
    require(config, "text_config.norm_topk_prob", True, False, None)
    require(config, "vision_config.hidden_act", "gelu_pytorch_tanh")
    text = config.text_config
    if text.decoder_sparse_step < 1:
        raise UserError(f"config.json: text_config.decoder_sparse_step = {text.decoder_sparse_step}: must be 1 or more")
    return qwen3_vl.build(config, preprocessor, dtype, Qwen3VLMoe)
