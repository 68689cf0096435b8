"""Qwen2.5-VL over packed rows: windowed vision encoder, projector, M-RoPE decoder.

Module names are the tensor names of released checkpoints. Rules are those of the released model (Qwen2.5-VL technical
report, arXiv 2502.13923, and qwen-vl-utils 0.0.14); where a public implementation differs, the comment says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vft.models.base import VideoLanguageModel, VisionParts
from vft.models.decoder import Decoder, require, require_rope
from vft.models.layers import GatedMLP, Linear, PatchEmbed, RMSNorm, VisionBlock, graph_of, rotary_2d, two_linears
from vft.models.qwen2_5_vl.processor import Qwen2_5Processor, QwenLayout

MODEL_TYPE = "qwen2_5_vl"


class Projector(nn.Module):
    """Four neighbouring patches become one token of the language model's width."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.merged_width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, eps=1e-6)
        widths = (self.merged_width, self.merged_width, config.out_hidden_size)
        self.mlp = two_linears(("0", "2"), widths, nn.GELU())

    def forward(self, x_PE: Tensor) -> Tensor:
        """[P, width] to [P / 4, out_width]."""
        return self.mlp(self.ln_q(x_PE).view(-1, self.merged_width))


class VisionEncoder(nn.Module):
    """Patches to embeddings. A part that is not trained builds no graph."""

    def __init__(self, config: Any, processor: Qwen2_5Processor) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        mlps = (GatedMLP(width, config.intermediate_size, bias=True) for _ in range(config.depth))
        self.patch_embed = PatchEmbed(width, processor, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(width, config.num_heads, RMSNorm, mlp) for mlp in mlps)
        self.merger = Projector(config)

    def forward(self, pixels_PD: Tensor, layout: QwenLayout) -> tuple[Tensor]:
        """Normalised pixels [P, D] in media order to embeddings [M, E] in media order."""
        with graph_of((*self.patch_embed.parameters(), *self.blocks.parameters())):
            x_PE = self.patch_embed(pixels_PD[layout.order_P])
            rotary = rotary_2d(layout.positions_P2, self.config.hidden_size // self.config.num_heads)
            for index, block in enumerate(self.blocks):
                kind = "frame" if index in self.config.fullatt_block_indexes else "window"
                x_PE = block(x_PE, rotary, layout.plans[kind])
        with graph_of(self.parameters()):
            return (self.merger(x_PE)[layout.restore_M],)


class Qwen2_5_VL(VideoLanguageModel):
    """The model."""

    components: Mapping[str, tuple[str, ...]] = {
        "language_model": ("model.", "lm_head."),
        "projector": ("visual.merger.",),
        "vision_encoder": ("visual.",),
    }
    # transformers 4.52 and later; as released; vLLM's modules; the parts saved without the whole (`AutoModel`).
    spellings: Mapping[str, tuple[str, ...]] = {
        "model.": ("model.language_model.", "model.", "language_model.model.", "language_model.", ""),
        "visual.": ("model.visual.", "visual."),
        "lm_head.": ("lm_head.", "language_model.lm_head.", "model.lm_head."),
    }
    decoder_path, head_path = "model", "lm_head"

    def __init__(self, config: Any, processor: Qwen2_5Processor, compute_dtype: torch.dtype) -> None:
        text = config.text_config
        super().__init__(text, processor, compute_dtype)
        self.visual = VisionEncoder(config.vision_config, processor)
        # M-RoPE: the frequencies are shared out to time, height and width in runs.
        runs = enumerate(text.rope_parameters["mrope_section"])
        self.model = Decoder(text, [axis for axis, run in runs for _ in range(run)], qkv_bias=True)
        self.lm_head = None if config.tie_word_embeddings else Linear(text.hidden_size, text.vocab_size, bias=False)

    @property
    def vision(self) -> VisionParts:
        """Encoder and projector, which are one module."""
        encoder, config = self.visual, self.visual.config
        full = len(config.fullatt_block_indexes)
        return VisionParts(
            modules=(encoder,),
            blocks=encoder.blocks,
            patches_per_row=self.processor.merge**2,
            pair_widths={"frame": config.hidden_size * full, "window": config.hidden_size * (config.depth - full)},
        )


def build(config: Any, preprocessor: dict[str, Any], dtype: torch.dtype) -> Qwen2_5_VL:
    """The model of transformers' configuration object; parameters (not set) and computation in `dtype`."""
    vision = config.vision_config
    require(config, "text_config.use_sliding_window", False, None)
    require_rope(config, "default")
    processor = Qwen2_5Processor.read(
        config,
        preprocessor,
        merge=vision.spatial_merge_size,
        temporal=vision.temporal_patch_size,
        tokens_per_second=vision.tokens_per_second,
        window=vision.window_size,
    )
    return Qwen2_5_VL(config, processor, dtype).to(dtype)
