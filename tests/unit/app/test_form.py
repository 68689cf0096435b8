"""The form of all settings and the TOML beside it say the same."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import tomli_w

from vft.app import form
from vft.common.errors import UserError
from vft.config import run as configs
from vft.config.listing import tables

RECIPES = sorted(Path("recipes").glob("*/*.toml"))


@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[-1], Path("recipes/demo/caption_preferences.toml")], ids=str)
def test_a_recipe_typed_into_the_form_is_that_recipe(recipe: Path) -> None:
    """Each value that the form shows, typed into an empty form, gives the settings back: but for sources, which the
    form does not have."""
    text, typed = recipe.read_text(), ""
    for key, value in form.values_in(text).items():
        typed = form.with_value(typed, key, value)
    want, got = configs.load(recipe), configs.load(tomllib.loads(typed))
    differing = {key for key, _, _ in configs.differences(want, got, ignore=())}
    assert {key for key in differing if ".sources" not in key} == set()
    assert form.values_in(typed) == form.values_in(text)


@pytest.mark.parametrize("value", ["true", "16", "1e-3", "a b", "[x]", "Qwen/Qwen2.5-VL", 'say "a"', "1.0 to 2.5"])
def test_a_text_stays_a_text(value: str) -> None:
    """Also one that looks like a number when its quotes are gone."""
    text = tomli_w.dumps({"data": {"prompt": value}})
    shown = form.values_in(text)["data.prompt"]
    assert form.values_in(form.with_value("", "data.prompt", shown)) == {"data.prompt": shown}
    assert configs.load({"output_dir": "r", "model": {"path": "m"}, "data": {"prompt": value}}).data.prompt == value
    again = form.with_value("output_dir = 'r'\nmodel.path = 'm'\n", "data.prompt", shown)
    assert configs.load(tomllib.loads(again)).data.prompt == value


def test_what_is_emptied_has_its_default() -> None:
    text = "[train]\nmax_steps = 3  # few\nseed = 1\n"
    assert form.with_value(text, "train.max_steps", " ") == "[train]\nseed = 1\n"
    assert form.with_value(text, "lora.rank", "") == text  # no empty table: it would mean adapters
    assert "# few" in form.with_value(text, "train.max_steps", "4")
    with pytest.raises(UserError, match="not a TOML value"):
        form.with_value(text, "train.max_steps", "[1")


def test_choices_are_all_that_a_setting_takes() -> None:
    settings = {setting.key: setting for table in tables() for setting in table.settings}
    assert settings["train.schedule"].choices == ("cosine", "linear", "constant")
    assert settings["data.share_videos"].choices == ("true", "false")
    assert {"auto", "true", "false"} == set(settings["parallel.compile"].choices)
    assert settings["train.max_steps"].choices == () and settings["lora.init"].choices == ()
    base = {"output_dir": "r", "model": {"path": "m"}, "lora": {}}
    for key, setting in settings.items():
        if key.startswith(("train.", "parallel.", "model.")):
            for choice in setting.choices:
                configs.load(base, [f"{key}={choice}"])
