"""Qwen3-VL, dense, over packed rows: vision tower with learned and rotary positions, DeepStack, M-RoPE decoder.

Module names are the tensor names of released checkpoints. Rules are those of the released model (Qwen3-VL technical
report, arXiv 2511.21631).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from vft.models.decoder import Decoder, DecoderConfig
from vft.models.family import VideoLanguageModel, VisionParts
from vft.models.layers import LayerNorm, Linear, PatchEmbed, VisionAttention, rotary_2d
from vft.models.qwen3_vl_vision import Qwen3Vision, TableLayout
from vft.types import AttentionPlan, UserError, VisionLayout

MODEL_TYPE = "qwen3_vl"

TOWERS = {
    "language_model": ("model.language_model.", "lm_head."),
    "merger": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    "vision_tower": ("model.visual.",),
}
"""Parts that can be trained or adapted, by prefixes of parameter names; the first that fits counts."""

PEFT_PREFIXES = {"model.": "model.", "lm_head.": "lm_head."}
"""Released names are those of transformers' model in memory."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Shape of the vision tower."""

    width: int
    mlp_width: int
    blocks: int
    heads: int
    out_width: int
    deepstack_blocks: tuple[int, ...]
    """Blocks whose output is added behind the first decoder layers, one each."""
    table_size: int
    """Entries of the table of learned positions."""
    patch_features: int
    merge: int


@dataclass(frozen=True, slots=True)
class ModelConfig(DecoderConfig):
    """Shape of the whole model, read from a released or re-saved `config.json`."""

    vision: VisionConfig

    @staticmethod
    def from_hf(config: Any) -> ModelConfig:
        """From transformers' configuration object."""
        text, vision = config.text_config, config.vision_config
        deepstack = tuple(vision.deepstack_visual_indexes)
        if len(deepstack) >= text.num_hidden_layers:
            raise UserError(
                f"config.json: deepstack_visual_indexes = {list(deepstack)}: must be fewer than "
                f"num_hidden_layers = {text.num_hidden_layers}"
            )
        rope = text.rope_parameters
        if rope["rope_type"] != "default":
            raise UserError(
                f"rope_type = {rope['rope_type']!r}: {MODEL_TYPE} has 'default' alone; take the scaling out"
            )
        return ModelConfig(
            vocabulary=text.vocab_size,
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            key_heads=text.num_key_value_heads,
            head_width=text.head_dim,
            norm_eps=text.rms_norm_eps,
            rope_theta=rope["rope_theta"],
            rope_axes=_interleaved(rope["mrope_section"]),
            rope_factor=1.0,
            qkv_bias=False,
            qk_norm=True,
            tied_head=config.tie_word_embeddings,
            vision=VisionConfig(
                width=vision.hidden_size,
                mlp_width=vision.intermediate_size,
                blocks=vision.depth,
                heads=vision.num_heads,
                out_width=vision.out_hidden_size,
                deepstack_blocks=deepstack,
                table_size=vision.num_position_embeddings,
                patch_features=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
                merge=vision.spatial_merge_size,
            ),
        )


def _interleaved(section: Sequence[int]) -> tuple[int, ...]:
    """The axis that turns each rotary frequency: time, height and width in turns, as far as height and width go."""
    turns = zip(range(sum(section)), cycle((0, 1, 2)))
    return tuple(axis if place < 3 * section[axis] else 0 for place, axis in turns)


class VisionMLP(nn.Module):
    """Two linears with a GELU, approximated by tanh, between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config.width, config.mlp_width)
        self.act = nn.GELU(approximate="tanh")
        self.linear_fc2 = Linear(config.mlp_width, config.width)

    def forward(self, x_PE: Tensor) -> Tensor:
        """[P, E] to [P, E]."""
        return self.linear_fc2(self.act(self.linear_fc1(x_PE)))


class VisionBlock(nn.Module):
    """One block of the tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, eps=1e-6)
        self.norm2 = LayerNorm(config.width, eps=1e-6)
        self.attn = VisionAttention(config.width, config.heads)
        self.mlp = VisionMLP(config)

    def forward(self, x_PE: Tensor, cos_PK: Tensor, sin_PK: Tensor, plan: AttentionPlan) -> Tensor:
        """[P, E] to [P, E]."""
        x_PE = x_PE + self.attn(self.norm1(x_PE), cos_PK, sin_PK, plan)
        return x_PE + self.mlp(self.norm2(x_PE))


