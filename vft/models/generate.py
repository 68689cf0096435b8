"""Answers, token by token, for all prompts of a packed row at once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vft.attention import build_plan, document_segments
from vft.distributed import sum_over_ranks
from vft.models.cache import KeyValueCache
from vft.stopping import asked, stop_if
from vft.types import Batch


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: the likeliest token (greedy)."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability to draw from."""
    seed: int = 0


@torch.no_grad()
def generate(
    model: Any,
    prompts: Batch,
    stop_ids: Collection[int],
    sampling: Sampling,
    on_tokens: Callable[[list[int | None]], None] | None = None,
) -> list[list[int]]:
    """New token ids for each document of `prompts` (one branch each), without the token that ended it.

    All processes go on until the last of them is done, because a sharded model needs every one in each pass. An empty
    batch takes part and gives no answers. `on_tokens` gets each pass's tokens, None for a prompt that has ended.
    """
    device = prompts.input_ids_T.device
    lengths = [document.num_tokens for document in prompts.documents] or [1]
    ends_S = torch.tensor(lengths).cumsum(0) - 1
    cache = KeyValueCache(lengths, sampling.max_new_tokens, model.config.layers, device)
    next_position_S = torch.stack([part.max() for part in prompts.positions_3T.split(lengths, dim=1)]) + 1
    generator = torch.Generator(device).manual_seed(sampling.seed)
    batch = replace(prompts, target_index_N=ends_S.to(device), target_ids_N=ends_S.to(device))
    answers: list[list[int]] = [[] for _ in lengths]
    running = [bool(prompts.documents)] * len(lengths)
    for _ in range(sampling.max_new_tokens):
        tokens_S = choose(model(batch, cache, loss=False), sampling, generator)
        cache.advance()
        shown: list[int | None] = []
        for index, token in enumerate(tokens_S.tolist()):
            running[index] = running[index] and token not in stop_ids
            shown.append(token if running[index] else None)
            if running[index]:
                answers[index].append(token)
        if on_tokens is not None:
            on_tokens(shown)
        left, stop = sum_over_ranks(torch.tensor([sum(running), asked()], device=device)).tolist()
        stop_if(stop)
        if not left:
            break
        batch = _single_tokens(tokens_S, next_position_S, prompts)
        next_position_S = next_position_S + 1
    return answers[: len(prompts.documents)]


def choose(logits_SV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Greedy, or a draw from the nucleus (Holtzman et al. 2019, arXiv 1904.09751) at a temperature."""
    if sampling.temperature == 0:
        return logits_SV.argmax(-1)
    probabilities, order = (logits_SV / sampling.temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    drawn = torch.multinomial(kept, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


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
