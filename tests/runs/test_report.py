"""report.html, read back by a parser that knows nothing of how it was made."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs.commands import Commands
from tests.runs.world import ANSWERS, COLOURS, PROMPT, World, damage
from vft.common.scores import Samples
from vft.common.types import Conversation, MediaRef, Turn
from vft.config import run as configs
from vft.data.chat import ChatEncoder
from vft.data.dataset import Dataset
from vft.inference.evaluate import write_score_parts
from vft.metrics import mean_interval
from vft.models import build
from vft.models.pretrained import Pretrained
from vft.models.processor import VisionProcessor
from vft.preparation.documents import load_held_out
from vft.recipes import task_of
from vft.reporting import report, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


@dataclass
class Element:
    """An element and what is in it: other elements and texts."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All texts in it, with single spaces."""
        return " ".join(" ".join(one.text if isinstance(one, Element) else one for one in self.children).split())

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """The elements in it of this tag and these attributes; `class` may be one of several."""
        found: list[Element] = []
        for one in self.children:
            if isinstance(one, Element):
                fits = all(
                    value in (one.attributes.get(key.strip("_")) or "").split() for key, value in attributes.items()
                )
                found += [one] if tag in ("", one.tag) and fits else []
                found += one.all(tag, **attributes)
        return found


class Reader(HTMLParser):
    """A tree of the page; fails where elements don't nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(folder: Path, held_out: Dataset | None = None, processor: VisionProcessor | None = None) -> Element:
    """Write the report and read it; every page must stand alone."""
    assert write_report(folder, held_out, processor) == folder / "report.html"
    reader = Reader()
    reader.feed((folder / "report.html").read_text(encoding="utf-8"))
    reader.close()
    assert len(reader.open) == 1
    page = reader.open[0]
    assert not [tag for tag in ("script", "link", "iframe", "base", "object", "a") if page.all(tag)]
    for element in page.all():
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in ("href", "srcset", "action"), (element.tag, name)
            assert name != "src" or (value or "").startswith("data:image/jpeg;base64,")
    assert not re.search(r"url\(|@import", page.all("style")[0].text)
    return page


def write_run(
    folder: Path, lines: list[dict[str, Any]], task: str = "caption", **predictions: list[dict[str, Any]]
) -> Path:
    """A run's folder by hand; predictions by `step_000000`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(
        f'task = "{task}"\n[model]\npath = "some/base"\n[lora]\nrank = 4\ntargets = ["a"]\n'
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "predictions").mkdir(exist_ok=True)
    for name, rows in predictions.items():
        file = folder / "predictions" / f"{name.replace('_', '-')}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def step(number: int, loss: float = 1.0, **values: float) -> dict[str, Any]:
    """A training step's line."""
    line = {"step": number, "epoch": 0, "loss": loss, "lr": 1e-3, "grad_norm": 2.0, "tokens_per_s": 1000.0}
    return {**line, "samples": 3, "tokens": 50, "step_time_s": 0.5, "mfu": None, **values}


def evaluation(number: int, **scores: tuple[float, float, float]) -> dict[str, Any]:
    """An evaluation's line, of (value, low, high); `__` in a name stands for a slash."""
    named = {name.replace("__", "/"): score for name, score in scores.items()}
    line: dict[str, Any] = {"step": number, **{f"eval_{name}": value for name, (value, _, _) in named.items()}}
    return {**line, "eval_intervals": {name: [low, high] for name, (_, low, high) in named.items() if low < high}}


def answer(number: int, text: str, reference: str | None, **more: Any) -> dict[str, Any]:
    """A line of a predictions file."""
    return {"id": f"clip-{number}", "prompt": f"Question {number}?", "prediction": text, "reference": reference, **more}


def table(page: Element, heading: str) -> list[list[str]]:
    """The rows of the table under a heading, its first row among them, without the scales of scores."""
    body = page.all("body")[0].children
    start = next(
        i for i, one in enumerate(body) if isinstance(one, Element) and one.tag == "h2" and one.text == heading
    )
    found = next(one.all("table")[0] for one in body[start + 1 :] if isinstance(one, Element) and one.all("table"))
    for row in found.all("th"):
        row.children = [one for one in row.children if one not in row.all(class_="scale")]
    return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in found.all("tr")]


