#!/usr/bin/env python
"""How the cost of a step grows: with rows, frames, questions about a video, row length: python tools/bench/scaling.py

`expected` is the time that a line should take, as a multiple of the first line's; `found / expected` is 1 if it does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import benchmark, interleaved, median, report
from step import make_step
from workload import SHAPES, adapted_model, add_shape, shape_and_device

from vft.common.types import Batch
from vft.models.base import VideoLanguageModel
from vft.models.flops import FlopCounter
from vft.preparation.synthetic import Video, row_of, video_document

WORDS, ANSWER = 25, 10
"""Tokens of a question with its answer, and of the answer."""


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_arguments) as (options, _):
        name, device = shape_and_device(options)
        model = adapted_model(SHAPES[name], device)
        rows = [line for kind in options.of for line in measure(kind, model, device, options.repeats)]
        report(f"growth of a step: {name}", rows, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_shape(parser)
    parser.add_argument("--of", nargs="+", choices=sorted(KINDS), default=sorted(KINDS), help="what grows (all)")


def measure(kind: str, model: VideoLanguageModel, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The lines of one kind, timed in turns."""
    cases = KINDS[kind](model)
    steps = {name: _all(model, rows, device) for name, (rows, _) in cases.items()}
    seconds = {name: median(times) for name, times in interleaved(steps, repeats).items()}
    first = next(iter(cases))
    lines = []
    for name, (rows, expected) in cases.items():
        found = seconds[name] / seconds[first]
        tokens = sum(row.num_tokens for row in rows)
        line = {"grows": kind, "case": name, "tokens": tokens, "s": seconds[name], "tokens/s": tokens / seconds[name]}
        lines.append({**line, "expected": expected, "found": found, "found / expected": found / expected})
    return lines


def _all(model: VideoLanguageModel, rows: Sequence[Batch], device: torch.device) -> Callable[[], None]:
    steps = [make_step(model, row, device) for row in rows]

    def run() -> None:
        for step in steps:
            step()

    return run


Cases = dict[str, tuple[list[Batch], float]]
"""Rows by the name of the case, and their time as a multiple of the first case's."""


def packs(model: VideoLanguageModel) -> Cases:
    """One row after another: in proportion to their number."""
    row = row_of(
        model.processor, [video_document(model.processor, Video(), 1, WORDS, ANSWER, seed) for seed in range(2)]
    )
    return {f"{count} rows": ([row] * count, float(count)) for count in (1, 2, 4)}


def questions(model: VideoLanguageModel) -> Cases:
    """k questions on one copy of their video instead of k copies: (V + kq) / k(V + q) of the time.

    Four documents a row in either case: on two cores a row of one is too short to keep them busy.
    """
    cases: Cases = {}
    video = Video(8, 224, 224)
    for k in (2, 5, 8):
        alone = row_of(
            model.processor, [video_document(model.processor, video, 1, WORDS, ANSWER, seed) for seed in range(4)]
        )
        shared = row_of(
            model.processor, [video_document(model.processor, video, k, WORDS, ANSWER, seed) for seed in range(4)]
        )
        unit = k / 2
        cases[f"{k} apart"] = ([alone] * k, unit)
        cases[f"{k} shared"] = ([shared], unit * shared.num_tokens / (k * alone.num_tokens))
    return cases


def frames(model: VideoLanguageModel) -> Cases:
    """More frames of one video: as its FLOPs grow, the encoder's in proportion, attention faster."""
    return _by_flops(
        model,
        {
            f"{count} frames": [video_document(model.processor, Video(count), 1, WORDS, ANSWER)]
            for count in (8, 16, 32, 64)
        },
    )


def length(model: VideoLanguageModel) -> Cases:
    """More videos in a row: in proportion, for documents don't attend one another."""
    return _by_flops(
        model,
        {
            f"{count} videos": [
                video_document(model.processor, Video(), 1, WORDS, ANSWER, seed) for seed in range(count)
            ]
            for count in (2, 4, 8, 16)
        },
    )


def _by_flops(model: VideoLanguageModel, documents: dict[str, list[Any]]) -> Cases:
    counter = FlopCounter(model)
    rows = {name: row_of(model.processor, members) for name, members in documents.items()}
    unit = counter.count(next(iter(rows.values()))).model
    return {name: ([row], counter.count(row).model / unit) for name, row in rows.items()}


KINDS: dict[str, Callable[[Any], Cases]] = {
    "frames": frames,
    "length": length,
    "packs": packs,
    "questions": questions,
}


if __name__ == "__main__":
    main()
