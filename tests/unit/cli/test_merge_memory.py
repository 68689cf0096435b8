"""tools/merge_lora.py works in the memory of a tensor, however large the files are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from workload import SHAPES, write_checkpoint

from vft.adapters.lora import fill, is_adapter
from vft.adapters.peft_format import export_adapter
from vft.adapters.targets import choose_trainable
from vft.config.run import LoraConfig
from vft.models import build
from vft.models.pretrained import Pretrained

REPOSITORY = Path(__file__).parents[3]

PROGRAM = r"""
import re, sys
from pathlib import Path

from vft.cli.merge_lora import merge


def peak_bytes():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


for base in sys.argv[1:]:  # the first, a small one, loads and makes what every merge needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    merge(base, Path(base, "adapter"), Path(base, "merged"))
print(peak_bytes() - before)
"""


def with_adapter(base: Path) -> Path:
    """An adapter of random values on every linear, in the folder of its base."""
    model = build(Pretrained.open(str(base)), torch.bfloat16)
    lora = LoraConfig(rank=4, alpha=8)
    choose_trainable(model, lora, ())
    model.to_empty(device="cpu")
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if is_adapter(name):
            fill(parameter, torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    export_adapter(model, base / "adapter", lora, str(base), {}, write=True)
    return base


def test_the_peak_is_that_of_a_tensor(tmp_path: Path) -> None:
    """The resident set, pages of mapped files among it, grows by far less than the one file of the model."""
    shapes = {"small": SHAPES["tiny"], "large": {**SHAPES["small"], "num_hidden_layers": 8, "vocab_size": 25_000}}
    bases = [with_adapter(write_checkpoint(tmp_path / name, one, torch.bfloat16)) for name, one in shapes.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, *map(str, bases)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    file = bases[1] / "model.safetensors"
    assert file.stat().st_size > 100e6
    grown = int(done.stdout.split()[-1])
    print(f"merging {file.stat().st_size / 1e6:.0f} MB took {grown / 1e6:.0f} MB")  # pytest -rP shows it
    assert grown < 0.3 * file.stat().st_size
    # 2 * B A is added to every linear of the layers, and to nothing else.
    before, after = load_file(file), load_file(bases[1] / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.layers.") and name.endswith("_proj.weight")}
