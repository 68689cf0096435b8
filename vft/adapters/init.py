"""Initial values of adapters: Kaiming (as in PEFT) and PiSSA (Meng et al. 2024, arXiv 2404.02948)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vft.adapters.lora import LoRALinear, adapted_layers, fill
from vft.common.console import progress_bar
from vft.distributed.process_group import broadcast, full_tensor, local_part, place


def initialise(model: nn.Module, seed: int) -> None:
    """Initialise all adapters of `model` so that it computes what its base does.

    With "kaiming", A is uniform in +-1/sqrt(in), and B and DoRA's changes of magnitude are zero. PiSSA's A and B are
    computed from the base's weights, which must be loaded. Each layer has its own generator, seeded by its name, so
    sharding and the order of layers change nothing.
    """
    layers = adapted_layers(model)
    for name, layer in layers:
        if layer.init == "kaiming":
            bound = 1 / math.sqrt(layer.in_features)
            generator = torch.Generator().manual_seed(_layer_seed(seed, name))
            fill(
                layer.lora_A.weight, torch.empty(layer.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
            )
            fill(layer.lora_B.weight, torch.zeros(layer.lora_B.weight.shape))
            if layer.lora_magnitude_change is not None:
                fill(layer.lora_magnitude_change, torch.zeros(layer.out_features))
    _initialise_pissa([(name, layer) for name, layer in layers if layer.init != "kaiming"], seed)


def _initialise_pissa(layers: Sequence[tuple[str, LoRALinear]], seed: int) -> None:
    """In each round every process decomposes one matrix and broadcasts the result."""
    rank, processes = place()
    with progress_bar(len(layers), "decomposing weights", "matrix", rank == 0 and bool(layers)) as bar:
        for first in range(0, len(layers), processes):
            batch = layers[first : first + processes]
            mine: tuple[Tensor, ...] = ()
            for source, (name, layer) in enumerate(batch):
                weight = full_tensor(layer.dense_weight().detach())  # all processes gather it, one uses it
                if source == rank:
                    mine = principal_part(weight, layer.rank, layer.scale, layer.init, _layer_seed(seed, name))
                del weight
            for source, (_, layer) in enumerate(batch):
                assert layer.lora_A0 is not None and layer.lora_B0 is not None
                pairs = (layer.lora_A.weight, layer.lora_A0), (layer.lora_B.weight, layer.lora_B0)
                for number, (trained, start) in enumerate(pairs):
                    empty = torch.empty(trained.shape, device=local_part(trained).device)
                    values = broadcast(mine[number] if source == rank else empty, source)
                    fill(trained, values)
                    fill(start, values)
                bar.update()


def principal_part(weight: Tensor, rank: int, scale: float, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] such that scale * B A is the best approximation of W [out, in] of this rank, with
    the singular values shared evenly (arXiv 2404.02948, section 3).

    `init` is "pissa", or "pissa_niter_N" for a randomised decomposition with N power iterations.
    """
    weight = weight.float()
    if init == "pissa":
        u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            u, values, v = torch.svd_lowrank(weight, q=rank, niter=int(init.removeprefix("pissa_niter_")))
            vh = v.T
    roots = (values[:rank] / scale).sqrt()
    return (roots[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * roots).contiguous()


def _layer_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")