def chart(page: Element, title: str) -> Element:
    """The figure that shows something over steps."""
    return next(one for one in page.all("figure") if one.all("svg") and one.all("figcaption")[0].text.startswith(title))


def points(figure: Element) -> list[tuple[float, float]]:
    """(step, value) of every circle, by the axes' own ticks, as a reader of the picture finds them."""
    columns = []
    for axis in ("x", "y"):
        ticks = [(number(tick, axis), float(tick.text.replace(",", ""))) for tick in figure.all("text", class_=axis)]
        assert 2 <= len(ticks) <= 12
        scale = np.polyfit(*np.array(ticks).T, 1)
        columns.append([float(np.polyval(scale, number(circle, f"c{axis}"))) for circle in figure.all("circle")])
    return list(zip(*columns, strict=True))


def number(element: Element, name: str) -> float:
    """The value of a numeric attribute."""
    return float(element.attributes[name] or "")


# ------------------------------------------------------------------------------------------------------ made by hand


def test_curves_lie_where_their_values_are(tmp_path: Path) -> None:
    losses = [4.0, 2.5, 2.75, 1.125, 0.5]
    lines = [step(i, loss, grad_norm=10.0 * i, tokens_per_s=12_345.0) for i, loss in enumerate(losses, 1)]
    lines += [evaluation(5, loss=(0.75, 0.5, 1.0), rouge_l=(0.5, 0.5, 0.5))]
    page = read(write_run(tmp_path, [evaluation(0, loss=(3.5, 3.0, 4.5), rouge_l=(0.1, 0.1, 0.1)), *lines]))
    wanted = [*enumerate(losses, 1), (0, 3.5), (5, 0.75)]
    assert np.allclose(points(chart(page, "loss")), wanted, atol=0.03)
    assert np.allclose(points(chart(page, "gradient norm")), [(i, 10 * i) for i in range(1, 6)], atol=0.3)
    assert np.allclose(points(chart(page, "rouge_l")), [(0, 0.1), (5, 0.5)], atol=0.03)
    titles = [title.text for title in chart(page, "loss").all("title")]
    assert titles[0] == "training, step 1: 4" and titles[-1] == "held-out, step 5: 0.75 [0.5, 1]"
    assert len(chart(page, "loss").all("line", class_="whisker")) == 2
    # All values alike still make an axis around them.
    assert np.allclose(points(chart(page, "tokens per second")), [(i, 12_345.0) for i in range(1, 6)], atol=30)


def test_a_spike_makes_the_axis_logarithmic(tmp_path: Path) -> None:
    norms = [1.0, 1.2, 0.9, 1000.0, 1.1]
    figure = chart(read(write_run(tmp_path, [step(i, grad_norm=n) for i, n in enumerate(norms, 1)])), "gradient norm")
    ticks = [(number(t, "y"), float(t.text.replace(",", ""))) for t in figure.all("text", class_="y")]
    assert [value for _, value in ticks] == [0.1, 1, 10, 100, 1000]
    slope = np.polyfit([y for y, _ in ticks], np.log10([value for _, value in ticks]), 1)
    shown = [10 ** np.polyval(slope, number(c, "cy")) for c in figure.all("circle")]
    assert np.allclose(shown, norms, rtol=0.03)


def test_figures_of_pairs_and_warnings(tmp_path: Path) -> None:
    """Both answers in one chart, held-out scores beside the same of training, warnings with their steps."""
    figures = {"reward_chosen": 0.5, "reward_rejected": -1.5, "log_p_chosen": -9.0, "log_p_rejected": -30.0}
    lines = [step(i, **{name: i * one for name, one in figures.items()}, margin=20.0 * i) for i in (1, 2)]
    lines[1]["warnings"] = ["the chosen <answers>"]
    page = read(write_run(tmp_path, [*lines, evaluation(2, reward_margin=(35.0, 30.0, 40.0))]))
    for title, (chosen, rejected) in {"rewards": (0.5, -1.5), "log-probabilities": (-9.0, -30.0)}.items():
        wanted = [(i, i * one) for one in (chosen, rejected) for i in (1, 2)]
        assert np.allclose(points(chart(page, title)), wanted, atol=0.3), title
        assert [one.text for one in chart(page, title).all(class_="legend")] == ["chosen", "rejected"]
    assert np.allclose(points(chart(page, "reward_margin")), [(1, 20.0), (2, 40.0), (2, 35.0)], atol=0.3)
    assert [one.text for one in page.all("p", class_="worst")] == ["Warning at step 2: the chosen <answers>"]


