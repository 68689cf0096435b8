"""LoRA (Hu et al. 2021, arXiv 2106.09685) on a frozen base, and the choice of what is trained at all.

Adapters are float32 beside frozen weights of any dtype and compute in the dtype of their input. Files are PEFT's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vft.config import LoraConfig
from vft.distributed import local_part, local_rows, whole
from vft.files import whole_folder
from vft.types import UserError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ABOUT_FILE = "vft.json"
"""Where an adapter came from and what it was trained with; PEFT and vLLM don't look at it."""
PEFT_ROOT = "base_model.model."

Towers = Mapping[str, tuple[str, ...]]


class LoRALinear(nn.Linear):
    """y = x W^T + b + scale * dropout(x) A^T B^T, with W and b those of the layer it takes the place of."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = scale, dropout
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        base = self.base(x)
        down = self.lora_A.weight.to(x.dtype)
        dropped = self.training and self.dropout > 0
        low = _DropoutLinear.apply(x, down, self.dropout) if dropped else F.linear(x, down)
        return base + F.linear(low, self.lora_B.weight.to(x.dtype)) * self.scale

    def base(self, x: Tensor) -> Tensor:
        """What the layer would give without its adapter."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class _DropoutLinear(torch.autograd.Function):
    """dropout(x) W^T. It keeps x, which the layer's neighbours keep too, and a mask of bytes; autograd would keep the
    dropped input of each adapter besides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dropout: float) -> Tensor:
        """[..., in] to [..., out]."""
        dropped, mask = torch.native_dropout(x, dropout, True)
        ctx.save_for_backward(x, mask, weight)
        ctx.dropout = dropout
        return F.linear(dropped, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """Gradients of input and weight."""
        (grad,) = grads
        x, mask, weight = ctx.saved_tensors
        kept = mask * (1 / (1 - ctx.dropout))
        grad_x = grad @ weight * kept.to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad.flatten(0, -2).T @ (x * kept.to(x.dtype)).flatten(0, -2)
        return grad_x, grad_weight, None


def lora_scale(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / rank; with rsLoRA (arXiv 2312.03732) alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class TrainableRow:
    """One line of the table of what is trained."""

    what: str
    modules: int
    parameters: int
    example: str


def tower_of(name: str, towers: Towers) -> str:
    """The part of the model that a parameter or module belongs to; the first prefix that fits counts."""
    for tower, prefixes in towers.items():
        if f"{name}.".startswith(prefixes):  # the dot: "lm_head" is a module of the prefix "lm_head."
            return tower
    raise AssertionError(f"{name} belongs to no tower of {list(towers)}")


def match_targets(model: nn.Module, patterns: Sequence[str], towers: Towers) -> dict[str, list[str]]:
    """Linear layers that each pattern names, all of them in the tower before the first dot.

    What follows the dot is a glob against the layer's last name or its path within the model. The output head is
    taken only where it is named. UserError for a pattern that matches nothing.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched: dict[str, list[str]] = {}
    for pattern in patterns:
        tower, _, glob = pattern.partition(".")
        if tower not in towers or not glob:
            raise UserError(
                f"lora.targets = {pattern!r}: must be TOWER.PATTERN with a tower of {', '.join(towers)}, "
                'such as "language_model.*" or "language_model.q_proj"'
            )
        matched[pattern] = [
            name
            for name in linears
            if tower_of(name, towers) == tower
            and (fnmatchcase(name.rsplit(".", 1)[-1], glob) or fnmatchcase(name, glob))
            and (name.rsplit(".", 1)[-1] != "lm_head" or glob == "lm_head")
        ]
        if not matched[pattern]:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in linears if tower_of(name, towers) == tower})
            raise UserError(f"lora.targets = {pattern!r}: matches no linear layer; {tower} has {', '.join(leaves)}")
    return matched


