"""Opening a released model: a folder or a hub name, with its configuration, tokenizer, template and weight files.

transformers finds and reads the files. Weights must be safetensors, and no code in a model's folder is ever run.
Weights that another program has quantised are recognised, and refused with the name of the method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.hub import cached_file

from vft.common.errors import UserError, first_line, missing
from vft.common.files import read_object
from vft.common.safetensors_io import open_tensors

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FINGERPRINT_BYTES = 1 << 16
TEMPLATE_FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja")
"""Files that may have the chat template. The first that has one counts, then the tokenizer's own."""

BY_TENSOR = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".absmax": "bitsandbytes, 4 bits",
    ".quant_map": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits",
    ".weight_format": "bitsandbytes, 8 bits",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".scale_weight": "FP8",
    ".input_scale": "FP8",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    "._data": "quanto",
}
"""Endings of tensor names that only quantised layers have, and the methods that write them."""
QUANTISER_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which AutoGPTQ, AutoAWQ and ModelOpt record it if config.json does not."""
OTHER_FOLDERS = {
    "adapter_config.json": "it is an adapter's: give it as the adapter, and its base as the model",
    "run.json": "it is a run's: give it as the adapter and its base as the model, or name its folder `model`",
}
"""Folders that are taken for a model's, by a file that each of them has; and what to do."""
WHOLE_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Floating-point types of full weights, in safetensors' names."""
METHODS = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8", "hqq": "HQQ", "aqlm": "AQLM"}
"""Displayed name of a `quant_method`. Others are shown as they are."""


@dataclass(frozen=True)
class Pretrained:
    """The files of a released model."""

    path: str
    """Folder or hub name, as the user gave it."""
    config: Any
    """transformers' configuration object."""
    weight_files: dict[str, Path]
    """The safetensors file of each tensor."""
    rope_factor: float | None = None
    """Linear scaling of positions, which replaces that of config.json."""

    @staticmethod
    def open(path: str, rope_factor: float | None = None) -> Pretrained:
        """Find `path` and read its configuration and the names of its tensors.

        Raises UserError if there is no such model or it has no safetensors weights.
        """
        if Path(path).is_file() or (path.startswith((".", "/", "~")) and not Path(path).exists()):
            raise UserError(f"model.path = {path!r}: {missing(path, 'folder')}")
        if Path(path).exists() and not Path(path, "config.json").is_file():
            fix = next(
                (fix for name, fix in OTHER_FOLDERS.items() if Path(path, name).is_file()), "name a model's folder"
            )
            raise UserError(f"model.path = {path!r}: the folder has no config.json; {fix}")
        reason = "it has no such model, or can't be reached"
        try:
            file = find_file(path, "config.json")
        except (OSError, ValueError) as error:
            file, reason = None, first_line(error)
        if file is None:
            fix = f"`hf download {path} --local-dir DIR` where there is a network, and model.path=DIR here"
            why = (
                "HF_HUB_OFFLINE keeps from asking it; unset that, or"
                if is_offline_mode()
                else f"{reason}; check it, or"
            )
            raise UserError(
                f"model.path = {path!r}: {missing(path, 'folder')}, and not to be had from the hub: {why} {fix}"
            )
        refuse_quantised(path, read_object(file), ())
        for own in (Path(path, name) for name in QUANTISER_FILES):
            refuse_quantised(path, {"quantization_config": read_object(own) if own.is_file() else {}}, ())
        config = _configuration(path, file)
        stretch_positions(config, rope_factor)
        index_file = find_file(path, INDEX_FILE)
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
        """The model's tokenizer with its chat template. It must be a fast one, which gives character offsets."""
        # Without this file transformers builds a tokenizer with an empty vocabulary.
        if find_file(self.path, "tokenizer.json") is None:
            raise UserError(f"{self.path}: no tokenizer.json; only fast tokenizers give character offsets")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # transformers, tokenizers and json raise many kinds for a damaged file
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
        """The chat template of transformers' processor: in processor_config.json, the legacy file or the template's own
        file, in its order (`ProcessorMixin.get_processor_dict`). None if only the tokenizer has one."""
        for name in TEMPLATE_FILES:
            if name.endswith(".jinja"):
                file = find_file(self.path, name)
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
        """Content of a JSON file; empty if there is no such file."""
        file = find_file(self.path, name)
        return read_object(file) if file is not None else {}

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer, by generation_config.json and config.json, each with one or several.

        Raises UserError if they name something other than tokens.
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
        """Folder of the weight files on this machine."""
        return next(iter(self.weight_files.values())).parent

    @property
    def weight_bytes(self) -> int:
        """Size of all weight files."""
        return sum(file.stat().st_size for file in set(self.weight_files.values()))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of each weight file's name, size, first and last bytes. Differs for two bases of equal shape."""
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
    """Put `model.rope_factor` into transformers' configuration object. None changes nothing."""
    if rope_factor is not None:
        text = config.get_text_config()
        text.rope_parameters = {**text.rope_parameters, "rope_type": "linear", "factor": rope_factor}