def test_long_runs_are_drawn_by_means(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, [step(i, loss=float(i % 2)) for i in range(1, 5001)]))
    figure = chart(page, "loss")
    assert len(figure.all("circle")) == 295 and (tmp_path / "report.html").stat().st_size < 300_000
    assert all(abs(value - 0.5) < 0.05 for _, value in points(figure)[:-1])
    assert figure.all("title")[0].text == "training, mean of steps 1 to 17: 0.52941 [0, 1]"


def test_first_and_last_evaluation_side_by_side(tmp_path: Path) -> None:
    first = evaluation(0, cider_d=(1.0, 0.5, 1.5), bleu4=(10, 5, 15), accuracy__duration__short=(0.25, 0.25, 0.25))
    middle = evaluation(1, cider_d=(9.0, 8.5, 9.5), bleu4=(90, 85, 95), accuracy__duration__short=(1, 1, 1))
    last = evaluation(2, cider_d=(2.0, 1.6, 2.5), bleu4=(12, 6, 20), accuracy__duration__short=(0.5, 0.5, 0.5))
    page = read(write_run(tmp_path, [first, step(1), middle, step(2), last]))
    scales = [one.text for one in page.all("table")[0].all(class_="scale")]
    assert scales == ["0 to 10, higher is better", "0 to 100, higher is better"]
    assert "0 to 1, higher is better" in chart(page, "accuracy/duration/…").all("figcaption")[0].text
    assert table(page, "Scores") == [
        ["", "step 0", "step 2", "change"],
        ["cider_d", "1 [0.5, 1.5]", "2 [1.6, 2.5]", "+1"],
        ["bleu4", "10 [5, 15]", "12 [6, 20]", "+2"],
    ]
    assert table(page, "Groups")[1:] == [["accuracy/duration/short", "0.25", "0.5", "+0.25"]]
    assert np.allclose(points(chart(page, "accuracy/duration/…")), [(0, 0.25), (1, 1.0), (2, 0.5)], atol=0.03)


def test_how_texts_were_cut_stands_beside_their_scores(tmp_path: Path) -> None:
    first, last = evaluation(0, bleu4=(10, 5, 15), loss=(3, 3, 3)), evaluation(2, bleu4=(12, 6, 20), loss=(2, 2, 2))
    page = read(write_run(tmp_path, [{**first, "eval_tokenization": {"bleu4": "13a"}}, step(1), last]))
    assert [row[0] for row in table(page, "Scores")[1:]] == ["bleu4 (13a)", "loss"]
    last["eval_tokenization"] = {"bleu4": "13a+zh"}  # two that don't compare
    page = read(write_run(tmp_path, [{**first, "eval_tokenization": {"bleu4": "13a"}}, step(1), last]))
    assert [row[0] for row in table(page, "Scores")[1:]] == ["bleu4 (13a / 13a+zh)", "loss"]


def test_a_change_is_that_of_the_same_questions(tmp_path: Path) -> None:
    """Question by question, where what the scores were computed from was kept; damaged files change nothing."""
    folder = write_run(tmp_path, [evaluation(0, rouge_l=(0.5, 0.4, 0.6)), evaluation(2, rouge_l=(0.6, 0.5, 0.7))])
    names = [f"q{i}" for i in range(40)]
    before = [i % 2 * 0.9 for i in range(40)]
    for number, gain in ((0, 0.0), (2, 0.1)):
        samples = Samples(tuple(names), tuple(range(40)))
        score = mean_interval([one + gain for one in before], samples=samples)
        write_score_parts(folder / "scores" / f"step-{number:06d}.json", {"rouge_l": score})
    wanted = ["rouge_l", "0.5 [0.4, 0.6]", "0.6 [0.5, 0.7]", "+0.1 [+0.1, +0.1]"]
    assert table(read(folder), "Scores")[1] in (
        wanted,
        [*wanted[:3], "+0.1"],
    )
    samples = Samples(tuple(names[:30]), tuple(range(30)))
    gains = [one + (0.2 if i < 15 else 0.1) for i, one in enumerate(before[:30])]
    write_score_parts(folder / "scores" / "step-000002.json", {"rouge_l": mean_interval(gains, samples=samples)})
    (_, row) = table(read(folder), "Scores")
    assert row[3].startswith("+0.15 [+0.1") and row[3].endswith("] on the 30 of both")
    other = Samples(tuple("abc"), (0, 1, 2))
    write_score_parts(
        folder / "scores" / "step-000002.json", {"rouge_l": mean_interval([0.0, 1.0, 1.0], samples=other)}
    )
    assert table(read(folder), "Scores")[1][3] == "other questions"
    for damaged in ("{", "[]", '{"samples": [], "scores": {"rouge_l": {"kind": "ratio", "samples": 0, "table": []}}}'):
        (folder / "scores" / "step-000002.json").write_text(damaged)
        assert table(read(folder), "Scores")[1][3] == "+0.1"


