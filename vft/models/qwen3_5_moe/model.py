"""Qwen3.5 with a mixture of experts and a shared expert in the place of each MLP of its decoder.

Rules are those of the released model, by its configuration and transformers' `models/qwen3_5_moe`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vft.models.decoder import require
from vft.models.experts import EXPERT_MATRICES, ExpertsAndShared
from vft.models.qwen3_5 import model as qwen3_5

MODEL_TYPE = "qwen3_5_moe"


class Qwen35Moe(qwen3_5.Qwen35):
    """The model. Released files have the matrices of experts as [out, in], so they are turned when read."""

    turned = EXPERT_MATRICES

    def make_mlp(self) -> nn.Module:
        """The MLP of a layer."""
        text = self.config
        sizes = text.moe_intermediate_size, text.num_experts, text.num_experts_per_tok
        return ExpertsAndShared(text.hidden_size, text.shared_expert_intermediate_size, *sizes)


def build(config: Any, preprocessor: dict[str, Any], dtype: torch.dtype) -> qwen3_5.Qwen35:
    """The model of transformers' configuration object; parameters (not set) and computation in `dtype`."""
    require(config, "text_config.norm_topk_prob", True, None)
    require(config, "text_config.mlp_only_layers", [], None)
    return qwen3_5.build(config, preprocessor, dtype, Qwen35Moe)
