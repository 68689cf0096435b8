"""Sharing a video among its questions changes nothing that the model sees, unless a setting trades frames for it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.helpers.tiny import Tiny, medium, talk
from vft.common.types import Conversation
from vft.config.data import DataConfig, ImageConfig, VideoConfig
from vft.data.dataset import Dataset, make_dataset
from vft.data.media.timed_text import with_frame_times

INFOS = dict(
    [
        medium("video", 240, 280, 280, fps=24.0, name="long"),
        medium("video", 33, 150, 140, fps=3.0, name="odd"),
        medium("image", 1, 90, 130, name="picture"),
    ]
)
Seen = dict[str, list[Any]]


def documents_of(tiny: Tiny, talks: list[Conversation], pack_tokens: int, **settings: Any) -> Dataset:
    """All the documents of the conversations."""
    video = VideoConfig(min_frames=2, max_frames=24, max_pixels=140 * 140)
    data = DataConfig(pack_tokens=pack_tokens, video=video, image=ImageConfig(max_pixels=140 * 140), **settings)
    return make_dataset(talks, tiny.encoder, data, INFOS.__getitem__)


def seen_by_each(documents: Dataset) -> Seen:
    """Of each sample: frames and sizes of its media, and its ids and labels, the shared ones before its own."""
    seen: Seen = {}
    for number in range(len(documents.documents)):
        made = documents.build(number)
        assert made.num_tokens == documents.lengths[number] <= documents.config.pack_tokens
        for sample, rows in zip(made.sample_ids, made.suffix_rows, strict=True):
            own = [*range(made.prefix_length), *range(rows.start, rows.stop)]
            media = [(plan.ref, plan.frame_indices, plan.height, plan.width) for plan in made.media]
            seen[sample] = [media, made.ids_T[own].tolist(), made.labels_T[own].tolist()]
    return seen


def random_talks(rng: random.Random) -> list[Conversation]:
    """Some questions of very different lengths about each of some media."""
    talks: list[Conversation] = []
    times = rng.random() < 0.3
    for refs in rng.sample([[ref] for ref in INFOS] + [list(INFOS)[::2]], 2):
        for _ in range(rng.randint(1, 6)):
            words = ["What happens?", *["Is it so?"] * rng.choice((0, 0, 1, 2, 10, 40))]
            asked = talk(("user", [*refs, " ".join(words)]), ("assistant", "Yes. " * rng.randint(1, 12)))
            asked = Conversation(f"q{len(talks)}", asked.turns, asked.origin)
            talks.append(with_frame_times(asked) if times else asked)
    return rng.sample(talks, len(talks))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_random_samples_see_the_same_with_and_without(make_tiny: Any, family: str) -> None:
    tiny, rng = make_tiny(family, "tied"), random.Random(f"sharing:{family}")
    shared = differing = limited = refused = 0
    for _ in range(120):
        talks, pack_tokens = random_talks(rng), rng.choice((150, 200, 250, 300, 400, 600, 1500))
        limit = rng.choice((0, 0, 2, 3))
        on, off = (
            documents_of(tiny, talks, pack_tokens, share_videos=share, max_samples_per_pack=limit)
            for share in (True, False)
        )
        with_it, without = seen_by_each(on), seen_by_each(off)
        assert with_it == without, (pack_tokens, limit)
        assert sorted(item.id for item in on.bad) == sorted(item.id for item in off.bad)
        assert all(len(planned.conversations) <= (limit or 99) for planned in on.documents)
        # What this is about must have been there.
        shared += len(off.documents) - len(on.documents)
        refused += len(off.bad)
        frames: dict[Any, set[Any]] = {}
        for media, _, _ in without.values():
            frames.setdefault(tuple(ref for ref, *_ in media), set()).add(str(media))
        differing += any(len(plans) > 1 for plans in frames.values())
        free = documents_of(tiny, talks, 100_000, share_videos=False)
        limited += seen_by_each(free) != without
    assert min(shared, differing, limited, refused) > 5, (shared, differing, limited, refused)


def test_frames_are_given_up_for_sharing_where_it_is_asked_for(tiny: Tiny) -> None:
    """Three questions don't fit into one row behind the video's 20 frames, 25 tokens a pair; behind fewer they do."""
    (ref, *_), texts = INFOS, ("Who?", "Where is it?", "When is it, and how long?")
    talks = [talk(("user", [ref, text]), ("assistant", "Yes."), id=text) for text in texts]
    for share, documents_made, frames in ((0.0, 3, 20), (0.02, 3, 20), (0.3, 1, 16)):
        documents = documents_of(tiny, talks, 310, frames_for_sharing=share)
        assert len(documents.documents) == documents_made, share
        assert [len(media[0][1]) for media, _, _ in seen_by_each(documents).values()] == [frames] * 3, share
