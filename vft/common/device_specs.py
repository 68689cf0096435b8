"""Peak figures of accelerators, from their data sheets: dense FLOP/s, memory, links to other GPUs and the
host."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Card:
    """Peak figures of one accelerator."""

    flops: float
    """Dense bf16 FLOP/s with float32 accumulation."""
    fp32_flops: float
    """FLOP/s of matrix products in float32 (not TF32, which torch uses only if told to)."""
    memory_gb_s: float
    """10^9 bytes per second between the GPU and its own memory."""
    link_gb_s: float
    """10^9 bytes per second between GPUs of a host, in one direction: NVLink, xGMI, otherwise PCIe."""
    pcie_gb_s: float
    """10^9 bytes per second between the GPU and host memory, in one direction."""
    memory_gib: float
    """GiB as drivers report them, to about half a GiB: with error correction less than the sheet says. Of a card that
    is sold with several sizes, the largest."""

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products in `dtype`."""
        return self.fp32_flops if dtype == torch.float32 else self.flops


CARDS = {
    "A10": Card(125e12, 31.2e12, 600, 32, 32, 22.5),
    "A10G": Card(70e12, 31.5e12, 600, 32, 32, 22.5),
    "A40": Card(149.7e12, 37.4e12, 696, 32, 32, 45),
    "A100": Card(312e12, 19.5e12, 2039, 300, 32, 80),
    "A100 PCIe": Card(312e12, 19.5e12, 1935, 32, 32, 80),
    "A800": Card(312e12, 19.5e12, 2039, 200, 32, 80),
    "RTX A6000": Card(154.8e12, 38.7e12, 768, 32, 32, 48),
    "RTX 6000 Ada": Card(364e12, 91.1e12, 960, 32, 32, 48),
    "3090": Card(71e12, 35.6e12, 936, 32, 32, 24),
    "4090": Card(165e12, 82.6e12, 1008, 32, 32, 24),
    "5090": Card(209.5e12, 104.8e12, 1792, 64, 64, 32),
    "L4": Card(121e12, 30.3e12, 300, 32, 32, 22.5),
    "L40S": Card(362e12, 91.6e12, 864, 32, 32, 45),
    "H20": Card(148e12, 44e12, 4000, 450, 64, 96),
    "H100": Card(989e12, 67e12, 3350, 450, 64, 80),
    "H100 PCIe": Card(756e12, 51e12, 2000, 64, 64, 80),
    "H100 NVL": Card(835e12, 60e12, 3900, 64, 64, 94),
    "H800": Card(989e12, 67e12, 3350, 200, 64, 80),
    "H200": Card(989e12, 67e12, 4800, 450, 64, 140),
    "H200 NVL": Card(835e12, 60e12, 4800, 64, 64, 140),
    "B200": Card(2250e12, 75e12, 8000, 900, 64, 179),
    "MI210": Card(181e12, 45.3e12, 1600, 32, 32, 64),
    "MI250X": Card(191.5e12, 47.9e12, 1600, 200, 36, 64),
    "MI300X": Card(1307e12, 163.4e12, 5300, 448, 64, 192),
    "MI325X": Card(1307e12, 163.4e12, 6000, 448, 64, 256),
    "MI350X": Card(2300e12, 144.2e12, 8000, 538, 64, 288),
    "MI355X": Card(2500e12, 157.3e12, 8000, 538, 64, 288),
}
"""By name. If bridges join pairs of PCIe cards (H100 NVL), the link is that of PCIe, which larger groups must cross.
MI250X: one of its two dies, each of which torch shows as a GPU."""


def card_name(device_name: str) -> str | None:
    """Key in `CARDS` of the card with this device name (`NVIDIA H100 80GB HBM3`), or None if it is unknown.

    All words of a card's name must be in the device's, in any order: `NVIDIA A100 80GB PCIe` is `A100 PCIe`. If several
    cards match, the one with most words counts.
    """
    words = set(re.split(r"[\s\-_]+|(?<=rtx)(?=\w)", device_name.lower()))
    if words & {"laptop", "mig"}:  # only a part of the card, or another chip with the same name
        return None
    known = [name for name in CARDS if words.issuperset(name.lower().split())]
    return max(known, key=lambda name: len(name.split()), default=None)


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Peak of dense products in `dtype` on the device, FLOP/s; None if it is not known."""
    if device.type != "cuda":
        return None
    name = card_name(torch.cuda.get_device_name(device))
    return None if name is None else CARDS[name].peak(dtype)
