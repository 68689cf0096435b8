"""The tab Data, without a browser: what is said of files is what is in them, and what is written is what was read."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from vft.app import data_tab, records
from vft.app.workspace import Workspace
from vft.common import plugins
from vft.common.errors import UserError
from vft.config import run as configs
from vft.config.data import SourceConfig

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Ten questions about five clips, one of which is gone; two have two answers; one record has none."""
    (tmp_path / "data/clips").mkdir(parents=True)
    rows = [{"video": f"{i // 2}.mp4", "question": f"{EVIL} {i}?", "answer": f"{i}", "shade": "red"} for i in range(10)]
    rows += [{**row, "answer": "other"} for row in rows[:2]] + [{"video": "0.mp4", "question": "Why?"}]
    (tmp_path / "data/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data/odd.csv").write_text("clip_name,q,a\n0.mp4,What?,This.\n")
    for i in range(4):
        (tmp_path / f"data/clips/{i}.mp4").touch()
    monkeypatch.chdir(tmp_path)  # as the page does
    return Workspace((tmp_path,))


def test_what_was_read_and_what_is_wrong(space: Workspace) -> None:
    data = records.data_of(space, "data")
    assert records.record_files_in(space, space.home / "data") == ["odd.csv", "train.jsonl"]
    found = records.read(records.sources_of(space, data, ["train.jsonl"], records.DETECTED, "", {}), data)
    facts, wrong = records.facts(found, data, "qa")
    assert facts["read as"] == "train.jsonl: messages, media in clips"
    assert facts["samples"] == "12; 1 record(s) can't be read"
    assert facts["media"] == "12 videos in 5 files" and facts["not there"] == "1 of 5 files"
    assert facts["different questions"] == "10, 2 of them with several right answers"
    assert "shade (12)" in facts["not read"]
    assert [(row[0].rpartition("/")[2], row[1]) for row in wrong] == [("train.jsonl:13", "answer"), ("4.mp4", "media")]
    shown = records.as_html(facts, wrong, found[0].samples[:3])
    assert EVIL not in shown and "&lt;script&gt;" in shown
    found = [records.Found(found[0].source, found[0].samples, [])]
    assert records.facts(found, data, "qa")[0]["samples"] == "12"  # a file that isn't there is no unread record


def test_columns_of_the_form(space: Workspace) -> None:
    columns = {"video": "clip_name", "question": "q", "answer": "a"}
    form = ("data", ["odd.csv"], records.DETECTED, "", "", "clip_name", "", "q", "a", "", None, "", "")
    data, sources = data_tab._read_form(space, *form)
    assert sources[0].model_dump(include={"columns", "media"}) == {"columns": columns, "media": "clips"}
    (found,) = records.read(sources, data)
    assert not found.bad and found.samples[0].turns[1].text == "This."
    with pytest.raises(UserError, match=r"columns\.colour: is not known"):
        data_tab._read_form(space, *form[:4], "colour=x", *form[5:])


@pytest.mark.parametrize("paths", [["../etc"], ["/etc/passwd"], [], ["gone.json"]])
def test_nothing_outside_is_read(space: Workspace, paths: list[str]) -> None:
    data = records.data_of(space, "data")
    with pytest.raises(UserError):
        records.sources_of(space, data, paths, records.DETECTED, "", {})
    with pytest.raises(UserError, match="lies outside"):
        records.data_of(space, "/etc")
    (space.home / "data/link.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="lies outside"):
        records.sources_of(space, data, ["l*.json"], records.DETECTED, "", {})


def test_what_is_written(space: Workspace) -> None:
    text = (
        '# kept\noutput_dir = "o"\n[data]\nroot = "old"\n[eval]\nsources = [{format = "messages", path = "e.json"}]\n'
    )
    data, one = records.data_of(space, "data"), SourceConfig(format="messages", path="train.jsonl", media="clips")
    table = {"format": "messages", "path": "train.jsonl", "media": "clips"}
    made = data_tab.with_sources(space, text, data, [one], data_tab.TRAIN, 0.0, "qa")
    read = tomllib.loads(made)
    assert made.startswith("# kept\n") and read["task"] == "qa"
    assert read["data"] == {"root": "data", "sources": [table]} and read["eval"] == {}  # e.json is not there
    also = data_tab.with_sources(space, made, data, [one], data_tab.ALSO_TRAIN, 0.1, "qa")
    assert tomllib.loads(also)["data"]["sources"] == [table, table] and tomllib.loads(also)["eval"] == {"split": 0.1}
    held_out = tomllib.loads(data_tab.with_sources(space, also, data, [one], data_tab.EVALUATE, 0.1, "qa"))
    assert held_out["eval"] == {"sources": [table]} and len(held_out["data"]["sources"]) == 2
    with pytest.raises(UserError, match="all sources need the same"):
        data_tab.with_sources(space, made, records.data_of(space, "."), [one], data_tab.ALSO_TRAIN, 0.1, "qa")


def test_code_that_settings_name_is_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not even to check them."""
    (tmp_path / "planted.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "only_own", True)
    settings = {"output_dir": "o", "model": {"path": "m"}}
    with pytest.raises(UserError, match="code of its own"):
        configs.load({**settings, "data": {"sources": [{"format": "planted:Format", "path": "x"}]}})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("share", "said"), [(0.4, ", 4 of 12 samples held out"), (0.0001, "raise it"), (0.9999, "lower")]
)
def test_what_is_held_out_is_said(space: Workspace, share: float, said: str) -> None:
    data = {"root": "data", "sources": [{"format": "messages", "path": "train.jsonl", "media": "clips"}]}
    table = {"output_dir": "run", "model": {"path": "base"}, "data": data, "eval": {"split": share}}
    config = configs.Config.model_validate(table)
    if said.startswith(","):
        assert records.held_out_text(config) == said
    else:
        with pytest.raises(UserError, match=f"eval.split = .*: none of 12 samples .*; {said}"):
            records.held_out_text(config)
