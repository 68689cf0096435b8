"""Qwen3-VL, dense, over packed rows: vision encoder with learned and rotary positions, DeepStack, M-RoPE decoder.

Module names are the tensor names of released checkpoints. Rules are those of the released model (Qwen3-VL technical
report, arXiv 2511.21631).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from vft.common.errors import UserError
from vft.models.base import VideoLanguageModel, VisionParts
from vft.models.decoder import Decoder, DecoderLayer, require_rope
from vft.models.layers import LayerNorm, Linear, PatchEmbed, VisionBlock, graph_of, rotary_2d, two_linears
from vft.models.qwen3_vl.processor import Qwen3Processor, TableLayout

MODEL_TYPE = "qwen3_vl"


class Projector(nn.Module):
    """Four neighbouring patches become one token of the language model's width; they are normalised before they are
    joined, or with `joined` after it."""

    def __init__(self, config: Any, joined: bool) -> None:
        super().__init__()
        self.merged_width = config.hidden_size * config.spatial_merge_size**2
        self.norm = LayerNorm(self.merged_width if joined else config.hidden_size, eps=1e-6)
        self.linear_fc1 = Linear(self.merged_width, self.merged_width)
        self.act = nn.GELU()
        self.linear_fc2 = Linear(self.merged_width, config.out_hidden_size)

    def forward(self, x_PE: Tensor) -> Tensor:
        """[P, width] to [P / 4, out_width]."""
        x_ME = self.norm(x_PE.view(-1, *self.norm.normalized_shape)).view(-1, self.merged_width)
        return self.linear_fc2(self.act(self.linear_fc1(x_ME)))


class VisionEncoder(nn.Module):
    """Patches to embeddings, and to what DeepStack (arXiv 2406.04334) adds to them later. A part that is not trained
    builds no graph."""

    def __init__(self, config: Any, processor: Qwen3Processor) -> None:
        super().__init__()
        self.config = config
        width, self.deepstack = config.hidden_size, getattr(config, "deepstack_visual_indexes", None) or ()
        names, widths = ("linear_fc1", "linear_fc2"), (width, config.intermediate_size, width)
        mlps = (two_linears(names, widths, nn.GELU(approximate="tanh")) for _ in range(config.depth))
        self.patch_embed = PatchEmbed(width, processor, bias=True)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, width)
        self.blocks = nn.ModuleList(VisionBlock(width, config.num_heads, LayerNorm, mlp) for mlp in mlps)
        self.merger = Projector(config, joined=False)
        self.deepstack_merger_list = nn.ModuleList(Projector(config, joined=True) for _ in self.deepstack)

    def forward(self, pixels_PD: Tensor, layout: TableLayout) -> tuple[Tensor, ...]:
        """Normalised pixels [P, D] to embeddings [M, E], and as many for each of the first decoder layers."""
        features = []
        with graph_of((*self.patch_embed.parameters(), *self.pos_embed.parameters(), *self.blocks.parameters())):
            x_PE = self.patch_embed(pixels_PD)
            learned_UE = (self.pos_embed(layout.corners_U4) * layout.shares_U4[:, :, None]).sum(1)
            x_PE = x_PE + learned_UE.to(x_PE.dtype)[layout.place_P]
            rotary = rotary_2d(layout.positions_P2, self.config.hidden_size // self.config.num_heads)
            for index, block in enumerate(self.blocks):
                x_PE = block(x_PE, rotary, layout.plans["frame"])
                if index in self.deepstack:
                    features.append(x_PE)
        with graph_of(self.parameters()):
            deepstack = (merge(x) for merge, x in zip(self.deepstack_merger_list, features, strict=True))
            return self.merger(x_PE), *deepstack


class Qwen3VL(VideoLanguageModel):
    """The model."""

    components: Mapping[str, tuple[str, ...]] = {
        "language_model": ("model.language_model.", "lm_head."),
        "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
        "vision_encoder": ("model.visual.",),
    }
    spellings: Mapping[str, tuple[str, ...]] = {
        "model.language_model.": ("model.language_model.", "language_model.model.", "language_model.", "model.", ""),
        "model.visual.": ("model.visual.", "visual."),
        "lm_head.": ("lm_head.", "language_model.lm_head.", "model.lm_head."),
    }
    decoder_path, head_path = "model.language_model", "lm_head"

    def __init__(self, config: Any, processor: Qwen3Processor, compute_dtype: torch.dtype) -> None:
        text = config.text_config
        super().__init__(text, processor, compute_dtype)
        encoder = VisionEncoder(config.vision_config, processor)
        self.model = nn.ModuleDict({"visual": encoder, "language_model": self.make_decoder(text)})
        self.lm_head = None if config.tie_word_embeddings else Linear(text.hidden_size, text.vocab_size, bias=False)

    def make_decoder(self, text: Any) -> Decoder:
        """The decoder of transformers' `text_config`."""
        return Decoder(text, interleaved(text.rope_parameters["mrope_section"]), make_layer=self.make_layer)

    def make_layer(self, index: int) -> nn.Module:
        """The decoder layer with this number."""
        return DecoderLayer(self.config, qkv_bias=False, qk_norm=True)

    @property
    def vision(self) -> VisionParts:
        """Encoder and projectors, which are one module."""
        encoder: Any = self.model["visual"]
        return VisionParts(
            modules=(encoder,),
            blocks=encoder.blocks,
            patches_per_row=self.processor.merge**2,
            pair_widths={"frame": encoder.config.hidden_size * encoder.config.depth},
            added=len(encoder.deepstack),
        )


def interleaved(section: Sequence[int]) -> tuple[int, ...]:
    """The axis that turns each rotary frequency: time, height and width in turns, as far as height and width go."""
    turns = zip(range(sum(section)), cycle((0, 1, 2)))
    return tuple(axis if place < 3 * section[axis] else 0 for place, axis in turns)


def build(config: Any, preprocessor: dict[str, Any], dtype: torch.dtype, kind: type[Qwen3VL] = Qwen3VL) -> Qwen3VL:
    """The model of transformers' configuration object; parameters (not set) and computation in `dtype`. `kind` is a
    family that differs in its decoder's layers alone."""
    text, vision = config.text_config, config.vision_config
    deepstack = list(vision.deepstack_visual_indexes)
    if len(deepstack) >= text.num_hidden_layers:
        raise UserError(
            f"config.json: deepstack_visual_indexes = {deepstack}: must be fewer than "
            f"num_hidden_layers = {text.num_hidden_layers}"
        )
    require_rope(config, "default")
    return kind(config, Qwen3Processor.of(config, preprocessor), dtype).to(dtype)
