"""Qwen3.5 over packed rows: a decoder in which most layers are a linear recurrence (Gated DeltaNet) and the
others gated attention, behind the vision encoder of Qwen3-VL without DeepStack.

Module names are the tensor names of released checkpoints. Rules are those of the released model, by its configuration
and transformers' `models/qwen3_5`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vft.common.errors import UserError
from vft.common.types import AttentionPlan
from vft.models.decoder import Attention, Decoder, require, require_rope
from vft.models.delta_rule import Shape, convolve, delta_rule, flops_of, has_fla, recurrence_of
from vft.models.experts import add_mlp
from vft.models.kv_cache import Cache, CachedLayer
from vft.models.layers import GatedMLP, Linear, OffsetRMSNorm, Rotary, apply_all
from vft.models.qwen3_vl.model import Qwen3VL, interleaved
from vft.models.qwen3_vl.processor import Qwen3Processor

MODEL_TYPE = "qwen3_5"
LINEAR, FULL = "linear_attention", "full_attention"
"""Values of `layer_types`."""
IN_FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")
"""Endings of the names of parameters that releases keep in float32 beside bf16: small errors in them add up along a
row."""


class GatedNorm(nn.Module):
    """RMS norm of each head, times weight, times silu(gate), in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x_THV: Tensor, gate_THV: Tensor) -> Tensor:
        """[T, H, V] to the same shape."""
        x = x_THV.float()
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).to(x_THV.dtype)
        return (self.weight.float() * x * F.silu(gate_THV.float())).to(x_THV.dtype)


class DeltaNet(nn.Module):
    """Gated DeltaNet: a short convolution over queries, keys and values, then the gated delta rule."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        keys, values = self.key_heads * config.linear_key_head_dim, self.value_heads * config.linear_value_head_dim
        self.widths = (keys, keys, values)
        self.in_proj_qkv = Linear(width, sum(self.widths), bias=False)
        self.in_proj_z = Linear(width, values, bias=False)
        self.in_proj_b = Linear(width, self.value_heads, bias=False)
        self.in_proj_a = Linear(width, self.value_heads, bias=False)
        # Only its weight is used: `vft.models.delta_rule.convolve`.
        self.conv1d = nn.Conv1d(
            sum(self.widths), sum(self.widths), config.linear_conv_kernel_dim, groups=sum(self.widths), bias=False
        )
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.norm = GatedNorm(config.linear_value_head_dim, config.rms_norm_eps)
        self.out_proj = Linear(values, width, bias=False)

        self.flops = [
            self.value_heads * one for one in flops_of(config.linear_key_head_dim, config.linear_value_head_dim)
        ]
        """Of the delta rule for one token, forward and backward."""

    def forward(self, x_TE: Tensor, plan: AttentionPlan, past: CachedLayer | None, rows_N: Tensor | None) -> Tensor:
        """[T, E] to [T, E], or to [N, E] of these rows. `past` has the states of earlier passes."""
        recurrence = plan.recurrence
        left, initial = (None, None) if past is None else past.states(recurrence.sources_S)
        qkv, z, b, a = apply_all([self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a], x_TE)
        mixed, last = convolve(qkv, self.conv1d.weight.squeeze(1), recurrence, left)
        q, k, v = F.silu(mixed).split(self.widths, dim=-1)
        q, k = (x.unflatten(-1, (self.key_heads, -1)) for x in (q, k))
        v, z = (x.unflatten(-1, (self.value_heads, -1)) for x in (v, z))
        decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        out, states = delta_rule(q, k, v, decay, b.sigmoid(), recurrence, initial)
        if past is not None:
            past.keep(last[: recurrence.count], states[: recurrence.count])
        if rows_N is not None:
            out, z = out[rows_N], z[rows_N]
        return self.out_proj(self.norm(out, z).flatten(1))


class HybridLayer(nn.Module):
    """One layer of the decoder: a mixer of tokens, then an MLP."""

    def __init__(self, config: Any, kind: str, mlp: nn.Module) -> None:
        super().__init__()
        if kind == LINEAR:
            self.linear_attn = DeltaNet(config)
        else:
            self.self_attn = Attention(config, bias=False, norm=OffsetRMSNorm, is_gated=True)
        self.mlp = mlp
        self.input_layernorm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_linear = kind == LINEAR

    def forward(
        self, x_TE: Tensor, rotary: Rotary, plan: AttentionPlan, past: CachedLayer | None, rows_N: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[T, E] to [T, E], or to [N, E] of these rows."""
        normalised = self.input_layernorm(x_TE)
        if self.is_linear:
            mixed = self.linear_attn(normalised, plan, past, rows_N)
        else:
            mixed = self.self_attn(normalised, rotary, plan, past, rows_N)
        x_TE = (x_TE if rows_N is None else x_TE[rows_N]) + mixed
        return add_mlp(x_TE, self.mlp(self.post_attention_layernorm(x_TE)))


