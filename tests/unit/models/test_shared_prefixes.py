"""Questions behind one copy of their video: loss and gradients are those of the samples one by one.

Each question is also run alone, with the video to itself; float32, no dropout, every weight trained or adapters on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.patches import patches_of
from tests.helpers.tiny import (
    Media,
    Tiny,
    assert_same_gradients,
    batch_of,
    document,
    load_prepared,
    loss_and_gradients,
    medium,
    talk,
)
from vft.adapters.lora import initialise, is_adapter
from vft.adapters.targets import choose_trainable
from vft.common.types import Batch, Conversation, Document, MediaInfo, MediaPlan, Patches
from vft.config.data import DataConfig, ImageConfig, VideoConfig
from vft.config.run import LoraConfig
from vft.data.dataset import Dataset, make_dataset
from vft.data.packing import collate, owners
from vft.models.base import VideoLanguageModel

VIDEO, VIDEO_INFO = medium("video", 6, 150, 140, fps=1.0)
OTHER, OTHER_INFO = medium("video", 3, 60, 90, fps=4.0, name="other")
PICTURE, PICTURE_INFO = medium("image", 1, 90, 130, name="picture")
SECOND, SECOND_INFO = medium("image", 1, 60, 60, name="second")
INFOS = {VIDEO: VIDEO_INFO, OTHER: OTHER_INFO, PICTURE: PICTURE_INFO, SECOND: SECOND_INFO}
QUESTIONS = [
    ("What happens?", "A dog runs."),
    ("Who is there?", "Nobody."),
    ("Where?", "In a park, near the old mill, on a Sunday morning."),
    ("Is it late?", "No"),
    ("What happens?", "A dog runs."),  # asked twice
    ("What happens?", "A cat sleeps."),  # and answered otherwise
    ("?", "1"),
    ("How many dogs are there, and how many of them run to the left of the tree?", "Two."),
]


def about(parts: Sequence[Any], count: int) -> list[Conversation]:
    """`count` samples that ask about the same media, which `parts` hold with what stands between them."""
    return [talk(("user", [*parts, q]), ("assistant", a), id=f"q{i}") for i, (q, a) in enumerate(QUESTIONS[:count])]


MULTI_TURN = talk(
    ("user", [VIDEO, "Who is there?"]),
    ("assistant", "A dog."),
    ("user", "Sure?"),
    ("assistant", "Yes, quite."),
    ("user", "And where?"),
    ("assistant", "In a park."),
    id="turns",
)
WITH_SYSTEM = [replace(one, turns=(*talk(("system", "Be brief.")).turns, *one.turns)) for one in about([VIDEO], 3)]

SHARED: dict[str, list[Conversation]] = {
    **{f"{count} questions": about([VIDEO], count) for count in (2, 5, 8)},
    "two videos": about([VIDEO, " and ", OTHER, "\n"], 3),
    "one video twice": about([OTHER, OTHER], 2),
    "a multi-turn record among single ones": [*about([VIDEO], 1), MULTI_TURN, *about([VIDEO], 4)[2:]],
    "a picture": about([PICTURE], 3),
    "pictures and a video": about([PICTURE, "first, then ", VIDEO, SECOND], 3),
    "the same text before the video": about(["Watch: ", VIDEO], 3),
    "a system text": WITH_SYSTEM,
}
"""Samples that one trunk serves, by what is in them."""


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe"])
def tiny(request: pytest.FixtureRequest, make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    """Of the families whose templates leave media where they stand."""
    return make_tiny(request.param, "tied")


def media_of(tiny: Tiny, conversations: Sequence[Conversation]) -> Media:
    refs = conversations[0].media
    return Media.make(tiny.encoder.processor, [(ref, INFOS[ref]) for ref in refs], seed=3)


def adapted(tiny: Tiny) -> Any:
    """A model with an adapter on every linear layer of all its components, none of which is zero."""

    def prepare(model: VideoLanguageModel) -> None:
        targets = ("language_model.*", "vision_encoder.*", "projector.*")
        choose_trainable(model, LoraConfig(rank=4, alpha=8, targets=targets), ())

    model = load_prepared(tiny.path, prepare)[0]
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.train()


MODELS: dict[str, Callable[[Tiny], Any]] = {"full": Tiny.ours, "lora": adapted}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Any:
    """Trained in full, or by adapters."""
    return MODELS[request.param](tiny)


def assert_same_training(model: Any, batches: Sequence[Batch], alone: Sequence[Batch]) -> None:
    """Loss and gradients of `batches` together are those of `alone` together."""
    wanted_loss, wanted = loss_and_gradients(model, *alone)
    loss, found = loss_and_gradients(model, *batches)
    assert sum(one.num_targets for one in batches) == sum(one.num_targets for one in alone)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    # A state carries rounding along the whole row.
    assert_same_gradients(found, wanted, 1e-4 if any(model.decoder.recurrence_flops) else 1e-5)
    if any(one.grids for one in batches):
        # A softmax cancels the keys' bias; LLaVA's line break stands in pictures alone.
        idle = ("k_proj.bias", "image_newline")
        assert all(float(gradient.norm()) > 0 for name, gradient in found.items() if not name.endswith(idle))


# --------------------------------------------------------------------------------------- a trunk = separate samples


@pytest.mark.parametrize("name", SHARED)
def test_ids_labels_and_positions_of_branches(tiny: Tiny, name: str) -> None:
    """The trunk and branch b, one behind the other, are sample b as it is alone, token by token."""
    talks, media = SHARED[name], media_of(tiny, SHARED[name])
    shared = batch_of(tiny.encoder, (talks, media))
    assert len(shared.documents) == 1 and len(shared.grids) == len(media.plans)
    assert shared.sample_ids == tuple(one.id for one in talks)
    branch_T = owners(shared.documents)[1]
    for number, one in enumerate(talks):
        mine = (branch_T == -1) | (branch_T == number)
        alone = batch_of(tiny.encoder, ([one], media))
        assert torch.equal(shared.input_ids_T[mine], alone.input_ids_T)
        assert torch.equal(shared.labels_T[mine], alone.labels_T)
        assert torch.equal(shared.positions_3T[:, mine], alone.positions_3T)


def test_one_question_has_no_branches(tiny: Tiny, model: Any) -> None:
    """k = 1: one segment, as attention of the whole row."""
    talks = about([VIDEO], 1)
    batch = batch_of(tiny.encoder, (talks, media_of(tiny, talks)))
    assert len(batch.plan.segments) == 1 and batch.plan.k_index is None
    assert batch.documents[0].prefix_length == 0 and set(owners(batch.documents)[1].tolist()) == {0}
    twice = batch_of(tiny.encoder, (talks, media_of(tiny, talks)), (talks, media_of(tiny, talks)))
    assert_same_training(model, [twice], [batch, batch])


def test_branches_in_a_pack(tiny: Tiny, model: Any) -> None:
    """Dataset with and without a trunk side by side; no row sees another document."""
    text = [talk(("user", "Hello"), ("assistant", "Hi there, how are you?"), id="text")]
    groups = [text, SHARED["5 questions"], SHARED["a picture"], about([VIDEO], 1), SHARED["two videos"]]
    rows = [(talks, Media((), ()) if talks is text else media_of(tiny, talks)) for talks in groups]
    alone = [batch_of(tiny.encoder, ([one], media)) for talks, media in rows for one in talks]
    assert_same_training(model, [batch_of(tiny.encoder, *rows)], alone)


def test_a_branch_sees_no_other(tiny: Tiny) -> None:
    """Another question and another answer in branch 1: the losses of the others stay what they were."""
    model, media = tiny.ours(), media_of(tiny, about([VIDEO], 1))
    talks = about([VIDEO], 3)
    other = talk(("user", [VIDEO, "Who is that?"]), ("assistant", "My aunt."), id="q1")

    def losses(members: list[Conversation], branch: int) -> torch.Tensor:
        batch = batch_of(tiny.encoder, (members, media))
        with torch.no_grad():
            logits_NV = model.logits(batch)
        found_N = torch.nn.functional.cross_entropy(logits_NV, batch.target_ids_N, reduction="none")
        return found_N[owners(batch.documents)[1][batch.labels_T != -100] == branch]

    for branch in (0, 2):
        before, after = (losses(members, branch) for members in (talks, [talks[0], other, talks[2]]))
        assert float((before - after).abs().max()) <= 5e-6  # rows of another branch change how experts round
    before, after = (losses([talks[0], one, talks[2]], 1) for one in (talks[1], other))
    assert float(before.sum() - after.sum()) != 0


def test_first_token_of_a_branch_is_predicted_by_the_trunk(tiny: Tiny) -> None:
    """A template may put a supervised token right behind the trunk: its predictor is the trunk's last row."""
    talks = about([VIDEO], 3)
    media = media_of(tiny, talks)
    made = document(tiny.encoder, talks, media)
    starts = torch.tensor([0, *made.suffix_lengths]).cumsum(0)[:-1] + made.prefix_length
    labels = made.labels_T.clone()
    labels[starts] = made.ids_T[starts]
    batch = collate([(replace(made, labels_T=labels), media.patches)], tiny.encoder.processor)
    predictors = dict(zip((labels != -100).nonzero().flatten().tolist(), batch.target_index_N.tolist(), strict=True))
    assert [predictors[int(start)] for start in starts] == [made.prefix_length - 1] * 3
    assert all(predictors[row] == row - 1 for row in predictors if row not in starts.tolist())


