"""What accelerators can do by their makers' data sheets: dense bf16 products, links to other GPUs and to the host."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Card:
    """Peaks of one accelerator."""

    flops: float
    """Dense bf16 FLOP/s with float32 accumulation."""
    link_gb_s: float
    """10^9 bytes a second to each GPU from the others of its host, in one direction: NVLink, xGMI, else PCIe."""
    pcie_gb_s: float
    """10^9 bytes a second between the GPU and its host's memory, in one direction."""


CARDS = {
    "A10": Card(125e12, 32, 32),
    "A10G": Card(70e12, 32, 32),
    "A40": Card(149.7e12, 32, 32),
    "A100": Card(312e12, 300, 32),
    "A100 PCIe": Card(312e12, 32, 32),
    "A800": Card(312e12, 200, 32),
    "RTX A6000": Card(154.8e12, 32, 32),
    "RTX 6000 Ada": Card(364e12, 32, 32),
    "3090": Card(71e12, 32, 32),
    "4090": Card(165e12, 32, 32),
    "5090": Card(209.5e12, 64, 64),
    "L4": Card(121e12, 32, 32),
    "L40S": Card(362e12, 32, 32),
    "H20": Card(148e12, 450, 64),
    "H100": Card(989e12, 450, 64),
    "H100 PCIe": Card(756e12, 64, 64),
    "H100 NVL": Card(835e12, 64, 64),
    "H800": Card(989e12, 200, 64),
    "H200": Card(989e12, 450, 64),
    "H200 NVL": Card(835e12, 64, 64),
    "B200": Card(2250e12, 900, 64),
    "MI210": Card(181e12, 32, 32),
    "MI250X": Card(191.5e12, 200, 36),
    "MI300X": Card(1307e12, 448, 64),
    "MI325X": Card(1307e12, 448, 64),
    "MI350X": Card(2300e12, 538, 64),
    "MI355X": Card(2500e12, 538, 64),
}
"""By name. Where a PCIe card has bridges for pairs (H100 NVL) its link is PCIe's: groups of more than two cross it.
MI250X: one of its two dies, which torch shows as a GPU each."""


def card_of(device_name: str) -> Card | None:
    """The card that a device's name (`NVIDIA H100 80GB HBM3`) means, the most particular one; None where it is unknown.

    All words of a card's name have to stand in the device's, in any order: `NVIDIA A100 80GB PCIe` is `A100 PCIe`.
    """
    words = set(re.split(r"[\s\-_]+", device_name.lower()))
    if words & {"laptop", "mig"}:  # a part of the card, or another chip under its name
        return None
    known = [name for name in CARDS if words.issuperset(name.lower().split())]
    return CARDS[max(known, key=lambda name: len(name.split()))] if known else None


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, None where it isn't known."""
    if device.type != "cuda":
        return None
    card = card_of(torch.cuda.get_device_name(device))
    return None if card is None else card.flops
