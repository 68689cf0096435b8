"""Qwen2.5-VL over packed rows: windowed vision tower, merger, M-RoPE decoder.

Module names are the tensor names of released checkpoints. Rules are those of the released model (Qwen2.5-VL technical
report, arXiv 2502.13923, and qwen-vl-utils 0.0.14); where a public implementation differs, the comment says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vft.attention import attend, prepare
from vft.loss import cross_entropy_sum
from vft.models.cache import Cache
from vft.models.layers import GatedMLP, Linear, RMSNorm, inverse_frequencies, rotate
from vft.models.qwen2_5_vl_vision import QwenVision
from vft.types import AttentionPlan, Batch, UserError, VisionLayout, move

MODEL_TYPE = "qwen2_5_vl"

Attend = Callable[[Tensor, Tensor, Tensor, AttentionPlan], Tensor]
"""Queries, keys and values [T, H, K] of a row, and its plan, to [T, H, K]."""

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
class ModelConfig:
    """Shape of the whole model, read from a released or re-saved `config.json`."""

    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tied_head: bool
    vision: VisionConfig

    @staticmethod
    def from_hf(config: Any) -> ModelConfig:
        """From transformers' configuration object (flat and nested files both arrive nested)."""
        text, vision = config.text_config, config.vision_config
        if getattr(text, "use_sliding_window", False):
            raise UserError("config.json: use_sliding_window = true: sliding-window checkpoints are not supported")
        rope = text.rope_parameters
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
            mrope_section=tuple(rope["mrope_section"]),
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


