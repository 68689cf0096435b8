"""The reference cases of Qwen3.5, from the video file to the gradients, through the path that training takes.

Their numbers were computed by other software (see the README beside them). Files and weights are as released.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny import CPU, load_model, load_prepared, loss_and_gradients
from tests.parity.test_reference_cases import Case, assert_logits, assert_loss_and_gradients, read_case, record
from vft.adapters.targets import choose_trainable
from vft.common.types import Batch, Turn
from vft.config.data import DataConfig
from vft.data.chat import ChatEncoder
from vft.data.media.patches import load_patches
from vft.data.packing import collate
from vft.models.attention import build_plan, document_segments
from vft.models.base import VideoLanguageModel
from vft.models.kv_cache import PrefixCache

CASES = ["text_only", "one_video", "image_video_turns", "thinking"]


@pytest.fixture(scope="module")
def base(reference_today: Path) -> Path:
    return reference_today / "qwen3_5_tiny"


@pytest.fixture(scope="module")
def trained(base: Path) -> VideoLanguageModel:
    """The base with everything trained, in float32."""
    components = ("language_model", "projector", "vision_encoder")
    return load_prepared(base, lambda it: choose_trainable(it, None, components))[0]


@pytest.fixture(scope="module")
def encoder(base: Path) -> ChatEncoder:
    return load_model(str(base), None, torch.float32, CPU).encoder(DataConfig())


LoadCase = Callable[[str], Case]


@pytest.fixture(scope="module")
def load_case(
    reference_today: Path, videos: Path, encoder: ChatEncoder, tmp_path_factory: pytest.TempPathFactory
) -> LoadCase:
    folder = tmp_path_factory.mktemp("records")
    return cache(lambda name: read_case(reference_today / "cases_qwen3_5" / name, videos, encoder, folder))


@pytest.mark.parametrize("name", CASES)
def test_frames_and_tokens(name: str, load_case: LoadCase) -> None:
    """Every answer behind its reasoning or an empty thought, which is not supervised."""
    case = load_case(name)
    for plan, medium in zip(case.batch.documents[0].media, case.facts["media"], strict=True):
        assert (plan.height, plan.width) == (medium["resized_height"], medium["resized_width"])
        assert list(plan.grid_thw) == medium["grid_thw"] and plan.num_tokens == medium["num_tokens"]
    assert torch.equal(case.batch.input_ids_T, case.tensors["input_ids"])
    assert torch.equal(case.batch.labels_T, case.tensors["labels"])
    assert torch.equal(case.batch.positions_3T, case.tensors["position_ids"])
    assert torch.equal(case.batch.target_index_N, case.tensors["predicting_positions"])


@pytest.mark.parametrize("name", CASES)
def test_tags_of_thoughts_are_supervised_where_that_is_asked_for(
    name: str, load_case: LoadCase, encoder: ChatEncoder
) -> None:
    case = load_case(name)
    settings = encoder.end_ids, encoder.learn_reasoning, True
    other = ChatEncoder(encoder.tokenizer, encoder.processor, *settings)
    (document,) = case.batch.documents
    again = other.document([case.conversation], document.media)
    assert torch.equal(again.ids_T, document.ids_T)
    assert torch.equal(again.labels_T, case.tensors["labels_with_block"])


@pytest.mark.parametrize("name", CASES)
def test_where_the_model_is_to_answer_the_text_is_the_templates(
    name: str, load_case: LoadCase, encoder: ChatEncoder
) -> None:
    """Earlier answers without thoughts, and an empty one at the end."""
    case = load_case(name)
    asked = encoder.encode(replace(case.conversation, turns=case.conversation.turns[:-1]), answer_next=True)
    messages = [{"role": m["role"], "content": m["content"]} for m in record(case.facts)["messages"][:-1]]
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert list(asked.ids) == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["one_video", "image_video_turns"])
def test_pixels(name: str, load_case: LoadCase, trained: VideoLanguageModel) -> None:
    case = load_case(name)
    pixels_PD = trained.normalise(case.batch.pixels_PD)
    counts = [t * h * w for t, h, w in case.batch.grids]
    for kind, stored in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        parts = zip(pixels_PD.split(counts), case.batch.documents[0].media, strict=True)
        found = [part for part, plan in parts if plan.ref.kind == kind]
        assert bool(found) == (stored in case.tensors)
        if found:
            assert float((torch.cat(found) - case.tensors[stored]).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, load_case: LoadCase, trained: VideoLanguageModel) -> None:
    assert_logits(trained, load_case(name), within=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name: str, load_case: LoadCase, trained: VideoLanguageModel) -> None:
    assert_loss_and_gradients(trained, load_case(name), lambda name: name)


def prefix_of(case: Case, tokens: int) -> Batch:
    """The first tokens of the case's row, with its video."""
    batch = case.batch
    none = batch.target_index_N[:0]
    return replace(
        batch,
        input_ids_T=batch.input_ids_T[:tokens],
        positions_3T=batch.positions_3T[:, :tokens],
        plan=build_plan(document_segments(0, 0, [tokens]), causal=True),
        target_index_N=none,
        target_ids_N=none,
    )


