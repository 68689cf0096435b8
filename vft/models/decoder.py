"""The decoder that the model families share: grouped-query attention, gated MLPs, rotary positions over packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from vft.common.errors import UserError
from vft.common.types import AttentionPlan, Batch, move
from vft.models.attention import attend, prepare
from vft.models.experts import add_mlp
from vft.models.kv_cache import Cache, CachedLayer
from vft.models.layers import GatedMLP, Linear, RMSNorm, Rotary, apply_all, inverse_frequencies, rotate
from vft.models.processor import linear_factor


def require(config: Any, name: str, *allowed: Any) -> None:
    """Raises UserError if the value of a field, given by its dotted name, is not `allowed`. A missing field is None."""
    value = reduce(lambda part, key: getattr(part, key, None), name.split("."), config)
    if value not in allowed:
        known = f"must be {' or '.join(map(repr, allowed))}" if allowed else "not known"
        raise UserError(f"config.json: {name} = {value!r}: {known} for a {config.model_type} checkpoint")


def require_rope(config: Any, *types: str) -> None:
    """Raises UserError if positions are scaled in another way than these `rope_type`s."""
    rope = config.text_config.rope_parameters
    if rope["rope_type"] not in types:
        raise UserError(
            f"rope_type = {rope['rope_type']!r}, factor {rope.get('factor')} (of config.json, or by "
            f"model.rope_factor): {config.model_type} has {' and '.join(types)} alone; take the scaling out"
        )


def head_width(config: Any) -> int:
    """Width of an attention head, by transformers' `text_config`."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Attention(nn.Module):
    """Grouped-query attention. With `norm`, queries and keys of each head are normalised. With `is_gated`, each head
    has a gate beside its query, whose sigmoid its output is multiplied by."""

    def __init__(
        self, config: Any, bias: bool, norm: Callable[[int, float], nn.Module] | None, is_gated: bool = False
    ) -> None:
        super().__init__()
        width, heads, key_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_width = head = head_width(config)
        self.is_gated = is_gated
        self.q_proj = Linear(width, heads * head * (2 if is_gated else 1), bias=bias)
        self.k_proj = Linear(width, key_heads * head, bias=bias)
        self.v_proj = Linear(width, key_heads * head, bias=bias)
        self.o_proj = Linear(heads * head, width, bias=False)
        self.q_norm = None if norm is None else norm(head, config.rms_norm_eps)
        self.k_norm = None if norm is None else norm(head, config.rms_norm_eps)

    def forward(
        self, x_TE: Tensor, rotary: Rotary, plan: AttentionPlan, past: CachedLayer | None, rows_N: Tensor | None
    ) -> Tensor:
        """[T, E] to [T, E], or to [N, E] of these rows. `past` has the keys of earlier passes."""
        projections = apply_all([self.q_proj, self.k_proj, self.v_proj], x_TE)
        q, k, v = (projected.unflatten(-1, (-1, self.head_width)) for projected in projections)
        gate = None
        if self.is_gated:
            q, gate = q.unflatten(1, (-1, 2)).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        out = (attend if past is None else past.attend)(q, k, v, plan)
        out = out if gate is None else out * gate.sigmoid()
        out = out if rows_N is None else out[rows_N]
        return self.o_proj(out.flatten(1))


