"""Resume state: what it takes to go on exactly. Safetensors and JSON only; whole on disk or not there at all.

    step-000100/   trainable.safetensors  optimizer.safetensors  state.json  manifest.json

Where the model is sharded each process writes its own rows (`trainable-00001-of-00004.safetensors`, ...), and the
headers say where they belong, as torch's distributed checkpoint says it: its HuggingFaceStorageReader reads them too.
Any number of processes reads what any number wrote. `checkpoint_writer` says when and by whom it is written.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
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
from vft.common.safetensors_io import write_tensors
from vft.distributed.process_group import World, all_of, local_part, local_rows, writes_rows
from vft.models.pretrained import open_tensors

MANIFEST = "manifest.json"
STATE = "state.json"
TRAINABLE, OPTIMIZER = "trainable", "optimizer"
"""Files of tensors."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SHARDING = "DCP_SHARDING_INFO"
"""Key of a header's metadata: `saved_offsets` of each tensor, where in the whole its part begins."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a tensor of the state that this process writes."""

    file: str
    """TRAINABLE or OPTIMIZER."""
    rows: Tensor
    first: int
    """Number of the first of them in the whole."""


# ------------------------------------------------------------------------------------------------------------ writing


def parts_to_write(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
    """This process's part of the state, by tensor name; the tensors are those that training changes, not copies."""
    parts = {}
    for name, parameter in _kept(model):
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
    """Write the files of writer `number` (from 1) of `count`, flushed to the disk. Returns what the manifest says."""
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
    """The state that is no tensor, in JSON, and last the manifest of all `files`."""
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
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_good(root: Path, world: World, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are those of its manifest; None where there is none at all.

    Every process calls it, hashes its share of the files and gets the same answer. A broken one is reported and the one
    before it taken. UserError where all are broken.
    """
    found = all_of(list_checkpoints(root))[0]
    for folder in found:
        broken = next(filter(None, all_of(what_is_broken(folder, world.rank, world.size))), None)
        if broken is None:
            return folder
        report(f"{folder}: {broken}; trying the checkpoint before it")
    if found:
        raise UserError(f"{root}: none of {len(found)} checkpoints is whole; remove the folder to begin anew")
    return None


def what_is_broken(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """The first thing in one of several shares of the files that doesn't fit the manifest, or None."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text != _manifest(int(folder.name.removeprefix("step-")), files):  # the one file that no digest speaks for
            return f"{MANIFEST} is not what was written for this step"
        for name, expected in sorted(files.items(), key=lambda item: -item[1]["bytes"])[share::shares]:
            if _describe(folder / name) != expected:
                return f"{name} is not what the manifest says (size or SHA-256)"
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return f"{MANIFEST} or a file that it names can't be read ({error})"
    return None


def _describe(path: Path) -> dict[str, Any]:
    digest = sha256()
    if not path.is_file():  # a FIFO would block whoever opens it, a device has no end
        raise OSError(f"{path.name} is no file")
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


# ------------------------------------------------------------------------------------------------------------- loading


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill parameters and optimizer, each process its own rows, and return the rest of the state.

    UserError where the tensors are not those of the model.
    """
    named = dict(_kept(model))
    with ExitStack() as stack:
        stored = _stored(folder, TRAINABLE, stack)
        if stored.keys() != named.keys():
            odd = sorted(stored.keys() ^ named.keys())
            raise UserError(f"{folder}: {len(odd)} trained tensors differ from the model's, {odd[0]} among them")
        moments = _stored(folder, OPTIMIZER, stack)
        for name, parameter in named.items():
            _fill(parameter, stored[name], f"{folder}: {name}")
            if not parameter.requires_grad:
                continue
            slots = optimizer.state[parameter]
            targets = {f"{moment}.{name}": slots[moment] for moment in MOMENTS} | {f"step.{name}": slots["step"]}
            for key, target in targets.items():
                _fill(target, moments.get(key, []), f"{folder}: {key}")
    return read_object(folder / STATE)


def _stored(folder: Path, file: str, stack: ExitStack) -> dict[str, list[tuple[int, Any]]]:
    """By tensor name: its parts in order, each the number of its first row and a slice to read from."""
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
    """Copy what this process holds of `target`; UserError unless the parts make up exactly a tensor of its shape."""
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


def _kept(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, and where PiSSA began: another machine's decomposition might differ in the last bits."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad or is_start(name))