def test_what_a_prefix_leaves(load_case: LoadCase, trained: VideoLanguageModel) -> None:
    """States of recurrent layers, the last inputs of their convolutions, keys and values of the others."""
    case, prefix = load_case("one_video"), PrefixCache()
    tokens = case.facts["trunk"]["trunk_tokens"]
    with torch.no_grad():
        trained(prefix_of(case, tokens), prefix)
    for number, (last, state) in prefix.states.items():
        wanted: Tensor = case.tensors[f"state.{number}.recurrent"]
        assert float((state[0] - wanted).abs().max()) <= 5e-5
        assert float((last[0].T - case.tensors[f"state.{number}.conv"][:, 1:]).abs().max()) <= 5e-5
    for number, (keys, values) in prefix.past.items():
        for kind, found in (("key", keys), ("value", values)):
            wanted = case.tensors[f"state.{number}.{kind}"]
            wanted = wanted if wanted.shape == found.shape else wanted.squeeze(0).transpose(0, 1)
            assert float((found - wanted).abs().max()) <= 1e-4  # of up to 6
    assert sorted([*prefix.states, *prefix.past]) == [0, 1, 2, 3, 4]


def test_two_conversations_behind_one_video(
    load_case: LoadCase, trained: VideoLanguageModel, encoder: ChatEncoder
) -> None:
    """The second is a suffix that starts from the state that the video left: its loss, and the gradients of both, are
    those of two sequences of their own."""
    case = load_case("one_video")
    first = case.conversation
    (video,) = first.media
    asked, answered = case.facts["trunk"]["messages"]
    question = [video if part["type"] == "video" else part["text"] for part in asked["content"]]
    second = replace(
        first, id="second", turns=(Turn("user", tuple(question)), Turn("assistant", (answered["content"],)))
    )
    document = encoder.document([first, second], case.batch.documents[0].media)
    assert 0 < document.prefix_length <= case.facts["trunk"]["trunk_tokens"] and len(document.suffix_lengths) == 2
    rows = document.suffix_rows[1]
    assert torch.equal(document.ids_T[rows], case.tensors["branch1_input_ids"][document.prefix_length :])
    patches = [load_patches(plan, encoder.processor) for plan in document.media]
    loss, gradients = loss_and_gradients(trained, collate([(document, patches)], encoder.processor))
    wanted = case.facts["loss_sum"] + case.facts["trunk"]["loss_sum"]
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    norms = case.facts["trunk"]["both_grad_norms"]
    assert norms.keys() <= gradients.keys()
    for name, norm in norms.items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-4), name


def test_what_the_model_does_not_use_is_left_out(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vft")
    load_model(str(base), None, torch.float32, CPU)
    assert any("15 tensors (mtp.) are not used in training" in message for message in caplog.messages)
