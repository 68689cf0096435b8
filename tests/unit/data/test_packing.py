"""Rows of several documents, what is supervised in them, and what an epoch is made of; trunks have a file of their own.

Loss and gradients are compared with those of the samples one by one; nothing here asks a file.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.tiny import (
    NO_MEDIA,
    Media,
    Tiny,
    assert_same_gradients,
    batch_of,
    every_logit,
    loss_and_gradients,
    medium,
    talk,
)
from vft.common.errors import UserError
from vft.common.types import Batch, Conversation, MediaOptions, Patches
from vft.config.data import DataConfig, VideoConfig
from vft.data.dataset import Dataset, make_dataset
from vft.data.loader import Loader
from vft.data.packing import Cursor, PackPlan, collate, owners, share_out, take_step
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel
from vft.models import base as models

VIDEO, VIDEO_INFO = medium("video", 6, 150, 140, fps=1.0)
OTHER, OTHER_INFO = medium("video", 3, 60, 90, fps=4.0, name="other")
PICTURE, PICTURE_INFO = medium("image", 1, 90, 130, name="picture")
QUESTIONS = [
    ("What happens?", "A dog runs."),
    ("Who is there?", "Nobody."),
    ("Where?", "In a park, near the old mill, on a Sunday morning."),
    ("Is it late?", "No"),
    ("What happens?", "A dog runs."),
]


def about_video(count: int) -> list[Conversation]:
    """Samples that ask about one video; the second has two turns."""
    asked = []
    for number, (question, answer) in enumerate(QUESTIONS[:count]):
        turns: list[Any] = [("user", [VIDEO, question]), ("assistant", answer)]
        if number == 1:
            turns += [("user", "Sure?"), ("assistant", "Yes, quite.")]
        asked.append(talk(*turns, id=f"q{number}"))
    return asked


@pytest.fixture(scope="module")
def rows(each_tiny: Tiny) -> list[tuple[list[Conversation], Media]]:
    """Four samples: text, a video, a picture, pictures and videos in two turns."""
    processor = each_tiny.encoder.processor
    mixed = talk(
        ("user", ["One ", PICTURE, " two ", VIDEO]),
        ("assistant", "Seen."),
        ("user", [OTHER, "And?"]),
        ("assistant", "Done."),
        id="mixed",
    )
    infos = [(PICTURE, PICTURE_INFO), (VIDEO, VIDEO_INFO), (OTHER, OTHER_INFO)]
    return [
        ([talk(("user", "Hello"), ("assistant", "Hi there, how are you?"), id="text")], NO_MEDIA),
        (about_video(1), Media.make(processor, [(VIDEO, VIDEO_INFO)], seed=1)),
        (
            [talk(("user", [PICTURE, "Look"]), ("assistant", "A cat."), id="p")],
            Media.make(processor, infos[:1], seed=2),
        ),
        ([mixed], Media.make(processor, infos, seed=3)),
    ]


# ------------------------------------------------------------------------------------------- packed = one by one


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0], [2]])
def test_a_pack_is_the_sum_of_its_samples(each_tiny: Tiny, rows: Sequence[Any], order: list[int]) -> None:
    model = each_tiny.ours()
    chosen = [rows[i] for i in order]
    alone = [batch_of(each_tiny.encoder, row) for row in chosen]
    packed = batch_of(each_tiny.encoder, *chosen)
    assert packed.num_targets == sum(one.num_targets for one in alone)
    assert packed.num_tokens == packed.input_ids_T.numel() == sum(one.num_tokens for one in alone)
    wanted_loss, wanted = loss_and_gradients(model, *alone)
    loss, found = loss_and_gradients(model, packed)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    assert_same_gradients(found, wanted)


def test_logits_of_a_pack(each_tiny: Tiny, rows: Sequence[Any]) -> None:
    """Token by token, and the batch says which document each row belongs to."""
    model = each_tiny.ours()
    packed = batch_of(each_tiny.encoder, *rows)
    with torch.no_grad():
        logits, document_T = every_logit(model, packed), owners(packed.documents)[0]
        for number, row in enumerate(rows):
            alone = every_logit(model, batch_of(each_tiny.encoder, row))
            assert float((logits[document_T == number] - alone).abs().max()) <= 1e-4


def test_empty_pack(each_tiny: Tiny) -> None:
    """Weight zero: no loss, and a gradient of zero for every weight that is trained, the encoder's too."""
    empty = collate([], each_tiny.encoder.processor)
    assert empty.num_targets == empty.num_tokens == 0 and empty.sample_ids == ()
    model = each_tiny.ours()
    loss, gradients = loss_and_gradients(model, empty)
    assert float(loss) == 0.0
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(bool((g == 0).all()) for g in gradients.values())


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_loss_in_chunks(each_untied: Tiny, rows: Sequence[Any], monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """A chunk of few tokens at a time: same loss and gradients, and those of float64 on all logits at once."""
    model = each_untied.ours()
    batch = batch_of(each_untied.encoder, *rows)
    wanted_loss, wanted = loss_and_gradients(model, batch)
    monkeypatch.setattr(models, "MAX_LOGITS", tokens * model.config.vocab_size)
    loss, found = loss_and_gradients(model, batch)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    assert_same_gradients(found, wanted)
    with torch.no_grad():
        logits_NV = model.logits(batch).double()
    exact = F.cross_entropy(logits_NV, batch.target_ids_N, reduction="sum")
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)


