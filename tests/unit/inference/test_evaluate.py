"""Evaluation of a model on held-out records: which questions are asked, the loss beside them, the file of answers.

The loss is compared with transformers' model on each sample alone.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._dynamo.utils import counters

from tests.helpers.tiny import CPU, Tiny, talk
from vft.cli.evaluate import show_scores
from vft.common.errors import UserError
from vft.common.scores import Interval
from vft.common.task import Answer, Question, Task
from vft.common.types import Conversation, MediaOptions, MediaRef, Turn
from vft.config.data import DataConfig, ImageConfig, SourceConfig
from vft.config.run import Config, EvalConfig, ModelConfig
from vft.data.dataset import Dataset, make_dataset
from vft.data.media.patches import load_patches
from vft.data.packing import collate
from vft.data.workers import WorkerPool
from vft.distributed.process_group import World
from vft.inference.answers_file import as_text, evaluation_line
from vft.inference.engine import Answerer
from vft.inference.evaluate import evaluate, evaluation_config, held_out_scores
from vft.preparation.documents import load_held_out, questions, warn_of_overlap
from vft.recipes.caption import Caption
from vft.recipes.classify import Classify
from vft.recipes.summarize import Summarize
from vft.training.losses import cross_entropy

ALONE = World(rank=0, size=1, local_rank=0, device=CPU)
VIDEO = MediaRef("video", Path("a.mp4"))
GREYS = (30, 90, 150, 210)

# ---------------------------------------------------------------------------------------------- which are asked


def ask(text: Any, answer: str, id: str, **more: Any) -> Conversation:
    return replace(talk(("user", text), ("assistant", answer), id=id), **more)


def test_a_merged_model_is_asked_by_its_own_task(tmp_path: Path) -> None:
    """As the adapter in it would be, unless the configuration names another."""
    (tmp_path / "vft.json").write_text(json.dumps({"task": "qa"}))
    for path, task, wanted in (
        (tmp_path, None, "qa"),
        (tmp_path, "caption", "caption"),
        (tmp_path / "none", None, None),
    ):
        config = Config.model_validate({"task": task, "output_dir": "run", "model": {"path": str(path)}})
        assert evaluation_config(config, None).task == wanted


def test_an_adapter_to_start_from_is_not_scored_in_silence(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    table = {"output_dir": "r", "lora": {}, "model": {"path": str(tmp_path), "adapter": "runs/before"}}
    evaluation_config(Config.model_validate(table), None)
    assert "'runs/before' is what training starts from, and is not scored" in caplog.text


def test_equal_prompts_are_one_question() -> None:
    """With all their answers as references, in order, under the first one's name."""
    conversations = [
        ask([VIDEO, "What?"], "A dog.", "a", facts={"n": 1}),
        ask([VIDEO, "Who?"], "A cook.", "b"),
        ask([VIDEO, "What?"], "A brown dog.", "c", facts={"n": 2}),
        ask([VIDEO, "What?"], "A dog.", "d"),
    ]
    what, who = questions(conversations)
    assert (what.id, what.references) == ("a", ("A dog.", "A brown dog.", "A dog."))
    assert (who.id, who.references) == ("b", ("A cook.",))
    assert what.prompt == Conversation("a", conversations[0].turns[:1], "a.json:1", (), {"n": 1})


