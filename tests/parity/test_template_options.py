"""Keywords of the chat template (`data.template_options`), with the templates of the reference checkpoints.

What is compared with: transformers' rendering of the same messages with the same keywords, and the reference cases.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.helpers.tiny import CPU, Media, batch_of, load_model, talk
from tests.parity.test_reference_cases import Case, read_case
from vft.common.errors import UserError
from vft.common.task import Answer
from vft.common.types import IGNORE_INDEX, Conversation
from vft.config.data import DataConfig
from vft.data.chat import ChatEncoder, Encoded
from vft.data.media.patches import load_patches
from vft.data.media.video import scan
from vft.data.workers import WorkerPool
from vft.distributed.process_group import World
from vft.inference import generate as generating
from vft.inference.engine import Answerer
from vft.inference.generate import Sampling
from vft.inference.requests import user_question
from vft.preparation.run import PreparedModel
from vft.training.losses import cross_entropy

THINKS, THINKS_NOT = {"enable_thinking": True}, {"enable_thinking": False}
CASES = ["text_only", "one_video", "image_video_turns", "thinking"]
REASONED = "<think>\n I look.\n\nAgain. \n</think>\n\nA dog.\n"
EFFORT = (
    "{%- set said = {'low': 'Think little.', 'high': 'Think hard.'} %}"
    "{%- set effort = reasoning_effort | default('high') %}"
    "{%- if effort not in said %}{{- raise_exception('Unexpected effort ' ~ effort) }}{%- endif %}"
    "{{- '<|im_start|>system\n' ~ said[effort] ~ '<|im_end|>\n' }}"
)
"""How Qwen3.8's template lets the effort of thinking be chosen: a text in the system turn."""


@pytest.fixture(scope="module")
def base(reference_today: Path) -> Path:
    return reference_today / "qwen3_5_tiny"


@pytest.fixture(scope="module")
def prepared(base: Path) -> PreparedModel:
    return load_model(str(base), None, torch.float32, CPU)


def encoder_of(prepared: PreparedModel, **settings: Any) -> ChatEncoder:
    return prepared.encoder(DataConfig(**settings))


def with_template(prepared: PreparedModel, change: Callable[[str], str], options: dict[str, Any]) -> ChatEncoder:
    """An encoder whose template is changed."""
    tokenizer = AutoTokenizer.from_pretrained(prepared.pretrained.path)
    tokenizer.chat_template = change(prepared.pretrained.tokenizer.chat_template)
    return ChatEncoder(tokenizer, prepared.model.processor, template_options=options)


def thinks_by_itself(template: str) -> str:
    """The template of the larger releases, which think unless they are told not to."""
    switch = "enable_thinking is defined and enable_thinking is true"
    assert switch in template
    return template.replace(switch, "enable_thinking is not defined or enable_thinking")


def learnt(encoder: ChatEncoder, one: Encoded) -> str:
    return str(encoder.tokenizer.decode([label for label in one.labels if label != IGNORE_INDEX]))


def rendered(encoder: ChatEncoder, conversation: Conversation, answer_next: bool = False) -> list[int]:
    """transformers' text of a conversation without media, as ids."""
    messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
    text = encoder.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer_next, **encoder.template.options
    )
    return list(encoder.tokenizer(text)["input_ids"])


@pytest.mark.parametrize("answer", [REASONED, "A dog.", "  A dog.\n\n"])
def test_a_thinking_prompt_in_training(prepared: PreparedModel, answer: str) -> None:
    """What is learnt stands behind the opened tag: the reasoning, or its end alone, then the answer."""
    encoder = encoder_of(prepared, template_options=THINKS)
    asked = talk(("system", "Be brief."), ("user", " What is it? \n"))
    whole = Conversation("x", talk(*((t.role, t.text) for t in asked.turns), ("assistant", answer)).turns, "x")
    made, prompt = encoder.encode(whole), encoder.encode(asked, answer_next=True)
    assert list(prompt.ids) == rendered(encoder, asked, answer_next=True)
    assert encoder.tokenizer.decode(prompt.ids).endswith("<|im_start|>assistant\n<think>\n")
    assert made.ids[: len(prompt.ids)] == prompt.ids
    assert made.labels == (IGNORE_INDEX,) * len(prompt.ids) + made.ids[len(prompt.ids) : -1] + (IGNORE_INDEX,)
    said = "I look.\n\nAgain.\n</think>\n\nA dog.<|im_end|>" if answer == REASONED else "\n</think>\n\nA dog.<|im_end|>"
    assert learnt(encoder, made) == said
    # Where the prompt ends, two line breaks would be one token: the texts are equal, with reasoning the ids are.
    assert encoder.tokenizer.decode(made.ids) == encoder.tokenizer.decode(rendered(encoder, whole))
    if answer == REASONED:
        assert list(made.ids) == rendered(encoder, whole)
    answer_alone = encoder_of(prepared, template_options=THINKS, learn_reasoning=False).encode(whole)
    assert answer_alone.ids == made.ids and learnt(encoder, answer_alone) == "A dog.<|im_end|>"


