"""Keys and values of earlier passes (the past): for generation, and for scoring options after a shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vft.common.types import AttentionPlan, Segment, move
from vft.models.attention import attend, sdpa

ROWS_AHEAD = 512
"""Tokens by which the cache grows at a time: few answers are as long as they are allowed to be."""


class PrefixCache:
    """Stores the keys and values of its first pass, a row of shared prefixes. Later passes are rows of suffixes.

    Plans of later passes are built with `past` = the rows of the first one.
    """

    def __init__(self) -> None:
        self.past: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values by layer."""
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        """What recurrent layers keep of each prefix, by layer: the last inputs of a convolution, and a state."""
        self.prefixes: dict[int, int] = {}
        """Number of each prefix by its first row."""

    def recurrent(self, plan: AttentionPlan) -> tuple[Sequence[Segment], Sequence[int] | None]:
        """Segments of a pass, and which of the first pass each continues (`Recurrence.sources_S`)."""
        if not plan.past:
            self.prefixes = {segment.q_start: number for number, segment in enumerate(plan.segments)}
            return plan.segments, None
        none = len(self.prefixes)
        return plan.segments, [self.prefixes[s.prefix_start] if s.prefix_length else none for s in plan.segments]

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
        """The first pass attends by its plan alone. Later ones have the stored keys before their own."""
        if layer not in self.past:
            self.past[layer] = k_THK, v_THK
            return attend(q_THK, k_THK, v_THK, plan)
        keys, values = self.past[layer]
        assert plan.past == len(keys), (plan.past, len(keys))
        return attend(q_THK, torch.cat([keys, k_THK]), torch.cat([values, v_THK]), plan)


class KeyValueCache:
    """Keys and values of S sequences, one for each prompt of a packed row, and behind it those of its answers.

    The first pass is the packed row of prompts. Each later pass is a row with one token for each answer. The answers of
    a prompt, `samples` of them, take turns behind it and see each its own tokens; the prompt's keys are there once.
    Call `advance` after every pass.
    """

    def __init__(
        self, prompt_lengths: Sequence[int], max_new_tokens: int, device: torch.device, samples: int = 1
    ) -> None:
        lengths_S = torch.tensor(prompt_lengths)
        sequence_T = torch.repeat_interleave(torch.arange(len(lengths_S)), lengths_S)
        starts_S = torch.cumsum(lengths_S, 0) - lengths_S
        self.samples = samples
        """Answers to each prompt (Q)."""
        self.prompts_S = self.lengths_S = move(lengths_S, device)
        """Tokens of each prompt, and of each sequence."""
        self.longest = max(prompt_lengths)
        self.capacity = self.longest + samples * min(max_new_tokens, ROWS_AHEAD)
        """Tokens of each sequence that fit (L)."""
        self.past: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values by layer, [S, L, H, K]."""
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        """What recurrent layers keep of each prompt, then of each answer, by layer: the last inputs of a convolution,
        and a state."""
        self.passes = 0
        self.sequence_T = move(sequence_T, device)
        """Sequence of each row of the current pass."""
        self.index_T = move(torch.arange(len(sequence_T)) - starts_S[sequence_T], device)
        """Index of each row within its sequence."""

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
        """Store the keys and values of this pass, and attend all of each sequence."""
        if not self.passes:
            shape = (len(self.lengths_S), self.capacity, *k_THK.shape[1:])
            self.past[layer] = k_THK.new_zeros(shape), v_THK.new_zeros(shape)
        keys_SLHK, values_SLHK = self.past[layer]
        keys_SLHK[self.sequence_T, self.index_T] = k_THK
        values_SLHK[self.sequence_T, self.index_T] = v_THK
        if not self.passes:
            return attend(q_THK, k_THK, v_THK, plan)
        # A row is the newest token of an answer. It attends the prompt and all tokens of the answer, itself included.
        keys, values = keys_SLHK.transpose(1, 2), values_SLHK.transpose(1, 2)
        q_SHQK = q_THK.unflatten(0, (-1, self.samples)).transpose(1, 2)
        return sdpa(q_SHQK, keys, values, self.visible_SQL[:, None]).transpose(1, 2).flatten(0, 1)

    def recurrent(self, plan: AttentionPlan) -> tuple[Sequence[Segment], Sequence[int] | None]:
        """Segments of a pass, and which of the pass before each continues (`Recurrence.sources_S`)."""
        if not self.passes:
            return plan.segments, None
        rows = range(len(self.lengths_S) * self.samples)
        return [Segment(row, 1) for row in rows], [row // self.samples for row in rows] if self.passes == 1 else rows

    def advance(self) -> None:
        """End a pass, after all layers. The next one has one token for each answer."""
        if self.passes:
            self.lengths_S = self.lengths_S + self.samples
            self.longest += self.samples
        self.passes += 1
        if self.longest == self.capacity:
            more = self.samples * ROWS_AHEAD
            self.capacity += more
            for layer, past in self.past.items():
                keys, values = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in past)
                self.past[layer] = keys, values
        device = self.lengths_S.device
        answer_Q = torch.arange(self.samples, device=device)
        index_SQ = self.lengths_S[:, None] + answer_Q
        self.sequence_T = torch.arange(len(self.lengths_S), device=device).repeat_interleave(self.samples)
        self.index_T = index_SQ.flatten()
        place_L = torch.arange(self.capacity, device=device)
        behind_S1L = (place_L - self.prompts_S[:, None])[:, None]
        is_own_SQL = (behind_S1L < 0) | (behind_S1L % self.samples == answer_Q[:, None])
        self.visible_SQL = is_own_SQL & (place_L <= index_SQ[..., None])


Cache = PrefixCache | KeyValueCache
"""Its `attend` is the attention of a row to the past and to itself, in one layer."""


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """What one layer sees of a cache."""

    cache: Cache
    layer: int

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
        """As `vft.models.attention.attend`, with the keys of earlier passes."""
        return self.cache.attend(self.layer, q_THK, k_THK, v_THK, plan)

    def states(self, sources_S: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The last inputs and the state that each segment continues; None in the first pass."""
        if sources_S is None:
            return None, None
        last, state = (
            torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, sources_S)
            for x in self.cache.states[self.layer]
        )
        return last, state

    def keep(self, last: Tensor, state: Tensor) -> None:
        """Store what a pass leaves, unless later ones begin where the first one ended."""
        if isinstance(self.cache, KeyValueCache) or self.layer not in self.cache.states:
            self.cache.states[self.layer] = last, state
