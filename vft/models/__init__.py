"""Model families: each has a model and a `VisionProcessor`. FAMILIES lists them all."""

from __future__ import annotations

from typing import Any

import torch

from vft.common.errors import UserError
from vft.models import quantization as nf4
from vft.models.base import VideoLanguageModel
from vft.models.llava_next_video import model as llava_next_video
from vft.models.pretrained import Pretrained
from vft.models.qwen2_5_vl import model as qwen2_5_vl
from vft.models.qwen3_5 import model as qwen3_5
from vft.models.qwen3_5_moe import model as qwen3_5_moe
from vft.models.qwen3_vl import model as qwen3_vl
from vft.models.qwen3_vl_moe import model as qwen3_vl_moe

FAMILIES: dict[str, Any] = {
    family.MODEL_TYPE: family for family in (qwen2_5_vl, llava_next_video, qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe)
}
"""Module of each family, by `model_type` of config.json. A module has MODEL_TYPE and `build`."""


def build(pretrained: Pretrained, dtype: torch.dtype, quantize: str = "none") -> VideoLanguageModel:
    """The model of `pretrained` on the meta device, with parameters and computation in `dtype`.

    With `quantize` = "nf4" the linear layers and experts of its decoder layers are packed and frozen.
    """
    if pretrained.config.model_type not in FAMILIES:
        raise UserError(
            f"{pretrained.path}: model_type = {pretrained.config.model_type!r}: known families are {sorted(FAMILIES)}"
        )
    return build_model(pretrained.config, pretrained.json_file("preprocessor_config.json"), dtype, quantize)


def build_model(
    config: Any, preprocessor: dict[str, Any], dtype: torch.dtype, quantize: str = "none"
) -> VideoLanguageModel:
    """The model of transformers' configuration object and a `preprocessor_config.json`, on the meta device."""
    with torch.device("meta"):
        model: VideoLanguageModel = FAMILIES[config.model_type].build(config, preprocessor, dtype)
        if quantize == "nf4":
            nf4.quantize(model.decoder.layers)
    return model