def add_adapters(model: nn.Module, modules: Sequence[str], config: LoraConfig) -> None:
    """Put a LoRALinear in the place of each named layer."""
    scale = lora_scale(config.rank, config.alpha, config.rslora)
    for name in dict.fromkeys(modules):
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear), f"{name} is {type(base).__name__}"
        model.set_submodule(name, LoRALinear(base, config.rank, scale, config.dropout))


def choose_trainable(
    model: nn.Module, towers: Towers, lora: LoraConfig | None, train: Sequence[str]
) -> list[TrainableRow]:
    """Freeze everything, then thaw adapters, or where there is no `lora` the named towers. Trainable ones are float32.

    Returns the table to print. Call it on the meta device, before weights are read.
    """
    rows = []
    if lora is not None:
        matched = match_targets(model, lora.targets, towers)
        add_adapters(model, [name for names in matched.values() for name in names], lora)
        for pattern, names in matched.items():
            count = sum(p.numel() for name in names for p in _adapter_of(model, name))
            rows.append(TrainableRow(f"LoRA {pattern}", len(names), count, names[0]))
    for name, parameter in model.named_parameters():
        thawed = is_adapter(name) if lora is not None else tower_of(name, towers) in train
        parameter.requires_grad_(thawed)
        if thawed:
            parameter.data = parameter.data.float()
    if lora is None:
        for tower in train:
            names = [n for n, p in model.named_parameters() if p.requires_grad and tower_of(n, towers) == tower]
            count = sum(model.get_parameter(n).numel() for n in names)
            rows.append(TrainableRow(f"full {tower}", len(names), count, names[0]))
    return rows


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter's."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def initialise(model: nn.Module, seed: int) -> None:
    """A uniform in +-1/sqrt(in) (PEFT's Kaiming initialisation), B zero: the model starts as its base.

    Each layer draws from its own generator, so that sharding and the order of layers change nothing.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            bound = 1 / math.sqrt(module.in_features)
            values = torch.empty(module.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
            fill(module.lora_A.weight, values)
            fill(module.lora_B.weight, torch.zeros(module.lora_B.weight.shape))


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy this process's rows of `values` (the whole tensor) into a parameter, sharded or not."""
    with torch.no_grad():
        local_part(parameter).copy_(values[local_rows(parameter)])


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
    def open(folder: Path, peft_prefixes: Mapping[str, str]) -> Adapter:
        """UserError names what is missing or not understood."""
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: {name} is missing; an adapter in PEFT's safetensors format has it")
        config = _read_object(folder / CONFIG_FILE)
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
            raise UserError(f"{folder / CONFIG_FILE}: peft_type = {kind!r}: only plain LORA adapters are read")
        for field in ("rank_pattern", "alpha_pattern", "modules_to_save"):
            if config.get(field):
                raise UserError(f"{folder / CONFIG_FILE}: {field} = {config[field]!r}: not supported, must be empty")
        try:
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as reader:
                stored = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{folder / WEIGHTS_FILE}: not a readable safetensors file ({error})") from error
        file_names = {_from_peft(name, peft_prefixes): name for name in stored}
        return Adapter(
            folder, config, recorded(folder), {ours: stored[name] for ours, name in file_names.items()}, file_names
        )

    @property
    def lora(self) -> LoraConfig:
        """Rank, alpha and kind of scale as a configuration (targets are read off the tensors)."""
        config = self.config
        try:
            return LoraConfig(rank=config["r"], alpha=config["lora_alpha"], rslora=config.get("use_rslora", False))
        except (KeyError, ValueError) as error:
            found = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora")}
            raise UserError(f"{self.folder / CONFIG_FILE}: {found}: not the settings of a LoRA adapter") from error

    @property
    def modules(self) -> list[str]:
        """Names of the adapted layers."""
        return [name.removesuffix(".lora_A.weight") for name in self.shapes if name.endswith(".lora_A.weight")]

    def check(self, model: nn.Module, base: str, fingerprint: str) -> None:
        """UserError where the adapter was made for another base, or doesn't fit the adapters in `model`."""
        own = lora_scale(self.lora.rank, self.lora.alpha, self.lora.rslora)
        for layer in (module for module in model.modules() if isinstance(module, LoRALinear)):
            if layer.scale != own:
                raise UserError(
                    f"{self.folder / CONFIG_FILE}: lora_alpha = {self.lora.alpha}, use_rslora = {self.lora.rslora}: "
                    f"scale {own}, but {layer.scale} by the [lora] table; make alpha, rank and rslora equal"
                )
        made_for = self.about.get("base_fingerprint")
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

    def load_into(self, model: nn.Module) -> None:
        """Read every tensor into the model's adapters, each process its own rows."""
        parameters = dict(model.named_parameters())
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as reader:
            for name, stored in self.file_names.items():
                fill(parameters[name], reader.get_tensor(stored))


