"""One adapter under all the names that programs give its tensors, and merged a second time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.parity.cases.conftest import Case


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_other_names_of_an_adapter(case: Callable[[str], Case]) -> None:
    it = case("10_text_only_adapter")
    model = f"model.path={it.tiny}"
    it.run("vft.recipes.caption", "config.toml", "data.workers=0", "train.learning_rate=0.05", model).ok()
    subprocess.run([sys.executable, "rename.py"], cwd=it.folder, check=True, capture_output=True)
    for name in ("plain", "text_only", "old_names", "bare", "default_suffix"):
        it.run("tools/merge_lora.py", "--base", it.tiny, "--adapter", f"out/{name}", "--output", f"out/m_{name}").ok()
    plain = weights(it.folder / "out" / "m_plain")
    assert any(not torch.equal(plain[name], tensor) for name, tensor in weights(it.tiny).items())
    for name in ("text_only", "old_names", "bare", "default_suffix"):
        merged = weights(it.folder / "out" / f"m_{name}")
        assert merged.keys() == plain.keys() and all(torch.equal(merged[key], plain[key]) for key in plain), name
    for name, field in (("saved", "modules_to_save"), ("tokens", "trainable_token_indices")):
        base = ("--base", it.tiny, "--adapter", f"out/{name}", "--output", f"out/m_{name}")
        assert field in it.run("tools/merge_lora.py", *base).error
    for adapter in ("out/plain", "out/text_only", "out/run/adapter"):
        twice = ("--base", "out/m_plain", "--adapter", adapter, "--output", "out/m_twice")
        assert "merged into 'out/m_plain' already" in it.run("tools/merge_lora.py", *twice).error
    assert not (it.folder / "out" / "m_twice").exists()
