"""A model family outside the package, added by the steps of docs/develop/new_family.md: it loads and trains."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.rows import row
from tests.helpers.tiny import Tiny, load_prepared
from vft.adapters.lora import initialise
from vft.adapters.targets import choose_trainable
from vft.config.run import LoraConfig, TrainConfig
from vft.models import FAMILIES, build
from vft.models.pretrained import Pretrained
from vft.training.losses import cross_entropy
from vft.training.optimizer import build_optimizer

PROCESSOR = '''
from dataclasses import dataclass

import torch

from vft.common.types import MediaPlan, VisionLayout
from vft.models import processor as rules
from vft.models.processor import VisionProcessor


@dataclass(frozen=True, kw_only=True)
class ToyProcessor(VisionProcessor):
    """Square frames of 28 pixels; every patch of 14 pixels is a token."""

    turn_end: str = "<|im_end|>"

    def plan(self, ref, info, limits):
        indices = (0,)
        if ref.kind == "video":
            first, last = rules.frame_range(info, limits)
            count = rules.frame_count(last - first + 1, ref, info, limits)
            indices = rules.sample_frames(ref, info, first, last, count)
        return MediaPlan(ref, info, indices, 28, 28, (len(indices), 2, 2), 4 * len(indices), 0.0)

    def positions(self, num_tokens, media):
        return torch.arange(num_tokens).expand(3, -1)

    def layout(self, media):
        return VisionLayout(plans={}, projector_rows=sum(plan.num_tokens for plan in media))
'''
MODEL = """
from torch import nn
from toy_vl.processor import ToyProcessor
from transformers import AutoConfig, Qwen2_5_VLConfig

from vft.models.base import VideoLanguageModel, VisionParts
from vft.models.decoder import Decoder
from vft.models.layers import Linear

MODEL_TYPE = "toy_vl"


class ToyConfig(Qwen2_5_VLConfig):
    model_type = MODEL_TYPE


AutoConfig.register(MODEL_TYPE, ToyConfig, exist_ok=True)


class ToyVL(VideoLanguageModel):
    components = {
        "language_model": ("model.", "lm_head."),
        "projector": ("projector.",),
        "vision_encoder": ("encoder.",),
    }
    spellings = {prefix: (prefix,) for prefix in ("model.", "lm_head.", "projector.", "encoder.")}
    decoder_path, head_path = "model", "lm_head"

    def __init__(self, config, processor, dtype):
        text = config.text_config
        super().__init__(text, processor, dtype)
        self.encoder = Linear(processor.patch_features, 32)
        self.projector = Linear(32, text.hidden_size)
        self.model = Decoder(text, qkv_bias=True)
        self.lm_head = None if config.tie_word_embeddings else Linear(text.hidden_size, text.vocab_size, bias=False)

    @property
    def vision(self):
        return VisionParts((self.encoder, self.projector), (), patches_per_row=1, pair_widths={})

    def encode_media(self, pixels_PD, layout):
        return (self.projector(nn.functional.gelu(self.encoder(pixels_PD))),)


def build(config, preprocessor, dtype):
    processor = ToyProcessor.read(config, preprocessor)
    return ToyVL(config, processor, dtype).to(dtype)
"""


def test_a_family_outside_the_package(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files and an entry in one table; the data path, adapters and the optimizer take it from there."""
    package = tmp_path / "toy_vl"
    package.mkdir()
    for name, text in (("__init__", ""), ("processor", PROCESSOR), ("model", MODEL)):
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    family = importlib.import_module("toy_vl.model")
    monkeypatch.setitem(FAMILIES, family.MODEL_TYPE, family)

    folder = shutil.copytree(tiny.path, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "toy_vl"}), encoding="utf-8")
    save_file({}, folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in build(Pretrained.open(str(folder)), torch.float32).named_parameters()}
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")

    lora = LoraConfig(rank=4, alpha=8, targets=("language_model.*", "vision_encoder.*"))
    model, _ = load_prepared(folder, lambda made: choose_trainable(made, lora, ()))
    initialise(model, 0)
    batch = row(Tiny(folder), "mixed")
    optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-2, max_steps=1))
    before = cross_entropy(model, batch)
    before.backward()
    optimizer.step()
    assert float(cross_entropy(model, batch).detach()) < float(before.detach())
    assert len([file for file in package.glob("*.py") if file.read_text(encoding="utf-8")]) == 2
