"""A clip with several right labels is right by any of them, in whatever order its records stand."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.parity.cases.conftest import Case
from vft.common.task import Answer
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import read
from vft.preparation.documents import questions
from vft.recipes.classify import Classify
from vft.recipes.qa import QuestionAnswering


def test_multi_label(case: Callable[[str], Case]) -> None:
    one = case("02_multi_label")
    found = []
    for name in ("train", "swapped"):
        source = f'data.sources=[{{format="messages",path="{name}.jsonl"}}]'
        arguments = (f"model.path={one.tiny}", "eval.max_new_tokens=2", "data.workers=0", source)
        one.run("tools/evaluate.py", "config.toml", *arguments, f"output_dir=out/{name}").ok()
        folder = one.folder / "out" / name / "predictions"
        (row,) = (json.loads(line) for line in (folder / "base.jsonl").read_text().splitlines())
        scores = {
            name: score["value"] for name, score in json.loads((folder / "scores.json").read_text())["base"].items()
        }
        right = float(row["choice"] in ("eating", "sitting on a sofa"))
        assert scores["top1"] == scores["top1/eating"] == scores["top1/sitting on a sofa"] == right
        assert sorted(row["references"]) == ["eating", "sitting on a sofa"]
        found.append({metric: score for metric, score in scores.items() if metric != "loss"})
    assert found[0] == found[1]


def test_the_likelier_of_two_labels(case: Callable[[str], Case]) -> None:
    """The model finds "eating" likeliest, and says it: right in both orders of the records."""
    data = DataConfig(root=case("02_multi_label").folder / "data")
    for file in ("train.jsonl", "swapped.jsonl"):
        samples, _ = read(SourceConfig(format="messages", path=file), data)
        (question,) = questions([made for sample in samples for made in Classify().conversations(sample)])
        scores = [-0.01 if option == "eating" else -2.0 for option in question.prompt.options]
        answers = [Answer(question, "eating", tuple(scores))]
        assert Classify().score(answers)["top1"].value == 1.0
        assert QuestionAnswering().score(answers)["choice_accuracy"].value == 1.0
