"""Draws that depend on the question alone, extreme settings, every end token, and the end of the context."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.tiny import CPU, NO_MEDIA, Tiny, document, load_model, medium, plans_that_fit, talk
from vft.common.errors import UserError
from vft.common.task import Answer
from vft.common.types import MediaInfo, MediaRef
from vft.config.data import DataConfig, VideoConfig
from vft.data.chat import ChatEncoder
from vft.data.dataset import make_dataset
from vft.data.packing import collate
from vft.data.workers import WorkerPool
from vft.distributed.process_group import World
from vft.inference import generate as generation
from vft.inference.engine import Answerer, Failure, sampling_name
from vft.inference.generate import GeneratedIds, Sampling, choose, generate
from vft.inference.requests import user_question
from vft.models import kv_cache as cache
from vft.models.llava_next_video.processor import LlavaProcessor
from vft.models.pretrained import Pretrained
from vft.preparation.documents import check_answer_length

STEPS = 8
TEXTS = ["Hello?", "What is it?", "Who runs?", "A dog or a cat?", "Why?"]


def asked(tiny: Tiny, *texts: str) -> Any:
    """Prompts of these texts in one row; a text is its name too."""
    rows = []
    for text in texts:
        rows.append((tiny.encoder.document([replace(talk(("user", text)), id=text)], (), answer_next=True), []))
    return collate(rows, tiny.encoder.processor)


def ids(answers: list[GeneratedIds]) -> list[list[int]]:
    return [one.ids for one in answers]


def test_draws_depend_on_the_question_alone(tiny_untied: Tiny) -> None:
    """Whatever is asked beside it, in whichever order; each question has its own, and another seed another."""
    model, sampling = tiny_untied.ours(), Sampling(STEPS, temperature=3.0, seed=5)
    alone = {text: ids(generate(model, asked(tiny_untied, text), (), sampling))[0] for text in TEXTS}
    rng = random.Random(0)
    for _ in range(4):
        some = rng.sample(TEXTS, rng.randint(2, len(TEXTS)))
        assert ids(generate(model, asked(tiny_untied, *some), (), sampling)) == [alone[text] for text in some]
    other = ids(generate(model, asked(tiny_untied, *TEXTS), (), replace(sampling, seed=6)))
    assert other != list(alone.values())
    # Equal prompts under other names are drawn apart: no question restarts the stream of another.
    same = asked(tiny_untied, *["Hello?"] * 4)
    drawn = ids(generate(model, same, (), sampling, None, ["a", "b", "a", "c"]))
    assert drawn[0] == drawn[2] and len(set(map(tuple, drawn))) == 3


def test_names_of_questions() -> None:
    """A medium, its part and the words make another question; the folder it lies in does not."""
    ref, _ = medium("video", 4, 56, 56, name="a/clip")
    moved, _ = medium("video", 4, 56, 56, name="b/clip")
    part = replace(ref, options=replace(ref.options, video_start=1.0))
    names = [sampling_name(user_question("x", [one], "?")) for one in (ref, moved, part)]
    assert names[0] == names[1] != names[2]
    assert len({sampling_name(user_question(id, [ref], text)) for id in "xy" for text in "?!"}) == 4


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-10, 1e10, 1e308])
@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 0.5, 1.0])
def test_extremes(temperature: float, top_p: float) -> None:
    """Nearly no temperature, or nearly no mass, is the likeliest token; any temperature above is some token."""
    logits_SV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 30
    drawn_S = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens_S = choose(logits_SV, Sampling(1, temperature, top_p), drawn_S)
    if temperature < 1 or top_p < 0.1:
        assert tokens_S.tolist() == logits_SV.argmax(-1).tolist()
    else:
        assert len(set(tokens_S.tolist())) > 1 and all(0 <= token < 50 for token in tokens_S.tolist())


def test_frequencies_are_the_probabilities() -> None:
    """Numbers drawn evenly give each token its share: softmax in float64, and Holtzman's rule by hand."""
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0])
    count = 20_000
    drawn_S = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.75)):
        tokens = choose(logits.expand(count, -1), Sampling(1, temperature, top_p), drawn_S)
        wanted = (logits.double() / temperature).softmax(0)
        if top_p < 1:  # 0.56 + 0.21 reaches it: the first two of 2.0, 1.0, 0.5, ...
            wanted[[1, 3, 4]] = 0
        found = torch.bincount(tokens, minlength=5) / count
        assert float((found - wanted / wanted.sum()).abs().max()) < 1e-4


