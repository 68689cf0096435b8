"""LLaVA-NeXT-Video over packed rows: CLIP tower, pooling, projector, and a Llama or Mistral decoder.

Module names are the tensor names of released checkpoints (llava-hf/LLaVA-NeXT-Video-7B-hf and its siblings).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vft.attention import attend
from vft.models.decoder import Decoder, DecoderConfig
from vft.models.family import VideoLanguageModel, VisionParts
from vft.models.layers import LayerNorm, Linear
from vft.models.llava_next_video_vision import LlavaLayout, LlavaVision, linear_factor
from vft.types import AttentionPlan, MediaInfo, MediaRef, UserError, VisionLayout, VisionLimits

MODEL_TYPE = "llava_next_video"

PEFT_PREFIXES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}
"""Released names to those of transformers' model in memory, which adapter files use."""


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """Shape of the vision tower and the projector."""

    width: int
    mlp_width: int
    layers: int
    layers_read: int
    """Layers whose output is used: features are read before the last."""
    heads: int
    norm_eps: float
    activation: str
    patches: int
    """Of one square."""
    patch: int
    projector_activation: str
    projector_bias: bool
    stride: int


@dataclass(frozen=True, slots=True)
class ModelConfig(DecoderConfig):
    """Shape of the whole model, read from a released `config.json`."""

    tower: TowerConfig

    @staticmethod
    def from_hf(config: Any) -> ModelConfig:
        """From transformers' configuration object. UserError for what this file does not do."""
        text = config.text_config
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        rope = text.rope_parameters
        _require("text_config.model_type", text.model_type, ("llama", "mistral"))
        _require("text_config.hidden_act", text.hidden_act, ("silu",))
        _require("text_config.rope_parameters.rope_type", rope["rope_type"], ("default", "linear"))
        for name in ("attention_bias", "mlp_bias"):
            _require(f"text_config.{name}", getattr(text, name, False), (False,))
        window = getattr(text, "sliding_window", None)
        _require("text_config.sliding_window", window, (None, *([window] if _covers(window, text) else [])))
        return ModelConfig(
            vocabulary=text.vocab_size,
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            key_heads=text.num_key_value_heads,
            head_width=head_width,
            norm_eps=text.rms_norm_eps,
            rope_theta=rope["rope_theta"],
            rope_axes=(0,) * (head_width // 2),
            rope_factor=linear_factor(text),
            qkv_bias=False,
            qk_norm=False,
            tied_head=config.tie_word_embeddings,
            tower=_tower_config(config),
        )


def _tower_config(config: Any) -> TowerConfig:
    vision, layer = config.vision_config, config.vision_feature_layer
    _require("vision_config.model_type", vision.model_type, ("clip_vision_model",))
    _require("vision_config.hidden_act", vision.hidden_act, tuple(ACTIVATIONS))
    _require("projector_hidden_act", config.projector_hidden_act, tuple(ACTIVATIONS))
    _require("vision_feature_select_strategy", config.vision_feature_select_strategy, ("default",))
    depth = vision.num_hidden_layers
    read = layer if not isinstance(layer, int) or layer >= 0 else depth + 1 + layer
    _require("vision_feature_layer", layer, (layer,) if isinstance(read, int) and 0 < read <= depth else ())
    return TowerConfig(
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        layers=depth,
        layers_read=read,
        heads=vision.num_attention_heads,
        norm_eps=vision.layer_norm_eps,
        activation=vision.hidden_act,
        patches=(vision.image_size // vision.patch_size) ** 2,
        patch=vision.patch_size,
        projector_activation=config.projector_hidden_act,
        projector_bias=config.multimodal_projector_bias,
        stride=config.spatial_pool_stride,
    )


def _covers(window: int | None, text: Any) -> bool:
    return window is not None and window >= text.max_position_embeddings


def _require(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        known = f"must be {' or '.join(map(repr, allowed))}" if allowed else "not known"
        raise UserError(f"config.json: {name} = {value!r}: {known} for a {MODEL_TYPE} checkpoint")


class TowerAttention(nn.Module):
    """Self-attention within a square."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.k_proj = Linear(config.width, config.width)
        self.v_proj = Linear(config.width, config.width)
        self.q_proj = Linear(config.width, config.width)
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x_PE: Tensor, plan: AttentionPlan) -> Tensor:
        """[P, E] to [P, E]."""
        q, k, v = (proj(x_PE).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, plan).flatten(1))


class TowerMLP(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = Linear(config.width, config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        return self.fc2(self.activation(self.fc1(x)))


class TowerLayer(nn.Module):
    """One layer of the tower."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.self_attn = TowerAttention(config)
        self.layer_norm1 = LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = TowerMLP(config)
        self.layer_norm2 = LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x_PE: Tensor, plan: AttentionPlan) -> Tensor:
        """[P, E] to [P, E]."""
        x_PE = x_PE + self.self_attn(self.layer_norm1(x_PE), plan)
        return x_PE + self.mlp(self.layer_norm2(x_PE))


class Embeddings(nn.Module):
    """Patches, with a class token before those of each square, and learnt positions."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = nn.Module()
        # The released Conv2d's shape; on whole patches it is a matrix product.
        weight = torch.empty(config.width, 3, config.patch, config.patch)
        self.patch_embedding.weight = nn.Parameter(weight)
        self.position_embedding = nn.Embedding(config.patches + 1, config.width)
        self.patches = config.patches

    def forward(self, x_PD: Tensor) -> Tensor:
        """[squares x patches, D] to [squares x (1 + patches), E]."""
        weight = self.patch_embedding.get_parameter("weight").flatten(1)
        x_SPE = F.linear(x_PD, weight.to(x_PD.dtype)).unflatten(0, (-1, self.patches))
        first_S1E = self.class_embedding.to(x_SPE.dtype).expand(len(x_SPE), 1, -1)
        positions_PE = self.position_embedding.weight.to(x_SPE.dtype)
        return (torch.cat([first_S1E, x_SPE], dim=1) + positions_PE).flatten(0, 1)


class Encoder(nn.Module):
    """Holds the layers, under their released names."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.layers))


class ClipTower(nn.Module):
    """Squares to features. Layers behind the one that is read are there for their names alone."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = LayerNorm(config.width, eps=config.norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.width, eps=config.norm_eps)

    @property
    def layers_read(self) -> list[nn.Module]:
        """The layers that are run."""
        return list(self.encoder.layers)[: self.config.layers_read]

    def forward(self, pixels_PD: Tensor, plan: AttentionPlan) -> Tensor:
        """Normalised pixels [P, D] to features [P, E], without those of the class tokens."""
        x_PE = self.pre_layrnorm(self.embeddings(pixels_PD))
        for layer in self.layers_read:
            x_PE = layer(x_PE, plan)
        return x_PE.unflatten(0, (-1, 1 + self.config.patches))[:, 1:].flatten(0, 1)


class VisionTower(nn.Module):
    """The released name of the tower's outer module. It builds no graph unless something of it is trained."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.vision_model = ClipTower(config)

    def forward(self, pixels_PD: Tensor, layout: LlavaLayout) -> Tensor:
        """Normalised pixels [P, D] to features [P, E]."""
        trained = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.vision_model(pixels_PD, layout.plans["square"])


class Projector(nn.Module):
    """Features to the width of the language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.tower.projector_activation]
        self.linear_1 = Linear(config.tower.width, config.width, bias=config.tower.projector_bias)
        self.linear_2 = Linear(config.width, config.width, bias=config.tower.projector_bias)

    def forward(self, x_RE: Tensor) -> Tensor:
        """[R, tower's width] to [R, E]."""
        return self.linear_2(self.activation(self.linear_1(x_RE)))


class LanguageModel(nn.Module):
    """Decoder and head, under their released names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = None if config.tied_head else Linear(config.width, config.vocabulary, bias=False)


class LlavaNextVideo(VideoLanguageModel):
    """The whole model."""

    peft_prefixes = PEFT_PREFIXES
    config: ModelConfig
    spec: LlavaVision

    def __init__(self, config: ModelConfig, spec: LlavaVision, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.compute_dtype = compute_dtype
        tower = "vision_tower.vision_model"
        unread = range(config.tower.layers_read, config.tower.layers)
        self.towers = {
            "language_model": ("language_model.",),
            "merger": ("multi_modal_projector.", "image_newline."),
            "unread": (f"{tower}.post_layernorm.", *(f"{tower}.encoder.layers.{i}." for i in unread)),
            "vision_tower": ("vision_tower.",),
        }
        self.vision_tower = VisionTower(config.tower)
        self.multi_modal_projector = Projector(config)
        self.image_newline = nn.Parameter(torch.empty(config.width))
        self.language_model = LanguageModel(config)

    @property
    def decoder(self) -> Decoder:
        """Embedding, layers and norm."""
        return self.language_model.model

    @property
    def output_head(self) -> nn.Linear | None:
        """None where the embedding serves as head."""
        return self.language_model.lm_head

    @property
    def vision(self) -> VisionParts:
        """Tower and projector."""
        tower, config = self.vision_tower.vision_model, self.config.tower
        read = tower.layers_read
        weights = [parameter for layer in read for parameter in layer.parameters()]
        return VisionParts(
            modules=(self.vision_tower, self.multi_modal_projector),
            blocks=read,
            tower=(tower.embeddings.patch_embedding.get_parameter("weight"), *weights),
            merger=tuple(self.multi_modal_projector.parameters()),
            patches_per_row=config.stride**2,
            pair_widths={"square": config.width * len(read)},
        )

    def see(self, pixels_PD: Tensor, layout: VisionLayout) -> tuple[Tensor, ...]:
        """Normalised pixels [P, D] to embeddings [M, E]."""
        assert isinstance(layout, LlavaLayout)
        features_PE = self.vision_tower(pixels_PD, layout)
        trained = any(parameter.requires_grad for parameter in self.media_parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            rows_RE = torch.cat([features_PE[layout.pooled_RG].mean(1), features_PE[layout.kept_R]])
            projected_RE = self.multi_modal_projector(rows_RE)
            # Joined even where no picture is, so that its gradient exists in every process.
            newline_E = self.image_newline.to(projected_RE.dtype)
            return (torch.cat([projected_RE, newline_E[None]])[layout.tokens_M],)

    def least_media(self) -> tuple[int, VisionLayout]:
        """One frame."""
        spec = self.spec
        limits = VisionLimits(None, 1, 1, 1, 1, spec.side**2, None)
        plan = spec.plan(MediaRef("video", ()), MediaInfo("video", spec.side, spec.side, 1, 1.0), limits)
        return spec.grid**2, spec.layout([plan])


def build(config: Any, preprocessor: dict[str, Any], dtype: torch.dtype) -> LlavaNextVideo:
    """The model of transformers' configuration object; parameters (not set) and computation in `dtype`."""
    spec = LlavaVision.from_hf(config, preprocessor)
    return LlavaNextVideo(ModelConfig.from_hf(config), spec, dtype).to(dtype)