@pytest.mark.parametrize(
    "other",
    [
        ask([VIDEO, "What ?"], "B", "other"),
        ask([replace(VIDEO, path=Path("b.mp4")), "What?"], "B", "other"),
        ask([replace(VIDEO, options=MediaOptions(fps=1.0)), "What?"], "B", "other"),
        ask([VIDEO, VIDEO, "What?"], "B", "other"),
        ask("What?", "B", "other"),
        ask([VIDEO, "What?"], "B", "other", options=("B", "C")),
        ask([VIDEO, "What?"], "B", "other", options=("A", "B", "C")),
        talk(("system", "Be brief."), ("user", [VIDEO, "What?"]), ("assistant", "B"), id="other"),
        talk(("user", [VIDEO, "What?"]), ("assistant", "A"), ("user", "So?"), ("assistant", "B"), id="other"),
    ],
    ids=["text", "file", "frames", "media", "no media", "options", "more options", "system", "turns"],
)
def test_other_prompts_are_other_questions(other: Conversation) -> None:
    first = ask([VIDEO, "What?"], "A", "first", options=("A", "B"))
    assert [(one.id, one.references) for one in questions([first, other])] == [("first", ("A",)), ("other", ("B",))]


def test_options_in_another_order_are_the_same_question() -> None:
    """And what a record lists as right beside its own answer is right too."""
    one = ask([VIDEO, "What?"], "A", "a", options=("A", "B", "C"))
    other = ask([VIDEO, "What?"], "B", "b", options=("C", "B", "A"), facts={"answers": ("B", "C")})
    for records, references in (((one, other), ("A", "B", "C")), ((other, one), ("B", "C", "A"))):
        (question,) = questions(records)
        assert question.references == references and question.prompt.options == records[0].options


def test_the_last_answer_is_asked_for() -> None:
    """Earlier answers belong to the prompt, what comes behind the last one to nothing."""
    one = talk(
        ("user", [VIDEO, "Who?"]), ("assistant", "A cook."), ("user", "Why?"), ("assistant", "Lunch."), ("user", "Oh.")
    )
    (question,) = questions([one])
    assert question.references == ("Lunch.",) and question.prompt.turns == one.turns[:3]


