#!/usr/bin/env python
"""What each optimisation of a step is worth, with and without it in turns: python tools/bench/gains.py [--shape small]

Every line is the same work with the same loss, done in the obvious way and in the trainer's. `gain` is the ratio of the
two times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from measure import benchmark, default_device, interleaved, median, report
from workload import SHAPES, adapted_model, add_shape, shape_and_device

from vft.common.errors import UserError
from vft.common.types import AttentionPlan, Batch, Document
from vft.models import attention, layers
from vft.models.base import VideoLanguageModel
from vft.preparation.synthetic import Video, row_of, text_document, video_document
from vft.training.losses import cross_entropy

WORDS, ANSWER = 25, 10
"""Tokens of a question with its answer, and of the answer."""
Work = Callable[[], torch.Tensor]
"""Runs forward and backward and gives the summed loss."""


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_shape) as (options, _):
        name, device = shape_and_device(options)
        model = adapted_model(SHAPES[name], device)
        lines = [compare(what, *make(model, device), options.repeats) for what, make in GAINS.items()]
        report(f"what each optimisation is worth: {name}", lines, options)


def compare(what: str, plainly: Work, ours: Work, repeats: int) -> dict[str, Any]:
    """One line of the table. UserError if the two ways give different losses: then the figure means nothing."""
    losses = [float(work()) for work in (plainly, ours)]
    difference = abs(losses[1] / losses[0] - 1)
    if difference > (1e-4 if default_device().type == "cpu" else 2e-2):
        raise UserError(f"{what}: losses {losses[0]} and {losses[1]} differ")
    times = {name: median(t) for name, t in interleaved({"plainly": plainly, "ours": ours}, repeats).items()}
    figures = {"plainly s": times["plainly"], "ours s": times["ours"], "gain": times["plainly"] / times["ours"]}
    return {"optimisation": what, **figures, "loss differs by": difference}


def passes(model: VideoLanguageModel, rows: list[Batch], device: torch.device) -> Work:
    """Forward and backward of rows one after another."""

    def run() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for row in rows:
            loss = cross_entropy(model, row.to(device))
            loss.backward()
            total += loss.detach()
        model.zero_grad()
        return total

    return run


def shared_videos(model: VideoLanguageModel, device: torch.device) -> tuple[Work, Work]:
    """Five questions on one copy of their video, and on five."""
    shared = video_document(model.processor, Video(), 5, WORDS, ANSWER)
    return passes(model, [row_of(model.processor, apart(shared))], device), passes(
        model, [row_of(model.processor, [shared])], device
    )


def apart(document: Document) -> list[Document]:
    """Each branch with a copy of the trunk."""
    trunk, made = document.prefix_length, []
    for sample, own in zip(document.sample_ids, document.suffix_rows, strict=True):
        rows = torch.cat([torch.arange(trunk), torch.arange(own.start, own.stop)])
        made.append(
            replace(
                document,
                sample_ids=(sample,),
                ids_T=document.ids_T[rows],
                labels_T=document.labels_T[rows],
                positions_3T=document.positions_3T[:, rows],
                prefix_length=0,
                suffix_lengths=(len(rows),),
                media_mask_T=document.media_mask_T[rows],
            )
        )
    return made


def packed_rows(model: VideoLanguageModel, device: torch.device) -> tuple[Work, Work]:
    """Sixteen short documents in one row, and in a row each."""
    documents = [text_document(20 + 8 * seed, 10, seed) for seed in range(16)]
    alone = [row_of(model.processor, [document]) for document in documents]
    return passes(model, alone, device), passes(model, [row_of(model.processor, documents)], device)


def supervised_head(model: VideoLanguageModel, device: torch.device) -> tuple[Work, Work]:
    """Logits of supervised tokens alone, and of every token."""
    row = row_of(
        model.processor, [video_document(model.processor, Video(), 1, WORDS, ANSWER, seed) for seed in range(4)]
    )

    def everywhere() -> torch.Tensor:
        batch = row.to(device)
        every = torch.arange(row.num_tokens, device=device)
        x_TE, _ = model.embed(batch)
        hidden_TE = model.decoder.norm(model.decoder(x_TE, batch.positions_3T, batch.plan, every))
        losses_T = torch.nn.functional.cross_entropy(
            model.head(hidden_TE).float().index_select(0, batch.target_index_N), batch.target_ids_N, reduction="sum"
        )
        losses_T.backward()
        model.zero_grad()
        return losses_T.detach()

    return everywhere, passes(model, [row], device)


def windows_at_once(model: VideoLanguageModel, device: torch.device) -> tuple[Work, Work]:
    """All windows of the vision encoder in one call, and each in its own, as without flash-attention elsewhere."""
    row = row_of(
        model.processor, [video_document(model.processor, Video(), 1, WORDS, ANSWER, seed) for seed in range(4)]
    )
    ours = passes(model, [row], device)

    def one_by_one() -> torch.Tensor:
        with each_segment_alone():
            return ours()

    return one_by_one, ours


@contextmanager
def each_segment_alone() -> Iterator[None]:
    """A call of attention for each segment of the encoder's plans."""
    attend = attention.attend

    def loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        if plan.causal:
            return attend(q, k, v, plan)
        parts = []
        for one in plan.segments:
            own = slice(one.q_start, one.q_start + one.q_length)
            q1, k1, v1 = (x[own].transpose(0, 1)[None] for x in (q, k, v))
            parts.append(torch.nn.functional.scaled_dot_product_attention(q1, k1, v1)[0].transpose(0, 1))
        return torch.cat(parts)

    module: Any = layers
    module.attend = loop
    try:
        yield
    finally:
        module.attend = attend


def frozen_encoder(model: VideoLanguageModel, device: torch.device) -> tuple[Work, Work]:
    """No graph through the frozen encoder, and a whole graph, as if the patches' embedding needed a gradient."""
    row = row_of(
        model.processor, [video_document(model.processor, Video(), 1, WORDS, ANSWER, seed) for seed in range(4)]
    )

    def with_graph() -> torch.Tensor:
        weight = model.get_parameter("visual.patch_embed.proj.weight")
        weight.requires_grad_(True)
        try:
            return ours()
        finally:
            weight.requires_grad_(False)

    ours = passes(model, [row], device)
    return with_graph, ours


GAINS: dict[str, Callable[[Any, torch.device], tuple[Work, Work]]] = {
    "5 questions on one video": shared_videos,
    "16 documents in one row": packed_rows,
    "head on supervised tokens": supervised_head,
    "windows in one call": windows_at_once,
    "no graph in a frozen encoder": frozen_encoder,
}


if __name__ == "__main__":
    main()
