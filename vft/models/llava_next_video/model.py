"""LLaVA-NeXT-Video over packed rows: CLIP encoder, pooling, projector, and a Llama or Mistral decoder.

Module names are the tensor names of released checkpoints (llava-hf/LLaVA-NeXT-Video-7B-hf and its siblings).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vft.common.types import AttentionPlan
from vft.models.attention import attend
from vft.models.base import VideoLanguageModel, VisionParts
from vft.models.decoder import Decoder, require, require_rope
from vft.models.layers import LayerNorm, Linear, apply_all, graph_of, two_linears
from vft.models.llava_next_video.processor import LlavaLayout, LlavaProcessor
from vft.models.quantization import linear

MODEL_TYPE = "llava_next_video"


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), as in CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """To the same shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class ClipAttention(nn.Module):
    """Self-attention of the patches of a square picture."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x_PE: Tensor, plan: AttentionPlan) -> Tensor:
        """[P, E] to [P, E]."""
        projections = apply_all([self.q_proj, self.k_proj, self.v_proj], x_PE)
        q, k, v = (projected.unflatten(-1, (self.heads, -1)) for projected in projections)
        return self.out_proj(attend(q, k, v, plan).flatten(1))


class ClipLayer(nn.Module):
    """One layer of the encoder."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = ClipAttention(width, config.num_attention_heads)
        self.layer_norm1 = LayerNorm(width, eps=config.layer_norm_eps)
        widths = (width, config.intermediate_size, width)
        self.mlp = two_linears(("fc1", "fc2"), widths, ACTIVATIONS[config.hidden_act]())
        self.layer_norm2 = LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x_PE: Tensor, plan: AttentionPlan) -> Tensor:
        """[P, E] to [P, E]."""
        x_PE = x_PE + self.self_attn(self.layer_norm1(x_PE), plan)
        return x_PE + self.mlp(self.layer_norm2(x_PE))