class DecoderLayer(nn.Module):
    """One layer of the decoder. By default its MLP is a gated one."""

    def __init__(self, config: Any, qkv_bias: bool, qk_norm: bool, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.self_attn = Attention(config, qkv_bias, RMSNorm if qk_norm else None)
        self.mlp = mlp or GatedMLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_TE: Tensor, rotary: Rotary, plan: AttentionPlan, past: CachedLayer | None, rows_N: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[T, E] to [T, E], or to [N, E] of these rows; with experts also how rows were routed."""
        attended = self.self_attn(self.input_layernorm(x_TE), rotary, plan, past, rows_N)
        x_TE = (x_TE if rows_N is None else x_TE[rows_N]) + attended
        return add_mlp(x_TE, self.mlp(self.post_attention_layernorm(x_TE)))


class Decoder(nn.Module):
    """Embedding, layers and final norm, by transformers' `text_config` and what that does not say.

    `rope_axes` has the row of positions_3T for each of the rotary frequencies; without it, row 0 is for all. With
    `qk_norm` queries and keys of each head are normalised before rotation. A family with layers of its own has
    `make_layer`, which makes the one with a number, and with another kind of norm `norm`.
    """

    def __init__(
        self,
        config: Any,
        rope_axes: Sequence[int] = (),
        qkv_bias: bool = False,
        qk_norm: bool = False,
        make_layer: Callable[[int], nn.Module] | None = None,
        norm: Callable[[int, float], nn.Module] = RMSNorm,
    ) -> None:
        super().__init__()
        self.config, self.rope_axes = config, rope_axes
        make_layer = make_layer or (lambda _: DecoderLayer(config, qkv_bias, qk_norm))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(map(make_layer, range(config.num_hidden_layers)))
        self.norm = norm(config.hidden_size, config.rms_norm_eps)
        self.routing_weight = 0.0
        """Weight of the routing loss in training. Above 0, the last layer is computed for all rows."""
        self.routed: list[Tensor] = []
        """How the last forward pass in training routed rows (`vft.models.experts.Experts`), by layer: those that all
        rows passed."""

    @property
    def attention_layers(self) -> int:
        """Layers whose cost depends on query-key pairs."""
        return len(self.layers)

    @property
    def recurrence_flops(self) -> tuple[int, int]:
        """FLOPs of recurrences in all layers for one token, besides those of matrices: forward, and backward with what
        they compute again."""
        return 0, 0

    def prepare(self, plan: AttentionPlan, x_TE: Tensor, cache: Cache | None = None) -> None:
        """Add to a row's plan what the layers need beside it. It is done outside them, because they may be compiled."""
        prepare(plan, x_TE)

    def forward(
        self, x_TE: Tensor, batch: Batch, cache: Cache | None = None, deepstack: Sequence[Tensor] = ()
    ) -> Tensor:
        """Embeddings [T, E] to the hidden states [N, E] of the rows `batch.target_index_N`, before the final norm.

        Everything after the last layer's attention is computed for these rows only, unless its router has to see all.
        `deepstack` has [M, E] for each of
        the first layers (but not for the last one), which is added to the rows of media after that layer.
        """
        rotary = self._rotary(batch.positions_3T, x_TE.dtype)
        self.prepare(batch.plan, x_TE, cache)
        rows_N = None if self.training and self.routing_weight else batch.target_index_N
        self.routed = []
        for index, layer in enumerate(self.layers):
            # Without a cache, all layers but the last have the same arguments, so one compiled graph serves them.
            past = None if cache is None else CachedLayer(cache, index)
            is_last = index == len(self.layers) - 1
            out = layer(x_TE, rotary, batch.plan, past, rows_N if is_last else None)
            x_TE, *routed = out if isinstance(out, tuple) else (out,)
            self.routed += routed if self.training and not (is_last and rows_N is not None) else []
            if index < len(deepstack):
                x_TE = x_TE.index_add(0, batch.media_index_M, deepstack[index].to(x_TE.dtype))
        return x_TE if rows_N is not None else x_TE[batch.target_index_N]

    def _rotary(self, positions_3T: Tensor, dtype: torch.dtype) -> Rotary:
        rope = self.config.rope_parameters
        width = int(head_width(self.config) * rope.get("partial_rotary_factor", 1.0))
        frequencies = inverse_frequencies(width, rope["rope_theta"], positions_3T.device)
        axis_of = move(torch.tensor(self.rope_axes or (0,) * (width // 2)), positions_3T.device)
        angles_TK = (positions_3T.float()[axis_of].T * (frequencies / linear_factor(rope))).repeat(1, 2)
        return angles_TK.cos().to(dtype), angles_TK.sin().to(dtype)