def test_a_limit() -> None:
    """So many of them, in their order, always the same; all where it is 0 or more than there are."""
    conversations = [ask(f"What is {i}?", "x", str(i)) for i in range(20)]
    everything = questions(conversations)
    assert len(everything) == 20
    few = questions(conversations, 5)
    assert len(few) == 5 and few == questions(conversations, 5) and few == [one for one in everything if one in few]
    assert few != everything[:5]  # sets are often sorted
    assert questions(conversations, 20) == questions(conversations, 99) == everything


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and one whose file ends too early: its header is right, so that only decoding shows it."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for grey in GREYS:
        noise = torch.randint(0, 40, (56, 84, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray((noise + grey).numpy()).save(folder / f"{grey}.png")
    content = (folder / "30.png").read_bytes()
    (folder / "broken.png").write_bytes(content[: len(content) // 2])
    return folder


def record(answer: str, picture: str = "", question: str = "What is seen?") -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"{'<image>' * bool(picture)}{question}"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns, **({"images": [picture]} if picture else {})}


RECORDS = [
    record("A grey picture.", "30.png"),
    record("Grey", "90.png"),
    record("Nothing", "30.png", "Who is seen?"),
    record("Something of a light grey, and not much more than that.", "150.png"),
    record("Four.", question="What is two and two?"),
    record("Light.", "210.png"),
]


def held_out_of(
    tiny: Tiny, root: Path, records: Sequence[dict[str, Any]], task: Task | None = None, **settings: Any
) -> tuple[Config, Dataset]:
    """The records as a run reads them."""
    (root / "held_out.json").write_text(json.dumps(records))
    data = {"pack_tokens": 120, "workers": 0, "image": ImageConfig(max_pixels=84 * 56)} | settings
    source = SourceConfig(format="messages", path="held_out.json")
    data = DataConfig(root=root, sources=(source,), cache_dir=str(root / "cache"), **data)
    config = Config(output_dir=root / "run", model=ModelConfig(path=str(tiny.path)), data=data)
    return config, load_held_out(task or Caption(), config, tiny.encoder)


@torch.no_grad()
def sums_of(tiny: Tiny, held_out: Dataset, leave_out: str = "") -> list[tuple[float, int]]:
    """Summed loss and supervised tokens of each readable sample alone, by transformers."""
    found = []
    for one in held_out.conversations:
        if leave_out and any(leave_out in ref.name for ref in one.media):
            continue
        made = make_dataset([one], held_out.encoder, held_out.config, held_out.info).build(0)
        batch = collate([(made, [load_patches(p, tiny.encoder.processor) for p in made.media])], tiny.encoder.processor)
        logits_TV = tiny.theirs(**tiny.inputs(batch)).logits[0].double()
        loss = F.cross_entropy(logits_TV[:-1], batch.labels_T[1:], ignore_index=-100, reduction="sum")
        found.append((float(loss), int((batch.labels_T[1:] != -100).sum())))
    return found


def loss_of(tiny: Tiny, held_out: Dataset, model: Any = None, limit: int = 0) -> Interval | None:
    with WorkerPool(0, 60.0) as pool:
        answerer = Answerer(model or tiny.ours(), tiny.encoder, held_out.config, held_out.info, pool, ALONE)
        return held_out_scores(answerer, held_out, limit).get("loss")


def mean_of(sums: Sequence[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in sums) / sum(count for _, count in sums)


@pytest.mark.parametrize("share", [True, False])
def test_loss_is_that_of_the_samples_one_by_one(tiny: Tiny, root: Path, share: bool) -> None:
    """Over all supervised tokens, however they are packed; the model is left in the mode in which it was."""
    _, held_out = held_out_of(tiny, root, RECORDS, share_videos=share)
    packs = held_out.pack_plan(0).packs(0)
    assert len(held_out.documents) == (5 if share else 6) and 1 < len(packs) < 5 and max(map(len, packs)) > 1
    model, modes = tiny.ours().train(), []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    loss = loss_of(tiny, held_out, model)
    assert loss is not None and model.training and set(modes) == {False} and len(modes) == len(packs)
    assert loss.value == pytest.approx(mean_of(sums_of(tiny, held_out)), rel=1e-5)
    assert loss.low <= loss.value <= loss.high and loss.low < loss.high
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_has_the_interval_of_its_documents(tiny: Tiny, root: Path) -> None:
    """Sums of each document by transformers, those about one picture drawn together, though rows hold several."""
    _, held_out = held_out_of(tiny, root, RECORDS, share_videos=False)
    loss = loss_of(tiny, held_out)
    assert loss is not None and loss.parts is not None
    for found, wanted in zip(sorted(loss.parts.table.tolist()), sorted(sums_of(tiny, held_out)), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert len(set(loss.parts.samples.clusters)) == 5 and len(set(loss.parts.samples.names)) == 6
    generator = np.random.default_rng(1)
    table, number = loss.parts.table, np.unique(loss.parts.samples.clusters, return_inverse=True)[1]
    drawn = [sum(table[number == i].sum(0) for i in generator.integers(5, size=5)) for _ in range(4000)]
    low, high = np.quantile([one[0] / one[1] for one in drawn], [0.025, 0.975])
    assert (loss.low, loss.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_loss_of_some_documents(tiny: Tiny, root: Path) -> None:
    """A limit is a number of documents, each once: the loss is that of some choice of so many."""
    _, held_out = held_out_of(tiny, root, RECORDS, share_videos=False)
    sums, model = sums_of(tiny, held_out), tiny.ours()
    for limit in (1, 3, 6, 7):
        loss = loss_of(tiny, held_out, model, limit)
        assert loss is not None
        possible = [mean_of(chosen) for chosen in itertools.combinations(sums, min(limit, 6))]
        assert min(abs(loss.value / one - 1) for one in possible) <= 1e-5


def test_what_is_unreadable_does_not_count(tiny: Tiny, root: Path) -> None:
    """Nor does anything take its place, as it would in training: no sample counts twice."""
    broken = record("Half a picture, which nobody sees.", "broken.png")
    _, held_out = held_out_of(tiny, root, [*RECORDS[:2], broken, *RECORDS[2:]])
    assert not held_out.bad
    loss = loss_of(tiny, held_out)
    assert loss is not None
    assert loss.value == pytest.approx(mean_of(sums_of(tiny, held_out, leave_out="broken")), rel=1e-5)
    assert loss_of(tiny, held_out_of(tiny, root, [broken])[1]) is None


# --------------------------------------------------------------------------------------------- all of an evaluation


def evaluated(
    tiny: Tiny,
    root: Path,
    task: Task,
    records: Sequence[dict[str, Any]],
    folder: Path,
    limit: int = 0,
    model: Any = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Scores, and the lines of the file of answers."""
    config, held_out = held_out_of(tiny, root, records, task)
    with WorkerPool(0, 60.0) as pool:
        answerer = Answerer(model or tiny.ours(), tiny.encoder, config.data, held_out.info, pool, ALONE)
        settings = EvalConfig(max_new_tokens=4, batch_size=2, max_samples=limit)
        scores = evaluate(task, answerer, held_out, settings, folder / "answers.jsonl")
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return {name: one.value for name, one in scores.items()}, lines


def test_what_cannot_be_held_out_is_named(tiny: Tiny, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, held_out = held_out_of(tiny, root, [RECORDS[0], record("Gone.", "gone.png")], max_bad_fraction=0.5)
    assert held_out.num_samples == 1
    (message,) = (one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)
    assert message.startswith("1 held-out sample(s) can't be used, such as held_out-2: ") and "gone.png" in message


def test_an_evaluation(tiny: Tiny, root: Path, tmp_path: Path) -> None:
    """Every readable question is answered and scored; the others are counted; the loss stands beside."""
    broken = record("Half a picture.", "broken.png")
    again = record("Another grey.", "90.png")
    scores, lines = evaluated(tiny, root, Caption(), [RECORDS[0], RECORDS[1], broken, RECORDS[4], again], tmp_path)
    assert (scores["answered"], scores["unreadable"]) == (3, 1)
    assert {"cider_d", "bleu4", "rouge_l", "loss"} < scores.keys()
    assert scores["cut_off"] == sum(line.get("cut_off", False) for line in lines)
    assert [line["reference"] for line in lines] == ["A grey picture.", "Grey", "Four."]
    assert [line.get("references") for line in lines] == [None, ["Grey", "Another grey."], None]
    assert [line["prompt"] for line in lines] == ["What is seen?"] * 2 + ["What is two and two?"]
    assert all(isinstance(line["prediction"], str) and "choice" not in line for line in lines)
    assert [[Path(name).name for name in line["media"]] for line in lines] == [["30.png"], ["90.png"], []]
    assert [line["source"].rpartition(":")[0] for line in lines] == ["held_out.json"] * 3
    assert len({line["id"] for line in lines}) == 3
    nothing, _ = evaluated(tiny, root, Caption(), [broken], tmp_path)
    assert nothing == {"answered": 0, "unreadable": 1, "cut_off": 0}


def test_an_evaluation_with_options(tiny: Tiny, root: Path, tmp_path: Path) -> None:
    """Each option's score in its place; top1 is the share of those whose label scores highest."""
    labels = ["grey", "light grey", "black", "a picture of nothing"]
    records = [{**record(label, f"{grey}.png"), "labels": labels} for grey, label in zip(GREYS, labels, strict=True)]
    scores, lines = evaluated(tiny, root, Classify(), records, tmp_path)
    assert [line["reference"] for line in lines] == labels and all(len(line["option_scores"]) == 4 for line in lines)
    for line in lines:
        assert line["choice"] == max(line["option_scores"], key=line["option_scores"].__getitem__)
        assert set(line["option_scores"]) == set(labels) and max(line["option_scores"].values()) < 0
    assert scores["top1"] == sum(line["choice"] == line["reference"] for line in lines) / 4
    # Pictures differ, so do likelihoods.
    assert len({line["option_scores"]["grey"] for line in lines}) == 4


def test_records_that_list_right_answers(tiny: Tiny, root: Path, tmp_path: Path) -> None:
    """One record with a list, or two records, in either order: the same question, references and scores."""
    options = ["grey", "light grey", "black"]
    one, other = ({**record(answer, "30.png"), "options": options} for answer in ("grey", "black"))
    found = []
    for records in (
        [one, other],
        [other, one],
        [{**one, "answers": ["grey", "black"]}],
        [{**other, "label": options[::2]}],
    ):
        scores, (line,) = evaluated(tiny, root, Classify(), records, tmp_path)
        assert sorted(line["references"]) == ["black", "grey"]
        found.append({name: value for name, value in scores.items() if name != "loss"})
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0]["top1"] == found[0]["top1/grey"] == found[0]["top1/black"] == float(line["choice"] != "light grey")


def test_an_evaluation_compiles_nothing(tiny: Tiny, root: Path, tmp_path: Path) -> None:
    """What was compiled for training stays; rows of one token, or without gradients, would need graphs of their own."""
    plain, _ = evaluated(tiny, root, Caption(), RECORDS[:3], tmp_path)
    model = tiny.ours()
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.mlp.compile(dynamic=True, backend="aot_eager")
    _, held_out = held_out_of(tiny, root, RECORDS[:2])
    made = held_out.build(0)
    cross_entropy(
        model, collate([(made, [load_patches(p, tiny.encoder.processor) for p in made.media])], tiny.encoder.processor)
    ).backward()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    scores, _ = evaluated(tiny, root, Caption(), RECORDS[:3], tmp_path, model=model)
    assert counters["stats"]["unique_graphs"] == graphs and scores == pytest.approx(plain)
    torch._dynamo.reset()


def test_a_limit_of_questions(tiny: Tiny, root: Path, tmp_path: Path) -> None:
    scores, lines = evaluated(tiny, root, Caption(), RECORDS, tmp_path, limit=2)
    assert (scores["answered"], scores["unreadable"], len(lines)) == (2, 0, 2)


def test_segments_are_not_asked_about(tiny: Tiny, root: Path) -> None:
    """They are further supervision: an evaluation has the main question of each record alone."""
    story = {"images": ["30.png"], "text": "It is grey."}
    (root / "story.json").write_text(json.dumps([story]))
    (root / "video_story.json").write_text(
        json.dumps([{"video": "none.mp4", "text": "x", "segments": [{"start_s": 0, "end_s": 1, "text": "y"}]}])
    )
    source = SourceConfig(format="story", path="story.json")
    data = DataConfig(root=root, sources=(source,), workers=0, cache_dir=str(root / "cache"))
    config = Config(output_dir=root / "run", model=ModelConfig(path=str(tiny.path)), data=data)
    held_out = load_held_out(Summarize(), config, tiny.encoder)
    assert [[one.id for one in planned.conversations] for planned in held_out.documents] == [["story-1"]]


def test_what_can_not_be_asked_or_kept_shows_at_the_start(tiny: Tiny, root: Path) -> None:
    """A conversation that begins with an answer asks nothing; a metric that the task hasn't can't choose the best."""
    monologue = {"messages": [{"role": "assistant", "content": "I see."}], "id": "monologue"}
    config, held_out = held_out_of(tiny, root, [RECORDS[0], monologue, RECORDS[1]], max_bad_fraction=0.5)
    assert len(held_out.documents) == 2
    assert [item.reason for item in held_out.bad] == ["record"] and "begin with a question" in held_out.bad[0].message
    for metric, known in (("cider_d", True), ("loss", True), ("cider", False)):
        chosen = config.model_copy(update={"eval": EvalConfig(every_steps=1, best_metric=metric)})
        if known:
            load_held_out(Caption(), chosen, tiny.encoder)
        else:
            with pytest.raises(
                UserError, match=r"^eval\.best_metric = 'cider': caption has cider_d, bleu4, rouge_l, loss"
            ):
                load_held_out(Caption(), chosen, tiny.encoder)


def test_a_stream_has_no_held_out_records(tiny: Tiny, root: Path) -> None:
    source = SourceConfig(format="llava_video", path="shards", stream=True)
    data = DataConfig(root=root, sources=(source,))
    config = Config.model_construct(data=data, eval=Config.model_fields["eval"].default, seed=0)
    with pytest.raises(UserError, match=r"^eval\.sources = \[\]: a stream has no held-out records"):
        load_held_out(Caption(), config, tiny.encoder)


def test_a_line_of_the_file() -> None:
    """JSON on one line, whatever the texts hold; the choice is the likeliest option."""
    prompt = Conversation("q", (Turn("user", (VIDEO, "What\nis it?")),), "q", ("ä", "b"))
    answer = Answer(Question("q", prompt, ("b",)), "line\u2028break\n", (-2.5, -1.5))
    text = as_text(evaluation_line(answer))
    assert text.count("\n") == 1 and text.endswith("\n") and len(text[:-1].split("\n")) == 1
    line = json.loads(text)
    assert line["prompt"] == "What\nis it?" and line["prediction"] == "line\u2028break\n"
    assert (line["choice"], line["option_scores"], line["reference"]) == ("b", {"b": -1.5, "ä": -2.5}, "b")
    assert "references" not in line
    assert line["scored_by"] == "sum of log-probabilities, closing token included" and "choice_norm" not in line
    both = evaluation_line(Answer(Question("q", prompt, ("b",)), "x", (-2.5, -1.5), (-0.5, -0.75)))
    assert (both["choice"], both["choice_norm"], both["option_scores_norm"]) == ("b", "ä", {"b": -0.75, "ä": -0.5})
    many = replace(prompt, options=tuple("abcdefgh"))
    scores = tuple(-1.0 - i / 3 for i in range(8))
    line = evaluation_line(Answer(Question("q", many, ("g",)), "x", scores))
    assert list(line["option_scores"]) == ["a", "b", "c", "d", "e", "g"] and line["option_scores"]["b"] == -1.3333
    unknown = evaluation_line(Answer(Question("q", replace(prompt, options=()), ()), "x"))
    assert unknown["reference"] is None and "choice" not in unknown


def test_held_out_samples_that_are_trained_on_are_named(
    tiny: Tiny, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the records of training, read anew; where these can't be read a line says so; not where they are scored."""
    config, held_out = held_out_of(tiny, root, RECORDS[:2])
    (root / "train.json").write_text(json.dumps([record("Dark.", "30.png", "How bright?"), record("x", "150.png")]))

    def told(path: str, *eval_sources: SourceConfig) -> str:
        data = config.data.model_copy(update={"sources": (SourceConfig(format="messages", path=path),)})
        changed = {"data": data, "eval": EvalConfig(sources=eval_sources)}
        caplog.clear()
        warn_of_overlap(Caption(), config.model_copy(update=changed), held_out)
        return caplog.text

    own = SourceConfig(format="messages", path="held_out.json")
    assert "1 of 2 held-out samples are also in training" in told("train.json", own)
    assert "held_out-1 (30.png)" in told("train.json", own) and "90.png" not in told("train.json", own)
    assert "held-out samples can't be looked for" in told("gone.json", own) and told("train.json") == ""


def test_brackets_in_labels_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would take them for styles: the first would vanish, the second end in a traceback."""
    labels = ("[red] ball", "[/red] ball", ":dog:")
    show_scores({"base": {f"top1/{name}": Interval(1.0, 1.0, 1.0) for name in labels}}, "classify: answers in [b]")
    shown = capsys.readouterr().out
    assert all(f"top1/{name}" in shown for name in labels) and "answers in [b]" in shown
