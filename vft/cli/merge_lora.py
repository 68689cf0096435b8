"""Merge an adapter into its base: vft merge --base MODEL --adapter RUN/adapter --output DIR

Copies the base's files and overwrites the adapted weights in them one by one, in the memory of one tensor. The result
has the base's files, tensor names, shapes and dtypes, and loads in transformers and vLLM like the base. An adapter that
was trained on a quantised base (model.quantize) is merged into the base without quantisation.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from vft.adapters.lora import LORA_A, LORA_B, MAGNITUDE, merged
from vft.adapters.peft_format import WEIGHTS_FILE, Adapter, attach, check_adapter, merged_into, recorded
from vft.cli.arguments import parse_arguments
from vft.common.console import progress_bar, user_errors
from vft.common.errors import UserError
from vft.common.files import whole_folder
from vft.common.safetensors_io import open_tensors
from vft.models import build
from vft.models.pretrained import Pretrained, require_whole
from vft.models.weights import copy_companions, stored_names
from vft.reporting.serving import served_files, vllm_serve


def merge(base: str, adapter_folder: Path, output: Path, generation: str = "greedy") -> int:
    """Write the merged model to `output`, which appears only when it is complete. Returns the number of changed layers.
    `generation` as for `vft.reporting.serving.served_files`."""
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output = {str(output)!r}: the folder isn't empty; name a new one")
    checkpoint = Pretrained.open(base, recorded(adapter_folder).get("rope_factor"))
    model = build(checkpoint, torch.float32)
    adapter = Adapter.open(adapter_folder, model.spellings)
    stored = stored_names(model, checkpoint)
    attach(model, adapter)
    check_adapter(adapter, model, checkpoint)
    with whole_folder(output) as folder:
        changed = _merge_files(checkpoint, adapter, {theirs: ours for ours, theirs in stored.items()}, folder)
        merged = [*merged_into(checkpoint), {"adapter": str(adapter_folder), "digest": adapter.digest}]
        about = {**adapter.about, "base": base, "adapter": str(adapter_folder), "merged": merged}
        copy_companions(checkpoint, folder, served_files(checkpoint, model, about, generation))
        _compare(checkpoint, folder)
    return changed


def _merge_files(checkpoint: Pretrained, adapter: Adapter, ours: Mapping[str, str], folder: Path) -> int:
    """Copy the files and overwrite the adapted weights. `ours` maps the names in the files to the model's."""
    scales = adapter.scales
    waiting = set(scales)
    files = sorted(set(checkpoint.weight_files.values()))
    # Read first: nothing has looked into the files of a base that has several.
    layouts = {file: _header(file) for file in files}
    with (
        safe_open(adapter.folder / WEIGHTS_FILE, framework="pt") as low_rank,
        progress_bar(len(files), "merging", "file") as bar,
    ):
        for file in files:
            shutil.copyfile(file, folder / file.name)
            with (folder / file.name).open("r+b") as stream:
                for name, start in _starts(stream).items():
                    module = ours[name].removesuffix(".weight")
                    if module in waiting:
                        require_whole(layouts[file][name][1], checkpoint.path, name)
                        a, b = (low_rank.get_tensor(adapter.file_names[module + leaf]) for leaf in (LORA_A, LORA_B))
                        lengths = adapter.file_names.get(module + MAGNITUDE)
                        magnitude = None if lengths is None else low_rank.get_tensor(lengths)
                        weight = merged(_read(file, name), a, b, scales[module], magnitude)
                        stream.seek(start)
                        stream.write(weight.view(torch.uint8).numpy().data)
                        waiting.remove(module)
            bar.update()
    if waiting:
        raise UserError(f"{adapter.folder}: {len(waiting)} adapted layers are not in the base: {sorted(waiting)[:3]}")
    return len(scales)


def _starts(stream: BinaryIO) -> dict[str, int]:
    """Offset of each tensor in a safetensors file: 8 bytes with the length of a JSON header, the header, tensors."""
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
    return {name: 8 + length + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as reader:  # anew for each tensor: what was read does not stay mapped
        return reader.get_tensor(name)


def _compare(checkpoint: Pretrained, folder: Path) -> None:
    """UserError if the written files do not hold exactly the tensors of the base, with their shapes and dtypes."""
    for file in sorted(set(checkpoint.weight_files.values())):
        base, written = _header(file), _header(folder / file.name)
        if base != written:
            odd = sorted(name for name in base.keys() | written.keys() if base.get(name) != written.get(name))
            found = f"{base.get(odd[0])} in the base, {written.get(odd[0])} after merging"
            raise UserError(f"{folder / file.name}: {odd[0]}: {found}")


def _header(file: Path) -> dict[str, Any]:
    with open_tensors(file) as reader:
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(__doc__, add_arguments, argv, prog)
    with user_errors():
        changed = merge(arguments.base, arguments.adapter, arguments.output, arguments.generation)
        print(f"merged {changed} layers into {arguments.output}")
        print(f"with vLLM: {serve_command(arguments.output)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--base", required=True, help="folder or hub name of the adapter's base model")
    parser.add_argument(
        "--adapter", required=True, type=Path, help="folder of the adapter, such as runs/caption/adapter"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must be new or empty")
    what = "decoding in generation_config.json: greedy, as in evaluation (default), or as in the base"
    parser.add_argument("--generation", choices=["greedy", "base"], default="greedy", help=what)


def serve_command(folder: Path) -> str:
    """How vLLM serves the merged model in `folder`."""
    checkpoint, about = Pretrained.open(str(folder)), recorded(folder)
    media = about.get("video", {}), about.get("image", {})
    return vllm_serve(str(folder), checkpoint.config.model_type, *media, checkpoint.weight_bytes)


if __name__ == "__main__":
    main()
