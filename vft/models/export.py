"""Writing a full model in the layout of its release: the same files, tensor names and dtypes, and what lies beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vft.common.files import whole_folder
from vft.common.safetensors_io import DTYPES, Layout, file_order, open_tensors, write_tensors
from vft.distributed.process_group import full_tensor
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained, find_file
from vft.models.weights import BUFFERS, TIED_TO, stored_names

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


def export_model(
    model: VideoLanguageModel, pretrained: Pretrained, folder: Path, files: Mapping[str, Mapping[str, Any]], write: bool
) -> None:
    """Write the full model in the layout of its base, with `files` (JSON, by name) and the base's other files.

    Every process must call it. Tensors are gathered one by one in their final dtype. The process with `write` writes
    each of them before the next is gathered.
    """
    parameters = dict(model.named_parameters())
    embedding = next(name for name in parameters if name.endswith(TIED_TO))
    own = {stored: name for name, stored in stored_names(model, pretrained).items() if not name.endswith(BUFFERS)}
    with whole_folder(folder) if write else nullcontext(folder) as partial_folder:
        for file in sorted(set(pretrained.weight_files.values())):
            names = [name for name, home in pretrained.weight_files.items() if home == file and name in own]
            # If the release has a tied head as a tensor, it is the embedding here too.
            tensors = {name: parameters.get(own[name], parameters[embedding]).detach() for name in names}
            with open_tensors(file) as reader:
                layout = {name: (DTYPES[reader.get_slice(name).get_dtype()], tensors[name].shape) for name in names}
            fetch = partial(_gathered, tensors, layout)
            if write:
                write_tensors(partial_folder / file.name, layout, fetch, {"format": "pt"})
            else:
                for name in file_order(layout):
                    fetch(name)
        if write:
            copy_companions(pretrained, partial_folder, files)


def _gathered(tensors: dict[str, Tensor], layout: Layout, name: str) -> Tensor:
    return full_tensor(tensors[name].to(layout[name][0]))


def copy_companions(pretrained: Pretrained, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy what lies beside the weights: configuration, tokenizer, template and index, but no code and no pickles.
    `files` (JSON, by name) replace those of the base."""
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
    for name, own in files.items():
        (folder / name).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