class HybridDecoder(Decoder):
    """The decoder, with the recurrence of a row beside its attention."""

    @property
    def attention_layers(self) -> int:
        """Layers whose cost depends on query-key pairs."""
        return self.config.layer_types.count(FULL)

    @property
    def recurrence_flops(self) -> tuple[int, int]:
        """Those of the delta rule in all layers for one token, forward and backward."""
        forward, backward = zip(*(one.flops for one in self.layers.modules() if isinstance(one, DeltaNet)), strict=True)
        return sum(forward), sum(backward)

    def prepare(self, plan: AttentionPlan, x_TE: Tensor, cache: Cache | None = None) -> None:
        """As `Decoder.prepare`; also how the row's segments are cut into chunks."""
        super().prepare(plan, x_TE, cache)
        if plan.recurrence is None:
            segments, sources = (plan.segments, None) if cache is None else cache.recurrent(plan)
            by_fla = has_fla(x_TE.device, x_TE.dtype, rule_shape(self.config))
            plan.recurrence = recurrence_of(segments, self.config.linear_conv_kernel_dim, x_TE.device, sources, by_fla)


def rule_shape(text: Any) -> Shape:
    """That of the delta rule."""
    heads = text.linear_num_key_heads, text.linear_num_value_heads
    return *heads, text.linear_key_head_dim, text.linear_value_head_dim


class Qwen35(Qwen3VL):
    """The model."""

    unused = ("mtp.",)
    in_float32 = IN_FLOAT32

    def make_decoder(self, text: Any) -> Decoder:
        """Layers by `layer_types`."""
        axes = interleaved(text.rope_parameters["mrope_section"])
        return HybridDecoder(text, axes, make_layer=self.make_layer, norm=OffsetRMSNorm)

    def make_layer(self, index: int) -> nn.Module:
        """The decoder layer with this number."""
        return HybridLayer(self.config, self.config.layer_types[index], self.make_mlp())

    def make_mlp(self) -> nn.Module:
        """The MLP of a layer."""
        return GatedMLP(self.config.hidden_size, self.config.intermediate_size, bias=False)


def build(config: Any, preprocessor: dict[str, Any], dtype: torch.dtype, kind: type[Qwen35] = Qwen35) -> Qwen35:
    """The model of transformers' configuration object; parameters (not set) and computation in `dtype`. `kind` is a
    family that differs in its decoder's MLPs alone."""
    text, vision = config.text_config, config.vision_config
    require_rope(config, "default")
    require(config, "text_config.attn_output_gate", True, None)
    require(config, "text_config.attention_bias", False, None)
    require(config, "text_config.hidden_act", "silu")
    if unknown := sorted(set(text.layer_types) - {LINEAR, FULL}):
        raise UserError(f"config.json: layer_types has {unknown}: must be {LINEAR!r} or {FULL!r}")
    if getattr(vision, "deepstack_visual_indexes", None):
        raise UserError(f"config.json: deepstack_visual_indexes = {vision.deepstack_visual_indexes}: must be empty")
    model = kind(config, Qwen3Processor.of(config, preprocessor), dtype).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(IN_FLOAT32):
            parameter.data = parameter.data.float()
    return model