LoadCase = Callable[[str, str], Case]


@pytest.fixture(scope="module")
def load_case(
    reference_today: Path, videos: Path, prepared: PreparedModel, tmp_path_factory: pytest.TempPathFactory
) -> LoadCase:
    """A reference case with `unset` options, with thinking off, or off in a template that thinks by itself."""
    encoders = {
        "unset": encoder_of(prepared),
        "off": encoder_of(prepared, template_options=THINKS_NOT),
        "larger": with_template(prepared, thinks_by_itself, THINKS_NOT),
    }
    folder = tmp_path_factory.mktemp("records")
    cases = reference_today / "cases_qwen3_5"
    return cache(lambda name, options: read_case(cases / name, videos, encoders[options], folder))


@pytest.mark.parametrize("options", ["unset", "off", "larger"])
@pytest.mark.parametrize("name", CASES)
def test_without_thinking_the_cases_are_as_they_were(name: str, options: str, load_case: LoadCase) -> None:
    case = load_case(name, options)
    assert torch.equal(case.batch.input_ids_T, case.tensors["input_ids"])
    assert torch.equal(case.batch.labels_T, case.tensors["labels"])


def test_unset_is_what_the_template_does_by_itself(prepared: PreparedModel) -> None:
    larger = with_template(prepared, thinks_by_itself, {})
    asked = talk(("user", "What is it?"))
    ends = [
        encoder.tokenizer.decode(encoder.encode(asked, answer_next=True).ids).partition("assistant\n")[2]
        for encoder in (encoder_of(prepared), larger)
    ]
    assert ends == ["<think>\n\n</think>\n\n", "<think>\n"]


@pytest.mark.parametrize("options", [THINKS, THINKS_NOT])
def test_several_turns_about_a_video(options: dict[str, Any], load_case: LoadCase, prepared: PreparedModel) -> None:
    """With thinking each answer is a conversation of its own behind exactly the ids that prediction starts from, since
    the template shows earlier answers without their thoughts; they share the video, and their loss is that of each
    alone. Without thinking one row has them all, and the prompt for the last one is the template's."""
    encoder = encoder_of(prepared, template_options=options)
    (plan,) = load_case("one_video", "unset").batch.documents[0].media
    turns: list[Any] = [("user", [plan.ref, "What is it?"]), ("assistant", REASONED)]
    turns += [("user", "Sure?"), ("assistant", "<think>\nYes.\n</think>\n\nA dog, sure."), ("user", "So?")]
    whole = talk(*turns, ("assistant", "A dog."))
    parts = encoder.split_for_learning(whole)
    assert len(parts) == (3 if options["enable_thinking"] else 1)
    media = Media((plan,), (load_patches(plan, encoder.processor),))
    for part in parts:
        made = encoder.document([part], [plan])
        asked = Conversation("x", part.turns[:-1], "x")
        prompt = encoder.document([asked], [plan], answer_next=True)
        start = prompt.num_tokens
        template = encoder.template.apply(tuple((turn.role, shown(turn.parts)) for turn in asked.turns), True)
        assert template == encoder.tokenizer.decode(encoder.encode(asked, answer_next=True).ids)
        if options["enable_thinking"]:
            assert torch.equal(made.ids_T[:start], prompt.ids_T) and int(made.labels_T[start]) != IGNORE_INDEX
            assert torch.equal(made.positions_3T[:, :start], prompt.positions_3T)
            assert set(made.labels_T[:start].tolist()) == {IGNORE_INDEX}
    if len(parts) == 1:
        assert learnt(encoder, encoder.encode(whole)).count("<|im_end|>") == 3
        return
    together = batch_of(encoder, (list(parts), media))
    (document,) = together.documents
    assert document.prefix_length > plan.num_tokens and len(document.suffix_lengths) == 3
    with torch.no_grad():
        alone = sum(cross_entropy(prepared.model, batch_of(encoder, ([part], media))) for part in parts)
        assert float(cross_entropy(prepared.model, together)) == pytest.approx(float(alone), rel=1e-5)


def shown(parts: Any) -> Any:
    return tuple(part if isinstance(part, str) else (part.kind,) for part in parts)


