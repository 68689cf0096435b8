"""What is trained: components of the model, or adapters on the layers that `lora.targets` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from vft.adapters.lora import OF_EXPERTS, LoRAExperts, LoRALinear, is_adapter, is_start, target_of
from vft.common.errors import UserError
from vft.config.run import LoraConfig
from vft.models.base import VideoLanguageModel, component_of
from vft.models.experts import ExpertWeights

T = TypeVar("T")
BY_NAME = ("lm_head", "shared_expert_gate")
"""The output head, and a gate with one output, which is too small for a rank."""


@dataclass(frozen=True, slots=True)
class TrainableRow:
    """One line of the table of what is trained."""

    what: str
    modules: int
    parameters: int
    example: str


def choose_trainable(model: VideoLanguageModel, lora: LoraConfig | None, train: Sequence[str]) -> list[TrainableRow]:
    """Freeze all parameters but those of adapters, which are added here, or without `lora` those of the components in
    `train`. Trainable parameters become float32. Returns the table to print.

    Call it on the meta device, before weights are loaded. Raises UserError for a pattern that matches nothing.
    """
    adapted = {} if lora is None else _add_adapters_by_pattern(model, lora)
    for name, parameter in model.named_parameters():
        in_component = lora is None and component_of(name, model.components) in train
        parameter.requires_grad_(in_component or (lora is not None and is_adapter(name) and not is_start(name)))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if lora is None:
        names_of = {
            f"full {component}": [name for name in sizes if component_of(name, model.components) == component]
            for component in train
        }
    else:
        kind = "DoRA" if lora.dora else "LoRA" if lora.init == "kaiming" else "PiSSA"
        names_of = {f"{kind} {pattern}": names for pattern, names in adapted.items()}
    rows = []
    for what, names in names_of.items():
        prefixes = tuple(f"{name}." for name in names)
        count = sum(size for name, size in sizes.items() if f"{name}.".startswith(prefixes))
        rows.append(TrainableRow(what, len(names), count, names[0]))
    return rows


def _add_adapters_by_pattern(model: VideoLanguageModel, lora: LoraConfig) -> dict[str, list[str]]:
    matched = match_targets(model, lora.targets)
    modules = list(dict.fromkeys(name for names in matched.values() for name in names))
    ranks = _values_by_pattern(model, modules, lora.ranks, "lora.ranks")
    alphas = _values_by_pattern(model, modules, lora.alphas, "lora.alphas")
    add_adapters(model, {name: (ranks.get(name, lora.rank), alphas.get(name, lora.alpha)) for name in modules}, lora)
    return matched


def add_adapters(model: nn.Module, layers: Mapping[str, tuple[int, float]], config: LoraConfig) -> None:
    """Give each named layer (of `adaptable`) an adapter of its own rank and alpha, otherwise as in `config`."""
    for name, (rank, alpha) in layers.items():
        owner, of_experts, matrix = name.partition(OF_EXPERTS)
        base = model.get_submodule(owner)
        if isinstance(base, ExpertWeights) and of_experts:
            base.adapters[matrix] = LoRAExperts(base, matrix, config, rank, alpha)
            continue
        assert isinstance(base, nn.Linear), f"{name} is {type(base).__name__}"
        if config.init != "kaiming" and rank > min(base.in_features, base.out_features):
            raise UserError(
                f'lora.rank = {rank} with lora.init = "{config.init}": {name} is {base.out_features} x '
                f"{base.in_features} and has no more singular vectors than the smaller of the two; lower the rank"
            )
        model.set_submodule(name, LoRALinear(base, config, rank, alpha))


def adaptable(model: nn.Module) -> list[str]:
    """Names of the linear layers, and those that adapters of experts' matrices have or would have."""
    names = []
    for name, module in model.named_modules():
        names += [name] if isinstance(module, nn.Linear) else []
        names += [name + OF_EXPERTS + one for one in module.matrices] if isinstance(module, ExpertWeights) else []
    return names


def match_targets(
    model: VideoLanguageModel, patterns: Sequence[str], setting: str = "lora.targets"
) -> dict[str, list[str]]:
    """Layers of `adaptable` that each pattern COMPONENT.GLOB matches within its component.

    The glob is compared with the layer's last name, which for experts begins with `experts.`, and with its path in the
    model. It takes those of BY_NAME only if it is exactly their name, and experts only if it has `experts` in it.
    Raises UserError, with the name of the `setting`, for a pattern that matches nothing.
    """
    linears: dict[str, list[str]] = {component: [] for component in model.components}
    for name in adaptable(model):
        linears[component_of(name, model.components)].append(name)
    matched: dict[str, list[str]] = {}
    for pattern in patterns:
        component, _, glob = pattern.partition(".")
        if component not in linears or not glob:
            raise UserError(
                f"{setting} = {pattern!r}: must be COMPONENT.PATTERN with a component of {', '.join(linears)}, "
                'such as "language_model.*" or "language_model.q_proj"'
            )
        matched[pattern] = [name for name in linears[component] if _matches(name, glob)]
        if not matched[pattern]:
            leaves = ", ".join(sorted({_leaf(name) for name in linears[component]}))
            raise UserError(f"{setting} = {pattern!r}: matches no linear layer; {component} has {leaves}")
    return matched


def _matches(name: str, glob: str) -> bool:
    leaf = _leaf(name)
    may = glob == leaf if leaf in BY_NAME else "experts" in glob or OF_EXPERTS not in name
    return may and (fnmatchcase(leaf, glob) or fnmatchcase(target_of(name), glob))


def _leaf(name: str) -> str:
    leaf = name.rpartition(".")[2]
    return f"experts.{leaf}" if OF_EXPERTS in name else leaf


def _values_by_pattern(
    model: VideoLanguageModel, modules: Sequence[str], values: Mapping[str, T], setting: str
) -> dict[str, T]:
    """The value of the first pattern that matches, for each adapted module that a pattern matches (as in PEFT).

    Raises UserError for a pattern that decides nothing.
    """
    chosen: dict[str, T] = {}
    for pattern, names in match_targets(model, list(values), setting).items():
        adapted = [name for name in names if name in modules]
        new = [name for name in adapted if name not in chosen]
        if not new:
            reason = (
                "patterns before it match all of its layers; put it before them"
                if adapted
                else "none of its layers is among lora.targets; add them there, or take it out"
            )
            raise UserError(f"{setting} = {pattern!r}: {reason}")
        chosen |= dict.fromkeys(new, values[pattern])
    return chosen
