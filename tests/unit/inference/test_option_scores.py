"""Likelihoods of options: scored on kept keys and values as each is in a full pass of its own.

The other side is transformers' model on the whole conversation, with the option's rows picked by counting tokens, and
where the template's text merges with the option's the project's own full pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.tiny import NO_MEDIA, Media, Tiny, batch_of, medium, talk
from vft.common.task import Answer, Question
from vft.common.types import IGNORE_INDEX, Batch, Conversation, Document, Turn
from vft.data.packing import collate
from vft.inference import option_scores as score
from vft.inference.engine import with_option_scores
from vft.inference.option_scores import OptionScore, prefix_of, score_options
from vft.models.kv_cache import PrefixCache
from vft.recipes.classify import Classify

VIDEO, VIDEO_INFO = medium("video", 6, 150, 140, fps=1.0)
OTHER, OTHER_INFO = medium("video", 3, 60, 90, fps=4.0, name="other")
PICTURE, PICTURE_INFO = medium("image", 1, 90, 130, name="picture")


@dataclass(frozen=True)
class Asked:
    """A question with its options, and the media that it is about."""

    prompt: Conversation
    options: tuple[str, ...]
    media: Media

    def answered(self, option: str) -> Conversation:
        return Conversation("answered", (*self.prompt.turns, Turn("assistant", (option,))), "answered")


@pytest.fixture(scope="module")
def asked(tiny: Tiny) -> dict[str, Asked]:
    """Questions of all kinds."""
    processor = tiny.encoder.processor
    video = Media.make(processor, [(VIDEO, VIDEO_INFO)], seed=1)
    other = Media.make(processor, [(OTHER, OTHER_INFO)], seed=2)
    both = Media.make(processor, [(PICTURE, PICTURE_INFO), (OTHER, OTHER_INFO)], seed=3)
    what = talk(("user", [VIDEO, "What happens?"]))
    earlier = talk(
        ("system", "Be brief."),
        ("user", [VIDEO, "Who is there?"]),
        ("assistant", "left"),
        ("user", "And where does it go?"),
        ("assistant", "left and up"),
        ("user", "Sure?"),
    )
    return {
        "lengths": Asked(what, ("A dog runs.", "No", "In the old park, a dog runs to the mill and back."), video),
        "same first tokens": Asked(what, ("A dog runs.", "A dog sleeps.", "A dog"), video),
        "a prefix of another": Asked(what, ("left", "left and up", "left and"), video),
        "letters": Asked(what, ("A", "B", "C", "D"), video),
        "the longer first": Asked(what, ("left and up", "left"), video),
        "another video": Asked(talk(("user", [OTHER, "Where?"])), ("up", "down", "left and up"), other),
        "picture and video": Asked(talk(("user", [PICTURE, "then", OTHER, "Same?"])), ("yes", "no"), both),
        "earlier answers": Asked(earlier, ("left", "no", "left and up"), video),
        "text alone": Asked(talk(("user", "What is two and two?")), ("four", "five, or so"), NO_MEDIA),
        "one option": Asked(what, ("A dog runs.",), video),
    }


def ours(tiny: Tiny, model: Any, questions: Sequence[Asked]) -> list[list[float]]:
    """Scores of some questions at once: of each option the whole answer's, then the text's alone."""
    documents = [tiny.encoder.options(one.prompt, one.options, one.media.plans) for one in questions]
    rows = [(prefix_of(made), one.media.patches) for made, one in zip(documents, questions, strict=True)]
    batch = collate(rows, tiny.encoder.processor)
    scores = score_options(model, batch, documents, tiny.encoder.around_answer)
    return [[score for option in options for score in (option.whole, option.text)] for options in scores]


def sums_of(logits_TV: Tensor, ids_T: Tensor, start: int, count: int) -> tuple[float, float]:
    """Log-likelihood of `count` tokens from row `start` on and the one that closes them, each predicted by the row
    before it; then without the latter."""
    likelihoods_TV = logits_TV.double().log_softmax(-1)
    picked = [float(likelihoods_TV[row - 1, ids_T[row]]) for row in range(start, start + count + 1)]
    return sum(picked), sum(picked[:-1])


@torch.no_grad()
def theirs(tiny: Tiny, one: Asked, option: str) -> tuple[float, float]:
    """By transformers: the prompt's length and the option's are counted by tokenizing them apart."""
    tokenizer = tiny.encoder.tokenizer
    batch = batch_of(tiny.encoder, ([one.answered(option)], one.media))
    logits_TV = tiny.theirs(**tiny.inputs(batch)).logits[0]
    prompt = tokenizer.decode(tiny.encoder.encode(one.prompt, answer_next=True).ids)
    # A medium is one token in the text, and as many as it is planned for in the row.
    start = len(tokenizer(prompt)["input_ids"]) + sum(plan.num_tokens - 1 for plan in one.media.plans)
    ids = tokenizer(option)["input_ids"]
    assert batch.input_ids_T[start:].tolist() == [*ids, *tokenizer("<|im_end|>\n")["input_ids"]]
    return sums_of(logits_TV, batch.input_ids_T, start, len(ids))


def all_theirs(tiny: Tiny, one: Asked) -> list[float]:
    """As `ours` has them."""
    return [score for option in one.options for score in theirs(tiny, one, option)]


# --------------------------------------------------------------------------------- kept keys and values = full passes


def test_each_question_alone(tiny: Tiny, asked: dict[str, Asked]) -> None:
    """Options of all sorts behind one trunk, with the token that closes an answer and without it."""
    model = tiny.ours()
    for name, one in asked.items():
        (found,) = ours(tiny, model, [one])
        assert found == pytest.approx(all_theirs(tiny, one), rel=1e-5), name
        assert max(found) < 0 and len(set(found)) == len(found)


def test_several_questions_at_once(tiny: Tiny, asked: dict[str, Asked]) -> None:
    """Other videos, pictures, and none: each option sees its own question's trunk alone, in whatever order."""
    model, questions = tiny.ours(), list(asked.values())
    for order in (questions, questions[::-1], [questions[0], questions[0]]):
        wanted = [ours(tiny, model, [one])[0] for one in order]
        for found, alone in zip(ours(tiny, model, order), wanted, strict=True):
            assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("max_rows", "max_keys"), [(1, score.MAX_KEY_ROWS), (score.MAX_ROWS, 1), (20, 10_000), (1000, 250), (25, 300)]
)
def test_chunks(
    tiny: Tiny, asked: dict[str, Asked], max_rows: int, max_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same scores however many options a pass takes; one at a time where no two fit."""
    model, questions = tiny.ours(), list(asked.values())
    wanted = ours(tiny, model, questions)
    passes = spy(model)
    monkeypatch.setattr(score, "MAX_ROWS", max_rows)
    monkeypatch.setattr(score, "MAX_KEY_ROWS", max_keys)
    found = ours(tiny, model, questions)
    assert [len(scores) for scores in found] == [2 * len(one.options) for one in questions]
    for scores, at_once in zip(found, wanted, strict=True):
        assert scores == pytest.approx(at_once, rel=1e-5)
    counts = [len(batch.plan.segments) for batch in passes[1:]]
    assert sum(counts) == sum(len(one.options) for one in questions)
    assert set(counts) == {1} if 1 in (max_rows, max_keys) else max(counts) > 1
    # An option that is longer than the bound has a pass of its own.
    for batch in (batch for batch, count in zip(passes[1:], counts, strict=True) if count > 1):
        assert batch.input_ids_T.numel() <= max_rows and batch.plan.k_index.numel() <= max_keys


def test_nothing_asked(tiny: Tiny) -> None:
    """What a process without a question gives."""
    assert score_options(tiny.ours(), collate([], tiny.encoder.processor), [], (0, 1)) == []


def test_head_of_its_own(tiny_untied: Tiny) -> None:
    media = Media.make(tiny_untied.encoder.processor, [(OTHER, OTHER_INFO)])
    one = Asked(talk(("user", [OTHER, "Where?"])), ("up", "down and out"), media)
    (found,) = ours(tiny_untied, tiny_untied.ours(), [one])
    assert found == pytest.approx(all_theirs(tiny_untied, one), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [("\n\nfirst", "second"), ("second", "\nfirst", "  third"), ("\n", "\n\n")])
def test_options_that_merge_with_the_header(tiny: Tiny, options: tuple[str, ...]) -> None:
    """An option's line break becomes one token with the header's, which then begins the answer: the trunk ends before.

    Compared with a full pass whose labels come from the encoder.
    """
    model, media = tiny.ours(), Media.make(tiny.encoder.processor, [(OTHER, OTHER_INFO)])
    one = Asked(talk(("user", [OTHER, "Where?"])), options, media)
    wanted = []
    for option in options:
        batch = batch_of(tiny.encoder, ([one.answered(option)], media))
        first = int((batch.labels_T != IGNORE_INDEX).nonzero()[0])
        logits_NV = model.logits(batch)
        assert int(batch.target_ids_N[-1]) == tiny.encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
        wanted += sums_of(logits_NV, batch.input_ids_T[first - 1 :], 1, len(logits_NV) - 1)
    assert ours(tiny, model, [one])[0] == pytest.approx(wanted, rel=1e-5)


# ------------------------------------------------------------------------------------------- what is said, ranked first


@torch.no_grad()
def test_what_is_said_is_ranked_first_where_options_begin_others(tiny: Tiny) -> None:
    """The greedy answer is made an option, among its beginnings and longer ones: by the whole answer's probability it
    wins over each of its own beginnings, which by mean log-likelihood it need not."""
    model, media = tiny.ours(), Media.make(tiny.encoder.processor, [(OTHER, OTHER_INFO)])
    tokenizer = tiny.encoder.tokenizer
    one = Asked(talk(("user", [OTHER, "Where?"])), ("1", "10", "1 of 10", "No", "No, it does not"), media)
    (found,) = ours(tiny, model, [one])
    assert found == pytest.approx(all_theirs(tiny, one), rel=1e-5)
    whole = dict(zip(one.options, found[::2], strict=True))
    # A probability over answers: that of an answer and of all that go on from it is at most that of its beginning.
    text = dict(zip(one.options, found[1::2], strict=True))
    for begins, longer in (("1", "10"), ("1", "1 of 10"), ("No", "No, it does not")):
        ids = tokenizer(longer)["input_ids"]
        if ids[: len(tokenizer(begins)["input_ids"])] == tokenizer(begins)["input_ids"]:
            assert math.exp(whole[begins]) + math.exp(text[longer]) <= math.exp(text[begins]) * (1 + 1e-5)


def test_scores_by_length_are_those_of_lm_eval() -> None:
    """`acc_norm` of lm-evaluation-harness: `np.argmax(lls / completion_len)`, `completion_len` from `len(choice)`
    (lm_eval/api/task.py, ConfigurableTask.process_results); characters, not bytes or tokens."""
    options = ("basketball", "basketball dunk", "été 犬")
    texts, closing = (-2.0, -2.4, -1.5), (-0.1, -0.9, -3.0)
    prompt = Conversation("q", (Turn("user", (OTHER, "?")),), "q", options)
    scores = [OptionScore(text + end, text) for text, end in zip(texts, closing, strict=True)]
    answer = with_option_scores(Answer(Question("q", prompt, ("basketball",)), "x"), scores)
    lengths = np.array([float(len(option)) for option in options])
    assert answer.option_scores == pytest.approx((-2.1, -3.3, -4.5))
    assert answer.option_scores_norm == pytest.approx(np.array(texts) / lengths)
    assert answer.choice == 0 and int(np.argmax(np.array(texts) / lengths)) == 1
    found = {name: score.value for name, score in Classify().score([answer]).items()}
    assert (found["top1"], found["top1_norm"]) == (1.0, 0.0)


# ----------------------------------------------------------------------------------------------- trunk, branches


def rendered(tiny: Tiny, one: Asked) -> list[int]:
    """The prompt's ids up to where the answer begins, media expanded."""
    return tiny.encoder.document([one.prompt], one.media.plans, answer_next=True).ids_T.tolist()


def test_the_trunk_is_the_prompt_but_for_its_last_token(tiny: Tiny, asked: dict[str, Asked]) -> None:
    """The last token begins each branch: it predicts the option's first one. Shared first tokens of options stay in
    the branches."""
    for name, one in asked.items():
        made: Document = tiny.encoder.options(one.prompt, one.options, one.media.plans)
        prompt = rendered(tiny, one)
        trunk = prefix_of(made)
        assert trunk.ids_T.tolist() == prompt[:-1], name
        assert trunk.media == one.media.plans and int(trunk.media_mask_T.sum()) == sum(
            plan.num_tokens for plan in one.media.plans
        )
        assert bool((trunk.labels_T == IGNORE_INDEX).all()) and trunk.suffix_lengths == (len(prompt) - 1,)
        start = made.prefix_length
        for option, length in zip(one.options, made.suffix_lengths, strict=True):
            branch = slice(start, start + length)
            ids = tiny.encoder.tokenizer(option)["input_ids"]
            assert made.ids_T[branch].tolist()[: 1 + len(ids)] == [prompt[-1], *ids]
            labelled = (made.labels_T[branch] != IGNORE_INDEX).nonzero().flatten().tolist()
            assert labelled == list(range(1, 2 + len(ids)))
            assert made.labels_T[branch][labelled].tolist() == [
                *ids,
                *tiny.encoder.tokenizer("<|im_end|>")["input_ids"],
            ]
            start += length
        assert start == made.num_tokens and made.sample_ids == one.options


# ------------------------------------------------------------------------------------------------------- many labels


def spy(model: Any) -> list[Batch]:
    """The batches that the model is given from now on."""
    seen: list[Batch] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


def test_700_labels_in_bounded_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as Kinetics-700 has: passes within both bounds, one of the encoder, and keys kept of the trunk alone."""
    labels = tuple(f"{verb} {what} {number}" for number in range(10) for verb in VERBS for what in ("wood", "a bike"))
    assert len(set(labels)) == 700
    media = Media.make(tiny.encoder.processor, [(VIDEO, VIDEO_INFO)])
    one = Asked(talk(("user", [VIDEO, "Which action?"])), labels, media)
    model = tiny.ours()
    passes, encoder, logits, kept = spy(model), [], [], []
    model.visual.register_forward_hook(lambda module, args, out: encoder.append(out[0].shape[0]))
    model.register_forward_hook(lambda module, args, out: logits.append(out.shape[0]))
    attend = PrefixCache.attend

    def attend_and_look(self: PrefixCache, layer: int, *args: Any) -> Tensor:
        out = attend(self, layer, *args)
        kept.append(self.past[layer][0].shape[0])
        return out

    monkeypatch.setattr(PrefixCache, "attend", attend_and_look)
    (found,) = ours(tiny, model, [one])
    trunk = len(rendered(tiny, one)) - 1
    assert encoder == [media.plans[0].num_tokens] and set(kept) == {trunk}
    assert passes[0].input_ids_T.numel() == trunk and passes[0].num_targets == 0
    assert sum(len(batch.plan.segments) for batch in passes[1:]) == 700
    assert max(logits) <= max(batch.input_ids_T.numel() for batch in passes[1:]) <= score.MAX_ROWS
    assert max(batch.plan.k_index.numel() for batch in passes[1:]) <= score.MAX_KEY_ROWS
    # Bounded, but not one by one either.
    assert len(passes) - 1 <= 1.1 * sum(batch.input_ids_T.numel() for batch in passes[1:]) / score.MAX_ROWS + 1
    for number in (0, 1, 333, 699):
        assert found[2 * number : 2 * number + 2] == pytest.approx(theirs(tiny, one, labels[number]), rel=1e-5)


def test_keys_are_bounded_where_the_trunk_is_long(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few short options fill a pass by the keys of their trunk, long before their own rows do."""
    media = Media.make(tiny.encoder.processor, [(VIDEO, VIDEO_INFO)])
    one = Asked(talk(("user", [VIDEO, "Which?"])), tuple("ABCDEFGHIJ"), media)
    model = tiny.ours()
    trunk = len(rendered(tiny, one)) - 1
    passes = spy(model)
    monkeypatch.setattr(score, "MAX_KEY_ROWS", 3 * (trunk + 5))
    ours(tiny, model, [one])
    assert [len(batch.plan.segments) for batch in passes[1:]] == [3, 3, 3, 1]


VERBS = (
    *("chopping", "riding", "painting", "cutting", "washing", "carrying", "breaking", "throwing", "catching"),
    *("pushing", "pulling", "lifting", "dropping", "kicking", "fixing", "drawing", "burning", "hiding", "selling"),
    *("buying", "finding", "losing", "moving", "turning", "holding", "touching", "showing", "hitting", "climbing"),
    *("stacking", "sawing", "polishing", "splitting", "wrapping", "bending"),
)
