"""One function that makes a model parallel: checkpoint activations, compile, shard, in that order.

Adapters and frozen parts are chosen before (`vft.adapters.lora.choose_trainable`). Model files know nothing of
parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vft.config.run import ParallelConfig
from vft.models.attention import check_kernel, has_kernel, varlen_attn
from vft.models.base import VideoLanguageModel

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
    model: VideoLanguageModel, mesh: DeviceMesh | None, config: ParallelConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Change `model`, to be run on `device`, in place; it is still on the meta device. Without a mesh (one process)
    nothing is sharded."""
    check_kernel(device, dtype)
    checkpoint_activations(model, config.activation_checkpointing, config.vision_checkpointing)
    if config.compile:
        # One graph for all layers and lengths, another for rows with shared trunks. Without the kernel attention is a
        # loop over what a row is made of, which would be compiled for every row.
        for layer in model.decoder.layers:
            (layer if has_kernel(device, dtype) else layer.get_submodule("mlp")).compile(dynamic=True)
    if mesh is not None:
        shard(model, mesh, dtype, config)


def checkpoint_activations(model: VideoLanguageModel, decoder: str, encoder: str = "same") -> None:
    """Recompute in the backward pass: the MLPs (`mlp`), all but attention and every other product (`selective`), or
    whole layers (`full`). `encoder` is for a trained vision encoder; a frozen one keeps nothing anyway."""
    _checkpoint_layers(model.decoder.layers, decoder)
    if model.media_trained:
        _checkpoint_layers(model.vision.blocks, decoder if encoder == "same" else encoder)


def _checkpoint_layers(layers: Iterable[nn.Module], mode: str) -> None:
    """Each forward runs under a checkpoint: by a class of its own, as FSDP2 does it, so that no parameter is renamed. A
    forward bound to each module would be compiled anew for each."""
    for layer in layers if mode != "none" else ():
        module: Any = layer.get_submodule("mlp") if mode == "mlp" else layer
        kind: Any = type(module)
        module.__class__ = _checkpointed(kind, _selectively if mode == "selective" else checkpoint)


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


def shard(model: VideoLanguageModel, mesh: DeviceMesh, dtype: torch.dtype, config: ParallelConfig) -> None:
    """FSDP2 over the (replicate, shard) mesh: one group a decoder layer, the rest in the root.

    Frozen weights keep their dtype and trainable ones are cast to `dtype` on the way; gradients are reduced in
    float32. An encoder in which nothing is trained stays whole on every rank and outside: it then needs no collective,
    so a rank without a video can't hold up the others.
    """
    if mesh.size(0) == 1:
        mesh = mesh["shard"]  # or each layer's gradients would be summed over groups of one
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    away = offloaded(model, config)
    layers: list[Any] = list(model.decoder.layers)
    for layer in layers:
        fully_shard(layer, **options, reshard_after_forward=config.reshard_after_forward)
    ignored = set() if model.media_trained else set(model.media_parameters())
    for module in () if ignored else model.vision.modules:
        fully_shard(module, **options)
    fully_shard(model, **options, ignored_params=ignored)
    # The first layer is gathered while the encoder runs, each other one is asked for before the kernels of the layer
    # before it are. Backwards FSDP2 does so by itself.
    for first, following in pairwise([model, *layers]):
        first.set_modules_to_forward_prefetch([following])
    _keep_on_host(layers, {id(p) for module in away for p in module.parameters(recurse=False)})


def offloaded(model: VideoLanguageModel, config: ParallelConfig) -> list[nn.Module]:
    """Modules of the decoder's layers whose own parameters lie in the host's memory between uses: frozen matrices."""
    if config.offload == "none":
        return []
    inside = (module for layer in model.decoder.layers for module in layer.modules())
    found = ((module, list(module.parameters(recurse=False))) for module in inside)
    return [m for m, own in found if any(p.dim() > 1 for p in own) and not any(p.requires_grad for p in own)]


def _keep_on_host(layers: Iterable[Any], wanted: set[int]) -> None:
    """FSDP2's offload policy is for whole groups: adapters, their gradients and AdamW's means would go to the host
    with the weights beside them. What the policy sets for each parameter is set for those that are `wanted`."""
    for parameter in (one for layer in layers for group in _groups(layer) for one in group.fsdp_params):
        if id(parameter.sharded_param) in wanted:
            parameter.offload_to_cpu = True
            parameter.pin_memory = parameter.device.type == "cuda"


def _groups(layer: Any) -> Any:
    state = layer._get_fsdp_state()
    # Older versions of torch have one group a module.
    return state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]


def materialise(model: VideoLanguageModel, device: torch.device, config: ParallelConfig) -> None:
    """Memory without values for a model on the meta device: on `device`, in the host's where it is offloaded."""
    away = set(offloaded(model, config))
    for module in reversed(list(model.modules())):  # a group's module last: it takes note of its new parameters
        module.to_empty(device=torch.device("cpu") if module in away else device, recurse=False)


def sync_gradients(model: nn.Module, last: bool, adapters_only: bool) -> None:
    """Reduce the gradients of adapters in the backward pass of a step's last pack alone; the packs before only add up.

    Whole gradients of a model that is trained in full would fill the memory: they are reduced after every pack.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not adapters_only)
