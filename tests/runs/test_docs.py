"""What the documentation says is there: commands, options, recipes, settings, links."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.runs.commands import REPOSITORY, Commands
from vft.config import run as configs
from vft.config.data import DataConfig, SourceConfig
from vft.config.run import Config
from vft.data import formats

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|CONFIG|\.\.\.")
SECTIONS = "|".join(name for name, one in Config.model_fields.items() if name not in ("task", "output_dir", "seed"))


@pytest.fixture(scope="module")
def helps() -> dict[tuple[str, ...], str]:
    """What `--help` of each command has said: asked once for all pages."""
    return {}


def blocks(page: Path, language: str = "[a-z]*") -> list[str]:
    """The text of every fenced block."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands_of(page: Path) -> Iterator[list[str]]:
    """Every command of the project's in a fenced block or in a table, in words."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python tools/|torchrun |vft [a-z]+ )[^`]*)`", text)
    for line in lines:
        if re.match(r"(python tools/|python -m vft|torchrun |vft [a-z])", line.strip()):
            yield shlex.split(
                line.strip().replace("[", " ").replace("]", " ") if "[--" in line else line, comments=True
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_there(page: Path, commands: Commands, helps: dict[tuple[str, ...], str]) -> None:
    for words in commands_of(page):
        tool = next((word for word in words if word.startswith("tools/")), None)
        if tool is None and words[0] != "vft":
            check_recipe(words)
        elif tool is None or not PLACEHOLDER.search(tool):
            assert tool is None or (REPOSITORY / tool).is_file(), " ".join(words)
            program = ("vft.cli.main", words[1]) if tool is None else (tool,)
            if program not in helps:
                helps[program] = commands.run(*program, "--help").ok().stdout
            known = set(re.findall(r"--[a-z][a-z-]*", helps[program]))
            asked = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert asked <= known, f"{' '.join(words)}: {asked - known}"
            check_settings(words)


def check_recipe(words: list[str]) -> None:
    """A recipe's module, its file and its overrides."""
    if "-m" not in words:
        return
    module = words[words.index("-m") + 1]
    if not PLACEHOLDER.search(module):
        place = REPOSITORY / module.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), " ".join(words)
    check_settings(words)


def check_settings(words: list[str]) -> None:
    """Files of settings exist and take the overrides behind them."""
    files = [word for word in words if word.startswith("recipes/") and word.endswith(".toml")]
    for file in files:
        overrides = [word for word in words if re.match(r"[a-z_.]+=", word) and not PLACEHOLDER.search(word)]
        configs.load(REPOSITORY / file, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_are_there(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    for span in spans:
        for name in re.findall(rf"(?<![\w./-])((?:{SECTIONS})(?:\.[a-z_]+)+)", span):
            if not re.search(r"\.(md|py|toml|jsonl?|html|safetensors|layers|main)\b", name):
                assert has_setting(Config, name.split(".")), f"{page.name}: {name}"


def has_setting(model: Any, path: list[str]) -> bool:
    """Whether a dotted key is one of a section's."""
    if not path:
        return True
    field = model.model_fields.get(path[0])
    if field is None:
        return False
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return len(path) == 1 or (section is not None and has_setting(section, path[1:]))


def test_a_setting_that_is_not_there_is_noticed() -> None:
    assert has_setting(Config, ["data", "video", "fps"]) and not has_setting(Config, ["data", "video", "speed"])
    assert has_setting(Config, ["lora", "rank"]) and not has_setting(Config, ["lora", "rank", "of"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name}: {target}; there are {slugs}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_toml_loads(page: Path) -> None:
    """In place of what a whole recipe has there."""
    whole = tomllib.loads((REPOSITORY / "recipes/qwen2_5_vl_7b/caption.toml").read_text(encoding="utf-8"))
    for block in blocks(page, "toml"):
        for part in re.split(r"\n(?=sources = )", block) if block.startswith("sources") else [block]:  # alternatives
            given = tomllib.loads(part)
            if "sources" in given:
                given = {"eval" if "# in [eval]" in part else "data": given}
            tables = {name: {**whole.get(name, {}), **one} for name, one in given.items() if isinstance(one, dict)}
            configs.load({**whole, **given, **tables})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_json_is_read(page: Path, tmp_path: Path) -> None:
    """All keys of every record, by a format."""
    for block in blocks(page, "json"):
        (tmp_path / "records.jsonl").write_text(block, encoding="utf-8")
        assert any(reads_all(name, DataConfig(root=tmp_path)) for name in formats.names()), f"{page.name}: {block}"


def test_messages_are_said() -> None:
    """Those of the first column of troubleshooting.md, or of their parts the longest: the code has it in one string."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (REPOSITORY / "vft").rglob("*.py")]
    nodes = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    said = "\n".join(value for value in nodes if isinstance(value, str))
    page = (REPOSITORY / "docs/use/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\|[^|`]*`([^`|]* [^`|]*)`", page, re.MULTILINE)
    parts = [max(re.split(r"\.\.\.|, | \(.*\)|[;:=']", one), key=len).strip() for one in messages]
    theirs = {"Could not load libtorchcodec", "SignalException"}
    assert len(parts) > 12 and {part for part in parts if part not in said} == theirs


def test_columns_are_named() -> None:
    page = (REPOSITORY / "docs/use/data.md").read_text(encoding="utf-8")
    assert not [name for name in formats.find("messages").columns if f"`{name}`" not in page]


def reads_all(format: str, data: DataConfig) -> bool:
    """Whether a format reads the records and each of their keys."""
    try:
        samples, bad = formats.read(SourceConfig(format=format, path="records.jsonl"), data)
    except ValueError:  # it reads other files
        return False
    return bool(samples) and not bad and not any(sample.unread for sample in samples)
