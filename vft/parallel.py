"""One function that makes a model parallel: checkpoint activations, compile, shard, in that order.

Adapters and frozen parts are settled before (`vft.lora.choose_trainable`); the model's own file knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vft.attention import has_kernel, varlen_attn
from vft.config import ParallelConfig

_SAVED_OPS = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
}
if varlen_attn is not None:  # importing it has registered the operator
    _SAVED_OPS.add(torch.ops.torch_attn._varlen_attn.default)


def parallelize(
    model: Any, mesh: DeviceMesh | None, config: ParallelConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Change `model`, to be run on `device`, in place; it is still on the meta device. Without a mesh (one process)
    nothing is sharded."""
    checkpoint_activations(model, config.activation_checkpointing, config.tower_checkpointing)
    if config.compile:
        # One graph for all layers and lengths, another for rows with shared trunks. Without the kernel attention is a
        # loop over what a row is made of, which would be compiled for every row.
        for layer in model.decoder.layers:
            (layer if has_kernel(device, dtype) else layer.mlp).compile(dynamic=True)
    if mesh is not None:
        shard(model, mesh, dtype)


def checkpoint_activations(model: Any, decoder: str, tower: str = "same") -> None:
    """Recompute in the backward pass: the MLPs (`mlp`), all but attention and every other product (`selective`), or
    whole layers (`full`). `tower` is for a vision tower that is trained; one that is frozen keeps nothing anyway."""
    _checkpoint_layers(model.decoder.layers, decoder)
    if any(p.requires_grad for p in model.media_parameters()):
        _checkpoint_layers(model.vision.blocks, decoder if tower == "same" else tower)


def _checkpoint_layers(layers: Iterable[nn.Module], mode: str) -> None:
    for layer in layers:
        if mode == "mlp":
            _checkpoint(layer.get_submodule("mlp"), checkpoint)
        elif mode == "selective":
            _checkpoint(layer, _selectively)
        elif mode == "full":
            _checkpoint(layer, checkpoint)


def _checkpoint(module: nn.Module, run: Callable[..., Any]) -> None:
    """Run the module's forward under `run`: a class of its own, as FSDP2 does it, so that no parameter is renamed.

    A forward bound to each module would be compiled anew for each.
    """
    kind: Any = type(module)
    module.__class__ = _checkpointed(kind, run)


@cache
def _checkpointed(kind: type[Any], run: Callable[..., Any]) -> type[Any]:
    def forward(self: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args)
        return run(partial(kind.forward, self), *args, use_reentrant=False)

    return type(f"Checkpointed{kind.__name__}", (kind,), {"forward": forward})


def _selectively(*args: Any, **options: Any) -> Any:
    return checkpoint(*args, context_fn=_selective_contexts, **options)


def _selective_contexts() -> Any:
    """Keep attention and every second matrix product (as torchtitan v0.1.0 does), recompute the rest."""
    products = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            products[context.is_recompute] += 1
            if products[context.is_recompute] % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def shard(model: Any, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 over the (replicate, shard) mesh: one group a decoder layer, the rest in the root.

    Frozen weights keep their dtype and trainable ones are cast to `dtype` on the way; gradients are reduced in
    float32. A tower in which nothing is trained stays whole on every rank and outside: it then needs no collective,
    so a rank without a video can't hold up the others.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for layer in model.decoder.layers:
        fully_shard(layer, **options)
    ignored: set[nn.Parameter] = set()
    if any(p.requires_grad for p in model.media_parameters()):
        for module in model.vision.modules:
            fully_shard(module, **options)
    else:
        ignored = set(model.media_parameters())
    fully_shard(model, **options, ignored_params=ignored)


def sync_gradients(model: nn.Module, last: bool, adapters_only: bool) -> None:
    """Reduce the gradients of adapters in the backward pass of a step's last pack alone; the packs before only add up.

    Whole gradients of a model that is trained in full would fill the memory: they are reduced after every pack.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not adapters_only)
