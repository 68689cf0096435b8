"""The sizes that are planned without a file: as many parameters as the released files have."""

from __future__ import annotations

import pytest
import torch

from vft.models.released import RELEASED, build_from_config


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen2.5-VL-7B-", 8_292_166_656),
        ("Qwen3-VL-30B-A3B-", 31_070_754_032),
        ("Qwen3.5-2B", 2_274_069_824),
        ("Qwen3.5-4B", 4_659_865_088),
        ("Qwen3.5-9B", 9_653_104_368),
        ("Qwen3.5-27B", 27_781_427_952),
        ("Qwen3.5-35B-A3B", 35_951_822_704),  # 35.95 billion, as its card says
    ],
)
def test_numbers_of_parameters(name: str, published: int) -> None:
    """By the hub's `safetensors.total`. Qwen3.5's files also have a head that predicts a second token, which is no part
    of the model: a layer with full attention, a matrix that joins two states, and three norms."""
    model = build_from_config(RELEASED[name], torch.bfloat16)
    unused = 0
    if "Qwen3.5" in name:
        width = model.config.hidden_size
        unused = sum(p.numel() for p in model.decoder.layers[3].parameters()) + 2 * width**2 + 3 * width
    assert sum(p.numel() for p in model.parameters()) + unused == published
