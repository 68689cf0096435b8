#!/usr/bin/env python
"""What each optimisation of a step is worth, with and without it in turns: python tools/bench/gains.py [--shape small]

Every line is the same work with the same mean loss, done in the obvious way and in the trainer's. `gain` is the ratio
of the two times. Where tokens alone decide about them, `found` is the share of the plain way's time that the trainer's
takes and `expected` the share that it should take: (V + k q) / k (V + q) for k questions on one copy of their video.
Beside these, several rows are compared with one: their time should be in proportion.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import in_venv  # noqa: F401
import torch
import torch.nn.functional as F
from measure import DEVICE, benchmark, in_turns, report
from workload import MODELS, add_shape, random_model, settings

from vft.common.errors import UserError
from vft.common.types import AttentionPlan, Batch, Document
from vft.config.run import ObjectiveConfig
from vft.inference.generate import Sampling, generate
from vft.models import attention, layers
from vft.models.base import Objective, VideoLanguageModel
from vft.preparation.synthetic import Video, row_of, text_document, video_document
from vft.training.losses import cross_entropy
from vft.training.preferences import Preference

SHORT, LONG = Video(), Video(16, 352, 352)
Work = Callable[[], torch.Tensor]
"""Runs forward and backward and gives the mean loss."""


@dataclass(frozen=True)
class Gain:
    """Two ways to one loss."""

    plainly: Work
    ours: Work
    tokens: tuple[int, int] | None = None
    """Of the two ways, where these decide about their times."""


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_arguments) as (options, _):
        model = random_model(settings(options.shape))
        gains = {name: gain for kind in options.of for name, gain in KINDS[kind](model).items()}
        lines = [compare(name, gain, options.repeats) for name, gain in gains.items()]
        report(f"what each optimisation is worth: {options.shape}", lines, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_shape(parser, MODELS)
    parser.add_argument("--of", nargs="+", choices=sorted(KINDS), default=list(KINDS), help="what is measured (all)")


def compare(name: str, gain: Gain, repeats: int) -> dict[str, Any]:
    """One line of the table. UserError if the two ways give different losses: then the figure means nothing."""
    losses = [float(work()) for work in (gain.plainly, gain.ours)]
    difference = abs(losses[1] / losses[0] - 1)
    if difference > (1e-4 if DEVICE.type == "cpu" else 2e-2):
        raise UserError(f"{name}: losses {losses[0]} and {losses[1]} differ")
    plainly_s, ours_s = map(median, in_turns({"plainly": gain.plainly, "ours": gain.ours}, repeats).values())
    line: dict[str, Any] = {"optimisation": name, "plainly s": plainly_s, "ours s": ours_s, "gain": plainly_s / ours_s}
    if gain.tokens is not None:
        found, expected = ours_s / plainly_s, gain.tokens[1] / gain.tokens[0]
        line |= {"tokens": gain.tokens[1], "instead of": gain.tokens[0], "found": found, "expected": expected}
        line["found / expected"] = found / expected
    return {**line, "loss differs by": difference}


def passes(model: VideoLanguageModel, rows: Sequence[Batch], objective: Objective = cross_entropy) -> Work:
    """Forward and backward of rows one after another."""

    def run() -> torch.Tensor:
        total = torch.zeros((), device=DEVICE)
        for row in rows:
            loss = objective(model, row.to(DEVICE)).flatten()[0]
            loss.backward()
            total += loss.detach()
        model.zero_grad()
        return total / sum(map(objective.weight, rows))

    return run


def packs(model: VideoLanguageModel) -> dict[str, Gain]:
    """One row, and several."""
    row = video_row(model, 2)
    return {
        f"{k} rows instead of 1": Gain(
            passes(model, [row]), passes(model, [row] * k), (row.num_tokens, k * row.num_tokens)
        )
        for k in (2, 4)
    }


def questions(
    model: VideoLanguageModel, ks: Sequence[int] = (2, 5, 8), videos: int = 4, video: Video = SHORT, words: int = 25
) -> dict[str, Gain]:
    """k questions of so many words with a copy of their video each, and on one copy.

    Several videos a row in either case: on two cores a row of a short one is too short to keep them busy.
    """
    gains = {}
    for k in ks:
        shared = [video_document(model.processor, video, k, words, 10, seed) for seed in range(videos)]
        apart = [row_of(model.processor, [part(document, number) for document in shared]) for number in range(k)]
        row = row_of(model.processor, shared)
        tokens = sum(one.num_tokens for one in apart), row.num_tokens
        gains[f"{k} questions on one video"] = Gain(passes(model, apart), passes(model, [row]), tokens)
    return gains


def preferences(model: VideoLanguageModel) -> dict[str, Gain]:
    """Chosen and rejected answers with a copy of their video each, and on one copy, at two ratios of video to text, by
    DPO with its reference; and with what that computed before. Answers differ in length, so that a mistake would show
    in the loss."""
    gains, dpo = {}, Preference(ObjectiveConfig(kind="dpo"))
    for video, ratio in ((LONG, 4), (LONG, 16)):
        words = video_document(model.processor, video, 1, 1, 1).num_tokens // ratio
        shared = video_document(model.processor, video, 2, words, words // 2)
        apart = row_of(model.processor, [part(shared, 0), part(shared, 1)])
        row = row_of(model.processor, [shared])
        tokens = apart.num_tokens, row.num_tokens
        gains[f"pairs, video {ratio}:1 to text"] = Gain(passes(model, [apart], dpo), passes(model, [row], dpo), tokens)
    row = row_of(model.processor, [video_document(model.processor, SHORT, 2, 40, 20)])
    _, known_S = dpo.of_reference(model, row.to(DEVICE))
    once = Preference(dpo.config, lambda _: known_S)
    gains["reference computed once"] = Gain(passes(model, [row], dpo), passes(model, [row], once))
    return gains


def samples(model: VideoLanguageModel, count: int = 8, new_tokens: int = 32) -> dict[str, Gain]:
    """Answers to a question about a video, asked one by one and all behind one prompt. The "loss" is the mean of
    their token ids, for they must be the same answers; at a low temperature, for a random model finds all tokens about
    as likely, and rounding would decide."""
    prompt = video_document(model.processor, LONG, 1, 25, 1)
    row, sampling = row_of(model.processor, [prompt]).to(DEVICE), Sampling(new_tokens, temperature=1e-3)

    def answers(sampling: Sampling, *names: str) -> Work:
        def run() -> torch.Tensor:
            found = [one for name in names for one in generate(model, row, (), sampling, None, [name])]
            return torch.tensor([one.ids for one in found], dtype=torch.float64).mean()

        return run

    apart = answers(sampling, "x", *(f"{number}:x" for number in range(1, count)))
    about = f"{count} answers of {new_tokens} tokens to {prompt.num_tokens:,}"
    return {about: Gain(apart, answers(replace(sampling, samples=count), "x"))}


def part(document: Document, number: int) -> Document:
    """One branch with a copy of the trunk."""
    trunk, own = document.prefix_length, document.suffix_rows[number]
    kept = torch.cat([torch.arange(trunk), torch.arange(own.start, own.stop)])
    return Document(
        sample_ids=(document.sample_ids[number],),
        ids_T=document.ids_T[kept],
        labels_T=document.labels_T[kept],
        positions_3T=document.positions_3T[:, kept],
        prefix_length=0,
        suffix_lengths=(len(kept),),
        media=document.media,
        media_mask_T=document.media_mask_T[kept],
    )


def packing(model: VideoLanguageModel) -> dict[str, Gain]:
    """Sixteen short documents in a row each, and in one row."""
    documents = [text_document(20 + 8 * seed, 10, seed) for seed in range(16)]
    alone = [row_of(model.processor, [document]) for document in documents]
    return {"16 documents in one row": Gain(passes(model, alone), passes(model, [row_of(model.processor, documents)]))}


def parts(model: VideoLanguageModel) -> dict[str, Gain]:
    """Parts of the model that do less than all, on a row of four videos."""
    row = video_row(model, 4)
    ours = passes(model, [row])

    def head_everywhere() -> torch.Tensor:
        batch = row.to(DEVICE)
        x_TE, _ = model.embed(batch)
        every = torch.arange(row.num_tokens, device=DEVICE)
        hidden_TE = model.decoder.norm(model.decoder(x_TE, replace(batch, target_index_N=every)))
        logits_NV = model.head(hidden_TE).float().index_select(0, batch.target_index_N)
        loss = F.cross_entropy(logits_NV, batch.target_ids_N, reduction="sum")
        loss.backward()
        model.zero_grad()
        return loss.detach() / row.num_targets

    def windows_one_by_one() -> torch.Tensor:
        with each_segment_alone():
            return ours()

    def graph_in_the_encoder() -> torch.Tensor:
        # As if the patches' embedding needed a gradient.
        weight = model.get_parameter("visual.patch_embed.proj.weight").requires_grad_(True)
        try:
            return ours()
        finally:
            weight.requires_grad_(False)

    return {
        "head on supervised tokens": Gain(head_everywhere, ours),
        "windows in one call": Gain(windows_one_by_one, ours),
        "no graph in a frozen encoder": Gain(graph_in_the_encoder, ours),
    }


def video_row(model: VideoLanguageModel, count: int) -> Batch:
    """Videos with a question each."""
    return row_of(model.processor, [video_document(model.processor, Video(), 1, 25, 10, seed) for seed in range(count)])


@contextmanager
def each_segment_alone() -> Iterator[None]:
    """A call of attention for each segment of the encoder's plans, as without flash-attention elsewhere."""

    def loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        if plan.causal:
            return attention.attend(q, k, v, plan)
        results = []
        for one in plan.segments:
            own = slice(one.q_start, one.q_start + one.q_length)
            q1, k1, v1 = (x[own].transpose(0, 1)[None] for x in (q, k, v))
            results.append(F.scaled_dot_product_attention(q1, k1, v1)[0].transpose(0, 1))
        return torch.cat(results)

    with patch.object(layers, "attend", loop):
        yield


KINDS: dict[str, Callable[[Any], dict[str, Gain]]] = {
    "packs": packs,
    "questions": questions,
    "long-videos": partial(questions, ks=(1, 2, 5, 10), videos=1, video=LONG, words=100),
    "preferences": preferences,
    "samples": samples,
    "packing": packing,
    "parts": parts,
}


if __name__ == "__main__":
    main()
