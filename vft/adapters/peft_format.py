"""Adapter files in PEFT's format: reading those of any writer, and writing those that fit the original base.

Whether an adapter fits a base is checked first: the same base that it was trained on, not merged yet, with the same
settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vft.adapters.lora import (
    LORA_A,
    LORA_B,
    MAGNITUDE,
    OF_EXPERTS,
    LoRAExperts,
    LoRALinear,
    adapted_layers,
    expert_pairs,
    fill,
    is_adapter,
    lora_scale,
    target_of,
)
from vft.adapters.targets import adaptable, add_adapters
from vft.common.errors import UserError
from vft.common.files import read_object, whole_folder
from vft.common.safetensors_io import open_tensors
from vft.config.data import DataConfig
from vft.config.run import Config, LoraConfig
from vft.config.toml import show
from vft.distributed.process_group import full_tensor
from vft.models.base import Spellings, VideoLanguageModel, component_of
from vft.models.experts import MATRICES
from vft.models.pretrained import Pretrained
from vft.models.weights import our_names, stored_names

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
logger = logging.getLogger(__name__)

ABOUT_FILE = "vft.json"
"""Facts about the training of an adapter or a model. PEFT and vLLM ignore this file."""
PEFT_ROOT = "base_model.model."
PEFT_MAGNITUDE = ".lora_magnitude_vector"
PEFT_NESTED = ".base_layer"
"""Stands in a name for the module that a wrapper is around."""
PATTERNS = ("rank_pattern", "alpha_pattern")
REFUSED = (
    *("modules_to_save", "trainable_token_indices", "layer_replication", "fan_in_fan_out"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
)
"""PEFT's fields that change what is computed from the same tensors, or that need other tensors."""
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations (by how their names begin) whose adapter fits a changed base, unless PEFT has converted it."""
LAYERS_COMPARED = 16
"""Layers whose weights are searched for an adapter's update."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder: its configuration and the names and shapes of its tensors, but not their values."""

    folder: Path
    config: dict[str, Any]
    about: dict[str, Any]
    """Facts that this project's training recorded; empty for an adapter of another program."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each tensor, by its parameter name in this project's model."""
    file_names: dict[str, str]
    """Name of each tensor in the file, by the same keys."""

    @staticmethod
    def open(folder: Path, spellings: Spellings) -> Adapter:
        """Raises UserError, which says what is missing or not supported."""
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                fix = "name an adapter's folder, in PEFT's safetensors format, its run's or a checkpoint's"
                raise UserError(f"{folder}: {name} is missing; {fix}")
        config = read_object(folder / CONFIG_FILE)
        _check_config(folder / CONFIG_FILE, config)
        with open_tensors(folder / WEIGHTS_FILE) as reader:
            stored = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        plain = partial(_without_peft, config.get("target_parameters") or ())
        file_names = our_names(stored, spellings, folder / WEIGHTS_FILE, plain)
        shapes = {ours: stored[name] for ours, name in file_names.items()}
        return Adapter(folder, config, recorded(folder), shapes, file_names)

    @cached_property
    def lora(self) -> LoraConfig:
        """Rank, alpha and kind as a configuration. Its targets are not set: the tensors tell them."""
        config = self.config
        kind = {"rslora": config.get("use_rslora", False), "dora": config.get("use_dora", False)}
        try:
            return LoraConfig(rank=config["r"], alpha=config["lora_alpha"], **kind)
        except (KeyError, ValueError) as error:
            settings = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora", "use_dora")}
            raise UserError(f"{self.folder / CONFIG_FILE}: {settings}: not the settings of a LoRA adapter") from error

    @cached_property
    def layers(self) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each adapted layer: those of the first pattern that fits its name, else the common ones.

        A pattern is a regular expression for the full name or for what follows one of its dots
        (`peft.utils.other.get_pattern_key`).
        """
        ranks, alphas = ((self.config.get(field) or {}).items() for field in PATTERNS)

        def value_for(name: str, patterns: Iterable[tuple[str, Any]], default: Any) -> Any:
            return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", name)), default)

        layers = {}
        for module in [name.removesuffix(LORA_A) for name in self.shapes if name.endswith(LORA_A)]:
            name = self.file_names[module + LORA_A].removeprefix(PEFT_ROOT).partition(".lora_A.")[0]
            if OF_EXPERTS in module:
                name = f"{name.replace(PEFT_NESTED, '')}.{module.rpartition('.')[2]}"
            layers[module] = value_for(name, ranks, self.lora.rank), value_for(name, alphas, self.lora.alpha)
        return layers

    @cached_property
    def scales(self) -> dict[str, float]:
        """Factor of each adapted layer's update B A."""
        return {name: lora_scale(rank, alpha, self.lora.rslora) for name, (rank, alpha) in self.layers.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tensors and their scales, independent of the names in the file."""
        digest = hashlib.sha256(json.dumps(sorted(self.scales.items())).encode())
        with open_tensors(self.folder / WEIGHTS_FILE) as reader:
            for name, stored in sorted(self.file_names.items()):
                tensor: Tensor = reader.get_tensor(stored)
                digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}:".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def load_into(self, model: nn.Module) -> None:
        """Fill the model's adapters; each process reads its own rows. The base's weights must be loaded already."""
        parameters = dict(model.named_parameters())
        with open_tensors(self.folder / WEIGHTS_FILE) as reader:
            for name, stored in self.file_names.items():
                values = reader.get_tensor(stored)
                if name.endswith(MAGNITUDE):
                    layer = model.get_submodule(name.removesuffix(MAGNITUDE))
                    assert isinstance(layer, LoRALinear)
                    values = values.float() - full_tensor(layer.row_lengths()).cpu()
                fill(parameters[name], values)


def attach(model: VideoLanguageModel, adapter: Adapter) -> None:
    """Put adapters without values and without dropout where `adapter` has them: for use, not for training."""
    known = set(adaptable(model))
    for module in adapter.layers:
        if module not in known:
            raise UserError(
                f"{adapter.folder / WEIGHTS_FILE}: {module}: the model has no such layer; "
                f"the adapter was made for another base ({adapter.config.get('base_model_name_or_path')!r})"
            )
        component_of(module, model.components)
    add_adapters(model, adapter.layers, adapter.lora)


def recorded(adapter: Path | None) -> dict[str, Any]:
    """Facts that this project's training wrote beside an adapter; empty for no adapter or one of another program."""
    file = None if adapter is None else adapter / ABOUT_FILE
    return read_object(file) if file is not None and file.is_file() else {}


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
    part in these directions. Of experts it looks at the one whose B is largest.
    """
    stored = stored_names(model, pretrained)
    weight_of = {one: target_of(one) if OF_EXPERTS in one else f"{one}.weight" for one in adapter.scales}
    layers = sorted(one for one, name in weight_of.items() if name in stored)
    differences: list[float] = []
    with open_tensors(adapter.folder / WEIGHTS_FILE) as reader:
        for module in layers[:: -(-len(layers) // LAYERS_COMPARED) or 1]:
            a, b = (reader.get_tensor(adapter.file_names[module + leaf]).float() for leaf in (LORA_A, LORA_B))
            index: Any = slice(None)
            if OF_EXPERTS in module:
                a_GRI, b_GOR = expert_pairs(a, b, adapter.layers[module][0])
                index = int(b_GOR.flatten(1).norm(dim=1).argmax())
                a, b = a_GRI[index], b_GOR[index]
            (columns, a_core), (rows, b_core) = torch.linalg.qr(a.T), torch.linalg.qr(b)
            update = adapter.scales[module] * b_core @ a_core.T
            name = stored[weight_of[module]]
            with open_tensors(pretrained.weight_files[name]) as weights:
                weight: Tensor = weights.get_slice(name)[index].float()
            ways = [weight, weight.mT] if OF_EXPERTS in module else [weight]  # released experts are [in, out]
            projected = [rows.T @ one @ columns for one in ways if one.shape == (len(rows), len(columns))]
            if projected and update.norm() > 0:
                differences.append(min(float((one - update).norm() / update.norm()) for one in projected))
    return bool(differences) and statistics.median(differences) < 0.5


def start_from(model: VideoLanguageModel, config: Config, pretrained: Pretrained) -> None:
    """Fill the adapters in `model` from `model.adapter`. Raises UserError if it does not fit them or the base."""
    adapter = Adapter.open(Path(config.model.adapter), model.spellings)
    trained_rope_factor(adapter.folder, config.model.rope_factor, exact=True)
    warn_of_other_text(adapter.about, config.data)
    check_adapter(adapter, model, pretrained)
    adapter.load_into(model)


def warn_of_other_text(about: Mapping[str, Any], data: DataConfig) -> None:
    """Log it if the training that `about` (vft.json) records had other text around media and answers than `data`."""
    if about.get("video"):
        was = about.get("template_options", {}), about["video"].get("keep_outer_pair", False)
        now = data.template_options, data.video.keep_outer_pair
        if was != now:
            text = "data.template_options = %s, data.video.keep_outer_pair = %s: the model was trained with %s and %s"
            logger.warning(text, *map(show, (*now, *was)))


def merged_into(pretrained: Pretrained) -> list[dict[str, Any]]:
    """Records in a model's folder of the adapters that were merged into it: `adapter` (its folder) and `digest`."""
    records = pretrained.json_file(ABOUT_FILE).get("merged") or []
    return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []


def trained_rope_factor(adapter: Path | None, given: float | None, exact: bool = False) -> float | None:
    """The `model.rope_factor` that an adapter was trained with, or the one `given` if nothing is recorded.

    Raises UserError if both are there and differ; with `exact` also if one is recorded and none given.
    """
    factor: float | None = recorded(adapter).get("rope_factor", given)
    if given != factor and (exact or given is not None):
        raise UserError(f"model.rope_factor = {given}: {adapter} was trained with {factor}; make them equal")
    return factor


def export_adapter(
    model: VideoLanguageModel, folder: Path, lora: LoraConfig, base: str, about: Mapping[str, Any], write: bool
) -> None:
    """Write PEFT's two files, which fit the original base, and `about` beside them.

    Every process must call it, since it gathers tensors. The process with `write` writes the files.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    # A PiSSA adapter is exported with twice the rank. A larger alpha keeps its scale.
    rank_factor, alpha_factor = (1, 1.0) if lora.init == "kaiming" else (2, math.sqrt(2) if lora.rslora else 2.0)
    layers = dict(adapted_layers(model))
    for name, layer in layers.items():
        gathered = _peft_tensors(layer)  # all processes gather them, one keeps them
        if write:
            module = model.peft_name(_in_peft(name, layers))
            tensors |= {f"{PEFT_ROOT}{module}.{leaf}": t.cpu().contiguous() for leaf, t in gathered.items()}
            target = model.peft_name(target_of(name))
            ranks[target], alphas[target] = layer.rank * rank_factor, _number(layer.alpha * alpha_factor)
    if not write:
        return
    rank, alpha = lora.rank * rank_factor, _number(lora.alpha * alpha_factor)
    linears = [model.peft_name(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    of_experts = [model.peft_name(target_of(name)) for name in layers if OF_EXPERTS in name]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _by_pattern(ranks, rank),
        "alpha_pattern": _by_pattern(alphas, alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _target_pattern([name for name in ranks if name not in of_experts], linears) or [],
        "target_parameters": of_experts or None,
    }
    with whole_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        for file, content in ((CONFIG_FILE, config), (ABOUT_FILE, dict(about))):
            (partial / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _peft_tensors(layer: LoRALinear | LoRAExperts) -> dict[str, Tensor]:
    """A layer's adapter as PEFT stores it, gathered. PiSSA becomes plain LoRA of twice the rank:
    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0] (arXiv 2404.02948, appendix C)."""
    a, b = full_tensor(layer.lora_A.weight.detach()), full_tensor(layer.lora_B.weight.detach())
    if isinstance(layer, LoRALinear) and layer.lora_A0 is not None and layer.lora_B0 is not None:
        a, b = torch.cat([a, full_tensor(layer.lora_A0)]), torch.cat([b, -full_tensor(layer.lora_B0)], dim=1)
    tensors = {"lora_A.weight": a, "lora_B.weight": b}
    if isinstance(layer, LoRALinear) and layer.lora_magnitude_change is not None:
        lengths = full_tensor(layer.row_lengths())
        tensors[PEFT_MAGNITUDE.removeprefix(".")] = lengths + full_tensor(layer.lora_magnitude_change.detach())
    return tensors


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for a kind of adapter that this project would not compute as it was trained."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type = {config.get('peft_type')!r}: only LORA adapters (and DoRA) are read")
    for field in REFUSED:
        if config.get(field):
            raise UserError(f"{file}: {field} = {config[field]!r}: not supported, must be empty")
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or any(str(one).rpartition(".")[2] not in MATRICES for one in parameters):
        raise UserError(f"{file}: target_parameters = {parameters!r}: must be a list of experts' {', '.join(MATRICES)}")
    if parameters and config.get("use_dora"):
        raise UserError(f"{file}: use_dora = true with target_parameters = {parameters!r}: PEFT has no DoRA of experts")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: init_lora_weights = {init!r}: the adapter fits only a changed base; save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    for field, kinds in zip(PATTERNS, (int, int | float), strict=True):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{file}: {field} = {patterns!r}: must be an object")
        for key, value in patterns.items():
            try:
                re.compile(key)
            except re.error as error:
                raise UserError(f"{file}: {field}.{key!r}: not a regular expression ({error})") from error
            if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
                raise UserError(f"{file}: {field}.{key!r} = {value!r}: must be a number above 0")


def _without_peft(target_parameters: Collection[str], name: str) -> str:
    """The tensor's name without what PEFT adds to the model's own, including an adapter's name that a plain
    `state_dict` has. `_in_peft` says how the adapters of experts are named."""
    bare = re.sub(r"\.(lora_(?:A|B|magnitude_vector))\.default\b", r".\1", name.removeprefix(PEFT_ROOT))
    if found := re.fullmatch(rf"(.*\.experts)((?:{re.escape(PEFT_NESTED)})*)(\.lora_[AB]\.weight)", bare):
        owner, nested, leaf = found.groups()
        adapted = [m for m in MATRICES if any(f".{owner}.{m}".endswith(f".{one}") for one in target_parameters)]
        if (depth := nested.count(PEFT_NESTED)) < len(adapted):
            return owner + OF_EXPERTS + adapted[-1 - depth] + leaf
    return re.sub(rf"{re.escape(PEFT_MAGNITUDE)}(\.weight)?$", MAGNITUDE, bare)


def _in_peft(name: str, adapted: Collection[str]) -> str:
    """PEFT's module for an adapter. Experts have a wrapper for each adapted matrix, that of the last one outermost; how
    often a wrapper is nested tells its matrix (`peft.tuners.tuners_utils.BaseTuner._inject_parameters`)."""
    owner, of_experts, matrix = name.partition(OF_EXPERTS)
    around = MATRICES[MATRICES.index(matrix) + 1 :] if of_experts else ()
    return owner + PEFT_NESTED * sum(owner + of_experts + one in adapted for one in around)


def _target_pattern(modules: Sequence[str], linears: Sequence[str]) -> str:
    """A regular expression that fully matches exactly `modules` among `linears`. The layer number is left open if that
    matches no other layer. It is never a bare leaf name, which would match layers of other components."""
    names_of: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        names_of[_any_layer(name)].append(name)
    patterns = []
    for kind, names in sorted(names_of.items()):
        if all(name in names for name in linears if re.fullmatch(kind, name)):
            patterns.append(kind)
        else:
            patterns += map(re.escape, sorted(names))
    return "|".join(patterns)


def _by_pattern(values: Mapping[str, float], common: float) -> dict[str, float]:
    """Values other than the common one, by regular expression: one for all layers of a kind if they are equal."""
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in values.items():
        kinds[_any_layer(name)][name] = value
    patterns = {}
    for kind, own in kinds.items():
        if len(set(own.values())) == 1:
            patterns[kind] = next(iter(own.values()))
        else:
            patterns |= {re.escape(name): value for name, value in own.items()}
    return {pattern: value for pattern, value in patterns.items() if value != common}


def _any_layer(name: str) -> str:
    """A regular expression for a layer's name with any layer number."""
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
