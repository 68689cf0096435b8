#!/usr/bin/env python
"""Merge a LoRA adapter into its base: python tools/merge_lora.py --base MODEL --adapter RUN/adapter --output DIR

Works file by file, in the memory of one weight file plus the adapter. The result has the base's files, tensor names,
shapes and dtypes, and loads with transformers' from_pretrained and in vLLM like the base does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vft.console import progress_bar, user_errors
from vft.files import whole_folder
from vft.lora import ABOUT_FILE, WEIGHTS_FILE, Adapter, attach, lora_scale, merged, recorded
from vft.models import build
from vft.models.weights import Checkpoint, copy_companions
from vft.types import UserError


def merge(base: str, adapter_folder: Path, output: Path) -> int:
    """Write the merged model to `output`, which appears only when it is complete. Returns the layers changed."""
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output = {str(output)!r}: the folder isn't empty; name a new one")
    checkpoint = Checkpoint.open(base, recorded(adapter_folder).get("rope_factor"))
    skeleton = build(checkpoint, torch.float32)
    adapter = Adapter.open(adapter_folder, skeleton.peft_prefixes)
    attach(skeleton.model, adapter, skeleton.towers)
    adapter.check(skeleton.model, base, checkpoint.fingerprint)
    with whole_folder(output) as folder:
        changed = _merge_files(checkpoint, adapter, folder)
        copy_companions(checkpoint, folder)
        about = {**adapter.about, "base": base, "adapter": str(adapter_folder)}
        (folder / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        _compare(checkpoint, folder)
    return changed


def _merge_files(checkpoint: Checkpoint, adapter: Adapter, folder: Path) -> int:
    lora = adapter.lora
    scale = lora_scale(lora.rank, lora.alpha, lora.rslora)
    waiting = set(adapter.modules)
    files = sorted(set(checkpoint.weight_files.values()))
    with (
        safe_open(adapter.folder / WEIGHTS_FILE, framework="pt") as low_rank,
        progress_bar(len(files), "merging", "file") as bar,
    ):
        for file in files:
            tensors: dict[str, Tensor] = {}
            with safe_open(file, framework="pt") as reader:
                metadata = reader.metadata()
                for name in reader.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    tensors[name] = reader.get_tensor(name)
                    module = name.removesuffix(".weight")
                    if module in waiting:
                        a, b = (adapter.file_names[f"{module}.lora_{x}.weight"] for x in "AB")
                        tensors[name] = merged(tensors[name], low_rank.get_tensor(a), low_rank.get_tensor(b), scale)
                        waiting.remove(module)
            save_file(tensors, folder / file.name, metadata=metadata or {"format": "pt"})
            bar.update()
    if waiting:
        raise UserError(f"{adapter.folder}: {len(waiting)} adapted layers are not in the base: {sorted(waiting)[:3]}")
    return len(adapter.modules)


def _compare(checkpoint: Checkpoint, folder: Path) -> None:
    """Read the headers back: every tensor of the base is there with its shape and dtype, and nothing else."""
    for file in sorted(set(checkpoint.weight_files.values())):
        base, written = _header(file), _header(folder / file.name)
        if base != written:
            odd = sorted(name for name in base.keys() | written.keys() if base.get(name) != written.get(name))
            found = f"{base.get(odd[0])} in the base, {written.get(odd[0])} after merging"
            raise UserError(f"{folder / file.name}: {odd[0]}: {found}")


def _header(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as reader:
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", required=True, help="folder or hub name of the adapter's base model")
    parser.add_argument("--adapter", required=True, type=Path, help="its folder, such as runs/caption/adapter")
    parser.add_argument("--output", required=True, type=Path, help="folder to write, new or empty")
    arguments = parser.parse_args()
    with user_errors():
        changed = merge(arguments.base, arguments.adapter, arguments.output)
        print(f"merged {changed} layers into {arguments.output}")


if __name__ == "__main__":
    main()
