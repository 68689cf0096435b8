"""Answers, token by token, for all prompts of a packed row at once."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vft.common.types import Batch
from vft.distributed.process_group import sum_over_ranks
from vft.distributed.signals import asked, stop_if
from vft.models.attention import build_plan, document_segments
from vft.models.base import VideoLanguageModel
from vft.models.kv_cache import KeyValueCache


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: the likeliest token (greedy)."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability to draw from."""
    seed: int = 0

    def stream(self, name: str) -> torch.Generator:
        """Random numbers for the question of this name: the same whatever else is asked, and wherever."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode(errors="replace")).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True, slots=True)
class Generated:
    """What the model said to one prompt."""

    ids: list[int]
    """Without the token that ended it."""
    ended: bool
    """Whether the model ended it, and not the limit of tokens."""


@torch.no_grad()
def generate(
    model: VideoLanguageModel,
    prompts: Batch,
    stop_ids: Collection[int],
    sampling: Sampling,
    on_tokens: Callable[[list[int | None]], None] | None = None,
    names: Sequence[str] = (),
    context: int | None = None,
) -> list[Generated]:
    """New token ids for each document of `prompts` (one branch each), up to a token of `stop_ids`, `max_new_tokens` or
    the end of the model's `context` (in tokens).

    All processes go on until the last of them is done, because a sharded model needs every one in each pass. An empty
    batch takes part and gives no answers. `on_tokens` gets each pass's tokens, None for a prompt that has ended. What
    is drawn for a prompt depends on its name and the seed alone; without `names` a document's first sample id is one.
    """
    device = prompts.input_ids_T.device
    lengths = [document.num_tokens for document in prompts.documents] or [1]
    limits = [min(sampling.max_new_tokens, (context or sys.maxsize) - length) for length in lengths]
    ends_S = torch.tensor(lengths).cumsum(0) - 1
    cache = KeyValueCache(lengths, sampling.max_new_tokens, model.config.layers, device)
    next_position_S = torch.stack([part.max() for part in prompts.positions_3T.split(lengths, dim=1)]) + 1
    streams = [sampling.stream(name) for name in names or [one.sample_ids[0] for one in prompts.documents] or [""]]
    batch = replace(prompts, target_index_N=ends_S.to(device), target_ids_N=ends_S.to(device))
    answers: list[list[int]] = [[] for _ in lengths]
    running = [bool(prompts.documents) and limit > 0 for limit in limits]
    ended = [False] * len(lengths)
    for _ in range(sampling.max_new_tokens):
        drawn_S = torch.cat([torch.rand(1, generator=stream, dtype=torch.float64) for stream in streams])
        tokens_S = choose(model.logits(batch, cache), sampling, drawn_S.to(device))
        cache.advance()
        shown: list[int | None] = []
        for index, token in enumerate(tokens_S.tolist()):
            ended[index] = ended[index] or (running[index] and token in stop_ids)
            running[index] = running[index] and not ended[index]
            shown.append(token if running[index] else None)
            if running[index]:
                answers[index].append(token)
                running[index] = len(answers[index]) < limits[index]
        if on_tokens is not None:
            on_tokens(shown)
        left, stop = sum_over_ranks(torch.tensor([sum(running), asked()], device=device)).tolist()
        stop_if(stop)
        if not left:
            break
        batch = _single_tokens(tokens_S, next_position_S, prompts)
        next_position_S = next_position_S + 1
    return [Generated(*one) for one in zip(answers, ended, strict=True)][: len(prompts.documents)]


def choose(logits_SV: Tensor, sampling: Sampling, drawn_S: Tensor) -> Tensor:
    """Greedy, or a draw from the nucleus (Holtzman et al. 2019, arXiv 1904.09751) at a temperature: the token at which
    the sum of probabilities passes `drawn_S` (0 <= drawn < 1, float64)."""
    if sampling.temperature == 0:
        return logits_SV.argmax(-1)
    # In float64 and from the largest on, so that no temperature above 0 and no share of the mass is out of range.
    sorted_SV, order_SV = logits_SV.double().sort(dim=-1, descending=True, stable=True)
    probabilities_SV = ((sorted_SV - sorted_SV[:, :1]) / sampling.temperature).softmax(-1)
    before_SV = probabilities_SV.cumsum(-1) - probabilities_SV
    kept_SV = probabilities_SV.masked_fill(before_SV >= sampling.top_p, 0.0)
    kept_SV[:, 0] = probabilities_SV[:, 0]
    sums_SV = kept_SV.cumsum(-1)
    place_S1 = torch.searchsorted(sums_SV, drawn_S[:, None] * sums_SV[:, -1:], right=True)
    last_S1 = (kept_SV > 0).sum(-1, keepdim=True) - 1
    return order_SV.gather(-1, torch.minimum(place_S1, last_S1)).squeeze(-1)


def _single_tokens(tokens_S: Tensor, positions_S: Tensor, prompts: Batch) -> Batch:
    """A row with one token for each sequence. The plan only says how many rows there are: the cache attends."""
    rows_S = torch.arange(len(tokens_S), device=tokens_S.device)
    return Batch(
        input_ids_T=tokens_S,
        positions_3T=positions_S.expand(3, -1),
        plan=build_plan(document_segments(0, 0, [len(tokens_S)]), causal=True),
        target_index_N=rows_S,
        target_ids_N=tokens_S,
        media_index_M=rows_S[:0],
        pixels_PD=prompts.pixels_PD[:0],
        continues=True,
    )