def test_facts_and_what_was_left_out(tmp_path: Path) -> None:
    bad = [{"id": str(i), "path": "", "reason": "missing", "message": f"{i}.mp4: <gone>"} for i in range(3)]
    write_run(tmp_path, [step(1), step(2)])
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    (tmp_path / "run.json").write_text(json.dumps({"device": "Abacus 9000", "processes": 2, "samples": 1234}))
    page = read(tmp_path)
    assert page.all("h1")[0].text == "caption: some/base"
    names, values = ([one.text for one in page.all("dl")[0].all(tag)] for tag in ("dt", "dd"))
    facts = dict(zip(names, values, strict=True))
    assert facts["trained"] == "LoRA of rank 4: a" and facts["steps"] == "2" and facts["left out"] == "3 samples"
    assert (facts["device"], facts["processes"], facts["samples"]) == ("Abacus 9000", "2", "1,234")
    assert facts["trained on"] == "6 samples, 100 tokens, repetitions counted" and facts["time in steps"] == "0:00:01"
    assert table(page, "Left out")[1:] == [["missing", "3", "0.mp4: <gone>"]]
    assert 'path = "some/base"' in page.all("pre")[0].text


def test_sources_and_how_videos_were_seen(tmp_path: Path) -> None:
    write_run(tmp_path, [step(1)])
    assert "held out" not in read(tmp_path).text
    sources = '[data]\nsources = [{format = "folders", path = "a&b"}, {format = "ucf101", path = "u", repeats = 0.5}]\n'
    video = "[data.video]\nframes = 8\nmax_pixels = 50176\n"
    held_out = '[eval]\nsources = [{format = "ucf101", path = "test"}]\n'
    with (tmp_path / "config.toml").open("a") as file:
        file.write(sources + video + held_out)
    page = read(tmp_path)
    assert table(page, "Data") == [
        ["", "source", "format", "how often"],
        ["trained on", "a&b", "folders", "once"],
        ["trained on", "u", "ucf101", "repeats 0.5"],
        ["held out", "test", "ucf101", "once"],
    ]
    assert "Videos were seen at 8 frames, of at most 50,176 pixels each." in page.text


