"""Merge an adapter into its base: vft merge --base MODEL --adapter RUN/adapter --output DIR

Copies the base's files and overwrites the adapted weights in them one by one, in the memory of one tensor. The result
has the base's files, tensor names, shapes and dtypes, and loads in transformers and vLLM like the base. An adapter that
was trained on a quantised base (model.quantize) is merged into the base without quantisation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import safe_open
from torch import Tensor

from vft.adapters.lora import LORA_A, LORA_B, MAGNITUDE, OF_EXPERTS, merged, merged_expert, merged_experts, target_of
from vft.adapters.peft_format import WEIGHTS_FILE, Adapter, attach, check_adapter, merged_into, recorded
from vft.cli.arguments import AdapterFolder, Arguments, Choices, NewFolder, command
from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.files import whole_folder
from vft.common.safetensors_io import open_tensors
from vft.models import build
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained, require_whole
from vft.models.quantization import true_shapes
from vft.models.weights import copy_companions, experts_apart, stored_names, turned_names
from vft.reporting import serve_command, write_card
from vft.reporting.serving import served_files


class MergeArguments(Arguments):
    """Arguments of `vft merge`."""

    base: str
    """folder or hub name of the adapter's base model"""
    adapter: AdapterFolder
    """folder of the adapter, such as runs/caption/adapter, or of its run or a checkpoint"""
    output: NewFolder
    """folder to write; must be new or empty"""
    generation: Annotated[str, Choices(("greedy", "base"))] = "greedy"
    """decoding in generation_config.json: greedy, as in evaluation (default), or as in the base"""


@command(MergeArguments, __doc__, {"model.path": "--base"})
def main(arguments: MergeArguments) -> None:
    """Command line."""
    changed = merge(arguments.base, arguments.adapter, arguments.output, arguments.generation)
    print(f"merged {changed} layers into {arguments.output}")
    print(f"with vLLM: {serve_command(arguments.output)}")


def merge(base: str, adapter_folder: Path, output: Path, generation: str = "greedy") -> int:
    """Write the merged model to `output`, which appears only when it is complete. Returns the number of changed layers.
    `generation` as for `vft.reporting.serving.served_files`."""
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output = {str(output)!r}: the folder isn't empty; name a new one")
    checkpoint = Pretrained.open(base, recorded(adapter_folder).get("rope_factor"))
    model = build(checkpoint, torch.float32)
    adapter = Adapter.open(adapter_folder, model.spellings)
    changes = _changes(checkpoint, model, adapter)
    attach(model, adapter)
    check_adapter(adapter, model, checkpoint)
    with whole_folder(output) as folder:
        _merge_files(checkpoint, adapter, changes, folder)
        merged = [*merged_into(checkpoint), {"adapter": str(adapter_folder), "digest": adapter.digest}]
        about = {**adapter.about, "base": base, "adapter": str(adapter_folder), "merged": merged}
        copy_companions(checkpoint, folder, served_files(checkpoint, model, about, generation))
    homes = adapter_folder.absolute().parents[:2]  # RUN/adapter, RUN/exports/step-000100
    run = next((one for one in homes if (one / "run.json").is_file()), output)
    write_card(run, output, adapter.about.get("step"), checkpoint)
    return len(adapter.scales)


Changes = Mapping[str, tuple[str, Callable[..., Tensor]]]
"""For tensors of a checkpoint's files, by name: the adapter that changes it, and what merges weight, A, B and scale."""


def _changes(checkpoint: Pretrained, model: VideoLanguageModel, adapter: Adapter) -> Changes:
    """What is merged, for a model that has no adapters yet."""
    shapes, stored = true_shapes(model), stored_names(model, checkpoint)
    turned = turned_names(shapes, model.turned, stored, checkpoint)
    adapters = {target_of(name): name for name in adapter.scales}
    changes: dict[str, tuple[str, Callable[..., Tensor]]] = {}
    for own, theirs in stored.items():
        if name := adapters.get(own.removesuffix(".weight")):
            of_experts: Any = partial(merged_experts, is_turned=own in turned)
            changes[theirs] = name, of_experts if OF_EXPERTS in name else merged
    for own, experts in experts_apart(shapes, model.turned, stored).items():
        for expert, parts in enumerate(experts) if own in adapters else ():
            for place, theirs in enumerate(parts):
                where: dict[str, Any] = {"expert": expert, "experts": len(experts), "place": place, "parts": len(parts)}
                changes[theirs] = adapters[own], partial(merged_expert, **where)
    return changes


def _merge_files(checkpoint: Pretrained, adapter: Adapter, changes: Changes, folder: Path) -> None:
    """Copy the files and overwrite the adapted weights."""
    # Read first: nothing has looked into the files of a base that has several.
    layouts = {file: _layout(file) for file in sorted(set(checkpoint.weight_files.values()))}
    with (
        safe_open(adapter.folder / WEIGHTS_FILE, framework="pt") as low_rank,
        progress_bar(len(layouts), "merging", "file") as bar,
    ):
        for file, layout in layouts.items():
            copy = Path(shutil.copyfile(file, folder / file.name))
            with copy.open("r+b") as stream:
                for name, (dtype, _, start) in layout.items():
                    if name in changes:
                        module, merge_into = changes[name]
                        require_whole(dtype, checkpoint.path, name)
                        a, b = (low_rank.get_tensor(adapter.file_names[module + leaf]) for leaf in (LORA_A, LORA_B))
                        lengths = adapter.file_names.get(module + MAGNITUDE)
                        magnitude = () if lengths is None else (low_rank.get_tensor(lengths),)
                        weight = merge_into(_read(file, name), a, b, adapter.scales[module], *magnitude)
                        stream.seek(start)
                        stream.write(weight.view(torch.uint8).numpy().data)
            if _layout(copy) != layout:
                raise UserError(f"{copy}: does not hold the tensors of {file} any more; merge again")
            bar.update()
    if waiting := sorted(set(adapter.scales) - {name for name, _ in changes.values()}):
        raise UserError(f"{adapter.folder}: {len(waiting)} adapted layers are not in the base: {waiting[:3]}")


def _layout(file: Path) -> dict[str, tuple[str, list[int], int]]:
    """Type, shape and offset of each tensor in a safetensors file: 8 bytes with the length of a JSON header, the
    header, tensors. UserError if the file is damaged."""
    with open_tensors(file), file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    tensors = {name: one for name, one in header.items() if name != "__metadata__"}
    return {name: (one["dtype"], one["shape"], 8 + length + one["data_offsets"][0]) for name, one in tensors.items()}


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as reader:  # anew for each tensor: what was read does not stay mapped
        return reader.get_tensor(name)
