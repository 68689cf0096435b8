"""How long a step will take, before any GPU is rented: its products, and its traffic between GPUs and hosts.

Products follow from FLOPs and an assumed share of the card's peak. Traffic is that of the trainer's own sharding: a
decoder layer is gathered for each of its passes, gradients are reduced once a step (adapters) or once a row (weights
trained in full), offloaded weights are copied from the host before they are gathered. All of it runs beside the
products, so the slowest of them is the step's time.
"""

from __future__ import annotations

from dataclasses import dataclass

from vft.common.device_specs import Card
from vft.common.types import Batch
from vft.config.run import Config
from vft.models.base import VideoLanguageModel
from vft.models.flops import FlopCounter
from vft.preparation.memory import offloaded_parameters, whole_on_each

LINK_SHARE = 0.7
"""Share of a link's data-sheet rate that collectives and copies reach; assumed."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the processes run, one a GPU."""

    gpus: int
    gpus_per_host: int = 8
    network_gb_s: float = 50.0
    """10^9 bytes a second from host to host, for each GPU and direction (400 Gb/s: 50)."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one step, to (and for reductions also from) each GPU."""

    gathered: float
    """Weights of layers, for every pass of every row."""
    reduced: float
    """Gradients, within a group that shares the weights."""
    replicas: float
    """Gradients, between such groups."""
    host: float
    """From the host's memory: offloaded weights and pixels."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by the resource that they take; all of these overlap."""

    compute: float
    links: float
    """Between GPUs of one host."""
    network: float
    """Between hosts."""
    host: float
    """From the host's memory."""
    alone: bool = False
    """One process: FSDP2 copies offloaded weights when they are used, not ahead."""

    @property
    def seconds(self) -> float:
        """Of the whole step: of its slowest part."""
        if self.alone:
            return self.compute + self.host
        return max(self.compute, self.links, self.network, self.host)

    @property
    def bound(self) -> str:
        """The part that limits the step."""
        parts = {
            "the products": self.compute,
            "links between GPUs": self.links,
            "the network between hosts": self.network,
            "copies from the host's memory": self.host,
        }
        return max(parts, key=parts.__getitem__)


def traffic_of(model: VideoLanguageModel, config: Config, gpus: int, row: Batch) -> Traffic:
    """Bytes of one step of rows like `row`. `model` has what is trained settled; it may be on the meta device."""
    rows = config.train.packs_per_step // gpus
    shards = config.parallel.shard or gpus
    whole = whole_on_each(model)
    width = model.compute_dtype.itemsize
    in_layers = {id(p) for p in model.decoder.layers.parameters()}
    layers = rest = trained = 0
    for parameter in model.parameters():
        # What is trained is cast before it is gathered; frozen weights, packed ones too, go as they are.
        size = parameter.numel() * width if parameter.requires_grad else parameter.nbytes
        if id(parameter) in in_layers:
            layers += size
        elif id(parameter) not in whole:
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

    A ring through hosts of g GPUs with a network card each moves a g-th of its bytes through each of the cards."""
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
