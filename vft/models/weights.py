"""Reading a released model's weights into a model: by name, and in each process only the rows that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.safetensors_io import open_tensors
from vft.distributed.process_group import local_part, local_rows
from vft.models.base import VideoLanguageModel
from vft.models.prequantized import require_whole
from vft.models.pretrained import Pretrained
from vft.models.quantization import is_packed, pack, true_shapes
from vft.models.tensor_names import our_names

PACKED_AT_ONCE = 1 << 22
"""Weights that are read and packed at a time, which takes 64 MB of working memory."""
TIED_TO = "embed_tokens.weight"
BUFFERS = (".inv_freq", "embeddings.position_ids")
"""Endings of the names of tensors that older transformers saved and that follow from the configuration."""


def load_weights(
    model: VideoLanguageModel, pretrained: Pretrained, extra: frozenset[str], show_progress: bool = False
) -> None:
    """Fill every parameter of `model` but those in `extra` (adapters) from the released weights, by name.

    A sharded parameter reads only its own rows. An NF4 parameter packs them a few at a time. Raises UserError for a
    missing, an unexpected or a misshapen tensor: no parameter keeps its initial value.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name not in extra}
    shapes = true_shapes(model)
    stored = stored_names(model, pretrained)
    _check_names(parameters, stored, pretrained)
    _check_tied_head(parameters, stored, pretrained)
    by_file: dict[Path, list[str]] = {}
    for name in parameters:
        by_file.setdefault(pretrained.weight_files[stored[name]], []).append(name)
    with progress_bar(len(parameters), "loading weights", "tensor", show_progress) as progress, torch.no_grad():
        for file, names in by_file.items():
            with open_tensors(file) as reader:
                for name in names:
                    _copy(parameters[name], shapes[name], reader.get_slice(stored[name]), f"{file}: {stored[name]}")
                    progress.update()


def stored_names(model: VideoLanguageModel, pretrained: Pretrained) -> dict[str, str]:
    """Names of the model's tensors to those in the released files, in any of the family's spellings.

    Raises UserError if one part of the model is there under two spellings.
    """
    return our_names(pretrained.weight_files, model.spellings, pretrained.path)


def _check_names(parameters: dict[str, nn.Parameter], stored: dict[str, str], pretrained: Pretrained) -> None:
    missing = sorted(set(parameters) - set(stored))
    unexpected = {name for name in set(stored) - set(parameters) if not name.endswith(BUFFERS)}
    if not any(name.endswith("lm_head.weight") for name in parameters):
        # A tied head may be in the files too: see `_check_tied_head`.
        unexpected = {name for name in unexpected if not name.endswith("lm_head.weight")}
    if missing or unexpected:
        raise UserError(
            f"{pretrained.path}: {len(missing)} tensors of the model are missing in the checkpoint "
            f"{missing[:3]}, {len(unexpected)} of the checkpoint are unknown to the model "
            f"{sorted(stored[name] for name in unexpected)[:3]}; the checkpoint is in no known layout of "
            f"{pretrained.config.model_type}"
        )


def _check_tied_head(parameters: Mapping[str, nn.Parameter], stored: Mapping[str, str], pretrained: Pretrained) -> None:
    """Raises UserError if a head that config.json ties to the embedding was saved with other weights: transformers 5
    does not tie them (`PreTrainedModel.tie_weights`)."""
    head = next((name for name in stored if name.endswith("lm_head.weight") and name not in parameters), None)
    if head is None:
        return
    names = stored[head], stored[next(name for name in parameters if name.endswith(TIED_TO))]
    with open_tensors(pretrained.weight_files[names[0]]) as one, open_tensors(pretrained.weight_files[names[1]]) as two:
        parts = one.get_slice(names[0]), two.get_slice(names[1])
        shape = parts[0].get_shape()
        rows = max(1, PACKED_AT_ONCE // shape[-1])
        is_copy = shape == parts[1].get_shape() and all(
            torch.equal(parts[0][start : start + rows], parts[1][start : start + rows])
            for start in range(0, shape[0], rows)
        )
    if not is_copy:
        raise UserError(
            f"{pretrained.path}: {names[0]} and {names[1]} differ, but config.json has tie_word_embeddings = true; set "
            "it to false (in text_config too, where it stands there), or remove the head's tensor"
        )


def _copy(parameter: Tensor, expected: tuple[int, ...], source: Any, where: str) -> None:
    shape = tuple(source.get_shape())
    require_whole(source.get_dtype(), *where.split(": ", 1))
    if shape != expected:
        raise UserError(f"{where}: shape {list(shape)} in the file, {list(expected)} by config.json")
    rows, local = local_rows(parameter), local_part(parameter)
    if not is_packed(parameter):
        local.copy_(source[rows])
        return
    first, at_once = rows.start or 0, max(1, PACKED_AT_ONCE // shape[1])
    for start in range(0, len(local), at_once):
        part = local[start : start + at_once]
        part.copy_(pack(source[first + start : first + start + len(part)].to(part.device)))