def recorded(adapter: Path | None) -> dict[str, Any]:
    """What this project's training wrote beside an adapter; empty for another's, or none."""
    file = None if adapter is None else adapter / ABOUT_FILE
    return _read_object(file) if file is not None and file.is_file() else {}


def attach(model: nn.Module, adapter: Adapter, towers: Towers) -> None:
    """Put empty adapters where `adapter` has them (for use, not training: no dropout)."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module in adapter.modules:
        if module not in linears:
            raise UserError(
                f"{adapter.folder / WEIGHTS_FILE}: {module}: the model has no such linear layer; "
                f"the adapter was made for another base ({adapter.config.get('base_model_name_or_path')!r})"
            )
        tower_of(module, towers)
    add_adapters(model, adapter.modules, adapter.lora)


def export_adapter(
    model: nn.Module,
    folder: Path,
    lora: LoraConfig,
    base: str,
    peft_prefixes: Mapping[str, str],
    about: Mapping[str, Any],
    write: bool,
) -> None:
    """Write PEFT's two files, and `about` beside them.

    Every process calls it (tensors are gathered), the one with `write` writes.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            tensor = whole(parameter.detach())  # gathered by every process, kept by the one that writes
            if write:
                tensors[PEFT_ROOT + _to_peft(name, peft_prefixes)] = tensor.cpu().contiguous()
    if not write:
        return
    modules = sorted({name.removeprefix(PEFT_ROOT).rsplit(".lora_", 1)[0] for name in tensors})
    linears = [_to_peft(f"{n}.", peft_prefixes)[:-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _regular_expression(modules, linears),
    }
    with whole_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        for name, content in ((CONFIG_FILE, config), (ABOUT_FILE, dict(about))):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, added in float32, in W's dtype."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def _adapter_of(model: nn.Module, name: str) -> list[Tensor]:
    module = model.get_submodule(name)
    assert isinstance(module, LoRALinear)
    return [module.lora_A.weight, module.lora_B.weight]


def _to_peft(name: str, prefixes: Mapping[str, str]) -> str:
    for ours, theirs in prefixes.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"{name} has no prefix of {list(prefixes)}")


def _from_peft(name: str, prefixes: Mapping[str, str]) -> str:
    """A name of an adapter file to ours; the released names (`model.layers`, `visual`) are understood too."""
    bare = name.removeprefix(PEFT_ROOT)
    for ours, theirs in prefixes.items():
        if bare.startswith(theirs):
            return ours + bare.removeprefix(theirs)
    return bare


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object; fetch it again")
    return content


def _regular_expression(modules: Sequence[str], linears: Sequence[str]) -> str:
    """A full-match pattern for exactly these layers' kinds, layer numbers left open where it then fits no other of
    `linears`: never a bare leaf name, which would fit the other tower's layers too."""
    by_kind: dict[str, list[str]] = {}
    for name in modules:
        by_kind.setdefault(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)), []).append(name)
    patterns = []
    for kind, names in sorted(by_kind.items()):
        if all(name in names for name in linears if re.fullmatch(kind, name)):
            patterns.append(kind)
        else:
            patterns += map(re.escape, sorted(names))
    return "|".join(patterns)
