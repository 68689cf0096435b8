"""Settings that the page changes: what is meant changes, and nothing else, comments included."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from vft.app import draft
from vft.app.workspace import Workspace
from vft.common.errors import UserError

SOURCES = [{"format": "messages", "path": "a.jsonl"}, {"format": "folders", "path": "b"}]
CHANGES: dict[str, Any] = {
    "data.root": "r",
    "data.sources": SOURCES,
    "eval.sources": None,
    "parallel.offload": "frozen",
}


def test_recipes_keep_their_comments_and_other_settings() -> None:
    recipes = sorted(draft.RECIPES.glob("*/*.toml"))
    assert len(recipes) > 40
    for recipe in recipes[::8]:
        before = recipe.read_text()
        after = draft.changed(before, CHANGES)
        wanted = tomllib.loads(before)
        wanted["data"] |= {"root": "r", "sources": SOURCES}
        wanted.get("eval", {}).pop("sources", None)
        wanted.setdefault("parallel", {})["offload"] = "frozen"
        assert tomllib.loads(after) == wanted
        assert before.split("[model]")[0] in after, recipe


@pytest.mark.parametrize(
    "text",
    ["", "[data]\nroot = 'x'\n[data.video]\nfps = 1.0\n[train]\n[[data.sources]]\nformat = 'messages'\npath = 'p'\n"],
)
def test_settings_of_other_shapes(text: str) -> None:
    table = tomllib.loads(draft.changed(text, CHANGES))
    assert table["data"]["sources"] == SOURCES and table["data"]["root"] == "r"


def test_what_cannot_be_changed_is_named(tmp_path: Path) -> None:
    for text, says in (("a = ", "not TOML"), ("data = 3", "data.root: data is no table")):
        with pytest.raises(UserError, match=says):
            draft.changed(text, CHANGES)
    with pytest.raises(UserError, match="there are none yet"):
        draft.checked(Workspace((tmp_path,)), " ")
