"""Conversations about all kinds of media, as rows of any family's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.tiny import Media, Tiny, batch_of, medium, talk
from vft.common.types import Batch, Conversation
from vft.data.packing import collate

VIDEO, VIDEO_INFO = medium("video", 6, 170, 150, fps=1.0)
"""Its time positions (2 seconds a patch) reach past its height and width; 6 x 5 merged tokens are 4 windows."""
SHORT, SHORT_INFO = medium("video", 5, 90, 200, fps=10.0, name="short")
PICTURE, PICTURE_INFO = medium("image", 1, 200, 130, name="picture")

ROWS: dict[str, tuple[Conversation, list[Any]]] = {
    "text": (
        talk(("user", "Hello, what is 12 + 30?"), ("assistant", "42."), ("user", "And?"), ("assistant", "No.")),
        [],
    ),
    "picture": (
        talk(("user", ["Look: ", PICTURE, "What is it?"]), ("assistant", "A cat on a mat.")),
        [(PICTURE, PICTURE_INFO)],
    ),
    "video": (talk(("user", [VIDEO, "What happens?"]), ("assistant", "A dog runs.")), [(VIDEO, VIDEO_INFO)]),
    "mixed": (
        talk(
            ("system", "Answer briefly."),
            ("user", ["First ", PICTURE, " then:", VIDEO]),
            ("assistant", "Seen."),
            ("user", [SHORT, "And now?"]),
            ("assistant", "The dog sleeps."),
        ),
        [(PICTURE, PICTURE_INFO), (VIDEO, VIDEO_INFO), (SHORT, SHORT_INFO)],
    ),
}


def row(tiny: Tiny, name: str) -> Batch:
    """The conversation of that name, whole."""
    conversation, media = ROWS[name]
    return batch_of(tiny.encoder, ([conversation], Media.make(tiny.encoder.processor, media)))


def prompt(tiny: Tiny, name: str) -> Batch:
    """The row of that name without its last answer."""
    conversation, media = ROWS[name]
    asked = Conversation(conversation.id, conversation.turns[:-1], conversation.origin)
    made = Media.make(tiny.encoder.processor, media)
    document = tiny.encoder.document([asked], made.plans, answer_next=True)
    return collate([(document, made.patches)], tiny.encoder.processor)


def kinds_of(batch: Batch) -> Tensor:
    """transformers' kinds of tokens: 0 text, 1 picture, 2 video."""
    numbers = {"image": 1, "video": 2}
    kinds = torch.zeros_like(batch.input_ids_T)
    media = batch.documents[0].media
    parts = [torch.full((plan.num_tokens,), numbers[plan.ref.kind]) for plan in media]
    if parts:
        kinds[batch.media_index_M] = torch.cat(parts)
    return kinds[None]
