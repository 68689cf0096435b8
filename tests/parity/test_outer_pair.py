"""Videos inside the template's own vision_start and vision_end: the second form of the reference cases.

transformers from 5.10 makes this form, and `data.video.keep_outer_pair` trains in it. The numbers were computed by
other software (see the README beside them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.tiny import CPU, Media, Tiny, batch_of, load_model, talk
from tests.parity.test_reference_cases import Case, read_case
from vft.common.errors import UserError
from vft.config.data import DataConfig
from vft.data.chat import ChatEncoder
from vft.data.media.patches import load_patches
from vft.preparation.run import PreparedModel
from vft.training.losses import cross_entropy

CASES = ["one_video", "image_video_turns"]
KEEPING = DataConfig.model_validate({"video": {"keep_outer_pair": True}})


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_vl_moe"])
def checkpoint(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def prepared(reference_today: Path, checkpoint: str) -> PreparedModel:
    return load_model(str(reference_today / f"{checkpoint}_tiny"), None, torch.float32, CPU)


@pytest.fixture(scope="module")
def encoder(prepared: PreparedModel) -> ChatEncoder:
    return prepared.encoder(KEEPING)


@pytest.fixture(scope="module")
def load_case(
    reference_today: Path,
    videos: Path,
    checkpoint: str,
    encoder: ChatEncoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Case]:
    folder = tmp_path_factory.mktemp("records")
    return cache(lambda name: read_case(reference_today / f"cases_{checkpoint}" / name, videos, encoder, folder))


@pytest.mark.parametrize("name", CASES)
def test_ids_labels_and_positions(name: str, load_case: Callable[[str], Case]) -> None:
    case = load_case(name)
    assert torch.equal(case.batch.input_ids_T, case.tensors["wrapped_input_ids"])
    assert torch.equal(case.batch.labels_T, case.tensors["wrapped_labels"])
    assert torch.equal(case.batch.positions_3T, case.tensors["wrapped_position_ids"])
    assert case.batch.num_tokens == case.facts["wrapped"]["num_tokens"] > len(case.tensors["input_ids"])


@pytest.mark.parametrize("name", CASES)
def test_losses(name: str, load_case: Callable[[str], Case], prepared: PreparedModel) -> None:
    case = load_case(name)
    with torch.no_grad():
        nll_N = F.cross_entropy(prepared.model.logits(case.batch), case.batch.target_ids_N, reduction="none")
    assert float((nll_N - case.tensors["wrapped_token_nll"]).abs().max()) <= 2e-4
    assert float(nll_N.sum()) == pytest.approx(case.facts["wrapped"]["loss_sum"], rel=1e-5)


def test_questions_share_a_video_and_its_pair(
    load_case: Callable[[str], Case], encoder: ChatEncoder, prepared: PreparedModel
) -> None:
    """The prefix ends with the outer vision_end, and the loss is that of the two samples."""
    case = load_case("one_video")
    (plan,) = case.batch.documents[0].media
    asked, answered = case.facts["trunk"]["messages"]
    other = talk(("user", [plan.ref, asked["content"][1]["text"]]), ("assistant", answered["content"]))
    media = Media((plan,), (load_patches(plan, encoder.processor),))
    both = batch_of(encoder, ([case.conversation, other], media))
    (document,) = both.documents
    ends = encoder.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    assert document.ids_T[document.prefix_length - 2 : document.prefix_length].tolist() == [ends, ends]
    with torch.no_grad():
        together = cross_entropy(prepared.model, both)
        alone = [cross_entropy(prepared.model, batch_of(encoder, ([one], media))) for one in (case.conversation, other)]
    assert float(together) == pytest.approx(float(sum(alone)), rel=1e-5)


def test_plans_and_lengths_depend_on_it(prepared: PreparedModel, encoder: ChatEncoder) -> None:
    assert encoder.fingerprint != prepared.encoder(DataConfig()).fingerprint
    assert prepared.encoder(KEEPING).fingerprint == encoder.fingerprint


@pytest.mark.parametrize("name", CASES)
def test_a_template_that_writes_the_pad_alone(
    name: str, load_case: Callable[[str], Case], prepared: PreparedModel
) -> None:
    """As in a merged folder: trained on in the release's form, refused where the pair is to be kept."""
    case, pretrained = load_case(name), prepared.pretrained
    tokenizer = type(pretrained.tokenizer).from_pretrained(pretrained.path)
    tokenizer.chat_template = pretrained.tokenizer.chat_template.replace(
        "<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>"
    )
    assert tokenizer.chat_template != pretrained.tokenizer.chat_template
    processor = prepared.model.processor
    made = ChatEncoder(tokenizer, processor).document([case.conversation], case.batch.documents[0].media)
    assert torch.equal(made.ids_T, case.tensors["input_ids"])
    assert torch.equal(made.labels_T, case.tensors["labels"])
    with pytest.raises(UserError, match=r"keep_outer_pair = true: .* around a video, by its chat template; take"):
        ChatEncoder(tokenizer, replace(processor, keep_outer_pair=True))


def test_families_without_such_a_pair_refuse_it(make_tiny: Callable[[str, str], Tiny]) -> None:
    for family in ("qwen2_5_vl", "llava_next_video"):
        prepared = load_model(str(make_tiny(family, "tied").path), None, torch.float32, CPU)
        with pytest.raises(UserError, match=r"keep_outer_pair = true: .*no outer pair .* by its family; take"):
            prepared.encoder(KEEPING)