# ----------------------------------------------------------------------------------------------- supervised spans


def test_media_are_not_supervised(each_tiny: Tiny, rows: Sequence[Any]) -> None:
    batch = batch_of(each_tiny.encoder, rows[3])
    text = each_tiny.encoder.tokenizer.decode(batch.input_ids_T[batch.labels_T != -100])
    assert text.replace(" ", "") == f"Seen.{each_tiny.encoder.turn_end}Done.{each_tiny.encoder.turn_end}"
    assert bool((batch.labels_T[batch.media_index_M] == -100).all())


def test_a_conversation_without_an_answer_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="no assistant message"):
        tiny.encoder.encode(talk(("user", "Hello?")))


# ------------------------------------------------------------------------------------- budgets: frames, then pixels


LONG, LONG_INFO = medium("video", 240, 280, 280, fps=24.0, name="long")


def documents_of(tiny: Tiny, talks: Sequence[Conversation], pack_tokens: int, **settings: Any) -> Dataset:
    video = VideoConfig(fps=2.0, min_frames=4, max_frames=32, max_pixels=280 * 280)
    config = DataConfig(pack_tokens=pack_tokens, video=video, **settings)
    infos = {ref.path: info for ref, info in ((LONG, LONG_INFO), (VIDEO, VIDEO_INFO), (PICTURE, PICTURE_INFO))}
    return make_dataset(talks, tiny.encoder, config, lambda ref: infos[ref.path])


def text_of(made: Any) -> tuple[list[int], list[int]]:
    """Ids and labels without the media's."""
    return made.ids_T[~made.media_mask_T].tolist(), made.labels_T[~made.media_mask_T].tolist()


