"""What is learnt stands behind exactly the ids that generation starts from: any answer, any template, every turn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.helpers.families import CHAT_TEMPLATE, MISTRAL_TEMPLATE, VICUNA_TEMPLATE, llama_tokenizer, qwen_tokenizer
from tests.helpers.tiny import Tiny, talk
from vft.common.errors import UserError
from vft.common.task import answer_in, split_reasoning
from vft.common.types import IGNORE_INDEX, Conversation
from vft.data.chat import ChatEncoder, Encoded
from vft.models.llava_next_video.processor import LlavaProcessor
from vft.models.qwen3_vl.processor import Qwen3Processor

SHOW = (
    "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{% if p.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
CUT = (
    "{% set c = show(m.content) %}{% set r = '' %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
TURN = "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n"
THINKS = (
    SHOW + "{% for m in messages %}" + CUT + "{% if m.role == 'assistant' and loop.last %}"
    "<|im_start|>assistant\n<think>\n{{ r.strip('\n') }}\n</think>\n\n{{ c.lstrip('\n') }}<|im_end|>\n"
    "{% else %}" + TURN + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
TEMPLATES = {
    "qwen": CHAT_TEMPLATE,
    # As Qwen3-VL's Thinking checkpoints: opened for the model, taken out of earlier answers.
    "opens": THINKS + "<think>\n{% endif %}",
    # As Qwen3's text models: the model opens it.
    "hybrid": THINKS + "{% endif %}",
    # As DeepSeek-R1's distilled models: taken out of every answer, and no line break behind the tag.
    "drops": SHOW + "{% for m in messages %}" + CUT + TURN + "{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n<think>{% endif %}",
    # As Qwen3 with enable_thinking = false: a thought is written for the model, and nowhere else.
    "closes": SHOW + "{% for m in messages %}{% set c = show(m.content) %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    "trims": SHOW + "{% for m in messages %}{% set c = show(m.content).strip() %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "vicuna": VICUNA_TEMPLATE,
    "mistral": MISTRAL_TEMPLATE,
}
IN_PLACE = {"closes", "released", "qwen", "trims", "vicuna", "mistral"}
THINKING = {"opens", "hybrid", "drops"}


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen's kind, in which line breaks and spaces become one token with their neighbours, as in the released one."""
    made = qwen_tokenizer()
    content = json.loads(made.backend_tokenizer.to_str())
    model = content["model"]
    for left, right in [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "Ġ"), ("ĠĠ", "Ġ"), ("ĉ", "ĉ"), (">", "Ċ"), (".", "Ċ")]:
        model["merges"].append([left, right])
        model["vocab"][left + right] = 1000 + len(model["vocab"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encoder_with(template: str, **options: Any) -> ChatEncoder:
    if template in ("vicuna", "mistral"):
        tokenizer = llama_tokenizer(TEMPLATES[template])
        image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
        processor: Any = LlavaProcessor(
            image_token=image, video_token=video, patch=14, side=56, stride=2, resolutions=((56, 56),)
        )
        return ChatEncoder(tokenizer, processor, **options)
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return ChatEncoder(tokenizer, Qwen3Processor(image_token=image, video_token=video, table_side=48), **options)


def first_learnt(one: Encoded) -> int:
    return next(i for i, label in enumerate(one.labels) if label != IGNORE_INDEX)


def learnt_runs(one: Encoded) -> list[tuple[int, int]]:
    """First and last + 1 of each run of labels."""
    learnt = [label != IGNORE_INDEX for label in (IGNORE_INDEX, *one.labels, IGNORE_INDEX)]
    edges = [i for i, (before, now) in enumerate(pairwise(learnt)) if before != now]
    return list(zip(edges[::2], edges[1::2], strict=True))


SPACES = ["", "\n", "\n\n", "\n\n\n", " ", "  ", "\t", "\t\t", " \n", "\r\n", "\u00a0", "\u3000", "."]
WORDS = ["A dog runs.", "7", "é", "\u0301e", "狗", "😀", ":", "...", "<video>", "<|im_end|>", "</s>", "<br/>"]


def made_up(rng: random.Random, thinks: bool) -> str:
    space, word, end, other, last = (rng.choice(some) for some in (SPACES, WORDS, SPACES, WORDS, SPACES))
    thought = f"<think>{rng.choice(SPACES)}{rng.choice(WORDS)}{rng.choice(SPACES)}</think>" if thinks else ""
    return thought + space + word + end + other + last


@pytest.mark.parametrize("template", [*TEMPLATES, "released"])
def test_what_is_learnt_stands_behind_the_prompt(reference: Path, template: str) -> None:
    """Every answer of 40 random conversations is learnt once, right behind the ids of the prompt for it."""
    released, rng = Tiny(reference / "qwen2_5_vl_tiny").encoder, random.Random(template)
    encoder = released if template == "released" else encoder_with(template)
    for _ in range(40):
        turns: list[Any] = [("system", "Be brief.")] if rng.random() < 0.3 and template != "mistral" else []
        for _ in range(rng.randint(1, 3)):
            turns += [("user", made_up(rng, False)), ("assistant", made_up(rng, template in THINKING))]
        whole = talk(*turns)
        learnt = encoder.split_for_learning(whole)
        runs = [(one, run) for one in learnt for run in learnt_runs(encoder.encode(one))]
        answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
        assert len(runs) == len(answers)
        assert (len(learnt) == 1) == (template in IN_PLACE or len(answers) == 1)
        for number, (one, (start, end)) in zip(answers, runs, strict=True):
            prompt = Conversation("x", whole.turns[:number], "x")
            made = encoder.encode(one)
            assert made.labels[start:end] == made.ids[start:end]
            before, asked = made.ids[:start], encoder.encode(prompt, answer_next=True).ids
            if template == "closes":  # earlier answers keep their empty thoughts: compare what follows the last of them
                ends = [i for i, token in enumerate(asked) if token == made.ids[end - 1]]
                asked = asked[ends[-2] :] if number > answers[0] else asked
                before = before[-len(asked) :] if number > answers[0] else before
            assert before == asked
            assert made.ids[end - 1] == encoder.tokenizer.convert_tokens_to_ids(encoder.turn_end)
            said, given = encoder.tokenizer.decode(made.ids[start : end - 1]), turns[number][1]
            said, given = answer_in(said, template in ("opens", "drops")).strip(), answer_in(given).strip()
            assert normalize("NFC", said) == normalize("NFC", given)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ["\n\nTwo.", "\nTwo.", "Two.", "  Two.", "\tTwo.", "7"])
def test_the_prompt_is_that_of_transformers(template: str, answer: str) -> None:
    """What transformers' template and tokenizer give a model that is to answer, the question's ends merged."""
    encoder = encoder_with(template)
    turns = [{"role": "user", "content": [{"type": "text", "text": "\nWhat?\n"}]}]
    text = encoder.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    made = encoder.encode(talk(("user", "\nWhat?\n"), ("assistant", answer)))
    assert list(made.ids[: first_learnt(made)]) == encoder.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("template", sorted(THINKING))
@pytest.mark.parametrize("spelt", ["<think>\nI look.\n</think>\n\nOne.", "<think>I look.</think>One."])
def test_thought_is_learnt_behind_the_tag(template: str, spelt: str) -> None:
    """From behind `<think>` where the prompt has it, in the template's spelling; or the answer alone."""
    asked = talk(("user", "First?"), ("assistant", spelt))
    encoder = encoder_with(template)
    made = encoder.encode(asked)
    (run,) = learnt_runs(made)
    opening = {"opens": "", "hybrid": "<think>\n", "drops": "\n"}[template]
    said = encoder.tokenizer.decode(made.ids[slice(*run)])
    assert said == f"{opening}I look.\n</think>\n\nOne.<|im_end|>"
    answer_alone = encoder_with(template, learn_reasoning=False).encode(asked)
    assert answer_alone.ids == made.ids
    (run,) = learnt_runs(answer_alone)
    assert encoder.tokenizer.decode(made.ids[slice(*run)]) == "One.<|im_end|>"


def test_an_answer_without_a_thought_has_an_empty_one() -> None:
    """As the template shows it."""
    encoder = encoder_with("opens")
    made = encoder.encode(talk(("user", "First?"), ("assistant", "One.")))
    assert encoder.tokenizer.decode(made.ids[first_learnt(made) :]) == "\n</think>\n\nOne.<|im_end|>\n"
    with pytest.raises(UserError, match="does not end it"):
        encoder.encode(talk(("user", "First?"), ("assistant", "<think>One.")))


def test_earlier_answers_are_learnt_with_their_own_prompts() -> None:
    """The thought of the first answer is learnt, and is not there when the second one is asked for."""
    encoder = encoder_with("opens")
    thoughts = [f"<think>\nThought {i}.\n</think>\n\nAnswer {i}." for i in (1, 2)]
    whole = talk(("user", "First?"), ("assistant", thoughts[0]), ("user", "Second?"), ("assistant", thoughts[1]))
    first, second = encoder.split_for_learning(whole)
    assert first.is_part and second is whole
    texts = [encoder.tokenizer.decode(encoder.encode(one).ids) for one in (first, second)]
    assert texts[0].endswith("<think>\nThought 1.\n</think>\n\nAnswer 1.<|im_end|>\n")
    assert "Thought 1" not in texts[1] and "assistant\nAnswer 1.<|im_end|>" in texts[1]
    assert encoder_with("qwen").split_for_learning(whole) == [whole]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_texts_are_text(make_tiny: Callable[[str, str], Tiny], family: str, role: str) -> None:
    """No turn, no medium, no end of an answer comes of them, and they read as they were written."""
    encoder = make_tiny(family, "tied").encoder
    tokens = [one for one in encoder.tokenizer.all_special_tokens if one not in ("<unk>",)]
    texts = {"system": "S", "user": "U", "assistant": "A"}
    plain = encoder.encode(talk(*texts.items()))  # type: ignore[arg-type]
    special = set(encoder.tokenizer.all_special_ids)
    for token in tokens:
        made = encoder.encode(talk(*(texts | {role: f"x{token}y"}).items()))  # type: ignore[arg-type]
        assert [i for i in made.ids if i in special] == [i for i in plain.ids if i in special]
        assert f"x{token}y" in encoder.tokenizer.decode(made.ids)


def test_tokens_that_the_tokenizer_does_not_call_special() -> None:
    """A placeholder that is an added token like any other is text all the same."""
    encoder = encoder_with("qwen")
    content = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    for one in content["added_tokens"]:
        one["special"] = one["content"] == "<|im_end|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    plain = ChatEncoder(tokenizer, encoder.processor)
    made = plain.encode(talk(("user", "x<|im_start|>system\ny<|video_pad|>"), ("assistant", "<|im_end|>")))
    names = tokenizer.convert_ids_to_tokens(list(made.ids))
    assert names.count("<|im_start|>") == 3 and names.count("<|im_end|>") == 3 and "<|video_pad|>" not in names
    assert "x<|im_start|>system\ny<|video_pad|>" in tokenizer.decode(made.ids)


def test_options_are_scored_behind_an_empty_thought() -> None:
    """The same for all of them, and not counted."""
    encoder = encoder_with("opens")
    made = encoder.options(talk(("user", "First?")), ["One", "Two or three"], ())
    said = [encoder.tokenizer.decode([i for i in made.labels_T[rows].tolist() if i >= 0]) for rows in made.suffix_rows]
    assert [text.removesuffix("<|im_end|>") for text in said] == ["One", "Two or three"]
    assert encoder.tokenizer.decode(made.ids_T[: made.prefix_length]).endswith("<think>\n\n</think>")


def test_reasoning_is_told_from_the_answer() -> None:
    assert split_reasoning("<think>\na\n</think>\n\nb") == ("a", "b")
    assert split_reasoning("a</think>b", opened=True) == ("a", "b")
    assert split_reasoning("a</think>b") == (None, "a</think>b")
    assert answer_in("<think>never ends") == "" and answer_in("never ends", opened=True) == ""
    assert answer_in("Use <think>.") == "Use <think>."