def test_what_is_scored_is_the_answer(prepared: PreparedModel) -> None:
    answerer, asked = object.__new__(Answerer), user_question("x", [], "How many?")
    answerer.encoder = encoder_of(prepared, template_options=THINKS)
    found = answerer.parse(asked, "I look.\n</think>\n\nOne.", False)
    assert (found.text, found.reasoning) == ("One.", "I look.")
    assert answerer.parse(asked, "I look and look", True).text == ""
    answerer.encoder = encoder_of(prepared)
    assert answerer.parse(asked, "One.", False).text == "One."


def test_the_effort_of_thinking(prepared: PreparedModel) -> None:
    """A text of the template's own in the prompt, in training and in prediction; a value that it refuses is told."""
    asked = talk(("user", "What is it?"))
    for options, text in (({}, "Think hard."), ({"reasoning_effort": "low"}, "Think little.")):
        encoder = with_template(prepared, lambda it: EFFORT + it, options)
        for ids in (encoder.encode(asked, True).ids, encoder.encode(talk(("user", "?"), ("assistant", "!"))).ids):
            assert encoder.tokenizer.decode(ids).startswith(f"<|im_start|>system\n{text}<|im_end|>\n")
    with pytest.raises(
        UserError, match=r"data.template_options = \{'reasoning_effort': 'huge'\}.*Unexpected effort huge"
    ):
        with_template(prepared, lambda it: EFFORT + it, {"reasoning_effort": "huge"})


def test_an_option_that_the_template_does_not_read_is_refused(reference_today: Path, prepared: PreparedModel) -> None:
    for name in ("enable_thinkin", "raise_exception", "range"):
        with pytest.raises(UserError, match=rf"does not read {name}; it reads add_vision_id, enable_thinking"):
            encoder_of(prepared, template_options={name: True})
    for name in ("messages", "add_generation_prompt", "namespace"):  # what transformers and Jinja pass themselves
        with pytest.raises(UserError, match=rf"data.template_options = .*'{name}'"):
            encoder_of(prepared, template_options={name: True})
    other = load_model(str(reference_today / "qwen3_vl_moe_tiny"), None, torch.float32, CPU)
    with pytest.raises(UserError, match=r"qwen3_vl_moe_tiny does not read enable_thinking; it reads add_vision_id$"):
        encoder_of(other, template_options=THINKS)
    # A template with transformers' own tag, and one that reads nothing.
    tagged = "{% generation %}{% for m in messages %}{{ m.role }}{% endfor %}{% endgeneration %}"
    with pytest.raises(UserError, match=r"does not read enable_thinking; it reads no options$"):
        with_template(prepared, lambda _: tagged, THINKS)


def test_they_are_part_of_what_is_planned(prepared: PreparedModel) -> None:
    """Stored plans of other options are not taken, and worker processes have the same ones."""
    encoders = [encoder_of(prepared, template_options=options) for options in ({}, THINKS_NOT, THINKS)]
    assert len({encoder.fingerprint for encoder in encoders}) == 3
    for encoder in encoders:
        make, arguments = encoder.__reduce__()  # type: ignore[misc]
        assert make(*arguments).fingerprint == encoder.fingerprint  # type: ignore[operator]


@pytest.mark.parametrize("options", [{}, THINKS])
def test_both_end_tokens_of_the_release_end_an_answer(
    prepared: PreparedModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """generation_config.json names two. A token that only looks like an end is gone past."""
    encoder = encoder_of(prepared, template_options=options)
    ends = [encoder.tokenizer.convert_tokens_to_ids(one) for one in ("<|im_end|>", "<|endoftext|>")]
    assert encoder.end_ids == {*ends}
    starts = encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")
    said = encoder.tokenizer("</think>One." if options else "One.")["input_ids"]
    questions = [user_question(name, [], "How many?") for name in ("im_end", "endoftext", "neither")]
    script = [[*said, end, *said] for end in (*ends, starts)]
    steps = iter(range(100))

    def scripted(logits_SV: torch.Tensor, *_: Any) -> torch.Tensor:
        step = next(steps)
        return torch.tensor([one[min(step, len(one) - 1)] for one in script])

    monkeypatch.setattr(generating, "choose", scripted)
    with WorkerPool(0, 60.0) as pool:
        answerer = Answerer(prepared.model, encoder, DataConfig(), scan, pool, World(0, 1, 0, CPU))
        found = list(answerer.answers(questions, Sampling(len(script[0])), batch_size=3))
    assert [one.text for one in found if isinstance(one, Answer)][:2] == ["One.", "One."]
    assert [one.is_cut_off for one in found if isinstance(one, Answer)] == [False, False, True]
