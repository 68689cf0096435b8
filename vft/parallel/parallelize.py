"""One function that parallelizes a model: activation checkpointing, torch.compile, FSDP2, in this order.

Adapters and frozen parameters are chosen before (`vft.preparation.run`). Model code knows nothing of parallelism.
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
from vft.models.attention import check_kernel, compiles, varlen_attn
from vft.models.base import VideoLanguageModel
from vft.models.experts import PRODUCTS as GROUPED
from vft.models.quantization import prepare_unpacking

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, *(grouped.default for grouped in GROUPED)}
_SAVED_OPS = {
    *_PRODUCTS,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
if varlen_attn is not None:  # its import has registered the operator
    _SAVED_OPS.add(torch.ops.torch_attn._varlen_attn.default)


def parallelize(
    model: VideoLanguageModel, mesh: DeviceMesh | None, config: ParallelConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Parallelize `model`, which is still on the meta device and will run on `device`, in place.

    Without a mesh, which means one process, nothing is sharded. `config` has no "auto" (`vft.preparation.memory`).
    """
    assert "auto" not in (config.activation_checkpointing, config.compile), config
    check_kernel(device, dtype)
    prepare_unpacking(device)
    checkpoint_activations(model, config.activation_checkpointing, config.vision_checkpointing)
    if config.compile:
        # Variants of one layer: with and without shared prefixes, gradients, dropout, in the last layer and before. The
        # ninth would run uncompiled in silence.
        torch._dynamo.config.recompile_limit = 32
        # Two lengths of a row that happen to be equal are not the same length.
        torch.fx.experimental._config.use_duck_shape = False
        # One graph for all layers and lengths, and another for rows with shared prefixes. Without the kernel, attention
        # is a loop over the segments of a row, which would be compiled anew for every row.
        whole = compiles(device, dtype)
        for layer in (*model.decoder.layers, *model.vision.blocks):
            (layer if whole else layer.get_submodule("mlp")).compile(dynamic=True)
    if mesh is not None:
        shard(model, mesh, dtype, config)


def checkpoint_activations(model: VideoLanguageModel, decoder: str, encoder: str = "same") -> None:
    """Recompute in the backward pass the MLPs (`mlp`), all but attention and every second matrix product (`selective`),
    or whole layers (`full`). `encoder` is for a trained vision encoder; a frozen one keeps no activations."""
    _checkpoint_layers(model.decoder.layers, decoder)
    if model.trains_vision:
        _checkpoint_layers(model.vision.blocks, decoder if encoder == "same" else encoder)


def _checkpoint_layers(layers: Iterable[nn.Module], mode: str) -> None:
    """Run the forward of each layer under a checkpoint. The layer gets another class, as FSDP2 does it: no parameter is
    renamed, and torch.compile sees one function instead of one for each layer."""
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
    """Save attention and every second matrix product, as torchtitan v0.1.0 does, and recompute the rest."""
    products = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _PRODUCTS:
            products[context.is_recompute] += 1
            if products[context.is_recompute] % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def shard(model: VideoLanguageModel, mesh: DeviceMesh, dtype: torch.dtype, config: ParallelConfig) -> None:
    """FSDP2 over the (replicate, shard) mesh: one group for each decoder layer, the rest in the root.

    Frozen weights keep their dtype, trainable ones are gathered in `dtype`; gradients are reduced in float32. A vision
    encoder in which nothing is trained is replicated and ignored by FSDP: it needs no collective, so a rank without a
    video cannot block the others.
    """
    if mesh.size(0) == 1:
        mesh = mesh["shard"]  # else gradients would be reduced over groups of one process, too
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    on_host = offloaded(model, config)
    layers: list[Any] = list(model.decoder.layers)
    exact = model.exact_parameters()  # a few numbers, which every process has whole: the policy would round them
    for layer in layers:
        fully_shard(layer, **options, reshard_after_forward=config.reshard_after_forward, ignored_params=exact)
    ignored = exact if model.trains_vision else exact | set(model.vision_parameters())
    for module in model.vision.modules if model.trains_vision else ():
        fully_shard(module, **options)
    fully_shard(model, **options, ignored_params=ignored)
    # Gather the first layer while the vision encoder runs, and each other layer before the kernels of the layer before
    # it are launched. In the backward pass FSDP2 does so by itself.
    for first, following in pairwise([model, *layers]):
        first.set_modules_to_forward_prefetch([following])
    _keep_on_host(layers, {id(p) for module in on_host for p in module.parameters(recurse=False)})


def offloaded(model: VideoLanguageModel, config: ParallelConfig) -> list[nn.Module]:
    """Modules in the decoder's layers whose own parameters, frozen matrices, are in host memory between uses."""
    if config.offload == "none":
        return []
    inside = (module for layer in model.decoder.layers for module in layer.modules())
    with_own = ((module, list(module.parameters(recurse=False))) for module in inside)
    return [m for m, own in with_own if any(p.dim() > 1 for p in own) and not any(p.requires_grad for p in own)]


def _keep_on_host(layers: Iterable[Any], offloaded_ids: set[int]) -> None:
    """Set for single parameters what FSDP2's offload policy sets for whole groups.

    With the policy the adapters, their gradients and AdamW's moments would go to the host beside the frozen weights.
    """
    for parameter in (one for layer in layers for group in _groups(layer) for one in group.fsdp_params):
        if id(parameter.sharded_param) in offloaded_ids:
            parameter.offload_to_cpu = True
            parameter.pin_memory = parameter.device.type == "cuda"


def _groups(layer: Any) -> Any:
    state = layer._get_fsdp_state()
    # Older versions of torch have one group for each module.
    return state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]


def materialise(model: VideoLanguageModel, device: torch.device, config: ParallelConfig) -> None:
    """Allocate a model on the meta device, without values: on `device`, or in host memory if it is offloaded."""
    on_host = set(offloaded(model, config))
    for module in reversed(list(model.modules())):  # a group's module last: it registers its new parameters
        module.to_empty(device=torch.device("cpu") if module in on_host else device, recurse=False)


def sync_gradients(model: nn.Module, last: bool, adapters_only: bool) -> None:
    """Reduce the gradients of adapters only in the backward pass of a step's last pack; before they are accumulated.

    In full fine-tuning gradients are reduced after every pack, because unsharded ones would fill the memory.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not adapters_only)
