"""The model, its loading, its generation and its preprocessing beside transformers' own, on the same checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from tests.helpers.families import QWEN2_5_VL, QWEN3S
from tests.helpers.rows import ROWS, kinds_of, prompt, row
from tests.helpers.tiny import (
    CPU,
    Media,
    Tiny,
    assert_same_gradients,
    batch_of,
    every_logit,
    load_model,
    loss_and_gradients,
    medium,
    talk,
)
from vft.common.errors import UserError
from vft.common.types import IGNORE_INDEX, Batch, Conversation, MediaRef, Role
from vft.data.packing import collate
from vft.inference.generate import Sampling, generate
from vft.inference.option_scores import prefix_of, score_options


@pytest.fixture(params=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, family: str, make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    """A tied head in one file, and a head of its own in several files."""
    return make_tiny(family, request.param)


# -------------------------------------------------------------------------------------------------- logits, gradients


@pytest.mark.parametrize("name", ROWS)
def test_logits(checkpoint: Tiny, name: str) -> None:
    batch = row(checkpoint, name)
    with torch.no_grad():
        wanted = checkpoint.theirs(**checkpoint.inputs(batch)).logits[0]
        found = every_logit(checkpoint.ours(), batch)
    assert float(wanted.std()) > 0.5  # else the next line would say little
    assert float((found - wanted).abs().max()) <= checkpoint.family.tolerance


@pytest.mark.parametrize("name", ["text", "mixed"])
def test_gradients(checkpoint: Tiny, name: str) -> None:
    batch = row(checkpoint, name)
    theirs = checkpoint.theirs
    theirs.zero_grad()
    logits = theirs(**checkpoint.inputs(batch)).logits[0]
    wanted_loss = F.cross_entropy(logits[:-1], batch.labels_T[1:], reduction="sum", ignore_index=-100)
    wanted_loss.backward()
    wanted = {}
    model = checkpoint.ours()
    ours = {model.peft_name(name): name for name, _ in model.named_parameters()}
    read = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in theirs.named_parameters():
        # transformers leaves the encoder of a text without gradients; here they are there, and zero.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        wanted[ours[name]] = checkpoint.family.released(name, gradient)
    assert all(not wanted[name].any() for name in wanted.keys() - read)  # what nothing reads has none there either
    wanted = {name: gradient for name, gradient in wanted.items() if name in read}
    loss, found = loss_and_gradients(model, batch)
    assert float(loss) == pytest.approx(float(wanted_loss.detach()), rel=1e-5)
    assert_same_gradients(found, wanted, tolerance=1e-4)


def test_weights_in_bfloat16_load_as_they_are(each_bf16: Tiny) -> None:
    """bf16 files in a float32 model give the float32 logits of the rounded weights."""
    batch = row(each_bf16, "mixed")
    with torch.no_grad():
        wanted = each_bf16.theirs(**each_bf16.inputs(batch)).logits[0]
        found = every_logit(each_bf16.ours(), batch)
    assert float((found - wanted).abs().max()) <= each_bf16.family.tolerance


def test_computing_in_bfloat16(each_bf16: Tiny) -> None:
    """bf16 compute is as far from float32 as transformers' own, not further."""
    batch = row(each_bf16, "mixed")
    inputs = each_bf16.inputs(batch)
    ours = load_model(str(each_bf16.path), None, torch.bfloat16, CPU).model
    theirs = type(each_bf16.theirs).from_pretrained(each_bf16.path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact = each_bf16.theirs(**inputs).logits[0]
        found, wanted = every_logit(ours, batch), theirs(**inputs).logits[0].float()
    assert float((found - exact).square().mean().sqrt()) <= 1.5 * float((wanted - exact).square().mean().sqrt())


# ------------------------------------------------------------------------------------------------------- checkpoints


def edited(tiny: Tiny, folder: Path, change: Any, **options: Any) -> str:
    """A copy of a checkpoint with `change` applied to the tensors of its only file."""
    tiny.family.save(folder, **options)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "fault, expected",
    [
        ("missing", "layers.1.post_attention_layernorm.weight"),
        ("unexpected", "layers.0.attn.extra.weight"),
        ("shape", "layers.1.self_attn.o_proj.weight"),
    ],
)
def test_checkpoint_that_does_not_fit(each_tiny: Tiny, tmp_path: Path, fault: str, expected: str) -> None:
    embedding = next(name for name, _ in each_tiny.ours().named_parameters() if name.endswith("embed_tokens.weight"))
    expected = embedding.removesuffix("embed_tokens.weight") + expected

    def change(tensors: dict[str, Tensor]) -> None:
        if fault == "missing":
            del tensors[expected]
        elif fault == "unexpected":
            tensors[expected] = torch.zeros(3)
        else:
            tensors[expected] = torch.zeros(64, 97)

    path = edited(each_tiny, tmp_path / "base", change)
    with pytest.raises(UserError, match=expected.replace(".", r"\.")) as caught:
        load_model(path, None, torch.float32, CPU)
    assert "\n" not in str(caught.value)
    if fault == "shape":
        assert "[64, 97] in the file, [64, " in str(caught.value)


