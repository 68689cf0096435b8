"""Checkpoints: the state from which a run resumes exactly. Safetensors and JSON only; complete on disk or absent.

    step-000100/   trainable.safetensors  optimizer.safetensors  state.json  manifest.json

If the model is sharded, each process writes its own rows (`trainable-00001-of-00004.safetensors`, ...). Headers say
where these belong, in the form of torch.distributed.checkpoint, whose HuggingFaceStorageReader can read them. The
number of processes may change between writing and reading. `checkpoint_writer` decides when and by whom files are
written.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vft.adapters.lora import is_start
from vft.common.errors import UserError
from vft.common.files import read_object
from vft.common.safetensors_io import open_tensors, write_tensors
from vft.distributed.process_group import World, all_of, local_part, local_rows, writes_rows

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
TRAINABLE, OPTIMIZER = "trainable", "optimizer"
"""Beginnings of the names of tensor files."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SHARDING = "DCP_SHARDING_INFO"
"""Key in the metadata of a header: for each tensor `saved_offsets`, where its part begins in the whole tensor."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one tensor, which this process writes."""

    file: str
    """`TRAINABLE` or `OPTIMIZER`."""
    rows: Tensor
    first: int
    """Index of the first row in the whole tensor."""


# ------------------------------------------------------------------------------------------------------------ writing


def parts_to_write(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
    """The tensors of the state that this process writes, by name. These are not copies: training changes them."""
    parts = {}
    for name, parameter in _state_parameters(model):
        if not writes_rows(parameter):
            continue
        first = local_rows(parameter).start or 0
        parts[name] = Part(TRAINABLE, local_part(parameter.detach()), first)
        if not parameter.requires_grad:
            continue
        slots = optimizer.state[parameter]
        for moment in MOMENTS:
            parts[f"{moment}.{name}"] = Part(OPTIMIZER, local_part(slots[moment]).detach(), first)
        if first == 0:
            parts[f"step.{name}"] = Part(OPTIMIZER, slots["step"].detach(), 0)
    return parts


def write_parts(folder: Path, parts: Mapping[str, Part], number: int, count: int) -> dict[str, dict[str, Any]]:
    """Write the files of writer `number` (from 1) of `count`, flushed to the disk. Returns their manifest entries."""
    described = {}
    for file in (TRAINABLE, OPTIMIZER):
        mine = {name: part for name, part in parts.items() if part.file == file}
        layout = {name: (part.rows.dtype, part.rows.shape) for name, part in mine.items()}
        name, metadata = f"{file}.safetensors", None
        if count > 1:
            name = f"{file}-{number:05d}-of-{count:05d}.safetensors"
            offsets = {key: {"saved_offsets": _offsets(part)} for key, part in mine.items()}
            metadata = {SHARDING: json.dumps(offsets)}
        described[name] = write_tensors(folder / name, layout, lambda key: parts[key].rows, metadata)
    return described


def write_rest(folder: Path, step: int, state: str, files: Mapping[str, dict[str, Any]]) -> None:
    """Write the state that is not tensors, as JSON, and last the manifest, of `files` and of this one."""
    (folder / STATE).write_text(state, encoding="utf-8")
    text = _manifest(step, {**files, STATE: _describe(folder / STATE)})
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _manifest(step: int, files: Mapping[str, dict[str, Any]]) -> str:
    return json.dumps({"step": step, "files": dict(sorted(files.items()))}, indent=1) + "\n"


def _offsets(part: Part) -> list[int]:
    return [part.first, *[0] * (part.rows.dim() - 1)] if part.rows.dim() else []


# ------------------------------------------------------------------------------------------------------------ choosing


def list_checkpoints(root: Path) -> list[Path]:
    """Folders of checkpoints, newest first."""
    folders = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)] if root.is_dir() else []
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_intact(root: Path, world: World) -> Path | None:
    """The newest checkpoint whose files match its manifest, or None if there are no checkpoints.

    Every process calls it, hashes its share of the files, and gets the same answer. If a checkpoint is damaged, a
    message says so, and the one before it is tried. Raises UserError if all are damaged.
    """
    folders = all_of(list_checkpoints(root))[0]
    for folder in folders:
        damage = next(filter(None, all_of(find_damage(folder, world.rank, world.size))), None)
        if damage is None:
            return folder
        logger.info("%s: %s; trying the checkpoint before it", folder, damage)
    if folders:
        raise UserError(f"{root}: none of {len(folders)} checkpoints is whole; remove the folder to begin anew")
    return None


