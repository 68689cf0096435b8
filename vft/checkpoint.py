"""Resume state: what it takes to go on exactly. Safetensors and JSON only; whole on disk or not there at all.

    step-000100/   trainable.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is written beside its final place, the manifest last, every file flushed to disk, and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vft.distributed import local_part, local_rows, whole
from vft.files import whole_folder
from vft.types import UserError
from vft.watch import work_of_one

MANIFEST = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@work_of_one("writing a checkpoint")
def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep_last: int,
    write: bool,
) -> None:
    """Every process calls it (tensors are gathered); the one with `write` writes and prunes older checkpoints."""
    trainable: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in _trainable(model):
        slots = optimizer.state[parameter]
        # Gathered by every process, kept by the one that writes.
        gathered = [whole(tensor.detach()) for tensor in (parameter, *(slots[moment] for moment in MOMENTS))]
        if write:
            trainable[name], *rest = (tensor.cpu().contiguous() for tensor in gathered)
            moments |= {f"{moment}.{name}": tensor for moment, tensor in zip(MOMENTS, rest, strict=True)}
            moments[f"step.{name}"] = slots["step"].detach().cpu()
    if not write:
        return
    with whole_folder(root / f"step-{step:06d}") as folder:
        save_file(trainable, folder / "trainable.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({**state, "step": step}, indent=1) + "\n", encoding="utf-8")
        files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
    for old in list_checkpoints(root)[keep_last:] if keep_last else []:
        shutil.rmtree(old)


def list_checkpoints(root: Path) -> list[Path]:
    """Folders of checkpoints, newest first."""
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_good(root: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are those of its manifest; None where there is none at all.

    A broken one is reported and the one before it taken. UserError where all are broken.
    """
    found = list_checkpoints(root)
    for folder in found:
        broken = what_is_broken(folder)
        if broken is None:
            return folder
        report(f"{folder}: {broken}; trying the checkpoint before it")
    if found:
        raise UserError(f"{root}: none of {len(found)} checkpoints is whole; remove the folder to begin anew")
    return None


def what_is_broken(folder: Path) -> str | None:
    """The first thing that doesn't fit the manifest, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if _describe(folder / name) != expected:
                return f"{name} is not what the manifest says (size or SHA-256)"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{MANIFEST} or a file that it names can't be read ({error})"
    return None


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill parameters and optimizer, each process its own rows, and return the rest of the state."""
    named = dict(_trainable(model))
    with safe_open(folder / "trainable.safetensors", framework="pt") as reader:
        stored = set(reader.keys())
        if stored != set(named):
            odd = sorted(stored ^ set(named))
            raise UserError(f"{folder}: {len(odd)} trained tensors differ from the model's, {odd[0]} among them")
        for name, parameter in named.items():
            _copy_rows(parameter, reader.get_slice(name))
    with safe_open(folder / "optimizer.safetensors", framework="pt") as reader:
        for name, parameter in named.items():
            slots = optimizer.state[parameter]
            slots["step"].copy_(reader.get_tensor(f"step.{name}"))
            for moment in MOMENTS:
                _copy_rows(slots[moment], reader.get_slice(f"{moment}.{name}"))
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _copy_rows(target: Tensor, source: Any) -> None:
    with torch.no_grad():
        local_part(target).copy_(source[local_rows(target)])


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
