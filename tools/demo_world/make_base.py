"""Write the demo's base model before its training: the files of `base/`, but random weights.

    python tools/demo_world/make_base.py OUTPUT_DIR

The folder has the layout of the released Qwen2.5-VL checkpoints (flat configuration, tensor names, chat template,
special tokens), so that every program that reads those reads this one; only the sizes are small. The tokenizer is a
byte-level BPE of 618 tokens, learnt from the world's texts: every word of the tasks is one token, or few. Training the
model in full on tags (`recipes/demo/pretrain.toml`) makes it the base that the demo adapts.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import in_venv  # noqa: F401
import torch
from safetensors.torch import save_file
from torch import Tensor

from vft.models.released import build_from_config

BASE = Path(__file__).with_name("base")
EMBEDDING_STD = 0.02


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """bf16 tensors to start training from: ones for norms, zeros for biases, scaled matrices.

    A matrix has the standard deviation 1 / sqrt(inputs), those that write to the residual stream less by
    sqrt(2 * layers), as in GPT-2. The released 0.02 suits widths of thousands; in a narrow model it gives activations
    near zero. The language model's tensors come first, for the order decides what is drawn for each.
    """
    generator, weights = torch.Generator().manual_seed(seed), {}
    parameters = build_from_config(config, torch.bfloat16).named_parameters()
    for name, parameter in sorted(parameters, key=lambda item: item[0].startswith("visual.")):
        shape = parameter.shape
        if len(shape) == 1:
            weights[name] = torch.ones(shape) if "norm" in name or "ln_q" in name else torch.zeros(shape)
            continue
        std = EMBEDDING_STD if "embed_tokens" in name else 1 / math.sqrt(math.prod(shape[1:]))
        if name.endswith(("o_proj.weight", "attn.proj.weight", "down_proj.weight")):
            depth = config["vision_config"]["depth"] if name.startswith("visual.") else config["num_hidden_layers"]
            std /= math.sqrt(2 * depth)
        weights[name] = torch.randn(shape, generator=generator) * std
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the new checkpoint")
    folder = parser.parse_args().output
    # vft.json is about the trained weights.
    trained = shutil.ignore_patterns("model.safetensors", "vft.json")
    shutil.copytree(BASE, folder, ignore=trained, dirs_exist_ok=True)
    weights = random_weights(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{folder}: {sum(weight.numel() for weight in weights.values()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