def find_damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What does not match the manifest in one of several shares of the files; None if all of them are intact."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text != _manifest(int(folder.name.removeprefix("step-")), files):  # no digest covers the manifest itself
            return f"{MANIFEST} is not what was written for this step"
        for name, expected in sorted(files.items(), key=lambda item: -item[1]["bytes"])[share::shares]:
            if _describe(folder / name) != expected:
                return f"{name} is not what the manifest says (size or SHA-256)"
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return f"{MANIFEST} or a file that it names can't be read ({error})"
    return None


def _describe(path: Path) -> dict[str, Any]:
    digest = sha256()
    if not path.is_file():  # opening a FIFO would block, and a device has no end
        raise OSError(f"{path.name} is no file")
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


# ------------------------------------------------------------------------------------------------------------- loading


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read the checkpoint into model and optimizer, each process its own rows. Returns the content of state.json.

    Raises UserError if the tensors are not those of the model.
    """
    parameters = dict(_state_parameters(model))
    with ExitStack() as stack:
        stored = _stored(folder, TRAINABLE, stack)
        if stored.keys() != parameters.keys():
            different = sorted(stored.keys() ^ parameters.keys())
            raise UserError(
                f"{folder}: {len(different)} trained tensors differ from the model's, {different[0]} among them"
            )
        moments = _stored(folder, OPTIMIZER, stack)
        for name, parameter in parameters.items():
            _fill(parameter, stored[name], f"{folder}: {name}")
            if not parameter.requires_grad:
                continue
            slots = optimizer.state[parameter]
            targets = {f"{moment}.{name}": slots[moment] for moment in MOMENTS} | {f"step.{name}": slots["step"]}
            for key, target in targets.items():
                _fill(target, moments.get(key, []), f"{folder}: {key}")
    return read_object(folder / STATE)


def _stored(folder: Path, file: str, stack: ExitStack) -> dict[str, list[tuple[int, Any]]]:
    """For each tensor its parts in order: the index of the first row, and a slice to read from."""
    parts: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    names = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name in names:
        if name == f"{file}.safetensors" or name.startswith(f"{file}-"):
            reader = stack.enter_context(open_tensors(folder / name))
            offsets = json.loads((reader.metadata() or {}).get(SHARDING, "{}"))
            for key in list(reader.keys()):
                first = [*offsets.get(key, {}).get("saved_offsets", ()), 0][0]
                parts[key].append((first, reader.get_slice(key)))
    return {key: sorted(found, key=lambda part: part[0]) for key, found in parts.items()}


def _fill(target: Tensor, parts: list[tuple[int, Any]], where: str) -> None:
    """Read the rows of `target` that this process has. Raises UserError unless the parts make up exactly its shape."""
    shape, end = list(target.shape), 0
    rows = range(*local_rows(target).indices(shape[0])) if shape else range(1)
    local = local_part(target.detach())
    for first, part in parts:
        length = part.get_shape()[0] if shape else 1
        if first != end or part.get_shape()[1:] != shape[1:]:
            break
        end += length
        begin, stop = max(first, rows.start), min(end, rows.stop)
        if not shape:
            local.copy_(part[...])
        elif begin < stop:
            local[begin - rows.start : stop - rows.start].copy_(part[begin - first : stop - first])
    if end != (shape[0] if shape else 1) or not parts:
        stored = [f"{part.get_shape()} from row {first}" for first, part in parts]
        raise UserError(f"{where}: the model's has shape {shape}, the files have {', '.join(stored) or 'none'}")


def _state_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, and PiSSA's initial values: another machine's decomposition might differ in the last bits."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad or is_start(name))