class Embeddings(nn.Module):
    """Patch embedding with learnt positions, and a class token before the patches of each square."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(self.patches + 1, width)

    def forward(self, x_PD: Tensor) -> Tensor:
        """[squares x patches, D] to [squares x (1 + patches), E]. The Conv2d is computed as a matrix product."""
        x_SPE = linear(x_PD, self.patch_embedding.weight.flatten(1), None).unflatten(0, (-1, self.patches))
        first_S1E = self.class_embedding.to(x_SPE.dtype).expand(len(x_SPE), 1, -1)
        positions_PE = self.position_embedding.weight.to(x_SPE.dtype)
        return (torch.cat([first_S1E, x_SPE], dim=1) + positions_PE).flatten(0, 1)


class ClipEncoder(nn.Module):
    """Square pictures to features. Layers after the one that is used exist only for their released weights. Frozen, it
    builds no graph."""

    def __init__(self, config: Any, layers_read: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers = nn.ModuleList(ClipLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers_read = list(layers)[:layers_read]

    def forward(self, pixels_PD: Tensor, layout: LlavaLayout) -> Tensor:
        """Normalised pixels [P, D] to features [P, E] of the patches, without the class tokens."""
        with graph_of(self.parameters()):
            x_PE = self.pre_layrnorm(self.embeddings(pixels_PD))
            for layer in self.layers_read:
                x_PE = layer(x_PE, layout.plans["square"])
            return x_PE.unflatten(0, (-1, 1 + self.embeddings.patches))[:, 1:].flatten(0, 1)


class LlavaNextVideo(VideoLanguageModel):
    """The model."""

    # transformers 4.52 and later, whose encoder lost a level in 5; as released; LLaVA's own code.
    spellings: Mapping[str, tuple[str, ...]] = {
        "language_model.model.": ("model.language_model.", "language_model.model.", "language_model.", "model.", ""),
        "language_model.lm_head.": ("lm_head.", "language_model.lm_head.", "model.lm_head."),
        "vision_tower.vision_model.": (
            *("model.vision_tower.", "model.vision_tower.vision_model.", "vision_tower.vision_model."),
            *("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ),
        "multi_modal_projector.": ("model.multi_modal_projector.", "multi_modal_projector."),
        "multi_modal_projector.linear_1.": ("model.mm_projector.0.",),
        "multi_modal_projector.linear_2.": ("model.mm_projector.2.",),
        "image_newline": ("model.image_newline", "image_newline"),
    }
    processor: LlavaProcessor
    decoder_path, head_path = "language_model.model", "language_model.lm_head"

    def __init__(self, config: Any, processor: LlavaProcessor, compute_dtype: torch.dtype) -> None:
        text, vision, width = config.text_config, config.vision_config, config.text_config.hidden_size
        super().__init__(text, processor, compute_dtype)
        layer, encoder = config.vision_feature_layer, "vision_tower.vision_model"
        depth = vision.num_hidden_layers
        read = layer if layer >= 0 else depth + 1 + layer
        self.components = {
            "language_model": ("language_model.",),
            "projector": ("multi_modal_projector.", "image_newline."),
            "unread": (f"{encoder}.post_layernorm.", *(f"{encoder}.encoder.layers.{i}." for i in range(read, depth))),
            "vision_encoder": ("vision_tower.",),
        }
        self.vision_tower = nn.ModuleDict({"vision_model": ClipEncoder(vision, read)})
        widths, activation = (vision.hidden_size, width, width), ACTIVATIONS[config.projector_hidden_act]()
        bias = config.multimodal_projector_bias
        self.multi_modal_projector = two_linears(("linear_1", "linear_2"), widths, activation, bias)
        self.image_newline = nn.Parameter(torch.empty(width))
        head: Any = None if config.tie_word_embeddings else Linear(width, text.vocab_size, bias=False)
        self.language_model = nn.ModuleDict({"model": Decoder(text), "lm_head": head})

    @property
    def vision(self) -> VisionParts:
        """Encoder and projector."""
        encoder: Any = self.vision_tower["vision_model"]
        return VisionParts(
            modules=(encoder, self.multi_modal_projector),
            blocks=encoder.layers_read,
            patches_per_row=self.processor.stride**2,
            pair_widths={"square": encoder.embeddings.class_embedding.numel() * len(encoder.layers_read)},
        )

    def encode_media(self, pixels_PD: Tensor, layout: LlavaLayout) -> tuple[Tensor, ...]:
        """Normalised pixels [P, D] to embeddings [M, E]."""
        features_PE = self.vision_tower["vision_model"](pixels_PD, layout)
        with graph_of(self.vision_parameters()):
            rows_RE = torch.cat([features_PE[layout.pooled_RG].mean(1), features_PE[layout.kept_R]])
            projected_RE = self.multi_modal_projector(rows_RE)
            # Also without a picture, so that its gradient exists in every process.
            newline_E = self.image_newline.to(projected_RE.dtype)
            return (torch.cat([projected_RE, newline_E[None]])[layout.tokens_M],)


def build(config: Any, preprocessor: dict[str, Any], dtype: torch.dtype) -> LlavaNextVideo:
    """The model of transformers' configuration object; parameters (not set) and computation in `dtype`.

    UserError for what this file does not do.
    """
    text, layer, depth = config.text_config, config.vision_feature_layer, config.vision_config.num_hidden_layers
    require(config, "text_config.model_type", "llama", "mistral")
    require(config, "text_config.hidden_act", "silu")
    require(config, "text_config.attention_bias", False, None)
    require(config, "text_config.mlp_bias", False, None)
    window = getattr(text, "sliding_window", None)
    covers = window is not None and window >= text.max_position_embeddings
    require(config, "text_config.sliding_window", None, *([window] if covers else []))
    require(config, "vision_config.model_type", "clip_vision_model")
    require(config, "vision_config.hidden_act", *ACTIVATIONS)
    require(config, "projector_hidden_act", *ACTIVATIONS)
    require(config, "vision_feature_select_strategy", "default")
    require(config, "spatial_pool_mode", "average")
    known = isinstance(layer, int) and (0 < layer <= depth or -depth <= layer < 0)
    require(config, "vision_feature_layer", *([layer] if known else []))
    require_rope(config, "default", "linear")
    return LlavaNextVideo(config, LlavaProcessor.from_hf(config, preprocessor), dtype).to(dtype)