# ------------------------------------------------------------------------------------- records to batches, and back

APART: dict[str, list[Conversation]] = {
    "the question precedes the video": [
        talk(("user", [question, VIDEO]), ("assistant", answer), id=f"q{i}")
        for i, (question, answer) in enumerate(QUESTIONS[:3])
    ],
    "an answer precedes the video": [
        talk(("user", "Hi"), ("assistant", "Yes."), ("user", [VIDEO, question]), ("assistant", answer), id=f"q{i}")
        for i, (question, answer) in enumerate(QUESTIONS[:2])
    ],
    "system texts differ": [
        talk(("system", f"Say {i}."), ("user", [VIDEO, "?"]), ("assistant", "A."), id=f"q{i}") for i in range(3)
    ],
    "one video in another order": [
        talk(("user", [VIDEO, OTHER, "?"]), ("assistant", "A."), id="q0"),
        talk(("user", [OTHER, VIDEO, "?"]), ("assistant", "B."), id="q1"),
    ],
    "other frames of the video": [
        talk(("user", [VIDEO, "?"]), ("assistant", "A."), id="q0"),
        talk(("user", [replace(VIDEO, options=replace(VIDEO.options, nframes=2)), "?"]), ("assistant", "B."), id="q1"),
    ],
    "no media": [talk(("user", "Hi"), ("assistant", answer), id=answer) for answer in ("A", "B")],
}
"""Samples that no trunk can serve."""