def test_too_long_a_sample_loses_frames_then_pixels_never_text(tiny: Tiny) -> None:
    """20 frames of 100 tokens a pair: 1000 tokens, less and less room, until not even the smallest fit."""
    conversation = talk(("user", [LONG, "What happens in the video?"]), ("assistant", "A dog runs, and runs."))
    full = documents_of(tiny, [conversation], 4096).build(0)
    assert len(full.media[0].frame_indices) == 20 and full.media[0].num_tokens == 1000
    text_tokens = full.num_tokens - 1000
    seen = []
    for room in (1000, 999, 700, 400, 250, 200, 199, 100, 30, 8, 2):
        documents = documents_of(tiny, [conversation], text_tokens + room)
        made = documents.build(0)
        assert not documents.bad and documents.lengths == (made.num_tokens,)
        assert made.media[0].num_tokens == int(made.media_mask_T.sum()) <= room
        assert text_of(made) == text_of(full)
        frames, pixels = len(made.media[0].frame_indices), made.media[0].height * made.media[0].width
        assert made.media[0].frame_indices[0] == 0 and made.media[0].frame_indices[-1] == 239
        assert made.media[0].seconds_per_grid == pytest.approx(2 / (frames / 10.0))
        seen.append((frames, pixels))
        # Resolution goes only once frames can't: four of 100 tokens a pair need 200.
        assert pixels == 280 * 280 if room >= 200 else frames == 4 and pixels < 280 * 280
        # Not more is given up than needed: a pair of frames more, or a size more, would not fit.
        assert room < 200 or (frames + 2) // 2 * 100 > room or frames == 20
    assert seen == sorted(seen, reverse=True) and seen[0] == (20, 280 * 280)
    none = documents_of(tiny, [conversation], text_tokens + 1)
    assert not none.documents and [item.reason for item in none.bad] == ["unfit"]
    assert "sample.json:1" in none.bad[0].message and "data.pack_tokens" in none.bad[0].message


def test_the_digest_tells_edits_of_equal_length(tiny: Tiny, tmp_path: Path) -> None:
    """Another folder or kind of a medium, its trim, its place in the text; not where `data.root` lies."""

    def digest(
        path: str, text: Sequence[str] = ("What?",), root: Path = tmp_path, first: bool = True, **changes: Any
    ) -> str:
        ref = replace(LONG, path=root / path, **changes)
        parts = [ref, *text] if first else [*text, ref]
        asked = talk(("user", parts), ("assistant", "A dog."))
        documents = make_dataset([asked], tiny.encoder, DataConfig(root=root), lambda _: LONG_INFO)
        assert not documents.bad
        return documents.digest

    trim = MediaOptions(video_start=1.0, video_end=3.0)
    different = [
        digest("a/clip.mp4"),
        digest("b/clip.mp4"),
        digest("a/clip.mp4", options=trim),
        digest("a/clip.mp4", options=replace(trim, video_start=1.5, video_end=3.5)),
        digest("a/clip.mp4", first=False),
        digest("a/clip.mp4", ("When?",)),
    ]
    assert len(set(different)) == len(different)
    (tmp_path / "moved").mkdir()
    assert digest("a/clip.mp4", root=tmp_path / "moved") == digest("a/clip.mp4", ("Wh", "at?")) == different[0]


def test_too_long_a_text_is_refused(tiny: Tiny) -> None:
    documents = documents_of(tiny, [talk(("user", [LONG, "What?"]), ("assistant", "A dog. " * 40), id="long")], 40)
    assert not documents.documents and documents.bad[0].id == "long" and "40" in documents.bad[0].message


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_samples", [0, 1, 2, 4])
def test_questions_of_one_video(tiny: Tiny, share: bool, max_samples: int) -> None:
    """All samples are there once, in documents within both limits whose planned length is the true one; all see the
    frames that the longest text leaves room for."""
    talks = about_video(5)
    documents = documents_of(tiny, talks, 300, share_videos=share, max_samples_per_pack=max_samples)
    made = [documents.build(i) for i in range(len(documents.documents))]
    assert [i for one in made for i in one.sample_ids] == [t.id for t in talks]
    assert documents.num_samples == 5 and not documents.bad
    assert tuple(one.num_tokens for one in made) == documents.lengths and max(documents.lengths) <= 300
    assert all(len(one.sample_ids) <= (max_samples or 5) for one in made)
    assert len(made) == {(True, 0): 1, (True, 2): 3, (True, 4): 2}.get((share, max_samples), 5)
    assert documents.pack_plan(0).samples == tuple(len(one.sample_ids) for one in made)
    if share:
        assert len({one.media[0].frame_indices for one in made}) == 1


# ------------------------------------------------------------------------------------------------------ pack plans