def test_untied_head_is_required(each_untied: Tiny, tmp_path: Path) -> None:
    """A head that is missing is never replaced by the embedding or by noise."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in tensors if name.endswith("lm_head.weight"))]

    path = edited(each_untied, tmp_path / "base", change, tied=False)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load_model(path, None, torch.float32, CPU)


def test_missing_weight_file(each_tiny: Tiny, tmp_path: Path) -> None:
    folder = each_tiny.family.save(tmp_path / "base", max_shard_size="100KB")
    next(folder.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match="model-00002-of"):
        load_model(str(folder), None, torch.float32, CPU)


# -------------------------------------------------------------------------------------------------------- generation

STEPS = 12


def counted_on(positions: Tensor, count: int) -> Tensor:
    """Positions [..., T] with so many more, in every row from the largest of all on."""
    new = positions.max() + torch.arange(1, count + 1)
    return torch.cat([positions, new.expand(*positions.shape[:-1], -1)], dim=-1)


def greedy_by_recomputing(tiny: Tiny, batch: Batch) -> list[int]:
    """transformers' likeliest tokens, the whole row computed anew for each: no cache, positions counted on by 1."""
    inputs = tiny.inputs(batch)
    found: list[int] = []
    for _ in range(STEPS):
        with torch.no_grad():
            token = tiny.theirs(**inputs, use_cache=False).logits[0, -1].argmax().view(1, 1)
        found.append(int(token))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["position_ids"] = counted_on(inputs["position_ids"], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return found


@pytest.fixture(scope="module")
def answers(each_untied: Tiny) -> dict[str, list[int]]:
    found = {name: greedy_by_recomputing(each_untied, prompt(each_untied, name)) for name in ROWS}
    assert all(len(set(tokens)) > 4 for tokens in found.values()), "answers that repeat one token prove little"
    assert len({tuple(tokens) for tokens in found.values()}) == len(found)
    return found


def said(*asked: Any) -> list[list[int]]:
    """The ids alone."""
    return [one.ids for one in generate(*asked)]


class Recorder:
    """A model that keeps the logits of each pass."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.recorded: list[Tensor] = []

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's, and kept."""
        self.recorded.append(self.model.logits(*args, **kwargs))
        return self.recorded[-1]


def test_logits_with_a_cache(each_untied: Tiny) -> None:
    """Each pass over the newest token of a short and a long prompt: the logits of transformers over the whole row."""
    batches = [prompt(each_untied, name) for name in ("text", "video")]
    patches = [Media.make(each_untied.encoder.processor, ROWS[name][1]).patches for name in ("text", "video")]
    documents = [batch.documents[0] for batch in batches]
    model = Recorder(each_untied.ours())
    packed = collate(list(zip(documents, patches, strict=True)), each_untied.encoder.processor)
    answers = said(model, packed, (), Sampling(STEPS))
    for number, (batch, answer) in enumerate(zip(batches, answers, strict=True)):
        inputs = each_untied.inputs(batch)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]])], dim=1)
        inputs["position_ids"] = counted_on(inputs["position_ids"], STEPS - 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            wanted = each_untied.theirs(**inputs).logits[0, -STEPS:]
        assert float((torch.stack([step[number] for step in model.recorded]) - wanted).abs().max()) <= 1e-4


def test_generation_is_that_of_transformers(each_untied: Tiny) -> None:
    """Greedy, each with its own keys and values kept. Its `generate` counts positions itself, and but for the Qwen3s it
    numbers text after long videos otherwise; where no video is, both rules agree."""
    for name in ROWS if each_untied.family in QWEN3S else ("text", "picture"):
        batch = prompt(each_untied, name)
        inputs = each_untied.inputs(batch)
        del inputs["position_ids"]
        if each_untied.family in (QWEN2_5_VL, *QWEN3S):
            inputs["mm_token_type_ids"] = kinds_of(batch)
        options = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            whole = each_untied.theirs.generate(**inputs, **options)
        wanted = whole[0, batch.num_tokens :].tolist()
        assert said(each_untied.ours(), batch, (), Sampling(STEPS)) == [wanted], name


def test_generation_of_several_prompts(each_untied: Tiny, answers: dict[str, list[int]]) -> None:
    """Prompts of different length and media in one row: each as alone, one of them ended early by a stop token."""
    batches = [prompt(each_untied, name) for name in ROWS]
    members = []
    for name, batch in zip(ROWS, batches, strict=True):
        members.append((batch.documents[0], Media.make(each_untied.encoder.processor, ROWS[name][1]).patches))
    longest = [token for token in answers["video"] if any(token not in tokens for tokens in answers.values())]
    stop = longest[-1]  # not one that ends all of them
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in answers.values()]
    assert min(map(len, expected)) < STEPS == max(map(len, expected))
    found = said(each_untied.ours(), collate(members, each_untied.encoder.processor), (stop,), Sampling(STEPS))
    assert found == expected


