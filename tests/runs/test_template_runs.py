"""Whole commands with keywords of the chat template, and with videos in the template's own pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.families import QWEN3_TEMPLATE
from tests.runs.commands import Commands
from tests.runs.world import COLOURS, PROMPT, World, make_world

SWITCH = "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
TEMPLATE = QWEN3_TEMPLATE.removesuffix("{% endif %}") + SWITCH + "{% endif %}"
OPTIONS = {"data": {"template_options": {"enable_thinking": True}, "video": {"keep_outer_pair": True}}}
TRAIN = {"train": {"max_steps": 60, "learning_rate": 1e-2, "schedule": "linear"}, "lora": {"rank": 8, "alpha": 16}}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Records whose answers have reasoning."""
    world = make_world(tmp_path_factory.mktemp("thinking"), "qwen3_5")
    (world.base / "chat_template.jinja").write_text(TEMPLATE)
    records = json.loads((world.root / "videos.json").read_text())
    for one in records:
        one["messages"][-1]["content"] = f"<think>\nI see {one['id']}.\n</think>\n\nIt is {one['id']}."
    (world.root / "videos.json").write_text(json.dumps(records))
    return world


@pytest.fixture(scope="module")
def trained(thinking: World, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learnt both by heart."""
    return commands.train(thinking.config(tmp_path_factory.mktemp("trained") / "run.toml", OPTIONS, TRAIN))


def predicted(commands: Commands, *arguments: object) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in commands.run("tools/predict.py", "--json", *arguments).ok().stdout.splitlines()
    ]


def test_the_model_is_asked_as_it_was_trained(thinking: World, commands: Commands, trained: Path) -> None:
    """Prediction takes the settings from the adapter: it thinks what it has learnt, and the answer is what follows.
    Told otherwise, the prompt ends with an empty thought, and no reasoning is left."""
    about = json.loads((trained / "adapter" / "vft.json").read_text())
    assert about["template_options"] == {"enable_thinking": True} and about["video"]["keep_outer_pair"] is True
    asked = "--prompt", PROMPT, "--max-new-tokens", 40, *(thinking.root / f"{colour}.mp4" for colour in COLOURS)
    model = "--model", thinking.base, "--adapter", trained / "adapter"
    found = predicted(commands, *model, *asked)
    assert [line["prediction"] for line in found] == [f"It is {colour}." for colour in COLOURS]
    assert [line["reasoning"] for line in found] == [f"I see {colour}." for colour in COLOURS]
    other = predicted(commands, *model, "--template-options", "{enable_thinking = false}", *asked)
    assert not any("reasoning" in line for line in other)
    for wrong, said in (
        ("{thinking=true}", "does not read thinking; it reads enable_thinking"),
        ("x", "valid dictionary"),
        ("{x", "not a TOML value"),
    ):
        error = commands.run("tools/predict.py", *model, "--template-options", wrong, *asked).error
        assert error.startswith("error: --template-options = ") and said in error


def test_the_merged_model_too(thinking: World, commands: Commands, trained: Path, tmp_path: Path) -> None:
    """With the base's own template, since training kept the pair in it."""
    folder = tmp_path / "merged"
    merge = commands.run(
        "tools/merge_lora.py", "--base", thinking.base, "--adapter", trained / "adapter", "--output", folder
    ).ok()
    assert """--default-chat-template-kwargs '{"enable_thinking": true}'""" in merge.stdout
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    (line,) = predicted(commands, "--model", folder, "--prompt", PROMPT, thinking.root / "red.mp4")
    assert (line["prediction"], line["reasoning"]) == ("It is red.", "I see red.")
    card = (trained / "adapter" / "README.md").read_text()
    assert '{"enable_thinking": true} in training' in card and "--chat-template " not in card


def test_evaluation_tells_a_mismatch(thinking: World, commands: Commands, trained: Path, tmp_path: Path) -> None:
    """The run's own configuration is as trained. Answers are scored without their reasoning."""
    arguments = trained.with_suffix(".toml"), "--adapter", trained / "adapter", "--output", tmp_path
    result = commands.run("tools/evaluate.py", *arguments).ok()
    assert "was trained with" not in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "adapter.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [line["reference"] for line in lines]
    assert lines[0]["reference"] == "It is red." and lines[0]["reasoning"] == "I see red."
    changed = "data.template_options=", "data.video.keep_outer_pair=false", "eval.max_new_tokens=2"
    told = commands.run("tools/evaluate.py", *arguments, "--compare-base", *changed).ok().stderr
    said = "data.template_options = {}, data.video.keep_outer_pair = false: the model was trained with "
    assert told.count(said + '{"enable_thinking": true} and true') == 1


def test_training_that_goes_on_tells_a_mismatch(
    thinking: World, commands: Commands, trained: Path, tmp_path: Path
) -> None:
    lora = {"model": {"adapter": str(trained / "adapter")}, "lora": {"rank": 8, "alpha": 16}, "train": {"max_steps": 1}}
    said = "data.video.keep_outer_pair = false: the model was trained with "
    other = commands.run("vft.recipes.caption", thinking.config(tmp_path / "other.toml", lora)).ok()
    assert said in other.stderr
    same = commands.run("vft.recipes.caption", thinking.config(tmp_path / "same.toml", lora, OPTIONS)).ok()
    assert "was trained with" not in same.stderr


def test_an_option_that_is_not_read_ends_the_run(thinking: World, commands: Commands, tmp_path: Path) -> None:
    config = thinking.config(tmp_path / "run.toml", {"data": {"template_options": {"enable_thinkin": True}}})
    error = commands.run("vft.recipes.caption", config).error
    assert "data.template_options = {'enable_thinkin': True}: the chat template of " in error
    assert error.rstrip().endswith("does not read enable_thinkin; it reads enable_thinking")
