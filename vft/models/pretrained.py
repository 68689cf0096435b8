"""Opening a checkpoint and reading its weights: safetensors only, each process its own slices only.

transformers resolves a folder or a hub name and reads configuration, tokenizer and template; no code that a
checkpoint brings is ever run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.hub import cached_file

from vft.common.console import progress_bar
from vft.common.errors import UserError, first_line
from vft.common.files import read_object, whole_folder
from vft.common.safetensors_io import DTYPES, Layout, file_order, write_tensors
from vft.distributed.process_group import full_tensor, local_part, local_rows
from vft.models.prequantized import OWN_FILES, refuse_quantised, require_whole
from vft.models.quantization import is_packed, pack, true_shapes
from vft.models.tensor_names import our_names

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FINGERPRINT_BYTES = 1 << 16
PACKED_AT_ONCE = 1 << 22
"""Weights that are read and packed at a time: what this takes besides is 64 MB."""
TIED_TO = "embed_tokens.weight"
BUFFERS = (".inv_freq", "embeddings.position_ids")
"""Ends of names of tensors that older transformers saved, and that follow from the configuration."""
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
"""Small files that others need beside the weights."""
TEMPLATE_FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja")
"""Where the chat template may be, the first that has one counts; last the tokenizer's own."""
NOT_COPIED = frozenset({"adapter_config.json", "trainer_state.json", "vft.json"})
"""Of another training that happen to lie there: with adapter_config.json a full model would be taken for an adapter."""


@dataclass(frozen=True)
class Pretrained:
    """A base model's files."""

    path: str
    """As the user named it: a folder or a hub name."""
    config: Any
    """transformers' configuration object."""
    weight_files: dict[str, Path]
    """Tensor name to the safetensors file that holds it."""
    rope_factor: float | None = None
    """Linear scaling of positions instead of what config.json says."""

    @staticmethod
    def open(path: str, rope_factor: float | None = None) -> Pretrained:
        """Resolve `path` and read its configuration and the names of its tensors.

        UserError where there is no such checkpoint or it has no safetensors weights.
        """
        if Path(path).exists() and not Path(path, "config.json").is_file():
            raise UserError(f"model.path = {path!r}: the folder has no config.json; name a checkpoint's folder")
        try:
            file = _file(path, "config.json")
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"model.path = {path!r}: no such folder, and not to be had from the hub: {reason}"
            ) from error
        if file is None:
            raise UserError(f"model.path = {path!r}: no such folder, and not to be had from the hub: no config.json")
        refuse_quantised(path, read_object(file), ())
        for own in (Path(path, name) for name in OWN_FILES):
            refuse_quantised(path, {"quantization_config": read_object(own) if own.is_file() else {}}, ())
        config = _configuration(path, file)
        stretch_positions(config, rope_factor)
        index_file = _file(path, INDEX_FILE)
        if index_file is not None:
            names = _weight_map(index_file)
            resolved = {name: _required_file(path, name) for name in sorted(set(names.values()))}
            files = {tensor: resolved[name] for tensor, name in names.items()}
        else:
            single = _required_file(path, SINGLE_FILE)
            with open_tensors(single) as reader:
                files = dict.fromkeys(reader.keys(), single)
        refuse_quantised(path, {}, files)
        return Pretrained(path, config, files, rope_factor)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer with its chat template; it must be a fast one (offsets are needed)."""
        # Without the file transformers makes a tokenizer with an empty vocabulary.
        if _file(self.path, "tokenizer.json") is None:
            raise UserError(f"{self.path}: no tokenizer.json; only fast tokenizers give character offsets")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # of transformers, tokenizers, json: whatever a damaged file leads to
            raise UserError(
                f"{self.path}: the tokenizer can't be read ({first_line(error)}); fetch it again"
            ) from error
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{self.path}: {type(tokenizer).__name__} is no fast tokenizer, and gives no offsets")
        template = self._processor_template()
        if template is not None:
            tokenizer.chat_template = template
        if tokenizer.chat_template is None:
            raise UserError(
                f"{self.path}: no chat template in {', '.join(TEMPLATE_FILES)} or tokenizer_config.json; copy that of "
                "the release"
            )
        return tokenizer

    def _processor_template(self) -> str | None:
        """The chat template of transformers' processor, in its order (`ProcessorMixin.get_processor_dict`): what is in
        processor_config.json, the legacy file, the template's own file. None where the tokenizer alone has one."""
        for name in TEMPLATE_FILES:
            if name.endswith(".jinja"):
                file = _file(self.path, name)
                return file.read_text(encoding="utf-8") if file is not None else None
            template = self.json_file(name).get("chat_template")
            if isinstance(template, dict):  # several by name
                template = template.get("default")
            if template is not None:
                if not isinstance(template, str):
                    raise UserError(f"{self.path}: {name}: chat_template = {template!r:.60}: must be a text")
                return template
        return None

    def json_file(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint; empty where there is none."""
        file = _file(self.path, name)
        return read_object(file) if file is not None else {}

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens with which an answer ends, by generation_config.json and config.json: one or several each.

        UserError where they name something else than tokens.
        """
        named = {"generation_config.json": self.json_file("generation_config.json").get("eos_token_id")}
        text = self.config.get_text_config()
        named |= {f"config.json {i}": getattr(one, "eos_token_id", None) for i, one in enumerate((self.config, text))}
        found = set()
        for file, value in named.items():
            for one in value if isinstance(value, list | tuple) else [] if value is None else [value]:
                if not isinstance(one, int) or isinstance(one, bool):
                    raise UserError(f"{self.path}: {file}: eos_token_id = {value!r:.60}: must be the number of a token")
                found.add(one)
        return frozenset(found)

    @property
    def folder(self) -> Path:
        """Where the weight files lie on this machine."""
        return next(iter(self.weight_files.values())).parent

    @property
    def weight_bytes(self) -> int:
        """Of all its weight files."""
        return sum(file.stat().st_size for file in set(self.weight_files.values()))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over each weight file's name, size, first and last bytes: tells two bases of equal shape apart."""
        digest = hashlib.sha256()
        for file in sorted(set(self.weight_files.values())):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(FINGERPRINT_BYTES))
                stream.seek(max(0, size - FINGERPRINT_BYTES))
                digest.update(stream.read())
        return digest.hexdigest()