def test_generation_of_nothing(each_untied: Tiny) -> None:
    """A process without a prompt takes part, and has no answers."""
    assert said(each_untied.ours(), collate([], each_untied.encoder.processor), (), Sampling(2)) == []


@torch.no_grad()
def test_options_are_scored_as_each_in_a_pass_of_its_own(each_tiny: Tiny) -> None:
    """On the shared prefix: the sum over the tokens that training supervises of that answer, the closing one included,
    and the sum without it."""
    processor = each_tiny.encoder.processor
    media = Media.make(processor, [medium("image", 1, 90, 130, name="picture")], seed=3)
    asked = talk(("user", [media.plans[0].ref, "Which?"]))
    options = ("1", "10", "No", "No, it does not", "basketball", "basketball dunk")
    made = each_tiny.encoder.options(asked, options, media.plans)
    trunk = collate([(prefix_of(made), media.patches)], processor)
    (found,) = score_options(each_tiny.ours(), trunk, [made], each_tiny.encoder.around_answer)
    for option, score in zip(options, found, strict=True):
        batch = batch_of(each_tiny.encoder, ([talk(*turns_of(asked), ("assistant", option))], media))
        likelihoods_TV = each_tiny.theirs(**each_tiny.inputs(batch)).logits[0].double().log_softmax(-1)
        rows = (batch.labels_T != IGNORE_INDEX).nonzero().flatten()
        likelihoods_N = likelihoods_TV[rows - 1, batch.input_ids_T[rows]]
        assert each_tiny.encoder.tokenizer.decode(batch.input_ids_T[rows[-1:]]) == each_tiny.encoder.turn_end
        assert score.whole == pytest.approx(float(likelihoods_N.sum()), rel=1e-5)
        assert score.text == pytest.approx(float(likelihoods_N[:-1].sum()), rel=1e-5)


def turns_of(conversation: Conversation) -> list[tuple[Role, Sequence[str | MediaRef]]]:
    """As `talk` takes them."""
    return [
        (turn.role, [part for part in turn.parts if isinstance(part, str | MediaRef)]) for turn in conversation.turns
    ]


# ---------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", ROWS)
def test_tokens_are_those_of_the_chat_template(each_tiny: Tiny, name: str) -> None:
    """And of the tokenizer, with what it puts before a text; where the template leaves it out, an answer's end."""
    conversation = ROWS[name][0]
    tokenizer = AutoTokenizer.from_pretrained(each_tiny.path)
    messages: list[dict[str, Any]] = []
    for turn in conversation.turns:
        parts: Sequence[Any] = turn.parts
        content = [{"type": "text", "text": x} if isinstance(x, str) else {"type": x.kind} for x in parts]
        messages.append({"role": turn.role, "content": content})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    for turn in conversation.turns:
        if turn.role == "assistant" and not each_tiny.family.closes_answers:
            assert f"{turn.text} " in text
            text = text.replace(f"{turn.text} ", f"{turn.text}{tokenizer.eos_token}")
    assert list(each_tiny.encoder.encode(conversation).ids) == tokenizer(text)["input_ids"]
    asked = Conversation("x", conversation.turns[:1], "x")
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert list(each_tiny.encoder.encode(asked, answer_next=True).ids) == tokenizer(text)["input_ids"]
