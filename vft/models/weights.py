"""Reading and writing weights in the layout of a release.

They are read by name, and in each process only the rows that it holds. transformers and other programs have saved the
same model under different names; all are known. A full model is written as the same files, tensor names and dtypes, and
what lies beside.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.files import whole_folder
from vft.common.safetensors_io import DTYPES, Layout, file_order, open_tensors, write_tensors
from vft.distributed.process_group import full_tensor, local_part, local_rows
from vft.models.base import Spellings, VideoLanguageModel
from vft.models.pretrained import Pretrained, find_file, require_whole
from vft.models.quantization import is_packed, pack, true_shapes

logger = logging.getLogger(__name__)

PACKED_AT_ONCE = 1 << 22
"""Weights that are read and packed at a time, which takes 64 MB of working memory."""
TIED_TO = "embed_tokens.weight"
BUFFERS = (".inv_freq", "embeddings.position_ids")
"""Endings of the names of tensors that older transformers saved and that follow from the configuration."""
WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
"""Prefixes that DistributedDataParallel, torch.compile, FSDP and activation checkpointing add to saved names."""
DECODER_PARTS = ("layers.", "embed_tokens.", "norm.")
HUB_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
"""Small files that other programs need beside the weights."""
NOT_COPIED = frozenset({"adapter_config.json", "trainer_state.json", "vft.json"})
"""Files of other trainings in the folder. With adapter_config.json a full model would be taken for an adapter."""


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
    apart = experts_apart(shapes, model.turned, stored)
    _check_names(parameters, stored, apart, pretrained, model.unused)
    _check_tied_head(parameters, stored, pretrained)
    turned = turned_names(shapes, model.turned, stored, pretrained) | set(apart)
    by_file: dict[Path, list[str]] = {}
    for name in parameters:
        of_file = apart[name][0][0] if name in apart else stored[name]
        by_file.setdefault(pretrained.weight_files[of_file], []).append(name)
    with progress_bar(len(parameters), "loading weights", "tensor", show_progress) as progress, torch.no_grad():
        for file, names in by_file.items():
            with open_tensors(file) as reader:
                for name in names:
                    if name in apart:
                        source: Any = _ExpertsApart(apart[name], pretrained)
                        where = f"{file}: {apart[name][0][0]} and those of the other experts"
                    else:
                        source, where = reader.get_slice(stored[name]), f"{file}: {stored[name]}"
                    _copy(parameters[name], shapes[name], source, where, name in turned)
                    progress.update()


def stored_names(model: VideoLanguageModel, pretrained: Pretrained) -> dict[str, str]:
    """Names of the model's tensors to those in the released files, in any of the family's spellings.

    Raises UserError if one part of the model is there under two spellings.
    """
    return our_names(pretrained.weight_files, model.spellings, pretrained.path)


def experts_apart(
    shapes: Mapping[str, tuple[int, ...]], endings: tuple[str, ...], stored: Mapping[str, str]
) -> dict[str, list[list[str]]]:
    """Parameters of `shapes` with these endings that the files have expert by expert, as transformers 5 saves some
    families: for each expert the names of its parts in the files, one below the other. Raises UserError if some are
    missing."""
    apart = {}
    for name in (name for name in shapes if name.endswith(endings) and name not in stored):
        module, _, leaf = name.rpartition(".")
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        parts = [[f"{module}.{number}.{leaf}.weight" for leaf in leaves] for number in range(shapes[name][0])]
        missing = [part for expert in parts for part in expert if part not in stored]
        if any(part in stored for part in parts[0]):
            if missing:
                raise UserError(
                    f"{missing[0]} is missing in the checkpoint, which has {shapes[name][0]} experts a layer"
                )
            apart[name] = [[stored[part] for part in expert] for expert in parts]
    return apart


class _ExpertsApart:
    """The matrices of experts [G, out, in] that the files have one by one, read like a slice of a file."""

    def __init__(self, names: Sequence[Sequence[str]], pretrained: Pretrained) -> None:
        self.names, self.files = names, pretrained.weight_files
        self.open = lru_cache(maxsize=2)(open_tensors)  # a layer is in one file or two
        first = [self._slice(name) for name in names[0]]
        self.dtype, shapes = first[0].get_dtype(), [one.get_shape() for one in first]
        self.shape = len(names), sum(rows for rows, _ in shapes), shapes[0][1]

    def _slice(self, name: str) -> Any:
        return self.open(self.files[name]).get_slice(name)

    def get_dtype(self) -> str:
        """That of the first."""
        return str(self.dtype)

    def get_shape(self) -> tuple[int, ...]:
        """By the first expert."""
        return self.shape

    def __getitem__(self, rows: slice) -> Tensor:
        experts = []
        for parts in self.names[rows]:
            slices = [self._slice(name) for name in parts]
            expert = torch.cat([one[:] for one in slices])
            if tuple(expert.shape) != self.shape[1:] or any(one.get_dtype() != self.dtype for one in slices):
                raise UserError(
                    f"{self.files[parts[0]]}: {' and '.join(parts)}: shape {list(expert.shape)}, type "
                    f"{slices[0].get_dtype()}; those of the first expert are {list(self.shape[1:])}, {self.dtype}"
                )
            experts.append(expert)
        return torch.stack(experts)


def turned_names(
    shapes: Mapping[str, tuple[int, ...]], endings: tuple[str, ...], stored: Mapping[str, str], pretrained: Pretrained
) -> frozenset[str]:
    """Names of the parameters of `shapes` with these endings whose last two axes are exchanged in the files.

    The shape tells. A square one is as the others of its module, or as released if they don't tell either. Raises
    UserError for a tensor of neither shape.
    """
    turned, square = set(), set()
    for name in (name for name in shapes if name.endswith(endings) and name in stored):
        released = shapes[name]
        other = (*released[:-2], released[-1], released[-2])
        file = pretrained.weight_files[stored[name]]
        with open_tensors(file) as reader:
            found = tuple(reader.get_slice(stored[name]).get_shape())
        if found not in (released, other):
            raise UserError(
                f"{file}: {stored[name]}: shape {list(found)} in the file, {list(released)} by config.json, or "
                f"{list(other)} as other programs save it"
            )
        if released == other:
            square.add(name)
        elif found == other:
            turned.add(name)
    modules = {name.rpartition(".")[0] for name in turned}
    return frozenset(turned | {name for name in square if name.rpartition(".")[0] in modules})


def our_names(
    stored: Iterable[str], spellings: Spellings, where: object, plain: Callable[[str], str] = str
) -> dict[str, str]:
    """Names in this project's model to the names in a file. A name that fits no spelling stays as it is.

    `plain` takes from a name what another program has added to it. Raises UserError if a part of the model has two
    spellings, because it is not known which tensors count.
    """
    prefixes = sorted(
        ((theirs, ours) for ours, all_ in spellings.items() for theirs in all_), key=lambda pair: -len(pair[0])
    )
    names: dict[str, str] = {}
    spelled: dict[str, tuple[str, str]] = {}
    for name in stored:
        bare = WRAPPERS.sub("", plain(name))
        own = bare
        for theirs, ours in prefixes:
            if bare.startswith(theirs or DECODER_PARTS):
                own = ours + bare.removeprefix(theirs)
                first = spelled.setdefault(ours, (theirs, name))
                if first[0] != theirs:
                    raise UserError(
                        f"{where}: {first[1]} and {name}: one part of the model under two spellings of its "
                        "names; keep the tensors of one"
                    )
                break
        if own in names:
            raise UserError(f"{where}: {names[own]} and {name} are the same tensor; keep one of them")
        names[own] = name
    return names


def _check_names(
    parameters: dict[str, nn.Parameter],
    stored: dict[str, str],
    apart: Mapping[str, list[list[str]]],
    pretrained: Pretrained,
    unused: tuple[str, ...],
) -> None:
    missing = sorted(set(parameters) - set(stored) - set(apart))
    known = {name for experts in apart.values() for parts in experts for name in parts}
    unexpected = {
        name for name in set(stored) - set(parameters) if not name.endswith(BUFFERS) and stored[name] not in known
    }
    if left_out := {name for name in unexpected if name.startswith(unused)}:
        logger.info("%s: %d tensors (%s) are not used in training", pretrained.path, len(left_out), ", ".join(unused))
        unexpected -= left_out
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


def _copy(parameter: Tensor, expected: tuple[int, ...], source: Any, where: str, is_turned: bool) -> None:
    shape = tuple(source.get_shape())
    require_whole(source.get_dtype(), *where.split(": ", 1))
    wanted = (*expected[:-2], expected[-1], expected[-2]) if is_turned else expected
    if shape != wanted:
        raise UserError(f"{where}: shape {list(shape)} in the file, {list(wanted)} by config.json")

    def read(rows: slice) -> Tensor:
        return source[rows].mT if is_turned else source[rows]

    rows, local = local_rows(parameter), local_part(parameter)
    if not is_packed(parameter):
        local.copy_(read(rows))
        return
    first, at_once = rows.start or 0, max(1, PACKED_AT_ONCE // math.prod(shape[1:]))
    for start in range(0, len(local), at_once):
        part = local[start : start + at_once]
        part.copy_(pack(read(slice(first + start, first + start + len(part))).to(part.device).contiguous()))


def export_model(
    model: VideoLanguageModel, pretrained: Pretrained, folder: Path, files: Mapping[str, str], write: bool
) -> None:
    """Write the full model in the layout of its base, with `files` (texts, by name) and the base's other files.

    Every process must call it. Tensors are gathered one by one in their final dtype. The process with `write` writes
    each of them before the next is gathered.
    """
    parameters = dict(model.named_parameters())
    embedding = next(name for name in parameters if name.endswith(TIED_TO))
    stored = stored_names(model, pretrained)
    own = {theirs: name for name, theirs in stored.items() if not name.endswith(BUFFERS)}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    turned = {stored[name] for name in turned_names(shapes, model.turned, stored, pretrained)}
    cuts = {
        part: (name, number, slice(place * shapes[name][2] // len(parts), (place + 1) * shapes[name][2] // len(parts)))
        for name, experts in experts_apart(shapes, model.turned, stored).items()
        for number, parts in enumerate(experts)
        for place, part in enumerate(parts)
    }
    experts = lru_cache(maxsize=2)(lambda name, dtype: full_tensor(parameters[name].detach().to(dtype)))
    with whole_folder(folder) if write else nullcontext(folder) as partial_folder:
        for file in sorted(set(pretrained.weight_files.values())):
            names = [name for name, home in pretrained.weight_files.items() if home == file and name in own]
            # If the release has a tied head as a tensor, it is the embedding here too.
            tensors = {name: parameters.get(own[name], parameters[embedding]).detach() for name in names}
            tensors |= {name: tensors[name].mT for name in names if name in turned}
            tensors |= {
                name: torch.empty(rows.stop - rows.start, shapes[parameter][1], device="meta")
                for name, (parameter, _, rows) in cuts.items()
            }
            with open_tensors(file) as reader:
                tensors |= {name: reader.get_tensor(name) for name in names if own[name].startswith(model.unused)}
                layout = {name: (DTYPES[reader.get_slice(name).get_dtype()], tensors[name].shape) for name in names}
            fetch = partial(_gathered, tensors, layout, cuts, experts)
            if write:
                write_tensors(partial_folder / file.name, layout, fetch, {"format": "pt"})
            else:
                for name in file_order(layout):
                    fetch(name)
        if write:
            copy_companions(pretrained, partial_folder, files)


def _gathered(
    tensors: dict[str, Tensor],
    layout: Layout,
    cuts: Mapping[str, tuple[str, int, slice]],
    experts: Callable[[str, torch.dtype], Tensor],
    name: str,
) -> Tensor:
    """A tensor of the file; of one that is cut from those of all experts, these were gathered once."""
    dtype = layout[name][0]
    if name in cuts:
        parameter, expert, rows = cuts[name]
        return experts(parameter, dtype)[expert].mT[rows].contiguous()
    return full_tensor(tensors[name].to(dtype))


def copy_companions(pretrained: Pretrained, folder: Path, files: Mapping[str, str]) -> None:
    """Copy what lies beside the weights: configuration, tokenizer, template and index, but no code and no pickles.
    `files` (texts, by name) replace those of the base."""
    for name in HUB_COMPANIONS:
        find_file(pretrained.path, name)  # downloads it, if the base is a hub name
    for path in sorted(pretrained.folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    if pretrained.rope_factor is not None:
        content = pretrained.json_file("config.json")
        text = content.get("text_config", content)
        text["rope_parameters"] = dict(pretrained.config.get_text_config().rope_parameters)
        text["rope_scaling"] = {"rope_type": "linear", "factor": pretrained.rope_factor}  # what transformers 4 reads
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
