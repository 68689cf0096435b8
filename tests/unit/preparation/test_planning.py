"""What a step moves and how long that takes, beside figures worked out by hand; names of cards."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.tiny import Media, Tiny, batch_of, medium, talk
from vft.adapters.targets import choose_trainable
from vft.common.device_specs import CARDS, Card, card_name
from vft.common.types import Batch
from vft.config.run import Config, LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from vft.models import build
from vft.models.flops import FlopCounter
from vft.models.pretrained import Pretrained
from vft.preparation.kernels import Kernels
from vft.preparation.planning import LAUNCH_S, LINK_SHARE, Planner, Setting, step_of
from vft.training.losses import cross_entropy


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe"),
        ("NVIDIA GeForce RTX 5090", "5090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA L40S", "L40S"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300X VF", "MI300X"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA T4", None),
        ("rtx4090", "4090"),
        ("RTXA6000", "RTX A6000"),
    ],
)
def test_a_device_name_is_its_card(name: str, card: str | None) -> None:
    assert card_name(name) == card


def row_and_model(tiny: Tiny, config: Config) -> tuple[Batch, Any]:
    ref, info = medium("video", 4, 56, 56)
    media = Media.make(tiny.encoder.processor, [(ref, info)])
    row = batch_of(tiny.encoder, ([talk(("user", [ref, "What?"]), ("assistant", "It moves."))], media))
    model = build(Pretrained.open(str(tiny.path)), torch.bfloat16)
    choose_trainable(model, config.lora, config.model.train)
    return row, model


def settings(tiny: Tiny, gpus: int, card: Card | None = None, lora: bool = True, **parallel: object) -> Setting:
    """16 rows a step, whose products take half the card's peak."""
    model = ModelConfig(path=str(tiny.path), train=() if lora else ("language_model",))
    lora_table = LoraConfig(rank=4, targets=("language_model.q_proj",)) if lora else None
    train = TrainConfig(packs_per_step=16)
    parallel_table = ParallelConfig(**{"shard": 0, "activation_checkpointing": "none", **parallel})
    config = Config(output_dir="x", model=model, lora=lora_table, train=train, parallel=parallel_table)
    return Setting(config, gpus, 80.0, 300, card, 0.5, network_gb_s=1e9)


def sizes(model: torch.nn.Module) -> tuple[int, int, int]:
    """Bytes in bf16 of the decoder's layers and of what else is sharded, and numbers trained."""
    named = dict(model.named_parameters())
    vision = {n for n in named if "visual" in n or "vision" in n}
    layers = sum(2 * p.numel() for n, p in named.items() if ".layers." in n and n not in vision)
    rest = sum(2 * p.numel() for n, p in named.items() if ".layers." not in n and n not in vision)
    return layers, rest, sum(p.numel() for p in named.values() if p.requires_grad)


def test_float32_is_held_against_its_own_peak() -> None:
    """Products in float32 are not those of tensor cores in bf16."""
    card = CARDS["H100"]
    assert card.peak(torch.float32) == 67e12 < card.peak(torch.bfloat16) == 989e12


def test_traffic_of_adapters_and_of_full_tuning(tiny: Tiny) -> None:
    """16 rows on 4 GPUs: 4 each. Layers come twice a row, the rest once, 3/4 of them from others."""
    setting = settings(tiny, 4)
    row, model = row_and_model(tiny, setting.config)
    layers, rest, trained = sizes(model)
    step = step_of(model, setting, row)
    assert step.gathered == pytest.approx(4 * (2 * layers + rest) * 3 / 4)
    assert step.reduced == pytest.approx(4 * trained * 3 / 4)  # once a step, in float32
    assert step.replicas == 0 and step.host == 4 * row.pixels_PD.nbytes
    kept = step_of(model, settings(tiny, 4, reshard_after_forward=False), row)
    assert kept.gathered == pytest.approx(4 * (layers + rest) * 3 / 4)
    replicated = step_of(model, settings(tiny, 4, shard=1), row)
    assert replicated.gathered == replicated.reduced == 0
    assert replicated.replicas == pytest.approx(2 * 4 * trained * 3 / 4)  # a ring's all-reduce
    full = settings(tiny, 4, lora=False)
    row, model = row_and_model(tiny, full.config)
    _, _, trained = sizes(model)
    assert step_of(model, full, row).reduced == pytest.approx(4 * 4 * trained * 3 / 4)  # each row's


