"""An estimate of the time of a training step on GPUs that are not there: matrix products, and traffic.

The time of the products follows from FLOPs and an assumed share of the card's peak. The traffic is that of the
trainer's sharding: a decoder layer is gathered for each pass, gradients are reduced once a step (adapters) or once a
row (full fine-tuning), offloaded weights are copied from the host before they are gathered. All of these overlap, so
the slowest of them is the time of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from vft.common.device_specs import Card
from vft.common.types import Batch
from vft.config.run import Config
from vft.models.base import VideoLanguageModel
from vft.models.flops import FlopCounter
from vft.preparation.memory import offloaded_parameters, replicated_parameters

LINK_SHARE = 0.7
"""Assumed share of a link's data-sheet rate that collectives and copies reach."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs, with one process each, and what connects them."""

    gpus: int
    gpus_per_host: int = 8
    network_gb_s: float = 50.0
    """10^9 bytes a second between hosts, for each GPU and direction (400 Gb/s: 50)."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one step to each GPU; for reductions also from each GPU."""

    gathered: float
    """Weights of layers, gathered for every pass of every row."""
    reduced: float
    """Gradients, within a group of GPUs that shares the weights."""
    replicas: float
    """Gradients, between such groups."""
    host: float
    """From host memory: offloaded weights and pixels."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by resource. All of them overlap."""

    compute: float
    links: float
    """Between GPUs of one host."""
    network: float
    """Between hosts."""
    host: float
    """Copies from host memory."""
    alone: bool = False
    """Whether there is one process alone: FSDP2 then copies offloaded weights when they are used, not ahead."""

    @property
    def seconds(self) -> float:
        """Time of the step, which is that of its slowest part."""
        if self.alone:
            return self.compute + self.host
        return max(self.compute, self.links, self.network, self.host)

    @property
    def bound(self) -> str:
        """The slowest part."""
        parts = {
            "the products": self.compute,
            "links between GPUs": self.links,
            "the network between hosts": self.network,
            "copies from the host's memory": self.host,
        }
        return max(parts, key=parts.__getitem__)


def traffic_of(model: VideoLanguageModel, config: Config, gpus: int, row: Batch) -> Traffic:
    """Bytes of one step of rows like `row`. What `model` trains has been chosen; it may be on the meta device."""
    rows = config.train.packs_per_step // gpus
    shards = config.parallel.shard or gpus
    replicated = replicated_parameters(model)
    width = model.compute_dtype.itemsize
    in_layers = {id(p) for p in model.decoder.layers.parameters()}
    layers = rest = trained = 0
    for parameter in model.parameters():
        # Trained weights are cast before they are gathered; frozen ones, also packed ones, keep their dtype.
        size = parameter.numel() * width if parameter.requires_grad else parameter.nbytes
        if id(parameter) in in_layers:
            layers += size
        elif id(parameter) not in replicated:
            rest += size
        trained += parameter.numel() if parameter.requires_grad else 0
    passes = 2 if config.parallel.reshard_after_forward else 1
    others = (shards - 1) / shards
    reductions = 1 if config.lora is not None else rows
    groups = gpus // shards
    offloaded = sum(p.nbytes for p in offloaded_parameters(model, config.parallel)) / shards
    return Traffic(
        gathered=rows * (passes * layers + rest) * others,
        reduced=reductions * 4 * trained * others,
        replicas=reductions * 2 * 4 * trained / shards * (groups - 1) / groups,
        host=rows * (passes * offloaded + row.pixels_PD.nbytes),
    )


def step_time(
    model: VideoLanguageModel, config: Config, row: Batch, cluster: Cluster, card: Card, efficiency: float
) -> StepTime:
    """Seconds of one step of rows like `row`; `efficiency` is the assumed share of the card's peak.

    A ring through hosts with g GPUs, each with a network card, moves 1/g of its bytes through each card.
    """
    gpus, per_host = cluster.gpus, cluster.gpus_per_host
    traffic = traffic_of(model, config, gpus, row)
    shards = config.parallel.shard or gpus
    rows = config.train.packs_per_step // gpus
    flops = FlopCounter(model, config.parallel.activation_checkpointing).count(row)
    within = traffic.gathered + traffic.reduced
    crossing = within / per_host if shards > per_host else 0.0
    if gpus > per_host:
        crossing += traffic.replicas / max(1, per_host // shards)
    link, network = (rate * 1e9 * LINK_SHARE for rate in (card.link_gb_s, cluster.network_gb_s))
    return StepTime(
        compute=rows * flops.hardware / (card.flops * efficiency),
        links=(within + (traffic.replicas if shards < per_host else 0.0)) / link,
        network=crossing / network,
        host=traffic.host / (card.pcie_gb_s * 1e9 * LINK_SHARE),
        alone=gpus == 1,
    )
