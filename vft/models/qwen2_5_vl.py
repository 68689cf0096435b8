"""Qwen2.5-VL over packed rows: windowed vision tower, merger, M-RoPE decoder.

Module names are the tensor names of released checkpoints. Rules are those of the released model (Qwen2.5-VL technical
report, arXiv 2502.13923, and qwen-vl-utils 0.0.14); where a public implementation differs, the comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vft.models.decoder import Decoder, DecoderConfig
from vft.models.family import VideoLanguageModel, VisionParts
from vft.models.layers import GatedMLP, Linear, PatchEmbed, RMSNorm, VisionAttention, rotary_2d
from vft.models.qwen2_5_vl_vision import QwenLayout, QwenVision
from vft.types import AttentionPlan, UserError, VisionLayout

MODEL_TYPE = "qwen2_5_vl"

TOWERS = {"language_model": ("model.", "lm_head."), "merger": ("visual.merger.",), "vision_tower": ("visual.",)}
"""Parts that can be trained or adapted, by prefixes of parameter names; the first that fits counts."""

PEFT_PREFIXES = {"model.": "model.language_model.", "visual.": "model.visual.", "lm_head.": "lm_head."}
"""Released names to those of transformers' model in memory (4.52 and later), which adapter files use."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Shape of the vision tower."""

    width: int
    mlp_width: int
    blocks: int
    heads: int
    out_width: int
    full_attention_blocks: frozenset[int]
    patch_features: int
    merge: int


@dataclass(frozen=True, slots=True)
class ModelConfig(DecoderConfig):
    """Shape of the whole model, read from a released or re-saved `config.json`."""

    vision: VisionConfig

    @staticmethod
    def from_hf(config: Any) -> ModelConfig:
        """From transformers' configuration object (flat and nested files both arrive nested)."""
        text, vision = config.text_config, config.vision_config
        if getattr(text, "use_sliding_window", False):
            raise UserError("config.json: use_sliding_window = true: sliding-window checkpoints are not supported")
        rope = text.rope_parameters
        if rope.get("rope_type") == "linear":
            raise UserError(f"linear scaling of positions (factor {rope['factor']}): {MODEL_TYPE} was not made for it")
        return ModelConfig(
            vocabulary=text.vocab_size,
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            key_heads=text.num_key_value_heads,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            norm_eps=text.rms_norm_eps,
            rope_theta=rope["rope_theta"],
            # M-RoPE: the frequencies are shared out to time, height and width in runs.
            rope_axes=tuple(axis for axis, run in enumerate(rope["mrope_section"]) for _ in range(run)),
            rope_factor=1.0,
            qkv_bias=True,
            qk_norm=False,
            tied_head=config.tie_word_embeddings,
            vision=VisionConfig(
                width=vision.hidden_size,
                mlp_width=vision.intermediate_size,
                blocks=vision.depth,
                heads=vision.num_heads,
                out_width=vision.out_hidden_size,
                full_attention_blocks=frozenset(vision.fullatt_block_indexes),
                patch_features=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
                merge=vision.spatial_merge_size,
            ),
        )


class VisionBlock(nn.Module):
    """One block of the tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, eps=1e-6)
        self.norm2 = RMSNorm(config.width, eps=1e-6)
        self.attn = VisionAttention(config.width, config.heads)
        self.mlp = GatedMLP(config.width, config.mlp_width, bias=True)

    def forward(self, x_PE: Tensor, cos_PK: Tensor, sin_PK: Tensor, plan: AttentionPlan) -> Tensor:
        """[P, E] to [P, E]."""
        x_PE = x_PE + self.attn(self.norm1(x_PE), cos_PK, sin_PK, plan)
        return x_PE + self.mlp(self.norm2(x_PE))


class Merger(nn.Module):
    """Four neighbouring patches become one token of the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        merged = config.width * config.merge**2
        self.ln_q = RMSNorm(config.width, eps=1e-6)
        self.mlp = nn.Sequential(Linear(merged, merged), nn.GELU(), Linear(merged, config.out_width))
        self.merged_width = merged

    def forward(self, x_PE: Tensor) -> Tensor:
        """[P, width] to [P / 4, out_width]."""
        return self.mlp(self.ln_q(x_PE).view(-1, self.merged_width))


class VisionTower(nn.Module):
    """Patches to embeddings. A part that is not trained builds no graph."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.width, config.patch_features, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.blocks))
        self.merger = Merger(config)

    def forward(self, pixels_PD: Tensor, layout: QwenLayout) -> Tensor:
        """Normalised pixels [P, D] in media order to embeddings [M, E] in media order."""
        trained = any(p.requires_grad for p in (*self.patch_embed.parameters(), *self.blocks.parameters()))
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            x_PE = self.patch_embed(pixels_PD[layout.order_P])
            width = self.config.width // self.config.heads
            cos_PK, sin_PK = rotary_2d(layout.positions_P2, width)
            for index, block in enumerate(self.blocks):
                kind = "frame" if index in self.config.full_attention_blocks else "window"
                x_PE = block(x_PE, cos_PK, sin_PK, layout.plans[kind])
        merger_trained = trained or any(p.requires_grad for p in self.merger.parameters())
        with torch.set_grad_enabled(merger_trained and torch.is_grad_enabled()):
            return self.merger(x_PE)[layout.restore_M]


class Qwen2_5_VL(VideoLanguageModel):
    """The whole model."""

    towers = TOWERS
    peft_prefixes = PEFT_PREFIXES
    config: ModelConfig
    spec: QwenVision

    def __init__(self, config: ModelConfig, spec: QwenVision, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.compute_dtype = compute_dtype
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        self.lm_head = None if config.tied_head else Linear(config.width, config.vocabulary, bias=False)

    @property
    def decoder(self) -> Decoder:
        """Embedding, layers and norm."""
        return self.model

    @property
    def output_head(self) -> nn.Linear | None:
        """None where the embedding serves as head."""
        return self.lm_head

    @property
    def vision(self) -> VisionParts:
        """Tower and merger, which are one module."""
        vision, tower = self.config.vision, self.visual
        full = len(vision.full_attention_blocks)
        return VisionParts(
            modules=(tower,),
            blocks=tower.blocks,
            tower=(*tower.patch_embed.parameters(), *tower.blocks.parameters()),
            merger=tuple(tower.merger.parameters()),
            patches_per_row=vision.merge**2,
            pair_widths={"frame": vision.width * full, "window": vision.width * (vision.blocks - full)},
        )

    def see(self, pixels_PD: Tensor, layout: VisionLayout) -> tuple[Tensor, ...]:
        """Normalised pixels [P, D] to embeddings [M, E]."""
        assert isinstance(layout, QwenLayout)
        return (self.visual(pixels_PD, layout),)

    def least_media(self) -> tuple[int, VisionLayout]:
        """One merged token."""
        merge = self.spec.merge
        return merge**2, self.spec.layout_of([(1, merge, merge)])


def build(config: Any, preprocessor: dict[str, Any], dtype: torch.dtype) -> Qwen2_5_VL:
    """The model of transformers' configuration object; parameters (not set) and computation in `dtype`."""
    spec = QwenVision.from_hf(config, preprocessor)
    return Qwen2_5_VL(ModelConfig.from_hf(config), spec, dtype).to(dtype)