def test_room_for_answers_grows(tiny_untied: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of two thousand million tokens takes no memory until they come, and changes no answer."""
    model, batch = tiny_untied.ours(), asked(tiny_untied, *TEXTS[:3])
    wanted = ids(generate(model, batch, (), Sampling(STEPS)))
    stop = wanted[0][-1]
    monkeypatch.setattr(cache, "ROWS_AHEAD", 2)
    assert ids(generate(model, batch, (), Sampling(STEPS))) == wanted
    found = generate(model, asked(tiny_untied, TEXTS[0]), (stop,), Sampling(2_000_000_000))
    assert found == [GeneratedIds(wanted[0][: wanted[0].index(stop)], True)]


def test_an_answer_ends_with_the_context(tiny_untied: Tiny) -> None:
    """Each where its own does, and is told from one that the model ended."""
    batch = asked(tiny_untied, *TEXTS[:2])
    lengths = [one.num_tokens for one in batch.documents]
    whole = ids(generate(tiny_untied.ours(), batch, (), Sampling(STEPS)))
    found = generate(tiny_untied.ours(), batch, (), Sampling(STEPS), context=max(lengths) + 3)
    assert [len(one.ids) for one in found] == [min(STEPS, max(lengths) + 3 - length) for length in lengths]
    assert all(not one.ended and one.ids == w[: len(one.ids)] for one, w in zip(found, whole, strict=True))


@pytest.mark.parametrize("named", [7, [7, 9]])
def test_every_end_token_that_the_checkpoint_names(tiny: Tiny, tmp_path: Any, named: int | list[int]) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for file in tiny.path.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    encoder = load_model(str(folder), None, torch.float32, CPU).encoder(DataConfig())
    wanted = {named} if isinstance(named, int) else {*named}
    assert encoder.end_ids == wanted | {tiny.encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "<|im_end|>"}))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id = '<\|im_end\|>'"):
        assert Pretrained.open(str(folder)).end_ids


def test_thoughts_are_told_from_the_answer(tiny: Tiny) -> None:
    answerer, asked = object.__new__(Answerer), user_question("x", [], "How many?")
    answerer.encoder = tiny.encoder
    found = answerer.parse(asked, "<think>\nI look.\n</think>\n\nOne.", False)
    assert found == Answer(asked, "One.", reasoning="I look.")
    assert answerer.parse(asked, "<think>\nI lo", True) == Answer(asked, "", reasoning="I lo", is_cut_off=True)
    assert answerer.parse(asked, "One.", False) == Answer(asked, "One.")


# ---------------------------------------------------------------------------------------------------------- context


@pytest.fixture
def released(make_tiny: Any) -> ChatEncoder:
    """The sizes of LLaVA-NeXT-Video-7B: 144 tokens a frame, 4,096 positions, with a small tokenizer."""
    encoder = make_tiny("llava_next_video", "tied").encoder
    marks = {"image_token": encoder.processor.image_token, "video_token": encoder.processor.video_token}
    processor = LlavaProcessor(**marks, patch=14, side=336, stride=2, resolutions=((336, 672),), context_tokens=4096)
    return ChatEncoder(encoder.tokenizer, processor)


MINUTE, _ = medium("video", 1500, 360, 640, fps=25.0)


def minute(ref: MediaRef) -> MediaInfo:
    return MediaInfo("video", 360, 640, 1500, 25.0, duration_s=60.0)


def test_a_minute_fits_at_the_defaults(released: ChatEncoder) -> None:
    """32 frames of 144 tokens are more than 4,096: as many frames stay as leave room for text and answer."""
    prompt, answered = talk(("user", [MINUTE, "Who?"])), talk(("user", [MINUTE, "Who?"]), ("assistant", "A dog."))
    text = released.encode(prompt, answer_next=True).text_tokens
    for new_tokens in (1, 128, 256, 2000):
        (plan,) = plans_that_fit([prompt], released, DataConfig(), minute, answer_next=True, new_tokens=new_tokens)
        room = (4096 - text - new_tokens) // 144
        assert len(plan.frame_indices) in (room, room - 1) and plan.num_tokens == 144 * len(plan.frame_indices)
    documents = make_dataset([answered], released, DataConfig(), minute)
    assert not documents.bad and 4096 - 2 * 144 < documents.lengths[0] <= 4096
    assert documents.build(0).num_tokens == documents.lengths[0]


def test_nothing_runs_past_the_context_unsaid(released: ChatEncoder) -> None:
    """With the numbers of the limit that holds: the context's or the row's."""
    prompt = talk(("user", [MINUTE, "Who?"]))
    with pytest.raises(UserError, match=r"the model's context of 4096 less 4000 for the answer leaves room for \d+"):
        plans_that_fit([prompt], released, DataConfig(), minute, answer_next=True, new_tokens=4000)
    with pytest.raises(UserError, match=r"tokens of text, more than the model's context of 4096; "):
        plans_that_fit([talk(("user", "Who? " * 4000))], released, DataConfig(pack_tokens=1 << 20), minute, True)
    with pytest.raises(UserError, match=r"more than data.pack_tokens = 50; "):
        plans_that_fit([talk(("user", "Who? " * 100))], released, DataConfig(pack_tokens=50), minute, True)
    with pytest.raises(UserError, match=r"--max-new-tokens = 4096: the model's context is 4096 tokens"):
        check_answer_length(4096, 4096, "--max-new-tokens")
    check_answer_length(4095, 4096, "--max-new-tokens")


def test_options_leave_room_for_the_longest(released: ChatEncoder) -> None:
    """Its branch ends within the context, closing token included."""
    options = ("No.", "A dog runs. " * 40)
    question = user_question("x", [MINUTE], "Who?")
    question = replace(question, prompt=replace(question.prompt, options=options))
    answerer = object.__new__(Answerer)
    answerer.encoder, answerer.config, answerer.info = released, DataConfig(video=VideoConfig()), minute
    document_, scored = answerer.documents(question)
    assert scored is not None
    longest = scored.prefix_length + max(scored.suffix_lengths)
    assert 4096 - 2 * 144 < longest <= 4096 and document_.num_tokens < longest
    for option, length in zip(options, scored.suffix_lengths, strict=True):
        assert length - 1 <= released.answer_tokens(option)


def test_an_option_longer_than_the_context_costs_its_question_alone(tiny: Tiny) -> None:
    """The others are answered, in order."""
    context = tiny.encoder.processor.context_tokens
    assert context is not None
    asked = [user_question(name, [], "Who?") for name in "abc"]
    long = ("No.", "A dog runs. " * context)
    asked[1] = replace(asked[1], prompt=replace(asked[1].prompt, options=long))
    asked[2] = replace(asked[2], prompt=replace(asked[2].prompt, options=("No.", "A dog runs.")))
    with WorkerPool(0, 60.0) as pool:
        model = tiny.ours()
        answerer = Answerer(model, tiny.encoder, DataConfig(pack_tokens=1 << 20), minute, pool, World(0, 1, 0, CPU))
        first, failed, last = answerer.answers(asked, Sampling(max_new_tokens=2), batch_size=2)
    assert isinstance(first, Answer) and isinstance(last, Answer) and len(last.option_scores) == 2
    assert isinstance(failed, Failure) and failed.reason == "unfit"
    assert failed.message.startswith("b: ") and f"the model's context of {context}" in failed.message


def test_rows_of_training_hold_more_than_one_context(released: ChatEncoder) -> None:
    """Questions that share a video fit the context each, not all together."""
    talks = [talk(("user", [MINUTE, "Who? " * 50]), ("assistant", "A dog."), id=str(i)) for i in range(20)]
    documents = make_dataset(talks, released, DataConfig(), minute)
    assert not documents.bad and max(documents.lengths) > 4096
    for number in range(len(documents.lengths)):
        made = documents.build(number)
        assert made.prefix_length + max(made.suffix_lengths) <= 4096
    assert document(released, [talk(("user", "?"), ("assistant", "!"))], NO_MEDIA).num_tokens < 20


# ---------------------------------------------------------------------------------------- several answers to a prompt


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next_video_mistral", "qwen3_5"])
def test_samples_of_one_prefix_are_those_of_copies(
    make_tiny: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt is read once, and its answers are those to as many copies of it: prompts of several lengths, answers
    that end apart, a cache that grows. The first one is the answer to the prompt alone."""
    tiny = make_tiny(family, "untied")
    model, texts, count = tiny.ours(), TEXTS[:3], 4
    sampling = Sampling(STEPS, temperature=3.0, seed=5)
    names = [f"{number}:{text}" if number else text for text in texts for number in range(count)]
    copies = asked(tiny, *[text for text in texts for _ in range(count)])
    whole = generate(model, copies, (), sampling, None, names)
    assert len({*map(tuple, ids(whole))}) == len(names)
    end = {one.ids[index] for one, index in zip(whole, range(1, STEPS), strict=False)}
    wanted = generate(model, copies, end, sampling, None, names)
    assert len({len(one.ids) for one in wanted}) > 1 and {one.ended for one in wanted} == {False, True}
    rows, logits = [], model.logits
    monkeypatch.setattr(
        model, "logits", lambda batch, cache: rows.append(batch.input_ids_T.numel()) or logits(batch, cache)
    )
    monkeypatch.setattr(cache, "ROWS_AHEAD", 2)
    row = asked(tiny, *texts)
    assert generate(model, row, end, replace(sampling, samples=count)) == wanted
    assert rows == [row.num_tokens, *[len(names)] * (STEPS - 1)]
    assert generate(model, asked(tiny, texts[0]), end, sampling) == wanted[:1]
    assert generate(model, collate([], tiny.encoder.processor), end, replace(sampling, samples=count)) == []


def test_samples_share_logits_and_context(tiny_untied: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """First tokens are drawn from one distribution; each answer has the room that one alone has."""
    count, drawn = 4000, []
    model, batch = tiny_untied.ours(), asked(tiny_untied, TEXTS[0])
    monkeypatch.setattr(generation, "choose", lambda logits, *rest: drawn.append(logits) or choose(logits, *rest))
    found = generate(model, batch, (), Sampling(1, temperature=1.0, samples=count))
    assert drawn[0].shape[0] == count and bool((drawn[0] == drawn[0][0]).all())
    wanted_V = drawn[0][0].double().softmax(0)
    found_V = torch.bincount(torch.tensor([one.ids[0] for one in found]), minlength=len(wanted_V)) / count
    likely_V = wanted_V > 0.01
    deviation_V = (wanted_V * (1 - wanted_V) / count).sqrt()
    assert int(likely_V.sum()) > 3 and bool(((found_V - wanted_V).abs() < 5 * deviation_V)[likely_V].all())
    short = generate(model, batch, (), Sampling(STEPS, 1.0, samples=3), context=batch.num_tokens + 2)
    assert [(len(one.ids), one.ended) for one in short] == [(2, False)] * 3
