"""Examples of a run's answers: which to show, how good each is, the frames that the model saw.

They are rows of the predictions files that `vft.inference.evaluate` writes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from vft.common.errors import UserError
from vft.common.types import MediaPlan
from vft.data.dataset import Dataset
from vft.data.media.errors import MediaError
from vft.data.media.patches import frames_of, load_patches
from vft.metrics import rouge_l_scores, token_f1_scores
from vft.models.processor import VisionProcessor

T = TypeVar("T")
Row = dict[str, Any]
"""A line of a predictions file, or what the page shows of it."""

EXTREMES, SPREAD = 3, 6
"""Examples at either end of the scores, and between them."""
MAX_FRAMES = 8
"""Shown of each video."""
FRAME_PIXELS = 224
"""Longest side of a frame on the page."""


def examples(
    predictions: Mapping[str, list[Row]], held_out: Dataset | None, processor: VisionProcessor | None
) -> list[Row]:
    """The best answers of the last evaluation, some spread evenly and the worst, with what was said at the first."""
    if not predictions:
        return []
    rows = [*predictions.values()][-1]
    answers = {name: {key_of(row): row for row in said} for name, said in predictions.items()}
    grades = grade(rows)
    made = []
    for index, why in choose([rank for rank, _ in grades]).items():
        row = rows[index]
        told = [(name, said[key_of(row)]) for name, said in answers.items() if key_of(row) in said]
        made.append(
            {
                "id": row.get("id", ""),
                "why": why,
                "grade": grades[index][1],
                "media": [] if held_out is None or processor is None else strips(row, held_out, processor),
                "prompt": row.get("prompt", ""),
                "references": references_of(row),
                "answers": [(name, one, max((one.get("option_scores") or {"": 0.0}).values())) for name, one in told],
            }
        )
    return made


def key_of(row: Row) -> tuple[object, ...]:
    """What tells a question from others: ids may repeat between sources. Older files name no source."""
    return row.get("id"), row.get("prompt"), row.get("source"), tuple(row.get("media") or ())


def references_of(row: Row) -> list[str]:
    """What would have been right."""
    return row.get("references") or [row["reference"]] if row.get("reference") is not None else []


def grade(rows: Sequence[Row]) -> list[tuple[tuple[float, float] | None, str]]:
    """A rank for each answer, larger is better, and the same in words; None where nothing is known to be right.

    An option is right or wrong, and the better or worse the further the likeliest is ahead of the next.
    """
    found: list[tuple[tuple[float, float] | None, str]] = [(None, "")] * len(rows)
    texts = [i for i, row in enumerate(rows) if "choice" not in row and references_of(row)]
    said, wanted = [rows[i]["prediction"] for i in texts], [references_of(rows[i]) for i in texts]
    if texts:
        try:
            name, scores = "ROUGE-L", rouge_l_scores(said, wanted)
        except UserError:  # its package isn't installed
            name, scores = "token F1", token_f1_scores(said, wanted)
        for i, score in zip(texts, scores, strict=True):
            found[i] = (score, 0.0), f"{name} {score:.2f}"
    for i, row in enumerate(rows):
        if "choice" in row and references_of(row):
            right = row["choice"] in references_of(row)
            first, second, *_ = *sorted(row["option_scores"].values(), reverse=True), -math.inf
            found[i] = (float(right), first - second if right else second - first), "right" if right else "wrong"
    return found


def choose(ranks: Sequence[tuple[float, float] | None]) -> dict[int, str]:
    """Which answers to show, and why: the best, those between, the worst."""
    order = sorted((rank, i) for i, rank in enumerate(ranks) if rank is not None)
    count = min(EXTREMES, len(order) // 2) if order and order[0][0] < order[-1][0] else 0
    best, worst = [i for _, i in order[::-1][:count]], [i for _, i in order[:count]]
    between = evenly([i for i in range(len(ranks)) if i not in (*best, *worst)], SPREAD + 2 * (EXTREMES - count))
    return {**dict.fromkeys(best, "best"), **dict.fromkeys(between, ""), **dict.fromkeys(worst[::-1], "worst")}


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def strips(row: Row, documents: Dataset, processor: VisionProcessor) -> list[Row]:
    """The media of a question as the model sees them: frames with their times, or why there are none."""
    found = {}
    for number, planned in enumerate(documents.documents):
        for one in planned.conversations:
            names = [ref.name for ref in one.media]
            told = row.get("source", one.origin) == one.origin and row.get("media", names) == names
            if one.id == row.get("id") and told:
                found[one.origin, *names] = number
    if len(found) != 1:  # older files name no source, and two may use one id: rather no video than another's
        return []
    try:
        return [strip(plan, processor) for plan in documents.build(*found.values()).media]
    except (MediaError, UserError) as error:
        return [{"title": "", "problem": str(error), "frames": []}]


def strip(plan: MediaPlan, processor: VisionProcessor) -> Row:
    """Some frames of one medium, of the size at which the model sees them or smaller."""
    indices = evenly(plan.frame_indices, MAX_FRAMES)
    size = f"{plan.width} x {plan.height} px, {plan.num_tokens:,} tokens"
    if plan.ref.kind == "video":
        size = f"{len(plan.frame_indices)} frames of {size}"
    row: Row = {"title": f"{Path(plan.ref.name).name}: {size}", "problem": "", "frames": []}
    t, h, w = plan.grid_thw
    # Of a long video those frames alone are decoded that are shown.
    few = replace(plan, frame_indices=tuple(indices))
    few = replace(few, grid_thw=(math.ceil(few.num_pictures / math.ceil(plan.num_pictures / t)), h, w))
    try:
        frames_TCHW = frames_of(load_patches(few, processor).pixels_PD, few, processor)
    except MediaError as error:
        return {**row, "problem": f"can't be decoded: {error}"}
    for frame_CHW, time_s in zip(frames_TCHW, few.frame_times_s, strict=False):  # an odd video's last stands twice
        source = picture(frame_CHW, "jpeg", FRAME_PIXELS)
        row["frames"].append((source, f"{time_s:.2f} s" if plan.ref.kind == "video" else "picture"))
    return row


def picture(frame_CHW: Tensor, kind: str, longest: int | None = None) -> str:
    """A uint8 frame as a `data:` URL, `jpeg` or (exactly as it is) `png`, its longer side at most `longest` pixels."""
    image = Image.fromarray(frame_CHW.permute(1, 2, 0).numpy())
    if longest is not None:
        image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