def documents_of(tiny: Tiny, conversations: Sequence[Conversation], **settings: Any) -> Dataset:
    video = VideoConfig(frames=6, max_pixels=150 * 150)
    config = DataConfig(video=video, image=ImageConfig(max_pixels=90 * 130), **{"pack_tokens": 4096} | settings)
    infos = {ref.path: info for ref, info in INFOS.items()}
    made = make_dataset(conversations, tiny.encoder, config, lambda ref: infos[ref.path])
    assert not made.bad and made.num_samples == len(conversations)
    return made


def pixels_of(plan: MediaPlan, processor: Any) -> Patches:
    """The planned frames of a medium whose pixels depend on its name alone."""
    info: MediaInfo = plan.info
    generator = torch.Generator().manual_seed(len(plan.ref.name))
    shape = (info.num_frames, 3, info.height, info.width)
    frames_TCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return patches_of(frames_TCHW[list(plan.frame_indices)], plan, processor)


def batches_of(tiny: Tiny, documents: Dataset) -> list[Batch]:
    processor = tiny.encoder.processor
    built: list[Document] = [documents.build(number) for number in range(len(documents.documents))]
    assert tuple(one.num_tokens for one in built) == documents.lengths
    return [collate([(one, [pixels_of(plan, processor) for plan in one.media])], processor) for one in built]


