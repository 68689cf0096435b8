"""Text generation: one token after another, for all prompts of a packed row at once."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vft.common.types import Batch, move
from vft.distributed.process_group import sum_over_ranks
from vft.distributed.signals import stop_if, stop_requested
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
    """Probability mass of the nucleus, the smallest set of likeliest tokens that a token is drawn from."""
    seed: int = 0
    samples: int = 1
    """Answers to each prompt, drawn apart from one another. The prompt is read once for all of them."""

    def generator(self, name: str) -> torch.Generator:
        """Random numbers for one question. They depend on its name and the seed, not on the questions beside it."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode(errors="replace")).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True, slots=True)
class GeneratedIds:
    """The tokens generated for one prompt."""

    ids: list[int]
    """Without the end token."""
    ended: bool
    """Whether the model gave an end token. False: the limit of tokens or the end of the context came first."""


@torch.no_grad()
def generate(
    model: VideoLanguageModel,
    prompts: Batch,
    end_ids: Collection[int],
    sampling: Sampling,
    on_tokens: Callable[[list[int | None]], None] | None = None,
    names: Sequence[str] = (),
    context: int | None = None,
) -> list[GeneratedIds]:
    """Generate `sampling.samples` answers to each document of `prompts` (each with one suffix) up to a token of
    `end_ids`, to `sampling.max_new_tokens` or to the end of the model's `context` (tokens). Those to one document are
    neighbours; the first is what it would be alone.

    Every process must call it, without documents if it has no prompt: a sharded model needs all of them in each pass,
    so they go on until the last prompt of the last process has ended. `on_tokens` gets the tokens of each pass, None
    for a prompt that has ended. `names` are those of the prompts for `Sampling.generator`, by default the first sample
    id of each document.
    """
    device, samples = prompts.input_ids_T.device, sampling.samples
    lengths = [document.num_tokens for document in prompts.documents] or [1]
    room = [min(sampling.max_new_tokens, (context or sys.maxsize) - length) for length in lengths]
    limits = [limit for limit in room for _ in range(samples)]
    last_rows_S = move(torch.tensor(lengths).cumsum(0) - 1, device)
    cache = KeyValueCache(lengths, sampling.max_new_tokens, device, samples)
    positions_S = torch.stack([part.max() for part in prompts.positions_3T.split(lengths, dim=1)])
    positions_S = positions_S.repeat_interleave(samples)
    names = names or [document.sample_ids[0] for document in prompts.documents] or [""]
    each = [f"{number}:{name}" if number else name for name in names for number in range(samples)]
    generators = [sampling.generator(name) for name in each]
    batch = replace(prompts, target_index_N=last_rows_S, target_ids_N=last_rows_S)
    ids: list[list[int]] = [[] for _ in limits]
    running = [bool(prompts.documents) and limit > 0 for limit in limits]
    ended = [False] * len(limits)
    for step in range(sampling.max_new_tokens):
        drawn_S = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        logits_SV = model.logits(batch, cache)
        logits_SV = logits_SV if step else logits_SV.repeat_interleave(samples, dim=0)
        tokens_S = choose(logits_SV, sampling, move(drawn_S, device))
        cache.advance()
        new_tokens: list[int | None] = []
        for index, token in enumerate(tokens_S.tolist()):
            ended[index] = ended[index] or (running[index] and token in end_ids)
            running[index] = running[index] and not ended[index]
            new_tokens.append(token if running[index] else None)
            if running[index]:
                ids[index].append(token)
                running[index] = len(ids[index]) < limits[index]
        if on_tokens is not None:
            on_tokens(new_tokens)
        left, stop = sum_over_ranks(torch.tensor([sum(running), stop_requested()])).tolist()
        stop_if(stop)
        if not left:
            break
        positions_S = positions_S + 1
        batch = _single_tokens(tokens_S, positions_S, prompts)
    return [GeneratedIds(*one) for one in zip(ids, ended, strict=True)][: len(prompts.documents) * samples]


def choose(logits_SV: Tensor, sampling: Sampling, drawn_S: Tensor) -> Tensor:
    """The next token of each sequence [S]: the likeliest one, or at a temperature a draw from the nucleus.

    A draw takes the token at which the cumulative probability passes `drawn_S` (0 <= drawn < 1, float64). Source:
    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019, arXiv 1904.09751.
    """
    if sampling.temperature == 0:
        return logits_SV.argmax(-1)
    # In float64 and relative to the largest logit, so that any temperature above 0 and any top_p stay in range.
    sorted_SV, order_SV = logits_SV.double().sort(dim=-1, descending=True, stable=True)
    probabilities_SV = ((sorted_SV - sorted_SV[:, :1]) / sampling.temperature).softmax(-1)
    before_SV = probabilities_SV.cumsum(-1) - probabilities_SV
    nucleus_SV = probabilities_SV.masked_fill(before_SV >= sampling.top_p, 0.0)
    nucleus_SV[:, 0] = probabilities_SV[:, 0]
    cumulative_SV = nucleus_SV.cumsum(-1)
    place_S1 = torch.searchsorted(cumulative_SV, drawn_S[:, None] * cumulative_SV[:, -1:], right=True)
    last_S1 = (nucleus_SV > 0).sum(-1, keepdim=True) - 1
    return order_SV.gather(-1, torch.minimum(place_S1, last_S1)).squeeze(-1)


def _single_tokens(tokens_S: Tensor, positions_S: Tensor, prompts: Batch) -> Batch:
    """A row with one token for each answer. Its plan only says how many rows there are: the cache attends."""
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


class TextStreamer:
    """Writes the first answer of a batch piece by piece while its tokens come.

    Holds back what a later token may still change: bytes of a character that is not complete yet.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], None]) -> None:
        self._decode, self._write = decode, write
        self._ids: list[int] = []
        self._written = ""

    def put(self, tokens: Sequence[int | None]) -> None:
        """The tokens of a pass (`on_tokens` of `generate`)."""
        if tokens[0] is not None:
            self._ids.append(tokens[0])
            text = self._decode(self._ids)
            if not text.endswith("\ufffd"):  # the first bytes of a character
                self.end(text)

    def end(self, text: str) -> None:
        """Write what `text`, the whole answer so far, adds. A token decoded alone would lack spaces, or bytes."""
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text