def _configuration(path: str, file: Path) -> Any:
    """transformers' configuration object. Raises UserError if it is damaged or the model has its own code."""
    content = read_object(file)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of transformers or its checks of fields
        kind = f"model_type = {content.get('model_type')!r}"
        if "auto_map" in content:
            raise UserError(f"{file}: {kind} comes with code of its own (auto_map), which is never run") from error
        raise UserError(f"{file}: {kind}: can't be read as a configuration ({first_line(error)})") from error


def _weight_map(file: Path) -> dict[str, str]:
    """File name of each tensor. Raises UserError if it is not the name of a safetensors file in this folder."""
    names = read_object(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{file}: weight_map = {names!r:.60}: must name the file of each tensor; fetch it again")
    for tensor, name in names.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(f"{file}: weight_map.{tensor} = {name!r:.60}: must name a safetensors file in this folder")
    return names


def find_file(path: str, name: str) -> Path | None:
    """A file of a folder or hub name on this machine, downloaded if needed; None if there is no such file."""
    found = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _required_file(path: str, name: str) -> Path:
    file = find_file(path, name)
    if file is None or not file.is_file():
        raise UserError(f"model.path = {path!r}: {name} is missing, or the hub can't be reached; safetensors only")
    return file


def refuse_quantised(path: str, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raises UserError if config.json or the names of the tensors show that the weights are quantised."""
    for table in (config, *(config.get(part) for part in ("text_config", "vision_config"))):
        found = table.get("quantization_config") if isinstance(table, Mapping) else None
        if found:
            raise _quantised(path, _quantisation(found), "config.json: quantization_config")
    for name in tensors:
        method = next((kind for end, kind in BY_TENSOR.items() if name.endswith(end)), None)
        method = "bitsandbytes, 4 bits" if ".quant_state." in name else method
        if method:
            raise _quantised(path, method, f"tensor {name}")


def require_whole(dtype: str, path: str, tensor: str) -> None:
    """Raises UserError if a weight is stored in a type of few bits. `dtype` is safetensors' name."""
    if dtype not in WHOLE_TYPES:
        raise _quantised(path, "FP8" if dtype.startswith("F8") else dtype, f"tensor {tensor}")


def _quantisation(found: Any) -> str:
    if not isinstance(found, Mapping):
        return repr(found)
    found = {**found, **(found["quantization"] if isinstance(found.get("quantization"), Mapping) else {})}
    method = str(found.get("quant_method") or found.get("quant_algo") or found.get("quantization_status") or "unnamed")
    bits = found.get("bits") or found.get("w_bit")
    if method == "bitsandbytes" or "load_in_4bit" in found or "load_in_8bit" in found:
        method, bits = "bitsandbytes", 8 if found.get("load_in_8bit") or found.get("_load_in_8bit") else 4
    return METHODS.get(method, method) + (f", {bits} bits" if bits else "")


def _quantised(path: str, method: str, where: str) -> UserError:
    return UserError(
        f"{path}: a quantised checkpoint ({method}; {where}): it can't be trained, adapted or merged; name the "
        'model that it was made from, and set model.quantize = "nf4" (predict: --quantize nf4) to hold it in 4 bits'
    )