def stretch_positions(config: Any, rope_factor: float | None) -> None:
    """Put `model.rope_factor` into transformers' configuration object; None leaves it as it is."""
    if rope_factor is not None:
        text = config.get_text_config()
        text.rope_parameters = {**text.rope_parameters, "rope_type": "linear", "factor": rope_factor}


def load_weights(model: nn.Module, checkpoint: Pretrained, extra: frozenset[str], show_progress: bool = False) -> None:
    """Fill every parameter of `model` but those in `extra` (adapters) from the checkpoint, by name.

    A sharded parameter reads its own rows only; a packed one packs them a few at a time. UserError for
    a missing, an unexpected or a misshapen tensor: nothing is ever left at its initial value.
    """
    wanted = {name: parameter for name, parameter in model.named_parameters() if name not in extra}
    shapes = true_shapes(model)
    stored = stored_names(model, checkpoint)
    _check_names(wanted, stored, checkpoint)
    _check_tied_head(wanted, stored, checkpoint)
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(checkpoint.weight_files[stored[name]], []).append(name)
    progress = progress_bar(len(wanted), "loading weights", "tensor", show_progress)
    with progress, torch.no_grad():
        for file, names in by_file.items():
            with open_tensors(file) as reader:
                for name in names:
                    _copy(wanted[name], shapes[name], reader.get_slice(stored[name]), f"{file}: {stored[name]}")
                    progress.update()


def stored_names(model: nn.Module, checkpoint: Pretrained) -> dict[str, str]:
    """Names of the model's tensors to those in the checkpoint's files, in any of the family's spellings.

    UserError where one part of the model is there under two.
    """
    spellings: Any = model.spellings
    return our_names(checkpoint.weight_files, spellings, checkpoint.path)


def _check_names(wanted: dict[str, nn.Parameter], stored: dict[str, str], checkpoint: Pretrained) -> None:
    missing = sorted(set(wanted) - set(stored))
    unexpected = {name for name in set(stored) - set(wanted) if not name.endswith(BUFFERS)}
    if not any(name.endswith("lm_head.weight") for name in wanted):
        # A tied head that was saved all the same: see `_check_tied_head`.
        unexpected = {name for name in unexpected if not name.endswith("lm_head.weight")}
    if missing or unexpected:
        raise UserError(
            f"{checkpoint.path}: {len(missing)} tensors of the model are missing in the checkpoint "
            f"{missing[:3]}, {len(unexpected)} of the checkpoint are unknown to the model "
            f"{sorted(stored[name] for name in unexpected)[:3]}; the checkpoint is in no known layout of "
            f"{checkpoint.config.model_type}"
        )


