"""Examples of a run's answers for its report: which to show, how good each is, the frames that the model saw.

They are rows of the predictions files that `vft.inference.evaluate` writes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from PIL import Image
from torch import Tensor

from vft.common.errors import UserError
from vft.common.types import MediaPlan
from vft.data.dataset import Dataset
from vft.data.media.errors import MediaError
from vft.data.media.patches import frames_of, load_patches
from vft.metrics import rouge_l_scores, token_f1_scores
from vft.models.processor import VisionProcessor
from vft.reporting.run_folder import Row

T = TypeVar("T")
Rank = tuple[float, float]
"""Orders answers, better ones last."""

NUM_EXTREMES, NUM_BETWEEN = 3, 6
"""Examples at each end of the scores, and between them."""
MAX_FRAMES = 8
"""Shown of each video."""
FRAME_PIXELS = 224
"""Longest side of a frame on the page."""


@dataclass(slots=True)
class Strip:
    """A video or picture of an example."""

    title: str
    frames: list[tuple[str, str]] = field(default_factory=list)
    """Pictures as `data:` URLs, with captions."""
    problem: str = ""
    """Why there are no frames."""


@dataclass(frozen=True, slots=True)
class Example:
    """A question, and the answers of the first and the last evaluation to it."""

    id: str
    why: str
    """`best`, `worst`, or empty."""
    grade: str
    media: list[Strip]
    prompt: str
    references: list[str]
    answers: list[tuple[str, Row, float]]
    """Name of the evaluation, line of its predictions file, and the likeliest option's score."""


def examples(
    predictions: Mapping[str, list[Row]], held_out: Dataset | None, processor: VisionProcessor | None
) -> list[Example]:
    """The best answers of the last evaluation, some spread evenly and the worst, beside those of the first one."""
    if not predictions:
        return []
    rows = [*predictions.values()][-1]
    answers = {name: {key_of(row): row for row in own} for name, own in predictions.items()}
    grades = grade(rows)
    made = []
    for index, why in choose([rank for rank, _ in grades]).items():
        row = rows[index]
        to_this = [(name, by_key[key_of(row)]) for name, by_key in answers.items() if key_of(row) in by_key]
        made.append(
            Example(
                id=row.get("id", ""),
                why=why,
                grade=grades[index][1],
                media=[] if held_out is None or processor is None else strips(row, held_out, processor),
                prompt=row.get("prompt", ""),
                references=references_of(row),
                answers=[
                    (name, answer, max((answer.get("option_scores") or {"": 0.0}).values())) for name, answer in to_this
                ],
            )
        )
    return made


def key_of(row: Row) -> tuple[object, ...]:
    """Identifies a question: ids may repeat between sources. Files of earlier versions name no source."""
    return row.get("id"), row.get("prompt"), row.get("source"), tuple(row.get("media") or ())


def references_of(row: Row) -> list[str]:
    """The right answers; none if they are not known."""
    return row.get("references") or [row["reference"]] if row.get("reference") is not None else []


def grade(rows: Sequence[Row]) -> list[tuple[Rank | None, str]]:
    """A rank for each answer, larger is better, and the same in words; None if no right answer is known.

    A chosen option is right or wrong; the further it is ahead of the next option, the better or worse it is.
    """
    grades: list[tuple[Rank | None, str]] = [(None, "")] * len(rows)
    texts = [i for i, row in enumerate(rows) if "choice" not in row and references_of(row)]
    answers, references = [rows[i]["prediction"] for i in texts], [references_of(rows[i]) for i in texts]
    if texts:
        try:
            name, scores = "ROUGE-L", rouge_l_scores(answers, references)
        except UserError:  # its package is not installed
            name, scores = "token F1", token_f1_scores(answers, references)
        for i, score in zip(texts, scores, strict=True):
            grades[i] = (score, 0.0), f"{name} {score:.2f}"
    for i, row in enumerate(rows):
        if "choice" in row and references_of(row):
            right = row["choice"] in references_of(row)
            first, second, *_ = *sorted(row["option_scores"].values(), reverse=True), -math.inf
            grades[i] = (float(right), first - second if right else second - first), "right" if right else "wrong"
    return grades


def choose(ranks: Sequence[Rank | None]) -> dict[int, str]:
    """Indices of the answers to show, each with the reason: the best, some between, the worst."""
    order = sorted((rank, i) for i, rank in enumerate(ranks) if rank is not None)
    count = min(NUM_EXTREMES, len(order) // 2) if order and order[0][0] < order[-1][0] else 0
    best, worst = [i for _, i in order[::-1][:count]], [i for _, i in order[:count]]
    others = [i for i in range(len(ranks)) if i not in (*best, *worst)]
    between = evenly(others, NUM_BETWEEN + 2 * (NUM_EXTREMES - count))
    return {**dict.fromkeys(best, "best"), **dict.fromkeys(between, ""), **dict.fromkeys(worst[::-1], "worst")}


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spread, with the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def strips(row: Row, documents: Dataset, processor: VisionProcessor) -> list[Strip]:
    """The media of a question as the model sees them: frames with their times, or why there are none."""
    matches = {}
    for number, planned in enumerate(documents.documents):
        for member in planned.conversations:
            names = [ref.name for ref in member.media]
            same_source = row.get("source", member.origin) == member.origin and row.get("media", names) == names
            if member.id == row.get("id") and same_source:
                matches[member.origin, *names] = number
    if len(matches) != 1:  # files of earlier versions name no source, and two sources may use the same id
        return []
    try:
        return [strip(plan, processor) for plan in documents.build(*matches.values()).media]
    except (MediaError, UserError) as error:
        return [Strip("", problem=str(error))]


def strip(plan: MediaPlan, processor: VisionProcessor) -> Strip:
    """Some frames of a video, or a picture, of the size at which the model sees them or smaller."""
    size = f"{plan.width} x {plan.height} px, {plan.num_tokens:,} tokens"
    if plan.ref.kind == "video":
        size = f"{len(plan.frame_indices)} frames of {size}"
    made = Strip(f"{Path(plan.ref.name).name}: {size}")
    t, h, w = plan.grid_thw
    # Only the frames that are shown are decoded.
    few = replace(plan, frame_indices=tuple(evenly(plan.frame_indices, MAX_FRAMES)))
    few = replace(few, grid_thw=(math.ceil(few.num_pictures / math.ceil(plan.num_pictures / t)), h, w))
    try:
        frames_TCHW = frames_of(load_patches(few, processor).pixels_PD, few, processor)
    except MediaError as error:
        made.problem = f"can't be decoded: {error}"
        return made
    for frame_CHW, time_s in zip(frames_TCHW, few.frame_times_s, strict=False):  # an odd clip has its last frame twice
        caption = f"{time_s:.2f} s" if plan.ref.kind == "video" else "picture"
        made.frames.append((picture(frame_CHW, "jpeg", FRAME_PIXELS), caption))
    return made


def picture(frame_CHW: Tensor, kind: str, longest: int | None = None) -> str:
    """A uint8 frame as a `data:` URL, `jpeg` or (lossless) `png`, its longer side at most `longest` pixels."""
    image = Image.fromarray(frame_CHW.permute(1, 2, 0).numpy())
    if longest is not None:
        image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