@pytest.mark.parametrize("name", [*SHARED, *APART])
def test_sharing_changes_no_training(tiny: Tiny, model: Any, name: str) -> None:
    """Records to documents to batches with `share_videos` on and off: one document or several, the same training."""
    talks = SHARED.get(name) or APART[name]
    on, off = (documents_of(tiny, talks, share_videos=share) for share in (True, False))
    assert len(off.documents) == len(talks)
    assert len(on.documents) == (1 if name in SHARED else len(talks))
    assert sorted(one.id for one in on.conversations) == sorted(one.id for one in talks)
    assert sum(on.lengths) < sum(off.lengths) if name in SHARED else sum(on.lengths) == sum(off.lengths)
    assert_same_training(model, batches_of(tiny, on), batches_of(tiny, off))


@pytest.mark.parametrize("settings", [{"max_samples_per_pack": 3}, {"pack_tokens": 190}], ids=["samples", "tokens"])
def test_a_group_over_several_documents(tiny: Tiny, model: Any, settings: dict[str, int]) -> None:
    """Eight questions that one row can't take: several trunks of the same frames, the same training."""
    talks = SHARED["8 questions"]
    on, off = (documents_of(tiny, talks, share_videos=share, **settings) for share in (True, False))
    assert 1 < len(on.documents) < 8 and max(len(planned.conversations) for planned in on.documents) > 1
    built = [on.build(number) for number in range(len(on.documents))]
    assert max(on.lengths) <= settings.get("pack_tokens", 4096)
    assert len({one.media[0].frame_indices for one in built}) == 1
    # Alone a sample may have room for more frames: both are to have the same here.
    assert {off.build(number).media[0].frame_indices for number in range(8)} == {built[0].media[0].frame_indices}
    assert_same_training(model, batches_of(tiny, on), batches_of(tiny, off))


def test_videos_are_told_apart(tiny: Tiny) -> None:
    """Two videos with two questions each, mixed: two documents, each with its own video's questions in their order."""
    first, second = about([VIDEO], 2), [replace(one, id=f"o{one.id}") for one in about([OTHER], 2)]
    documents = documents_of(tiny, [first[0], second[0], first[1], second[1]])
    built = [documents.build(number) for number in range(2)]
    assert [one.sample_ids for one in built] == [("q0", "q1"), ("oq0", "oq1")]
    assert [[plan.ref for plan in one.media] for one in built] == [[VIDEO], [OTHER]]


@pytest.mark.parametrize("name", APART)
def test_what_cannot_share_a_trunk(tiny: Tiny, name: str) -> None:
    """Said of the encoded samples too, on which the grouping relies."""
    talks = APART[name]
    if len({one.media_key for one in talks}) == 1:
        heads = [tiny.encoder.encode(one).shareable_prefix for one in talks]
        assert None in heads or len(set(heads)) == len(heads)
    heads = [tiny.encoder.encode(one).shareable_prefix for one in about([VIDEO], 3)]
    assert len(set(heads)) == 1 and None not in heads


def test_one_that_cannot_share_leaves_the_others_together(tiny: Tiny, model: Any) -> None:
    """A question that precedes its video comes alone; those behind it still share the video, and train the same."""
    first, *rest = about([VIDEO], 3)
    talks = [first, talk(("user", ["Where?", VIDEO]), ("assistant", "In a park."), id="before"), *rest]
    on, off = (documents_of(tiny, talks, share_videos=share) for share in (True, False))
    assert [on.build(number).sample_ids for number in range(len(on.documents))] == [("q0", "q1", "q2"), ("before",)]
    assert_same_training(model, batches_of(tiny, on), batches_of(tiny, off))
