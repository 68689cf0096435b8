"""The decoder that the model families share: grouped-query attention, gated MLPs, rotary positions over packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from vft.common.errors import UserError
from vft.common.types import AttentionPlan, Batch
from vft.models.attention import attend, prepare
from vft.models.kv_cache import Cache
from vft.models.layers import GatedMLP, Linear, RMSNorm, Rotary, inverse_frequencies, rotate

Attend = Callable[[Tensor, Tensor, Tensor, AttentionPlan], Tensor]
"""Queries, keys and values [T, H, K] of a row, and its plan, to [T, H, K]."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a decoder."""

    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    norm_eps: float
    rope_theta: float
    rope_axes: tuple[int, ...]
    """Row of positions_3T for each of the head_width / 2 rotary frequencies. Empty: row 0 for all."""
    rope_factor: float
    """Positions are divided by it (linear scaling)."""
    tied_head: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    """Queries and keys of each head are normalised before rotation."""

    @staticmethod
    def read(
        config: Any, rope_axes: Iterable[int] = (), rope_types: Sequence[str] = ("default",), **own: bool
    ) -> DecoderConfig:
        """From transformers' configuration object of a complete model. Flat and nested files both arrive nested.

        Raises UserError if positions are scaled in another way than `rope_types`.
        """
        text, rope = config.text_config, config.text_config.rope_parameters
        if rope["rope_type"] not in rope_types:
            raise UserError(
                f"rope_type = {rope['rope_type']!r}, factor {rope.get('factor')} (of config.json, or by "
                f"model.rope_factor): {config.model_type} has {' and '.join(rope_types)} alone; take the scaling out"
            )
        return DecoderConfig(
            vocabulary=text.vocab_size,
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            key_heads=text.num_key_value_heads,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            norm_eps=text.rms_norm_eps,
            rope_theta=rope["rope_theta"],
            rope_axes=tuple(rope_axes),
            rope_factor=linear_factor(rope),
            tied_head=config.tie_word_embeddings,
            **own,
        )


def linear_factor(rope: Mapping[str, Any]) -> float:
    """Factor of linear scaling by which `rope_parameters` extend the positions that a model was trained for, else 1."""
    return float(rope["factor"]) if rope["rope_type"] == "linear" else 1.0


def context_of(text: Any) -> int:
    """Positions that a model supports: those of its language model's configuration times the linear scaling."""
    return int(text.max_position_embeddings * linear_factor(text.rope_parameters))


def require(config: Any, name: str, *allowed: Any) -> None:
    """Raises UserError if the value of a field, given by its dotted name, is not `allowed`. A missing field is None."""
    value = reduce(lambda part, key: getattr(part, key, None), name.split("."), config)
    if value not in allowed:
        known = f"must be {' or '.join(map(repr, allowed))}" if allowed else "not known"
        raise UserError(f"config.json: {name} = {value!r}: {known} for a {config.model_type} checkpoint")


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.q_proj = Linear(config.width, config.heads * config.head_width, bias=config.qkv_bias)
        self.k_proj = Linear(config.width, config.key_heads * config.head_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.width, config.key_heads * config.head_width, bias=config.qkv_bias)
        self.o_proj = Linear(config.heads * config.head_width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x_TE: Tensor, rotary: Rotary, plan: AttentionPlan, attend_cached: Attend | None, rows_N: Tensor | None
    ) -> Tensor:
        """[T, E] to [T, E], or to [N, E] of these rows. `attend_cached` also attends the keys of earlier passes."""
        q, k, v = (proj(x_TE).unflatten(-1, (-1, self.head_width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        out = (attend_cached or attend)(q, k, v, plan)
        out = out if rows_N is None else out[rows_N]
        return self.o_proj(out.flatten(1))


class DecoderLayer(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.width, config.mlp_width, bias=False)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, x_TE: Tensor, rotary: Rotary, plan: AttentionPlan, attend_cached: Attend | None, rows_N: Tensor | None
    ) -> Tensor:
        """[T, E] to [T, E], or to [N, E] of these rows."""
        attended = self.self_attn(self.input_layernorm(x_TE), rotary, plan, attend_cached, rows_N)
        x_TE = (x_TE if rows_N is None else x_TE[rows_N]) + attended
        return x_TE + self.mlp(self.post_attention_layernorm(x_TE))


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, x_TE: Tensor, batch: Batch, cache: Cache | None = None, deepstack: Sequence[Tensor] = ()
    ) -> Tensor:
        """Embeddings [T, E] to the hidden states [N, E] of the rows `batch.target_index_N`, before the final norm.

        Everything after the last layer's attention is computed for these rows only. `deepstack` has [M, E] for each of
        the first layers (but not for the last one), which is added to the rows of media after that layer.
        """
        rotary = self._rotary(batch.positions_3T, x_TE.dtype)
        prepare(batch.plan, x_TE)  # outside the layers, which may be compiled
        for index, layer in enumerate(self.layers):
            # Without a cache, all layers but the last have the same arguments, so one compiled graph serves them.
            attend_cached = None if cache is None else partial(cache.attend, index)
            is_last = index == len(self.layers) - 1
            x_TE = layer(x_TE, rotary, batch.plan, attend_cached, batch.target_index_N if is_last else None)
            if index < len(deepstack):
                x_TE = x_TE.index_add(0, batch.media_index_M, deepstack[index].to(x_TE.dtype))
        return x_TE

    def _rotary(self, positions_3T: Tensor, dtype: torch.dtype) -> Rotary:
        config = self.config
        frequencies = inverse_frequencies(config.head_width, config.rope_theta, positions_3T.device)
        axis_of = torch.tensor(config.rope_axes or (0,) * (config.head_width // 2)).to(positions_3T.device)
        angles_TK = (positions_3T.float()[axis_of].T * (frequencies / config.rope_factor)).repeat(1, 2)
        return angles_TK.cos().to(dtype), angles_TK.sin().to(dtype)
