"""Keys and values kept from one pass to the next: while answers are generated, and while options are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vft.common.types import AttentionPlan
from vft.models.attention import attend

ROWS_AHEAD = 512
"""Tokens of an answer for which there is room at a time: few answers are as long as they may be."""


class Cache(Protocol):
    """What an attention layer asks of a cache."""

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
        """Attention of the row to what is kept and to itself."""
        ...


class PrefixCache:
    """Keeps the keys and values of its first pass, a row of trunks; later passes are rows of branches upon them.

    Their plans are built with `kept` = the rows of the first pass.
    """

    def __init__(self, layers: int) -> None:
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
        """The first pass attends as its plan says; a later one sees the kept keys before its own."""
        kept = self.kept[layer]
        if kept is None:
            self.kept[layer] = k_THK, v_THK
            return attend(q_THK, k_THK, v_THK, plan)
        assert plan.kept == len(kept[0]), (plan.kept, len(kept[0]))
        return attend(q_THK, torch.cat([kept[0], k_THK]), torch.cat([kept[1], v_THK]), plan)


class KeyValueCache:
    """One sequence for each prompt of a packed row.

    The first forward pass takes the packed prompts, each later one a row with one token for each sequence. Call
    `advance` after every pass.
    """

    def __init__(self, prompt_lengths: Sequence[int], max_new_tokens: int, layers: int, device: torch.device) -> None:
        lengths_S = torch.tensor(prompt_lengths, device=device)
        self.lengths_S = lengths_S
        """Tokens kept of each sequence."""
        self.longest = max(prompt_lengths)
        self.capacity = self.longest + min(max_new_tokens, ROWS_AHEAD)
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.prefilled = False
        self.sequence_T = torch.repeat_interleave(torch.arange(len(prompt_lengths), device=device), lengths_S)
        starts_S = torch.cumsum(lengths_S, 0) - lengths_S
        self.place_T = torch.arange(len(self.sequence_T), device=device) - starts_S[self.sequence_T]

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
        """Keep this pass's keys and values, and attend all that are kept of each sequence."""
        if not self.prefilled:
            shape = (len(self.lengths_S), self.capacity, *k_THK.shape[1:])
            self.kept[layer] = k_THK.new_zeros(shape), v_THK.new_zeros(shape)
        kept = self.kept[layer]
        assert kept is not None
        keys_SLHK, values_SLHK = kept
        keys_SLHK[self.sequence_T, self.place_T] = k_THK
        values_SLHK[self.sequence_T, self.place_T] = v_THK
        if not self.prefilled:
            return attend(q_THK, k_THK, v_THK, plan)
        # Row s is the newest token of sequence s: it sees what the sequence holds, itself included.
        visible_SL = torch.arange(self.capacity, device=q_THK.device) <= self.place_T[:, None]
        out = F.scaled_dot_product_attention(
            q_THK.unsqueeze(2),
            keys_SLHK.transpose(1, 2),
            values_SLHK.transpose(1, 2),
            attn_mask=visible_SL[:, None, None, :],
            enable_gqa=q_THK.shape[1] != k_THK.shape[1],
        )
        return out.squeeze(2)

    def advance(self) -> None:
        """The pass is over in every layer: the next one brings one token for each sequence."""
        if self.prefilled:
            self.lengths_S = self.lengths_S + 1
            self.longest += 1
        self.prefilled = True
        if self.longest == self.capacity:
            self.capacity += ROWS_AHEAD
            for layer, kept in enumerate(self.kept):
                if kept is not None:
                    keys, values = (F.pad(one, (0, 0, 0, 0, 0, ROWS_AHEAD)) for one in kept)
                    self.kept[layer] = keys, values
        self.sequence_T = torch.arange(len(self.lengths_S), device=self.lengths_S.device)
        self.place_T = self.lengths_S
