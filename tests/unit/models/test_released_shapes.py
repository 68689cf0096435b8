"""The released sizes, on the meta device: parameters and FLOPs against published counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vft.adapters.targets import choose_trainable
from vft.config.run import LoraConfig
from vft.models.base import component_of
from vft.models.flops import FlopCounter
from vft.models.released import RELEASED, build_from_config


def released(size: str) -> Any:
    """The Qwen2.5-VL of this size, without weights."""
    return build_from_config(RELEASED[f"Qwen2.5-VL-{size}-"], torch.bfloat16)


# In millions. Qwen2.5-VL's technical report and cards give 8.3 G and 73.4 G in all; the parts add up to them.
@pytest.mark.parametrize(
    ("size", "whole", "linears", "head", "encoder", "lora"),
    [("7B", 8292, 6525, 545, 676.6, 40.4), ("72B", 73411, 70213, 1246, 704.6, 210.6)],
)
def test_parameters(size: str, whole: float, linears: float, head: float, encoder: float, lora: float) -> None:
    model = released(size)

    def millions(parameters: object) -> float:
        return sum(p.numel() for p in parameters) / 1e6  # type: ignore[attr-defined]

    assert millions(model.parameters()) == pytest.approx(whole, rel=1e-3)
    assert millions(p for p in model.model.layers.parameters() if p.dim() == 2) == pytest.approx(linears, rel=1e-3)
    assert model.lm_head is not None
    assert millions(model.lm_head.parameters()) == pytest.approx(head, rel=1e-3)
    assert millions(model.visual.parameters()) == pytest.approx(encoder, rel=2e-3)
    (row,) = choose_trainable(model, LoraConfig(rank=16), [])
    assert row.parameters / 1e6 == pytest.approx(lora, rel=2e-3)


def test_parameters_of_llava_next_video() -> None:
    """7.06 G by its card: Vicuna-7B with 32,064 words, CLIP-L at 336 pixels, a projector of two linears."""
    model = build_from_config(RELEASED["LLaVA-NeXT-Video-7B"], torch.bfloat16)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = component_of(name, model.components)
        counts[part] = counts.get(part, 0) + parameter.numel()
    layer, width = 12 * 1024**2 + 13 * 1024, 4096
    assert counts == {
        "language_model": 6_738_415_616 + 2 * 64 * width,
        "projector": 1024 * width + width + width**2 + width + width,
        "vision_encoder": 23 * layer + 3 * 14**2 * 1024 + 577 * 1024 + 1024 + 2 * 1024,
        "unread": layer + 2 * 1024,
    }
    assert sum(counts.values()) == pytest.approx(7.06e9, rel=1e-3)
    assert model.processor.patch_features == 588
    (row,) = choose_trainable(model, LoraConfig(rank=16), [])
    assert row.parameters == 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    counter = FlopCounter(model)
    assert counter.token == 4 * 32 * (4 * width**2 + 3 * width * 11008) + 6 * row.parameters


def test_parameters_of_the_experts() -> None:
    """31.1 G on the hub. The decoder is Qwen3-30B-A3B's, whose card gives 30.5 G in all, 29.9 G without embeddings and
    3.3 G that work for a token."""
    model = build_from_config(RELEASED["Qwen3-VL-30B-A3B-"], torch.bfloat16)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == pytest.approx(31.1e9, rel=2e-3)
    text = {name: size for name, size in sizes.items() if component_of(name, model.components) == "language_model"}
    ends = sum(size for name, size in text.items() if "embed_tokens" in name or "lm_head" in name)
    experts = sum(size for name, size in text.items() if ".experts." in name)
    assert sum(text.values()) == pytest.approx(30.5e9, rel=2e-3)
    assert sum(text.values()) - ends == pytest.approx(29.9e9, rel=2e-3)
    assert sum(text.values()) - experts * (1 - 8 / 128) == pytest.approx(3.3e9, rel=0.02)
    (row,) = choose_trainable(model, LoraConfig(rank=16), [])
    assert row.parameters == 48 * 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    vectors = sum(parameter.numel() for parameter in model.decoder.layers.parameters() if parameter.dim() == 1)
    active = sum(text.values()) - ends - experts * (1 - 8 / 128) - vectors - 2048  # without the last norm
    assert FlopCounter(model).token == 4 * active + 6 * row.parameters


@pytest.mark.parametrize(("size", "token", "patch"), [("7B", 26.1e9, 1.263e9), ("72B", 280.9e9, 1.27e9)])
def test_flops(size: str, token: float, patch: float) -> None:
    """4 FLOPs a frozen and 6 an adapter's weight for each token; a frozen encoder's forward pass for each patch."""
    model = released(size)
    (row,) = choose_trainable(model, LoraConfig(rank=16), [])
    counter = FlopCounter(model)
    assert counter.token == pytest.approx(token + 6 * row.parameters, rel=3e-3)
    merger = 2 * sum(p.numel() for p in model.visual.merger.parameters() if p.dim() == 2) / 4
    assert counter.patch - merger == pytest.approx(patch, rel=0.02)


@pytest.mark.parametrize(
    ("size", "billions", "attention"), [("2B", 2.2, 6), ("4B", 4.5, 8), ("9B", 9.4, 8), ("27B", 27.4, 16)]
)
def test_parameters_of_qwen3_5(size: str, billions: float, attention: int) -> None:
    """By their names; every fourth layer is attention. Without the layers that predict several tokens at once."""
    model = build_from_config(RELEASED[f"Qwen3.5-{size}"], torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert model.decoder.attention_layers == attention
    counter = FlopCounter(model)
    assert 0 < counter.recurrence < 0.2 * counter.token