def test_examples_are_the_best_the_worst_and_some_between(tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    after = [answer(i, " ".join(words[: 1 + i % 10]), " ".join(words)) for i in range(40)]
    before = [answer(i, f"nothing {i}", " ".join(words)) for i in range(40)]
    page = read(write_run(tmp_path, [evaluation(0), evaluation(3)], step_000000=before, step_000003=after))
    shown = page.all("article")
    assert len(shown) == 12
    by_badge = {why: [one.all("h3")[0].text for one in shown if one.all(class_=why)] for why in ("best", "worst")}
    assert by_badge["best"] == [f"clip-{i} best ROUGE-L 1.00" for i in (39, 29, 19)]
    assert by_badge["worst"] == [f"clip-{i} worst ROUGE-L 0.18" for i in (20, 10, 0)]
    for one in shown:
        number = int(one.all("h3")[0].text.split()[0].removeprefix("clip-"))
        texts = [text.text for text in one.all("dl")[0].all("dd")]
        assert texts == [f"Question {number}?", " ".join(words), f"nothing {number}", after[number]["prediction"]]


def test_what_a_model_says_is_never_markup(tmp_path: Path) -> None:
    nasty = "</dd><script>alert(1)</script><img src=x onerror=alert(2)> & \"'{{ 7 * 7 }}"
    row = {
        **answer(0, nasty, nasty),
        "id": nasty,
        "prompt": nasty,
        "choice": nasty,
        "option_scores": {nasty: -1.5, "other": -2.0},
    }
    line = {"step": 1, f"eval_{nasty}": 0.5, "eval_loss": 1.0, "eval_intervals": {}}
    folder = write_run(tmp_path, [step(1), line], "classify", step_000001=[row, {**row, "id": "other"}])
    (folder / "run.json").write_text(json.dumps({"device": nasty}))
    (folder / "quarantine.jsonl").write_text(json.dumps({"reason": nasty, "message": nasty}) + "\n")
    page = read(folder)
    flat = " ".join(nasty.split())
    assert page.all("article")[0].all("dd")[0].text == page.all("article")[0].all("dd")[1].text == flat
    assert flat in page.all("article")[0].all("h3")[0].text and "49" not in page.all("article")[0].text
    assert table(page, "Left out")[1] == [flat, "1", flat] and table(page, "Confusion at step 1")[1] == [flat, "2"]


def test_options_are_right_or_wrong_with_their_likelihood(tmp_path: Path) -> None:
    rows = [answer(i, "B.", "A.", choice="B.", option_scores={"A.": -2.0, "B.": -1.0 + i / 10}) for i in range(3)]
    rows += [answer(3, "A.", "A.", choice="A.", option_scores={"A.": -0.125, "B.": -4.0})]
    page = read(write_run(tmp_path, [evaluation(1)], "qa", step_000001=rows))
    shown = page.all("article")
    assert [one.all("h3")[0].text for one in shown] == [
        "clip-3 best right",
        "clip-0 best wrong",
        "clip-1 worst wrong",
        "clip-2 worst wrong",  # the surest of the wrong ones
    ]
    assert shown[0].all("dd")[-1].text == "A. likeliest: A. (log-likelihood a token: -0.125)"
    assert not [heading for heading in page.all("h2") if "Confusion" in heading.text]


def test_confusion_of_few_classes_and_of_many(tmp_path: Path) -> None:
    def chosen(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
        return [answer(i, c, r, choice=c, option_scores={c: -1.0, "other": -2.0}) for i, (r, c) in enumerate(pairs)]

    few = chosen([("cat", "cat")] * 3 + [("cat", "dog")] + [("dog", "cat")] * 2)
    page = read(write_run(tmp_path / "few", [evaluation(1)], "classify", step_000001=few))
    assert table(page, "Confusion at step 1") == [["", "cat", "dog"], ["cat", "3", "1"], ["dog", "2", ""]]
    right = page.all("td", class_="right")
    assert [cell.text for cell in right] == ["3", ""] and right[0].attributes["style"] == "--share: 60%"
    both = {"references": ["cat", "dog"]}  # a clip with two right labels is in both rows, and right in both or neither
    rows = [{**row, **both} for row in chosen([("cat", "dog"), ("cat", "cow")])]
    page = read(write_run(tmp_path / "both", [evaluation(1)], "classify", step_000001=rows))
    wanted = [["", "cat", "cow", "dog"], ["cat", "1", "1", ""], ["cow", "", "", ""], ["dog", "", "1", "1"]]
    assert table(page, "Confusion at step 1") == wanted
    many = chosen([(f"class {i:02}", f"class {i:02}") for i in range(40)] + [("class 07", "class 08")] * 4)
    page = read(write_run(tmp_path / "many", [evaluation(1)], "classify", step_000001=many))
    assert table(page, "Confusion at step 1")[1:] == [["class 07", "class 08", "4", "5"]]


def test_equal_ids_of_two_sources_are_two_questions() -> None:
    """Each with its own answers, grade and pictures; of files that name no source rather no pictures than another's."""
    talks = [
        Conversation("1", (Turn("user", (MediaRef("video", Path("clip.mp4")), "What?")),), f"{source}.json:1")
        for source in "ab"
    ]
    rows = {
        said: [
            {**answer(0, f"{said} {one.origin}", one.origin), "source": one.origin, "media": ["clip.mp4"], "id": "1"}
            for one in talks
        ]
        for said in ("first", "last")
    }
    built: list[int] = []

    def build(number: int) -> SimpleNamespace:
        built.append(number)
        return SimpleNamespace(media=())

    planned = [SimpleNamespace(conversations=(one,)) for one in talks]
    held_out: Any = SimpleNamespace(documents=planned, build=build)
    shown = report.examples(rows, held_out, cast(VisionProcessor, object()))
    assert sorted(built) == [0, 1] and len(shown) == 2
    for one in shown:
        (source,) = one["references"]
        assert [row["prediction"] for _, row, _ in one["answers"]] == [f"first {source}", f"last {source}"]
    old = {key: value for key, value in rows["last"][0].items() if key not in ("source", "media")}
    built.clear()
    assert report.strips(old, held_out, cast(VisionProcessor, object())) == [] and built == []


def test_answers_that_were_cut_off_are_marked(tmp_path: Path) -> None:
    rows = [{**answer(0, "A dog ru", "A dog runs."), "cut_off": True}, answer(1, "A cat.", "A cat.")]
    page = read(write_run(tmp_path, [evaluation(1, rouge_l=(1, 1, 1), cut_off=(1, 1, 1))], step_000001=rows))
    assert table(page, "Scores")[1:] == [["rouge_l", "1"], ["cut_off", "1"]]
    marked = [one.all("dd")[-1].text for one in page.all("article") if one.all("dt")[-1].text == "step 1, cut off"]
    assert marked == ["A dog ru"]


def test_scores_by_the_evaluating_tool(tmp_path: Path) -> None:
    rows = {name: [answer(0, f"by {name}", "by adapter")] for name in ("base", "adapter")}
    folder = write_run(tmp_path, [], **rows)
    scores = {
        name: {"rouge_l": {"value": v, "low": v - 0.1, "high": v + 0.1}}
        for name, v in (("base", 0.2), ("adapter", 0.7))
    }
    (folder / "predictions" / "scores.json").write_text(json.dumps({"task": "caption", **scores}))
    wanted = ["rouge_l", "0.2 [0.1, 0.3]", "0.7 [0.6, 0.8]", "+0.5"]
    assert table(read(folder), "Scores, by tools/evaluate.py") == [["", "base", "adapter", "change"], wanted]
    scores["difference"] = {"rouge_l": {"value": 0.5, "low": 0.45, "high": 0.55}}
    (folder / "predictions" / "scores.json").write_text(json.dumps({"task": "caption", **scores}))
    page = read(folder)
    wanted[3] = "+0.5 [+0.45, +0.55]"
    assert table(page, "Scores, by tools/evaluate.py") == [["", "base", "adapter", "change"], wanted]
    assert [text.text for text in page.all("article")[0].all("dd")][2:] == ["by base", "by adapter"]


def test_pairs_of_answers_the_worst_ordered_first(tmp_path: Path) -> None:
    """Those of the last evaluation, or of the evaluating tool; what they say is never markup."""

    def pair(number: int, margin: float, **more: Any) -> dict[str, Any]:
        texts = {"prompt": f"Question {number}?", "chosen": f"<b>Yes</b> {number}", "rejected": "</dd><i>No"}
        return {"id": f"p-{number}", **texts, "log_p_chosen": -1.25, "log_p_rejected": -9.0, "margin": margin, **more}

    reference = {"reference_chosen": -2.0, "reference_rejected": -6.5}
    rows = [pair(i, 30.0 - i, **reference) for i in range(40)]
    lines = [evaluation(0, loss=(2, 2, 2)), evaluation(7, loss=(1, 1, 1))]
    pairs = {"step_000000.pairs": [pair(0, 0.0)], "step_000007.pairs": rows, "step_000009.pairs": [pair(9, -99.0)]}
    page = read(write_run(tmp_path / "run", lines, step_000000=[], step_000007=[], **pairs))
    shown = page.all("article")
    assert [one.all("h3")[0].text for one in shown[:2]] == ["p-39 margin -9.00", "p-38 margin -8.00"]
    assert len(shown) == 24
    assert [one.text for one in shown[0].all("dt")] == ["prompt", "chosen", "rejected"]
    assert [one.text for one in shown[0].all("dd")] == [
        "Question 39?",
        "<b>Yes</b> 39 log p -1.25, of the reference -2.00",
        "</dd><i>No log p -9.00, of the reference -6.50",
    ]
    page = read(write_run(tmp_path / "tool", [], adapter=[answer(0, "A.", "A.")], **{"adapter.pairs": [pair(0, 7.75)]}))
    (answered, shown_pair) = page.all("article")
    assert answered.all("h3")[0].text.startswith("clip-0") and shown_pair.all("h3")[0].text == "p-0 margin +7.75"
    assert "log p -1.25" in shown_pair.all("dd")[1].text and "reference" not in shown_pair.text


def test_whatever_is_missing_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "No step was recorded." in read(tmp_path / "empty").text
    page = read(write_run(tmp_path / "single", [step(1)]))
    assert "Nothing was evaluated." in page.text and len(chart(page, "loss").all("circle")) == 1
    folder = write_run(tmp_path / "cut", [step(1), step(2, loss=float("nan")), evaluation(2, rouge_l=(0.5, 0.5, 0.5))])
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(b'[1]\n{"step": null}\n{"step": 3, "loss": 0.5, "tok\xc3')
    (folder / "predictions" / "step-000002.jsonl").write_text('{"id": "a", "prediction": "said"}\n{"id": "b", "pred')
    (folder / "predictions" / "step-000009.jsonl").write_text(json.dumps(answer(9, "undone by a resume", None)) + "\n")
    (folder / "config.toml").write_text("task = \n")
    page = read(folder)
    assert len(chart(page, "loss").all("circle")) == 1 and table(page, "Scores")[1] == ["rouge_l", "0.5"]
    assert [one.all("h3")[0].text for one in page.all("article")] == ["a"] and "said" in page.text


# --------------------------------------------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def trained(world: World, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of two steps that was evaluated before and after, with data of its own."""
    folder = tmp_path_factory.mktemp("reported")
    shutil.copytree(world.root, folder / "data")
    settings = {
        "data": {"root": str(folder / "data"), "cache_dir": str(folder / "cache"), "video": {"frames": 12}},
        "train": {"max_steps": 2},
        "eval": {"every_steps": 2, "max_new_tokens": 8},
    }
    config = world.config(folder / "run.toml", settings)
    commands.train(config)
    return config


def load(config: Path) -> tuple[Dataset, VisionProcessor]:
    """What the run was evaluated on."""
    settings = configs.load(config)
    checkpoint = Pretrained.open(settings.model.path)
    processor = build(checkpoint, torch.float32).processor
    return load_held_out(task_of(settings), settings, ChatEncoder(checkpoint.tokenizer, processor)), processor


def test_a_run_with_its_frames(trained: Path) -> None:
    folder = trained.with_suffix("")
    page = read(folder, *load(trained))
    before, after = (
        {row["id"]: row["prediction"] for row in map(json.loads, (folder / "predictions" / name).open())}
        for name in ("step-000000.jsonl", "step-000002.jsonl")
    )
    assert {one.all("h3")[0].text.split()[0] for one in page.all("article")} == set(ANSWERS)
    assert len(chart(page, "loss").all("circle")) == 4 and len(chart(page, "learning rate").all("circle")) == 2
    for one in page.all("article"):
        colour = one.all("h3")[0].text.split()[0]
        texts = [" ".join(text.split()) for text in (PROMPT, ANSWERS[colour], before[colour], after[colour])]
        assert [text.text for text in one.all("dl")[0].all("dd")] == texts
        # 8 of the 12 frames, 4 a second; the bar of each has walked 4 pixels since the one before it.
        numbers = [0, 2, 3, 5, 6, 8, 9, 11]
        assert [caption.text for caption in one.all("figcaption")] == [f"{n / 4:.2f} s" for n in numbers]
        for number, image in zip(numbers, one.all("img"), strict=True):
            data = base64.b64decode((image.attributes["src"] or "").partition(",")[2])
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)
            assert pixels.shape == (56, 56, 3)
            bar = pixels[:, number * 4 + 2 : number * 4 + 6].mean((0, 1))
            ground = pixels[:, 50:].mean((0, 1)) if number < 6 else pixels[:, :16].mean((0, 1))
            assert np.abs(bar - 250).max() < 20 and np.abs(ground - COLOURS[colour]).max() < 20, (colour, number)


def test_a_clip_that_broke_since_is_named(trained: Path) -> None:
    held_out, processor = load(trained)
    damage(trained.parent / "data" / "red.mp4")
    (trained.parent / "data" / "blue.mp4").unlink()
    page = read(trained.with_suffix(""), held_out, processor)
    shown = {one.all("h3")[0].text.split()[0]: one for one in page.all("article")}
    assert {name: len(one.all("img")) for name, one in shown.items()} == {"red": 0, "green": 8, "blue": 0, "yellow": 8}
    assert all(
        "can't be decoded: " in shown[name].text and f"{name}.mp4" in shown[name].text for name in ("red", "blue")
    )
