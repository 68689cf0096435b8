"""Whether an adapter fits a base: the same base that it was trained on, not merged yet, with the same settings."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vft.adapters.lora import LORA_A, LORA_B, adapted_layers, is_adapter
from vft.adapters.peft_format import ABOUT_FILE, CONFIG_FILE, WEIGHTS_FILE, Adapter, recorded
from vft.common.errors import UserError
from vft.common.safetensors_io import open_tensors
from vft.config.run import ModelConfig
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained
from vft.models.weights import stored_names

LAYERS_COMPARED = 16


def check_adapter(adapter: Adapter, model: VideoLanguageModel, pretrained: Pretrained) -> None:
    """Raises UserError if the adapter was trained on another base than `pretrained`, is already merged into its
    weights, or does not fit the adapters in `model`."""
    _check_settings(adapter, model)
    trained_on = adapter.about.get("base_fingerprint")
    merged = any(record.get("digest") == adapter.digest for record in merged_into(pretrained))
    if not merged and trained_on and trained_on != pretrained.fingerprint:
        raise UserError(
            f"{adapter.folder / CONFIG_FILE}: base_model_name_or_path = "
            f"{adapter.config.get('base_model_name_or_path')!r} (fingerprint {trained_on[:12]}): the adapter was made "
            f"for another base than {pretrained.path!r} (fingerprint {pretrained.fingerprint[:12]}); name the base "
            "that it was trained on"
        )
    if not merged:
        _check_shapes(adapter, model)
        merged = trained_on is None and _is_in_weights(adapter, model, pretrained)
    if merged:
        raise UserError(
            f"{adapter.folder}: this adapter is merged into {pretrained.path!r} already; use it without, or name the "
            "model that it was trained on"
        )


def _check_settings(adapter: Adapter, model: VideoLanguageModel) -> None:
    file, lora = adapter.folder / CONFIG_FILE, adapter.lora
    for name, layer in adapted_layers(model):
        if (layer.lora_magnitude_change is not None) != lora.dora:
            raise UserError(
                f"{file}: use_dora = {lora.dora}, but lora.dora = {not lora.dora} by the [lora] table; make them equal"
            )
        if name in adapter.scales and not math.isclose(layer.scale, adapter.scales[name], rel_tol=1e-12):
            raise UserError(
                f"{file}: lora_alpha = {lora.alpha}, use_rslora = {lora.rslora}: scale {adapter.scales[name]} for "
                f"{name}, but {layer.scale} by the [lora] table; make alpha, rank (and alphas, ranks) and rslora equal"
            )


def _check_shapes(adapter: Adapter, model: VideoLanguageModel) -> None:
    file = adapter.folder / WEIGHTS_FILE
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if is_adapter(name)}
    for name in sorted(set(shapes) ^ set(adapter.shapes)):
        where = "the file alone" if name in adapter.shapes else "the model alone"
        raise UserError(f"{file}: {name}: found in {where}; the adapter has other targets")
    for name, shape in shapes.items():
        if shape != adapter.shapes[name]:
            raise UserError(
                f"{file}: {name}: shape {list(adapter.shapes[name])} in the adapter, {list(shape)} in the model; the "
                "adapter was made for another base or rank"
            )


def _is_in_weights(adapter: Adapter, model: VideoLanguageModel, pretrained: Pretrained) -> bool:
    """Whether the weights contain the adapter's update s B A of rank r.

    In the r x r directions of the update, a weight that contains it is close to the update itself, one that does not
    is close to zero. This looks at a few layers, and recognises only updates that are large beside the weight's own
    part in these directions.
    """
    stored = stored_names(model, pretrained)
    layers = sorted(name for name in adapter.scales if f"{name}.weight" in stored)
    differences: list[float] = []
    with open_tensors(adapter.folder / WEIGHTS_FILE) as reader:
        for module in layers[:: -(-len(layers) // LAYERS_COMPARED) or 1]:
            a, b = (reader.get_tensor(adapter.file_names[module + leaf]).float() for leaf in (LORA_A, LORA_B))
            (columns, a_core), (rows, b_core) = torch.linalg.qr(a.T), torch.linalg.qr(b)
            update = adapter.scales[module] * b_core @ a_core.T
            name = stored[f"{module}.weight"]
            with open_tensors(pretrained.weight_files[name]) as weights:
                weight: Tensor = weights.get_tensor(name)
            if weight.shape == (len(rows), len(columns)) and update.norm() > 0:
                projected = rows.T @ weight.float() @ columns
                differences.append(float((projected - update).norm() / update.norm()))
    return bool(differences) and statistics.median(differences) < 0.5


def start_from(model: VideoLanguageModel, base: ModelConfig, pretrained: Pretrained) -> None:
    """Fill the adapters in `model` from `model.adapter`. Raises UserError if it does not fit them or the base."""
    adapter = Adapter.open(Path(base.adapter), model.spellings)
    if trained_rope_factor(adapter.folder, base.rope_factor) != base.rope_factor:
        raise _other_rope_factor(base.rope_factor, adapter.folder, adapter.about["rope_factor"])
    check_adapter(adapter, model, pretrained)
    adapter.load_into(model)


def merged_into(pretrained: Pretrained) -> list[dict[str, Any]]:
    """Records in a model's folder of the adapters that were merged into it: `adapter` (its folder) and `digest`."""
    records = pretrained.json_file(ABOUT_FILE).get("merged") or []
    return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []


def trained_rope_factor(adapter: Path | None, given: float | None) -> float | None:
    """The `model.rope_factor` that an adapter was trained with, or the one `given` if nothing is recorded.

    Raises UserError if both are there and differ.
    """
    factor: float | None = recorded(adapter).get("rope_factor", given)
    if given is not None and given != factor:
        raise _other_rope_factor(given, adapter, factor)
    return factor


def _other_rope_factor(given: float | None, adapter: object, factor: float | None) -> UserError:
    return UserError(f"model.rope_factor = {given}: {adapter} was trained with {factor}; make them equal")