class Merger(nn.Module):
    """Four neighbouring patches become one token of the language model's width; they are normalised before they are
    joined, or with `joined` after it."""

    def __init__(self, config: VisionConfig, joined: bool) -> None:
        super().__init__()
        self.merged_width = config.width * config.merge**2
        self.norm = LayerNorm(self.merged_width if joined else config.width, eps=1e-6)
        self.linear_fc1 = Linear(self.merged_width, self.merged_width)
        self.act = nn.GELU()
        self.linear_fc2 = Linear(self.merged_width, config.out_width)

    def forward(self, x_PE: Tensor) -> Tensor:
        """[P, width] to [P / 4, out_width]."""
        x_ME = self.norm(x_PE.view(-1, *self.norm.normalized_shape)).view(-1, self.merged_width)
        return self.linear_fc2(self.act(self.linear_fc1(x_ME)))


class VisionTower(nn.Module):
    """Patches to embeddings, and to what DeepStack (arXiv 2406.04334) adds to them later. A part that is not trained
    builds no graph."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.width, config.patch_features, bias=True)
        self.pos_embed = nn.Embedding(config.table_size, config.width)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.blocks))
        self.merger = Merger(config, joined=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(config, joined=True) for _ in config.deepstack_blocks)

    def forward(self, pixels_PD: Tensor, layout: TableLayout) -> tuple[Tensor, ...]:
        """Normalised pixels [P, D] to embeddings [M, E], and as many for each of the first decoder layers."""
        mergers = [*self.merger.parameters(), *self.deepstack_merger_list.parameters()]
        merger_trained = any(p.requires_grad for p in mergers)
        merging = {id(p) for p in mergers}
        trained = any(p.requires_grad for p in self.parameters() if id(p) not in merging)
        seen = []
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            x_PE = self.patch_embed(pixels_PD)
            learned_UE = (self.pos_embed(layout.corners_U4) * layout.shares_U4[:, :, None]).sum(1)
            x_PE = x_PE + learned_UE.to(x_PE.dtype)[layout.place_P]
            cos_PK, sin_PK = rotary_2d(layout.positions_P2, self.config.width // self.config.heads)
            for index, block in enumerate(self.blocks):
                x_PE = block(x_PE, cos_PK, sin_PK, layout.plans["frame"])
                if index in self.config.deepstack_blocks:
                    seen.append(x_PE)
        with torch.set_grad_enabled((trained or merger_trained) and torch.is_grad_enabled()):
            deeper = (merge(x) for merge, x in zip(self.deepstack_merger_list, seen, strict=True))
            return self.merger(x_PE), *deeper


class Parts(nn.Module):
    """Tower and decoder, under the name that released checkpoints give the two."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.visual = VisionTower(config.vision)
        self.language_model = Decoder(config)


class Qwen3VL(VideoLanguageModel):
    """The whole model."""

    towers = TOWERS
    peft_prefixes = PEFT_PREFIXES
    config: ModelConfig
    spec: Qwen3Vision

    def __init__(self, config: ModelConfig, spec: Qwen3Vision, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.compute_dtype = compute_dtype
        self.model = Parts(config)
        self.lm_head = None if config.tied_head else Linear(config.width, config.vocabulary, bias=False)

    @property
    def decoder(self) -> Decoder:
        """Embedding, layers and norm."""
        return self.model.language_model

    @property
    def output_head(self) -> nn.Linear | None:
        """None where the embedding serves as head."""
        return self.lm_head

    @property
    def vision(self) -> VisionParts:
        """Tower and mergers, which are one module."""
        vision, tower = self.config.vision, self.model.visual
        return VisionParts(
            modules=(tower,),
            blocks=tower.blocks,
            tower=(*tower.patch_embed.parameters(), *tower.blocks.parameters()),
            merger=(*tower.merger.parameters(), *tower.deepstack_merger_list.parameters()),
            patches_per_row=vision.merge**2,
            pair_widths={"frame": vision.width * vision.blocks},
        )

    def see(self, pixels_PD: Tensor, layout: VisionLayout) -> tuple[Tensor, ...]:
        """Normalised pixels [P, D] to embeddings [M, E], and to what is added to them later."""
        assert isinstance(layout, TableLayout)
        return self.model.visual(pixels_PD, layout)

    def least_media(self) -> tuple[int, VisionLayout]:
        """One merged token."""
        merge = self.spec.merge
        return merge**2, self.spec.layout_of([(1, merge, merge)])


def build(config: Any, preprocessor: dict[str, Any], dtype: torch.dtype) -> Qwen3VL:
    """The model of transformers' configuration object; parameters (not set) and computation in `dtype`."""
    spec = Qwen3Vision.from_hf(config, preprocessor)
    return Qwen3VL(ModelConfig.from_hf(config), spec, dtype).to(dtype)