def plan(seed: int = 0, count: int = 200, **settings: Any) -> PackPlan:
    chance = random.Random(5)
    lengths = tuple(chance.choice([7, 30, 120, 400, 1000]) for _ in range(count))
    samples = tuple(chance.choice([1, 1, 2, 5]) for _ in range(count))
    limits = {"pack_tokens": 1000, "max_samples": 0} | settings
    return PackPlan(lengths, samples, (1.0,) * count, **limits, seed=seed)


@pytest.mark.parametrize("max_samples", [0, 5, 8])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch(max_samples: int, epoch: int) -> None:
    """Every document once, both limits kept, rows well filled, another order each epoch."""
    made = plan(max_samples=max_samples)
    packs = made.packs(epoch)
    assert sorted(i for pack in packs for i in pack) == list(range(200))
    tokens = [sum(made.lengths[i] for i in pack) for pack in packs]
    assert max(tokens) <= 1000 and min(map(len, packs)) > 0
    if max_samples:
        assert max(sum(made.samples[i] for i in pack) for pack in packs) <= max_samples
    else:
        assert len(packs) <= 1.15 * sum(made.lengths) / 1000
    assert packs != made.packs(epoch + 1)


def test_one_sample_a_pack() -> None:
    made = PackPlan((5,) * 30, (1,) * 30, (1.0,) * 30, pack_tokens=1000, max_samples=1, seed=0)
    assert sorted(made.packs(0)) == [(i,) for i in range(30)]


def test_plans_are_pure() -> None:
    """A process of its own, with its own hash seed, finds the same packs; another seed finds others."""
    code = (
        "import json, random; from vft.data.packing import PackPlan; chance = random.Random(5);"
        "n = [chance.choice([7, 30, 120, 400, 1000]) for _ in range(200)];"
        "s = [chance.choice([1, 1, 2, 5]) for _ in range(200)];"
        "plan = PackPlan(tuple(n), tuple(s), (1.0,) * 200, pack_tokens=1000, max_samples=0, seed=0);"
        "print(json.dumps([plan.packs(e) for e in (2, 0)]))"
    )
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [[list(pack) for pack in plan().packs(epoch)] for epoch in (2, 0)]
    assert plan(seed=1).packs(0) != plan().packs(0)


def test_steps_go_through_the_epochs() -> None:
    """Packs of all epochs in their order, wherever one begins anew from a cursor; then empty ones."""
    made = plan(count=40)
    everything = [pack for epoch in range(3) for pack in made.packs(epoch)]
    epochs = [epoch for epoch in range(3) for _ in made.packs(epoch)]
    assert len(everything) % 7, "the last step should lack packs"
    cursor, taken = Cursor(), []
    cursors = []
    for _ in range(len(everything) // 7 + 2):
        cursors.append(cursor)
        packs, cursor = take_step(made, cursor, 7, last_epoch=2)
        assert len(packs) == 7
        taken += packs
    real = taken[: len(everything)]
    assert [pack.documents for pack in real] == everything and [pack.epoch for pack in real] == epochs
    assert all(pack.documents == () for pack in taken[len(everything) :]) and len(taken) > len(everything) + 7
    # Another process that knows the cursor alone.
    for number in (1, 3):
        packs, _ = take_step(plan(count=40), Cursor(cursors[number].epoch, cursors[number].pack), 7, last_epoch=2)
        assert packs == taken[7 * number : 7 * number + 7]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_share_out(ranks: int) -> None:
    """Equally many for each, all of them once, and far more even than in their order."""
    chance = random.Random(0)
    costs = [chance.choice([100.0, 120.0, 700.0, 1000.0]) for _ in range(24)]
    shares = share_out(costs, ranks)
    assert [len(share) for share in shares] == [24 // ranks] * ranks
    assert sorted(slot for share in shares for slot in share) == list(range(24))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[slot] for slot in share) for share in shares]
    assert max(loads) - min(loads) <= 1000.0
    assert max(loads) <= 1.25 * sum(costs) / ranks