def _check_tied_head(wanted: Mapping[str, nn.Parameter], stored: Mapping[str, str], checkpoint: Pretrained) -> None:
    """UserError where a head that config.json ties to the embedding was saved with weights of its own: transformers 5
    then does not tie them (`PreTrainedModel.tie_weights`)."""
    head = next((name for name in stored if name.endswith("lm_head.weight") and name not in wanted), None)
    if head is None:
        return
    names = stored[head], stored[next(name for name in wanted if name.endswith(TIED_TO))]
    with open_tensors(checkpoint.weight_files[names[0]]) as one, open_tensors(checkpoint.weight_files[names[1]]) as two:
        parts = one.get_slice(names[0]), two.get_slice(names[1])
        shape = parts[0].get_shape()
        rows = max(1, PACKED_AT_ONCE // shape[-1])
        is_copy = shape == parts[1].get_shape() and all(
            torch.equal(parts[0][start : start + rows], parts[1][start : start + rows])
            for start in range(0, shape[0], rows)
        )
    if not is_copy:
        raise UserError(
            f"{checkpoint.path}: {names[0]} and {names[1]} differ, but config.json has tie_word_embeddings = true; set "
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


def _configuration(path: str, file: Path) -> Any:
    """transformers' configuration object. UserError where config.json is none, or one of a model with its own code."""
    content = read_object(file)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of transformers or its checks of fields
        kind = f"model_type = {content.get('model_type')!r}"
        if "auto_map" in content:
            raise UserError(f"{file}: {kind} comes with code of its own (auto_map), which is never run") from error
        raise UserError(f"{file}: {kind}: can't be read as a configuration ({first_line(error)})") from error


def _weight_map(file: Path) -> dict[str, str]:
    """Tensor name to the name of the file that holds it. UserError where that is no name of a file beside this one."""
    names = read_object(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{file}: weight_map = {names!r:.60}: must name the file of each tensor; fetch it again")
    for tensor, name in names.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(f"{file}: weight_map.{tensor} = {name!r:.60}: must name a safetensors file in this folder")
    return names


def _file(path: str, name: str) -> Path | None:
    found = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _required_file(path: str, name: str) -> Path:
    file = _file(path, name)
    if file is None or not file.is_file():
        raise UserError(f"model.path = {path!r}: {name} is missing, or the hub can't be reached; safetensors only")
    return file


def open_tensors(file: Path) -> Any:
    """A reader of a safetensors file. UserError where it is none."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error


def export_model(
    model: nn.Module, checkpoint: Pretrained, folder: Path, files: Mapping[str, Mapping[str, Any]], write: bool
) -> None:
    """The whole model in the layout of its base: same files, names and dtypes, and everything else beside them.

    Every process calls it: tensors are gathered one by one, in their final type, and the process with `write` writes
    each before it asks for the next. `files` are JSON files that go beside them, by name.
    """
    parameters = dict(model.named_parameters())
    embedding = next(name for name in parameters if name.endswith(TIED_TO))
    own = {stored: name for name, stored in stored_names(model, checkpoint).items() if not name.endswith(BUFFERS)}
    with whole_folder(folder) if write else nullcontext(folder) as unfinished:
        for file in sorted(set(checkpoint.weight_files.values())):
            names = [name for name, home in checkpoint.weight_files.items() if home == file and name in own]
            # A tied head may have been saved all the same: then it is the embedding here too.
            wanted = {name: parameters.get(own[name], parameters[embedding]).detach() for name in names}
            with open_tensors(file) as reader:
                layout = {name: (DTYPES[reader.get_slice(name).get_dtype()], wanted[name].shape) for name in names}
            fetch = partial(_gathered, wanted, layout)
            if write:
                write_tensors(unfinished / file.name, layout, fetch, {"format": "pt"})
            else:
                for name in file_order(layout):
                    fetch(name)
        if write:
            copy_companions(checkpoint, unfinished, files)


def _gathered(tensors: dict[str, Tensor], layout: Layout, name: str) -> Tensor:
    return full_tensor(tensors[name].to(layout[name][0]))


def copy_companions(checkpoint: Pretrained, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Everything that lies beside the weights: configuration, tokenizer, template, index; no code, no pickles. `files`,
    JSON by name, take the place of the checkpoint's."""
    for name in HUB_COMPANIONS:
        _file(checkpoint.path, name)  # of a hub name, only what was asked for so far is on this machine
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    if checkpoint.rope_factor is not None:
        content = checkpoint.json_file("config.json")
        text = content.get("text_config", content)
        text["rope_parameters"] = dict(checkpoint.config.get_text_config().rope_parameters)
        text["rope_scaling"] = {"rope_type": "linear", "factor": checkpoint.rope_factor}  # what transformers 4 reads
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, own in files.items():
        (folder / name).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