class VisionAttention(nn.Module):
    """Self-attention of patches; who attends whom is the plan's matter."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def forward(self, x_PE: Tensor, cos_PK: Tensor, sin_PK: Tensor, plan: AttentionPlan) -> Tensor:
        """[P, E] to [P, E]."""
        q, k, v = self.qkv(x_PE).unflatten(-1, (3, self.heads, -1)).unbind(1)
        out = attend(rotate(q, cos_PK, sin_PK), rotate(k, cos_PK, sin_PK), v, plan)
        return self.proj(out.flatten(1))


class VisionBlock(nn.Module):
    """One block of the tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, eps=1e-6)
        self.norm2 = RMSNorm(config.width, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = GatedMLP(config.width, config.mlp_width, bias=True)

    def forward(self, x_PE: Tensor, cos_PK: Tensor, sin_PK: Tensor, plan: AttentionPlan) -> Tensor:
        """[P, E] to [P, E]."""
        x_PE = x_PE + self.attn(self.norm1(x_PE), cos_PK, sin_PK, plan)
        return x_PE + self.mlp(self.norm2(x_PE))


class PatchEmbed(nn.Module):
    """The released Conv3d as the matrix product that it is on whole patches (Conv3d is slow or broken on some)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Module()
        # The released shape [E, C, time, y, x]; patches arrive flattened in the same order.
        side = int((config.patch_features // 6) ** 0.5)
        self.proj.weight = nn.Parameter(torch.empty(config.width, 3, 2, side, side))

    def forward(self, x_PD: Tensor) -> Tensor:
        """[P, D] to [P, E]."""
        return F.linear(x_PD, self.proj.get_parameter("weight").flatten(1).to(x_PD.dtype))


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
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.blocks))
        self.merger = Merger(config)

    def forward(self, pixels_PD: Tensor, layout: VisionLayout) -> Tensor:
        """Normalised pixels [P, D] in media order to embeddings [M, E] in media order."""
        trained = any(p.requires_grad for p in (*self.patch_embed.parameters(), *self.blocks.parameters()))
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            x_PE = self.patch_embed(pixels_PD[layout.order_P])
            # Rotary in float32, as the reference model computes it in the tower.
            width = self.config.width // self.config.heads
            frequencies = inverse_frequencies(width // 2, 10000.0, x_PE.device)
            angles_PK = (layout.positions_P2[:, :, None] * frequencies).flatten(1).repeat(1, 2)
            cos_PK, sin_PK = angles_PK.cos(), angles_PK.sin()
            for index, block in enumerate(self.blocks):
                kind = "frame" if index in self.config.full_attention_blocks else "window"
                x_PE = block(x_PE, cos_PK, sin_PK, layout.plans[kind])
        merger_trained = trained or any(p.requires_grad for p in self.merger.parameters())
        with torch.set_grad_enabled(merger_trained and torch.is_grad_enabled()):
            return self.merger(x_PE)[layout.restore_M]


class Attention(nn.Module):
    """Grouped-query attention of the decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.q_proj = Linear(config.width, config.heads * config.head_width)
        self.k_proj = Linear(config.width, config.key_heads * config.head_width)
        self.v_proj = Linear(config.width, config.key_heads * config.head_width)
        self.o_proj = Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(
        self,
        x_TE: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        plan: AttentionPlan,
        attend_kept: Attend | None,
        wanted_N: Tensor | None,
    ) -> Tensor:
        """[T, E] to [T, E], or to the rows that are wanted; with `attend_kept` the keys of earlier calls are attended
        too."""
        q, k, v = (proj(x_TE).unflatten(-1, (-1, self.head_width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos_TK, sin_TK), rotate(k, cos_TK, sin_TK)
        out = (attend_kept or attend)(q, k, v, plan)
        out = out if wanted_N is None else out[wanted_N]
        return self.o_proj(out.flatten(1))


class DecoderLayer(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.width, config.mlp_width, bias=False)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x_TE: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        plan: AttentionPlan,
        attend_kept: Attend | None = None,
        wanted_N: Tensor | None = None,
    ) -> Tensor:
        """[T, E] to [T, E], or to [N, E] where only some rows are wanted."""
        attended = self.self_attn(self.input_layernorm(x_TE), cos_TK, sin_TK, plan, attend_kept, wanted_N)
        x_TE = (x_TE if wanted_N is None else x_TE[wanted_N]) + attended
        return x_TE + self.mlp(self.post_attention_layernorm(x_TE))


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, x_TE: Tensor, positions_3T: Tensor, plan: AttentionPlan, wanted_N: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Embeddings [T, E] to the hidden states [N, E] of the rows that are wanted, before the final norm.

        What follows the last layer's attention is computed for these rows alone: nothing reads the others.
        """
        cos_TK, sin_TK = self._rotary(positions_3T, x_TE.dtype)
        prepare(plan, x_TE)  # outside the layers, which may be compiled
        for index, layer in enumerate(self.layers):
            # Without a cache all layers but the last are called alike: one compiled graph serves them.
            attend_kept = None if cache is None else partial(cache.attend, index)
            last = index == len(self.layers) - 1
            x_TE = layer(x_TE, cos_TK, sin_TK, plan, attend_kept, wanted_N if last else None)
        return x_TE

    def _rotary(self, positions_3T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """M-RoPE: the frequencies are shared out to time, height and width in runs of `mrope_section`."""
        frequencies = inverse_frequencies(self.config.head_width, self.config.rope_theta, positions_3T.device)
        axis_of = torch.repeat_interleave(
            torch.arange(3), torch.tensor(self.config.mrope_section), output_size=frequencies.numel()
        ).to(positions_3T.device)
        angles_TK = (positions_3T.float()[axis_of].T * frequencies).repeat(1, 2)
        return angles_TK.cos().to(dtype), angles_TK.sin().to(dtype)


class Qwen2_5_VL(nn.Module):
    """The whole model: a batch to its summed loss, or to logits."""

    def __init__(self, config: ModelConfig, spec: QwenVision, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.compute_dtype = compute_dtype
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        self.lm_head = None if config.tied_head else Linear(config.width, config.vocabulary, bias=False)

    def forward(self, batch: Batch, cache: Cache | None = None, loss: bool = True) -> Tensor:
        """The sum of cross-entropies over `batch.target_ids_N` (a scalar); without `loss` the logits [N, V]."""
        x_TE = self.embed(batch)
        x_NE = self.model(x_TE, batch.positions_3T, batch.plan, batch.target_index_N, cache)
        hidden_NE = self.model.norm(x_NE)
        if loss:
            return cross_entropy_sum(hidden_NE, self.head, self.config.vocabulary, batch.target_ids_N)
        return self.head(hidden_NE).float()

    def head(self, hidden_NE: Tensor) -> Tensor:
        """Logits [N, V]. A head of its own is called as the module that it is: it may have an adapter."""
        if self.lm_head is not None:
            return self.lm_head(hidden_NE)
        return F.linear(hidden_NE, self.model.embed_tokens.weight.to(hidden_NE.dtype))

    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings [T, E] with the media's in their places, in the compute dtype."""
        x_TE = self.model.embed_tokens(batch.input_ids_T).to(self.compute_dtype)
        if batch.layout is not None:
            media_ME = self.visual(self.normalise(batch.pixels_PD), batch.layout)
            return x_TE.index_copy(0, batch.media_index_M, media_ME.to(x_TE.dtype))
        if not batch.continues and any(p.requires_grad for p in self.visual.parameters()):
            # A trained tower is sharded: it runs in every process, or the others wait for ever; and in the graph, so
            # that backward doesn't either.
            layout = move(self.spec.layout([(1, self.spec.merge, self.spec.merge)]), x_TE.device)
            dummy_PD = batch.pixels_PD.new_zeros(self.spec.merge**2, self.spec.patch_features)
            x_TE = x_TE + 0.0 * self.visual(self.normalise(dummy_PD), layout).sum()
        return x_TE

    def normalise(self, pixels_PD: Tensor) -> Tensor:
        """uint8 patches to (x / 255 - mean) / std by channel, in float32, then in the compute dtype."""
        per_channel = pixels_PD.shape[1] // 3
        mean_D, std_D = (
            torch.tensor(values, device=pixels_PD.device).repeat_interleave(per_channel)
            for values in (self.spec.mean, self.spec.std)
        )
        return ((pixels_PD.float() / 255 - mean_D) / std_D).to(self.compute_dtype)


def build(config: Any, preprocessor: dict[str, Any], dtype: torch.dtype) -> Qwen2_5_VL:
    """The model of transformers' configuration object; parameters (not set) and computation in `dtype`."""
    spec = QwenVision.from_hf(config, preprocessor)
    return Qwen2_5_VL(ModelConfig.from_hf(config), spec, dtype).to(dtype)
