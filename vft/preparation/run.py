"""The one preparation of a model, for training, evaluation, prediction, inspection, planning and the benches alike.

A setting that one of them forgets cannot exist then. In this order:

    open_for_training | open_for_inference   open the base, build the model on the meta device, attach adapters, choose
                                             what is trained
    PreparedModel.encoder                    tokenizer and chat template, with which `documents` builds the data sets
    load                                     parallelize, allocate memory, read the weights
    start_adapters                           values of fresh adapters, in a training run that does not resume
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from vft.adapters.lora import initialise, is_adapter
from vft.adapters.peft_format import Adapter, attach, check_adapter, start_from, trained_rope_factor
from vft.adapters.targets import TrainableRow, choose_trainable
from vft.common.errors import UserError
from vft.config.data import DataConfig
from vft.config.run import Config, ModelConfig, ParallelConfig
from vft.config.toml import show
from vft.data.chat import ChatEncoder
from vft.distributed.process_group import place
from vft.models import build
from vft.models.base import VideoLanguageModel
from vft.models.experts import Experts
from vft.models.pretrained import Pretrained
from vft.models.weights import load_weights
from vft.parallel.parallelize import materialise, parallelize

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Values of `train.precision`."""


@dataclass(frozen=True)
class PreparedModel:
    """A model and the files that it is read from. The model is on the meta device until `load` has read its weights."""

    model: VideoLanguageModel
    pretrained: Pretrained
    adapter: Adapter | None = None
    """The adapter that `load` reads into the model; None for the base alone and in training."""
    trainable: Sequence[TrainableRow] = ()
    """What is trained, for the table that is shown at the start; empty for inference."""

    def encoder(self, data: DataConfig) -> ChatEncoder:
        """The tokenizer with its chat template and the family's rules. UserError if the base lacks one of them."""
        pretrained = self.pretrained
        processor = replace(self.model.processor, keep_outer_pair=data.video.keep_outer_pair)
        settings = data.learn_reasoning, data.learn_thought_tags, data.template_options
        return ChatEncoder(pretrained.tokenizer, processor, pretrained.end_ids, *settings)


def open_for_training(config: Config, pretrained: Pretrained | None = None) -> PreparedModel:
    """The model that a configuration trains: fresh adapters or whole components are trainable, the rest is frozen.

    `pretrained` replaces the files of `model.path`. Without weight files `load` leaves the weights without values.
    """
    pretrained = pretrained or Pretrained.open(config.model.path, config.model.rope_factor)
    model = build(pretrained, DTYPES[config.train.precision], config.model.quantize)
    trainable = choose_trainable(model, config.lora, config.model.train)
    model.decoder.routing_weight = _routing_weight(config.train.routing_loss, model, pretrained)
    return PreparedModel(model.train(), pretrained, trainable=trainable)


def _routing_weight(asked: bool | float | None, model: VideoLanguageModel, pretrained: Pretrained) -> float:
    """`train.routing_loss` as a number. UserError if there is no router."""
    if asked is None:
        asked = bool(getattr(model.config, "output_router_logits", False))
    if asked and not any(isinstance(module, Experts) for module in model.decoder.modules()):
        raise UserError(f"train.routing_loss = {show(asked)}: {pretrained.path} has no experts to spread; take it out")
    return float(model.config.router_aux_loss_coef if asked is True else asked)


def open_for_inference(base: ModelConfig, adapter: Path | None, dtype: torch.dtype) -> PreparedModel:
    """The base, or an adapter on it. `base.adapter` and `base.train`, which are settings of training, are not used.

    Raises UserError if the adapter does not fit the base.
    """
    pretrained = Pretrained.open(base.path, trained_rope_factor(adapter, base.rope_factor))
    model = build(pretrained, dtype, base.quantize)
    files = None
    if adapter is not None:
        files = Adapter.open(adapter, model.spellings)
        attach(model, files)
        check_adapter(files, model, pretrained)
    model.requires_grad_(False)
    return PreparedModel(model.eval(), pretrained, files)


def load(prepared: PreparedModel, device: torch.device, mesh: DeviceMesh | None, parallel: ParallelConfig) -> None:
    """Parallelize the model, allocate it on `device` and read its weights, and those of `prepared.adapter`.

    With a mesh every process must call it, and run the model as often as the others do.
    """
    model = prepared.model
    parallelize(model, mesh, parallel, model.compute_dtype, device)
    materialise(model, device, parallel)
    adapters = frozenset(name for name, _ in model.named_parameters() if is_adapter(name))
    if prepared.pretrained.weight_files:
        load_weights(model, prepared.pretrained, adapters, show_progress=place()[0] == 0)
    if prepared.adapter is not None:
        prepared.adapter.load_into(model)


def start_adapters(prepared: PreparedModel, config: Config) -> None:
    """Give a training run's adapters the values that they start from: fresh ones, or those of `model.adapter`."""
    initialise(prepared.model, config.seed)
    if config.model.adapter:
        start_from(prepared.model, config, prepared.pretrained)


def load_for_inference(
    prepared: PreparedModel, device: torch.device, mesh: DeviceMesh | None, parallel: ParallelConfig
) -> None:
    """`load` without the settings that only a backward pass needs."""
    parallel = parallel.model_copy(update={"activation_checkpointing": "none", "compile": False})
    is_replicated = mesh is None or (mesh["shard"].size() == 1 and parallel.offload == "none")
    load(prepared, device, None if is_replicated else mesh, parallel)  # replicas do not communicate in inference