def test_the_slowest_is_the_time_of_a_step(tiny: Tiny) -> None:
    row, model = row_and_model(tiny, settings(tiny, 16).config)
    card = Card(
        flops=FlopCounter(model).count(row).hardware,
        fp32_flops=1.0,
        memory_gb_s=1.0,
        link_gb_s=1e9,
        pcie_gb_s=1e9,
        memory_gib=80,
    )
    setting = settings(tiny, 16, card)
    step = step_of(model, setting, row)
    assert step.parts["products"] == step.seconds == pytest.approx(2.0)
    moved = step.gathered + step.reduced
    slow = step_of(model, settings(tiny, 16, replace(card, link_gb_s=1e-9)), row)
    assert slow.parts["links between GPUs"] == slow.seconds == pytest.approx(moved / LINK_SHARE)
    # Rings through both hosts: each of 8 network cards carries an eighth.
    far = step_of(model, replace(setting, network_gb_s=1e-9), row)
    assert far.parts["the network between hosts"] == far.seconds == pytest.approx(moved / 8 / LINK_SHARE)
    near = step_of(model, replace(settings(tiny, 16, card, shard=8), network_gb_s=1e-9), row)
    assert near.parts["the network between hosts"] == pytest.approx(near.replicas / LINK_SHARE) and near.replicas > 0


def test_one_process_waits_for_its_copies(tiny: Tiny) -> None:
    setting = settings(
        tiny,
        1,
        Card(flops=1e15, fp32_flops=1.0, memory_gb_s=1.0, link_gb_s=1.0, pcie_gb_s=1.0, memory_gib=80),
        offload="frozen",
    )
    row, model = row_and_model(tiny, setting.config)
    step = step_of(model, setting, row)
    named = dict(model.named_parameters())
    kept = [n for n, p in named.items() if p.requires_grad or ".layers." not in n or "visual" in n or "norm" in n]
    matrices = sum(2 * p.numel() for n, p in named.items() if n not in kept)  # and their biases
    host_s = step.parts["copies from the host's memory"]
    assert host_s == pytest.approx(16 * (2 * matrices + row.pixels_PD.nbytes) / 1e9 / LINK_SHARE)
    assert step.seconds == pytest.approx(step.parts["products"] + host_s)


def test_kernels_beside_the_products_take_their_time(tiny: Tiny) -> None:
    """One after another with the products; or the host launches them more slowly than they run."""
    row, model = row_and_model(tiny, settings(tiny, 1).config)
    card = Card(flops=1e15, fp32_flops=1.0, memory_gb_s=1.0, link_gb_s=1e9, pcie_gb_s=1e9, memory_gib=80)
    kernels = Kernels(Counter({(10**15, 8): 2, (2, 780_000_000): 3}), 1000, 3_900_000_000, 10, 780_000_000)
    model_flops = FlopCounter(model).count(row).model
    for compile, beside_s in ((False, 5.0), (True, 1.0)):
        step = step_of(model, settings(tiny, 1, card, compile=compile), row, kernels)
        assert step.parts["products"] == pytest.approx(16 * (2 * 2.0 + 3 * 1.0))  # two by FLOPs, three by bytes
        assert step.parts["memory traffic beside products"] == pytest.approx(16 * beside_s)
        assert step.seconds == pytest.approx(16 * (7.0 + beside_s)) and step.bound == "products"
        assert step.mfu == pytest.approx(16 * model_flops / step.seconds / 1e15)
    many = Kernels(kernels.products, 10**8, kernels.bytes, 10, kernels.fused_bytes)
    step = step_of(model, settings(tiny, 1, card, compile=False), row, many)
    assert step.bound == "launching kernels" and step.seconds == pytest.approx(16 * 10**8 * LAUNCH_S)


def test_modes_are_counted_as_they_run(tiny: Tiny) -> None:
    """What is computed again is launched again, and NF4 has to be unpacked."""
    card = Card(flops=1e15, fp32_flops=1e15, memory_gb_s=1e3, link_gb_s=1e9, pcie_gb_s=1e9, memory_gib=80)
    planner, setting = Planner(cross_entropy), settings(tiny, 1, card, compile=False)
    row, _ = row_and_model(tiny, setting.config)
    none, full = (planner.step(setting.changed(activation_checkpointing=mode), row) for mode in ("none", "full"))
    packed = planner.step(setting.changed({"quantize": "nf4"}), row)
    assert none.kernels and full.kernels and packed.kernels
    assert full.kernels.product_flops > 1.2 * none.kernels.product_flops
    assert packed.kernels.product_flops == none.kernels.product_flops
    assert packed.kernels.bytes > none.kernels.bytes and packed.kernels.launches > none.kernels.launches
    assert full.mfu < none.mfu
