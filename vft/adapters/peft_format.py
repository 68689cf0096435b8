"""Adapters as files: PEFT's format, written for the base as it was and read from whoever wrote it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vft.adapters.lora import (
    LORA_A,
    LORA_B,
    MAGNITUDE,
    LoRALinear,
    add_adapters,
    component_of,
    fill,
    is_adapter,
    lora_scale,
)
from vft.common.errors import UserError
from vft.common.files import read_object, whole_folder
from vft.config.run import LoraConfig, ModelConfig
from vft.distributed.process_group import full_tensor
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained, open_tensors, stored_names
from vft.models.tensor_names import Spellings, our_names

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ABOUT_FILE = "vft.json"
"""Where an adapter came from and what it was trained with; PEFT and vLLM don't look at it."""
PEFT_ROOT = "base_model.model."
PEFT_MAGNITUDE = ".lora_magnitude_vector"
PATTERNS = ("rank_pattern", "alpha_pattern")
REFUSED = (
    *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "fan_in_fan_out"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
)
"""Fields of PEFT's that make another computation of the same tensors, or need others."""
LAYERS_COMPARED = 16
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""How the initialisations begin after which an adapter fits a changed base alone, unless PEFT has converted it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's files in PEFT's format, read but for the tensors."""

    folder: Path
    config: dict[str, Any]
    about: dict[str, Any]
    """What this project's training recorded; empty for another's adapter."""
    shapes: dict[str, tuple[int, ...]]
    """By the parameter names of this project's model."""
    file_names: dict[str, str]
    """The same keys to the names in the file."""

    @staticmethod
    def open(folder: Path, spellings: Spellings) -> Adapter:
        """UserError names what is missing or not understood."""
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: {name} is missing; an adapter in PEFT's safetensors format has it")
        config = read_object(folder / CONFIG_FILE)
        _check_kind(folder / CONFIG_FILE, config)
        with open_tensors(folder / WEIGHTS_FILE) as reader:
            stored = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        bare: dict[str, str] = {}
        for name in stored:
            first = bare.setdefault(_without_peft(name), name)
            if first != name:
                raise UserError(f"{folder / WEIGHTS_FILE}: {first} and {name} are the same tensor; keep one of them")
        names = our_names(bare, spellings, folder / WEIGHTS_FILE)
        file_names = {ours: bare[name] for ours, name in names.items()}
        shapes = {ours: stored[name] for ours, name in file_names.items()}
        return Adapter(folder, config, recorded(folder), shapes, file_names)

    @property
    def lora(self) -> LoraConfig:
        """Rank, alpha and kind as a configuration (targets are read off the tensors)."""
        config = self.config
        kind = {"rslora": config.get("use_rslora", False), "dora": config.get("use_dora", False)}
        try:
            return LoraConfig(rank=config["r"], alpha=config["lora_alpha"], **kind)
        except (KeyError, ValueError) as error:
            found = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora", "use_dora")}
            raise UserError(f"{self.folder / CONFIG_FILE}: {found}: not the settings of a LoRA adapter") from error

    @property
    def layers(self) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each adapted layer: those of the first pattern that fits its name, else the common ones.

        A pattern is a regular expression for the whole name or for what follows one of its dots
        (`peft.utils.other.get_pattern_key`).
        """
        found, lora = {}, self.lora
        ranks, alphas = ((self.config.get(field) or {}).items() for field in PATTERNS)
        for module in [name.removesuffix(LORA_A) for name in self.shapes if name.endswith(LORA_A)]:
            theirs = self.file_names[module + LORA_A].removeprefix(PEFT_ROOT).partition(".lora_A.")[0]

            def own(patterns: Any, common: Any, name: str = theirs) -> Any:
                return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", name)), common)

            found[module] = own(ranks, lora.rank), own(alphas, lora.alpha)
        return found

    @property
    def scales(self) -> dict[str, float]:
        """Of each adapted layer's update."""
        return {name: lora_scale(rank, alpha, self.lora.rslora) for name, (rank, alpha) in self.layers.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the tensors and their scales, whatever they are named in the file."""
        found = hashlib.sha256(json.dumps(sorted(self.scales.items())).encode())
        with open_tensors(self.folder / WEIGHTS_FILE) as reader:
            for name, stored in sorted(self.file_names.items()):
                tensor: Tensor = reader.get_tensor(stored)
                found.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}:".encode())
                found.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def check(self, model: nn.Module, checkpoint: Pretrained) -> None:
        """UserError where the adapter was made for another base than this checkpoint, is in its weights already, or
        doesn't fit the adapters in `model`."""
        base, fingerprint = checkpoint.path, checkpoint.fingerprint
        scales, lora = self.scales, self.lora
        for name, layer in adapted_layers(model):
            if (layer.lora_magnitude_change is not None) != lora.dora:
                raise UserError(
                    f"{self.folder / CONFIG_FILE}: use_dora = {lora.dora}, but lora.dora = {not lora.dora} by the "
                    "[lora] table; make them equal"
                )
            if name in scales and not math.isclose(layer.scale, scales[name], rel_tol=1e-12):
                raise UserError(
                    f"{self.folder / CONFIG_FILE}: lora_alpha = {lora.alpha}, use_rslora = {lora.rslora}: scale "
                    f"{scales[name]} for {name}, but {layer.scale} by the [lora] table; make alpha, rank (and alphas, "
                    "ranks) and rslora equal"
                )
        made_for = self.about.get("base_fingerprint")
        records = merged_into(checkpoint)
        if records and self.digest in [one.get("digest") for one in records]:
            raise self._merged_before(base)
        if made_for and made_for != fingerprint:
            raise UserError(
                f"{self.folder / CONFIG_FILE}: base_model_name_or_path = "
                f"{self.config.get('base_model_name_or_path')!r} (fingerprint {made_for[:12]}): the adapter was made "
                f"for another base than {base!r} (fingerprint {fingerprint[:12]}); name the base that it was trained on"
            )
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if is_adapter(name)}
        for name in sorted(set(shapes) ^ set(self.shapes)):
            where = "the file alone" if name in self.shapes else "the model alone"
            raise UserError(f"{self.folder / WEIGHTS_FILE}: {name}: found in {where}; the adapter has other targets")
        for name, shape in shapes.items():
            if shape != self.shapes[name]:
                raise UserError(
                    f"{self.folder / WEIGHTS_FILE}: {name}: shape {list(self.shapes[name])} in the adapter, "
                    f"{list(shape)} in the model; the adapter was made for another base or rank"
                )
        if made_for is None and self._is_in(checkpoint, stored_names(model, checkpoint)):
            raise self._merged_before(base)

    def _merged_before(self, base: str) -> UserError:
        return UserError(
            f"{self.folder}: this adapter is merged into {base!r} already; use it without, or name the model "
            "that it was trained on"
        )

    def _is_in(self, checkpoint: Pretrained, stored: Mapping[str, str]) -> bool:
        """Whether the checkpoint's weights hold the adapter's update: between the update's own directions, s B A of
        rank r, a weight with the update in it is nearly the update, one without is nearly nothing.

        Told on a few layers, and only of updates that are large beside a weight's own part in r x r directions.
        """
        scales = self.scales
        layers = sorted(name for name in scales if f"{name}.weight" in stored)
        differences: list[float] = []
        with open_tensors(self.folder / WEIGHTS_FILE) as reader:
            for module in layers[:: -(-len(layers) // LAYERS_COMPARED) or 1]:
                a, b = (reader.get_tensor(self.file_names[module + leaf]).float() for leaf in (LORA_A, LORA_B))
                (columns, a_core), (rows, b_core) = torch.linalg.qr(a.T), torch.linalg.qr(b)
                update = scales[module] * b_core @ a_core.T
                name = stored[f"{module}.weight"]
                with open_tensors(checkpoint.weight_files[name]) as weights:
                    weight: Tensor = weights.get_tensor(name)
                if weight.shape == (len(rows), len(columns)) and update.norm() > 0:
                    seen = rows.T @ weight.float() @ columns
                    differences.append(float((seen - update).norm() / update.norm()))
        return bool(differences) and statistics.median(differences) < 0.5

    def load_into(self, model: nn.Module) -> None:
        """Read every tensor into the model's adapters, each process its own rows. The base's weights are there."""
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
    """Put empty adapters where `adapter` has them (for use, not training: no dropout)."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module in adapter.layers:
        if module not in linears:
            raise UserError(
                f"{adapter.folder / WEIGHTS_FILE}: {module}: the model has no such linear layer; "
                f"the adapter was made for another base ({adapter.config.get('base_model_name_or_path')!r})"
            )
        component_of(module, model.components)
    add_adapters(model, adapter.layers, adapter.lora)


def start_from(model: VideoLanguageModel, base: ModelConfig, checkpoint: Pretrained) -> None:
    """Fill the adapters in `model` from `model.adapter`. UserError where they don't fit it, or its base."""
    adapter = Adapter.open(Path(base.adapter), model.spellings)
    if trained_rope_factor(adapter.folder, base.rope_factor) != base.rope_factor:
        raise UserError(
            f"model.rope_factor = {base.rope_factor}: {base.adapter} was trained with "
            f"{adapter.about['rope_factor']}; make them equal"
        )
    adapter.check(model, checkpoint)
    adapter.load_into(model)


def merged_into(checkpoint: Pretrained) -> list[dict[str, Any]]:
    """The adapters that were merged into a model, as its folder says: `adapter` (its folder then) and `digest`."""
    found = checkpoint.json_file(ABOUT_FILE).get("merged") or []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def trained_rope_factor(adapter: Path | None, given: float | None) -> float | None:
    """The `model.rope_factor` that an adapter was trained with; the one `given` where nothing is recorded.

    UserError where the one given is another.
    """
    about = recorded(adapter)
    if "rope_factor" not in about:
        return given
    if given is not None and given != about["rope_factor"]:
        raise UserError(
            f"model.rope_factor = {given}: {adapter} was trained with {about['rope_factor']}; make them equal"
        )
    factor: float | None = about["rope_factor"]
    return factor


def recorded(adapter: Path | None) -> dict[str, Any]:
    """What this project's training wrote beside an adapter; empty for another's, or none."""
    file = None if adapter is None else adapter / ABOUT_FILE
    return read_object(file) if file is not None and file.is_file() else {}


def export_adapter(
    model: VideoLanguageModel,
    folder: Path,
    lora: LoraConfig,
    base: str,
    about: Mapping[str, Any],
    write: bool,
) -> None:
    """Write PEFT's two files, for the base as it was before training, and `about` beside them.

    Every process calls it (tensors are gathered), the one with `write` writes.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    # With twice the rank, PiSSA's update keeps its scale.
    doubled = 1.0 if lora.init == "kaiming" else math.sqrt(2) if lora.rslora else 2.0
    for name, layer in adapted_layers(model):
        gathered = _plain_tensors(layer)  # by every process, kept by the one that writes
        if write:
            theirs = _to_peft(f"{name}.", model.peft_prefixes).removesuffix(".")
            tensors |= {f"{PEFT_ROOT}{theirs}.{leaf}": t.cpu().contiguous() for leaf, t in gathered.items()}
            ranks[theirs] = gathered["lora_A.weight"].shape[0]
            known, rank = (lora.alpha, *lora.alphas.values()), layer.lora_A.out_features
            alpha = next(alpha for alpha in known if lora_scale(rank, alpha, lora.rslora) == layer.scale)
            alphas[theirs] = _number(alpha * doubled)
    if not write:
        return
    linears = [
        _to_peft(f"{n}.", model.peft_prefixes)[:-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)
    ]
    common = lora.rank * (1 if lora.init == "kaiming" else 2), _number(lora.alpha * doubled)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": common[0],
        "lora_alpha": common[1],
        "rank_pattern": _by_pattern(ranks, common[0]),
        "alpha_pattern": _by_pattern(alphas, common[1]),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _regular_expression(list(ranks), linears),
    }
    with whole_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        for name, content in ((CONFIG_FILE, config), (ABOUT_FILE, dict(about))):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def adapted_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """Layers with an adapter, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def _plain_tensors(layer: LoRALinear) -> dict[str, Tensor]:
    """A layer's adapter as PEFT keeps it, gathered. PiSSA's is a plain one of twice the rank:
    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0] (arXiv 2404.02948, appendix C)."""
    a, b = full_tensor(layer.lora_A.weight.detach()), full_tensor(layer.lora_B.weight.detach())
    if layer.lora_A0 is not None and layer.lora_B0 is not None:
        a, b = torch.cat([a, full_tensor(layer.lora_A0)]), torch.cat([b, -full_tensor(layer.lora_B0)], dim=1)
    tensors = {"lora_A.weight": a, "lora_B.weight": b}
    if layer.lora_magnitude_change is not None:
        lengths = full_tensor(layer.row_lengths())
        tensors[PEFT_MAGNITUDE.removeprefix(".")] = lengths + full_tensor(layer.lora_magnitude_change.detach())
    return tensors


def _check_kind(file: Path, config: Mapping[str, Any]) -> None:
    """UserError for a kind of adapter that would be computed otherwise than it was trained."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type = {config.get('peft_type')!r}: only LORA adapters (and DoRA) are read")
    for field in REFUSED:
        if config.get(field):
            raise UserError(f"{file}: {field} = {config[field]!r}: not supported, must be empty")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: init_lora_weights = {init!r}: the adapter fits a changed base alone; save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    for field, kinds in zip(PATTERNS, (int, int | float), strict=True):
        for key, value in _items(file, field, config.get(field)):
            try:
                re.compile(key)
            except re.error as error:
                raise UserError(f"{file}: {field}.{key!r}: not a regular expression ({error})") from error
            if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
                raise UserError(f"{file}: {field}.{key!r} = {value!r}: must be a number above 0")


def _items(file: Path, field: str, patterns: Any) -> list[tuple[str, Any]]:
    if patterns is not None and not isinstance(patterns, dict):
        raise UserError(f"{file}: {field} = {patterns!r}: must be an object")
    return list((patterns or {}).items())


def _to_peft(name: str, prefixes: Mapping[str, str]) -> str:
    for ours, theirs in prefixes.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"{name} has no prefix of {list(prefixes)}")


def _without_peft(name: str) -> str:
    """The name of an adapter file's tensor without what PEFT puts around the model's own; also where the adapter's name
    was saved with it (a plain `state_dict`)."""
    bare = re.sub(r"\.(lora_(?:A|B|magnitude_vector))\.default\b", r".\1", name.removeprefix(PEFT_ROOT))
    return re.sub(rf"{re.escape(PEFT_MAGNITUDE)}(\.weight)?$", MAGNITUDE, bare)


def _regular_expression(modules: Sequence[str], linears: Sequence[str]) -> str:
    """A full-match pattern for exactly these layers' kinds, layer numbers left open where it then fits no other of
    `linears`: never a bare leaf name, which would fit the other component's layers too."""
    by_kind: dict[str, list[str]] = {}
    for name in modules:
        by_kind.setdefault(_kind(name), []).append(name)
    patterns = []
    for kind, names in sorted(by_kind.items()):
        if all(name in names for name in linears if re.fullmatch(kind, name)):
            patterns.append(kind)
        else:
            patterns += map(re.escape, sorted(names))
    return "|".join(patterns)


def _kind(name: str) -> str:
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))


def _by_pattern(values: Mapping[str, float], common: float) -> dict[str, float]:
    """Values that aren't the common one, by regular expressions: of a kind of layer where all of it have the same."""
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in values.items():
        kinds[_kind(name)][name] = value
    patterns = {}
    for kind, own in kinds.items():
        if len(set(own.values())) == 1:
            patterns[kind] = next(iter(own.values()))
        else:
            patterns |= {re.escape(name): value for name, value in own.items()}
    return {pattern: value for pattern, value in patterns.items() if value != common}


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
