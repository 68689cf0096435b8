"""The page of all settings is made from the configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vft.cli import settings
from vft.config.run import Config
from vft.recipes import main as recipes

PAGE = Path("docs/use/settings.md")


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings.page(), "write it anew: vft settings > docs/use/settings.md"


def test_every_setting_is_told() -> None:
    """By its table: with a meaning, and what it may hold."""
    text = settings.page()
    names = re.findall(r"^\| `(\w+)` \| ([^|]+) \|[^|]*\| (\S.*) \|$", text, re.MULTILINE)
    fields = dict(Config.model_fields)
    assert {"max_steps", "kind", "shard", "max_pixels", "format", "every_steps"} <= {name for name, _, _ in names}
    assert len(names) == len(re.findall(r"^\| `", text, re.MULTILINE))  # none without values or meaning
    for table in fields.keys() - {"task", "output_dir", "seed"}:
        assert f"## `[{table}]`" in text
    assert "## `[[data.sources]]`" in text and "## `[[eval.sources]]`" in text
    assert "| `learning_rate` | number above 0 | 0.0001 |" in text
    assert '| `schedule` | "cosine", "linear", "constant" | "cosine" |' in text


def test_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    settings.main(["train"], "vft settings")
    shown = capsys.readouterr().out
    assert shown.startswith("## `[train]`") and "`max_steps`" in shown and "[lora]" not in shown.splitlines()[0]
    with pytest.raises(SystemExit) as stopped:
        settings.main(["trian"], "vft settings")
    assert stopped.value.code == 2 and "no table [trian]: did you mean 'train'?" in capsys.readouterr().err


def test_help_names_the_tables() -> None:
    assert recipes.__doc__ is not None
    tables = set(re.findall(r"\[(\w+)\]", recipes.__doc__))
    assert set(Config.model_fields) - {"task", "output_dir", "seed"} <= tables