def test_replacement() -> None:
    """No longer and with no more samples than the document it stands for, never that one, and always the same."""
    made = plan()
    for number in range(0, 200, 7):
        chosen = [made.replacement(number, 0, attempt) for attempt in range(5)]
        for other in chosen:
            assert other is not None and other != number
            assert made.lengths[other] <= made.lengths[number] and made.samples[other] <= made.samples[number]
        assert chosen == [plan().replacement(number, 0, attempt) for attempt in range(5)]
    alone = PackPlan((10, 20), (1, 1), (1.0, 1.0), pack_tokens=20, max_samples=0, seed=0)
    assert alone.replacement(0, 0, 0) is None and alone.replacement(1, 0, 0) == 0


def test_batch_is_moved_whole(each_tiny: Tiny, rows: Sequence[Any]) -> None:
    """To the meta device, where a tensor left behind would show."""
    media = Media.make(each_tiny.encoder.processor, [(VIDEO, VIDEO_INFO)])
    moved = batch_of(each_tiny.encoder, *rows, (about_video(2), media)).to(torch.device("meta"))

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        if isinstance(value, dict):
            return [x for item in value.values() for x in tensors(item)]
        if hasattr(value, "__dataclass_fields__") and not isinstance(value, tuple):
            return [
                x for name in value.__dataclass_fields__ if name != "documents" for x in tensors(getattr(value, name))
            ]
        return []

    found = tensors(moved)
    assert len(found) > 12 and all(x.is_meta for x in found)
    assert isinstance(moved, Batch)


def test_the_work_of_a_document_is_that_of_its_row(tiny: Tiny) -> None:
    """Known from the index: tokens, attended pairs and patches, with and without a shared trunk."""
    processor = tiny.encoder.processor
    for share in (True, False):
        talks = [*about_video(5), talk(("user", "And?"), ("assistant", "No."))]
        made = documents_of(tiny, talks, 4096, share_videos=share)
        assert len(made.documents) == (2 if share else 6)
        for number, planned in enumerate(made.documents):
            (tokens, pairs, patches, keys), built = planned.work, made.build(number)
            blank = [
                Patches(
                    torch.zeros(math.prod(one.grid_thw), tiny.encoder.processor.patch_features).byte(),
                    one.grid_thw,
                    1.0,
                )
                for one in built.media
            ]
            row = collate([(built, blank)], processor)
            assert tokens == row.num_tokens and patches == row.pixels_PD.shape[0]
            assert keys == sum(segment.k_length for segment in row.plan.segments)
            # Who sees whom: trunk and own branch, up to oneself.
            branch, position = owners(row.documents)[1], torch.arange(row.num_tokens)
            seen = (position[None] <= position[:, None]) & ((branch[None] == -1) | (branch[None] == branch[:, None]))
            assert pairs == int(seen.sum())


def test_rows_are_shared_out_by_what_they_cost(tiny: Tiny) -> None:
    """Rows of equal length, some of video and some of text: by tokens one process could get all the video."""
    long = "word " * 30
    talks = [
        talk(("user", [VIDEO, "What?"]), ("assistant", "A dog."), id=f"v{number}")
        if number % 2
        else talk(("user", long), ("assistant", long), id=f"t{number}")
        for number in range(8)
    ]
    documents = documents_of(tiny, talks, 400, share_videos=False, max_samples_per_pack=1)
    assert len(documents.documents) == 8
    encoder = 20.0
    costs = tuple(planned.work.tokens + encoder * planned.work.patches for planned in documents.documents)
    shares: dict[bool, list[float]] = {}
    for by_cost in (False, True):
        loads = []
        for rank in range(2):
            plan = documents.pack_plan(seed=3)
            loader = Loader(documents, plan, WorkerPool(0, 1.0), DataParallel(rank, 2), len(plan.packs(0)), 1, 0)
            loader.costs = costs if by_cost else loader.costs
            loads.append(sum(costs[n] for planned in loader.plan_step() for n in planned.pack.documents))
        shares[by_cost] = loads
    assert sum(shares[True]) == sum(shares[False]) == sum(costs)
    assert max(shares[True]) - min(shares[True]) <= max(costs)
    assert max(shares[True]) <= max(shares[False])
