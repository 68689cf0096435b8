"""Model families: one model and one `VisionSpec` each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vft import nf4
from vft.models import qwen2_5_vl
from vft.models.weights import Checkpoint
from vft.types import UserError, VisionSpec

FAMILIES = {qwen2_5_vl.MODEL_TYPE: qwen2_5_vl}


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, on the meta device, and what goes with it."""

    model: qwen2_5_vl.Qwen2_5_VL
    spec: VisionSpec
    towers: dict[str, tuple[str, ...]]
    """Trainable parts by prefixes of parameter names; the first that fits counts."""
    peft_prefixes: dict[str, str]
    """Prefix of a parameter's name here to its prefix in transformers' model, which PEFT's files use."""


def build(checkpoint: Checkpoint, dtype: torch.dtype, quantize: str = "none") -> Skeleton:
    """The model of `checkpoint` on the meta device with parameters and computation in `dtype`.

    With `quantize` = "nf4" the linears of its decoder layers are packed, to be frozen; the rest is as it was.
    """
    family = FAMILIES.get(checkpoint.config.model_type)
    if family is None:
        raise UserError(
            f"{checkpoint.path}: model_type = {checkpoint.config.model_type!r}: known families are {sorted(FAMILIES)}"
        )
    with torch.device("meta"):
        model = family.build(checkpoint.config, checkpoint.json_file("preprocessor_config.json"), dtype)
        if quantize == "nf4":
            nf4.quantize(model.model.layers)
    return Skeleton(model, model.spec, family.TOWERS, family.PEFT_PREFIXES)
