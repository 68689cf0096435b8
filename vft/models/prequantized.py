"""Recognises weights that another program has quantised, and refuses them with the name of the method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vft.common.errors import UserError

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
OWN_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which AutoGPTQ, AutoAWQ and ModelOpt record it if config.json does not."""
WHOLE_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Floating-point types of full weights, in safetensors' names."""
NAMES = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8", "hqq": "HQQ", "aqlm": "AQLM"}
"""Displayed name of a `quant_method`. Others are shown as they are."""


def refuse_quantised(path: str, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raises UserError if config.json or the names of the tensors show that the weights are quantised."""
    for table in (config, *(config.get(part) for part in ("text_config", "vision_config"))):
        found = table.get("quantization_config") if isinstance(table, Mapping) else None
        if found:
            raise _refused(path, _method(found), "config.json: quantization_config")
    for name in tensors:
        method = next((kind for end, kind in BY_TENSOR.items() if name.endswith(end)), None)
        method = "bitsandbytes, 4 bits" if ".quant_state." in name else method
        if method:
            raise _refused(path, method, f"tensor {name}")


def require_whole(dtype: str, path: str, tensor: str) -> None:
    """Raises UserError if a weight is stored in a type of few bits. `dtype` is safetensors' name."""
    if dtype not in WHOLE_TYPES:
        raise _refused(path, "FP8" if dtype.startswith("F8") else dtype, f"tensor {tensor}")


def _method(found: Any) -> str:
    if not isinstance(found, Mapping):
        return repr(found)
    found = {**found, **(found["quantization"] if isinstance(found.get("quantization"), Mapping) else {})}
    method = str(found.get("quant_method") or found.get("quant_algo") or found.get("quantization_status") or "unnamed")
    bits = found.get("bits") or found.get("w_bit")
    if method == "bitsandbytes" or "load_in_4bit" in found or "load_in_8bit" in found:
        method, bits = "bitsandbytes", 8 if found.get("load_in_8bit") or found.get("_load_in_8bit") else 4
    return NAMES.get(method, method) + (f", {bits} bits" if bits else "")


def _refused(path: str, method: str, where: str) -> UserError:
    return UserError(
        f"{path}: a quantised checkpoint ({method}; {where}): it can't be trained, adapted or merged; name the "
        'model that it was made from, and set model.quantize = "nf4" (predict: --quantize nf4) to hold it in 4 bits'
    )
