"""A path that is not there: each setting and option that names one says so, and what is there instead."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.main import run_main
from tests.runs.world import ANSWERS, World
from vft.common.errors import missing

TRAIN = ("vft.recipes.main", "caption", "run.toml")
PREDICT = ("vft.cli.predict", "--model", "base")
SOURCE = 'data.sources=[{{format="{0}",path="{1}"}}]'
CASES: list[tuple[tuple[str, ...], str]] = [
    ((*TRAIN, "model.adapter=gone"), "model.adapter = 'gone': no such folder"),
    ((*TRAIN, "model.adapter=runs/mine/adaptr"), "model.adapter = 'runs/mine/adaptr': no such folder; did you mean"),
    ((*TRAIN, "model.adapter=run.toml"), "model.adapter = 'run.toml': is a file, not a folder"),
    ((*TRAIN, "model.path=./bas"), "model.path = './bas': no such folder; did you mean 'base'?"),
    ((*TRAIN, "model.path=bas"), "model.path = 'bas': no such folder; did you mean 'base'?, and not to be had from"),
    ((*TRAIN, "model.path=run.toml"), "model.path = 'run.toml': is a file, not a folder"),
    ((*TRAIN, "data.root=dta"), "data.root = 'dta': no such folder; did you mean 'data'?"),
    ((*TRAIN, SOURCE.format("messages", "trian.jsonl")), "data/trian.jsonl: no such file; did you mean 'data/train.js"),
    ((*TRAIN, SOURCE.format("ucf101", "gone.txt")), "data/gone.txt: no such file; check data.root"),
    ((*TRAIN, SOURCE.format("folders", "gone")), "data/gone: no such file; check data.root"),
    (
        ("vft.cli.evaluate", "run.toml", 'eval.sources=[{format="messages",path="sub/val.jsonl"}]'),
        "no such file: there is no folder data/sub",
    ),
    (("vft.recipes.main", "caption", "rn.toml"), "rn.toml: no such file; did you mean 'run.toml'?"),
    ((*PREDICT, "--adapter", "runs/mine/adaptr", "clip.mp4"), "--adapter = runs/mine/adaptr: no such folder; did you"),
    ((*PREDICT, "clp.mp4"), "clp.mp4: no such file; did you mean 'clip.mp4'?"),
    ((*PREDICT, "data/train.jsonl", "--root", "dta"), "--root = dta: no such folder; did you mean 'data'?"),
    (("vft.cli.predict", "--model", "./bas", "clip.mp4"), "--model = './bas': no such folder; did you mean 'base'?"),
    (("vft.cli.chat", "--model", "base", "clp.mp4"), "clp.mp4: no such file; did you mean 'clip.mp4'?"),
    (("vft.cli.pairs", "run.toml", "model.adapter=gone"), "model.adapter = 'gone': no such folder"),
    (("vft.cli.inspect_batch", "run.toml", "--output", "o", "model.adapter=gone"), "model.adapter = 'gone': no such f"),
    (("vft.cli.live", "runs/gone"), "RUN = runs/gone: no such folder"),
    (("vft.cli.compare", "runs/mine", "runs/mne"), "RUN = runs/mne: no such folder; did you mean 'runs/mine'?"),
    (
        ("vft.cli.benchmark", "mvbench", "--model", "base", "--root", "data"),
        "there is no folder data/MVBench; `vft d",
    ),
    (("vft.cli.config", "import", "gone.yaml"), "gone.yaml: no such file"),
]


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, a configuration and the folder of a run."""
    folder = tmp_path_factory.mktemp("paths")
    (folder / "base").symlink_to(world.base)
    (folder / "clip.mp4").symlink_to(world.root / f"{next(iter(ANSWERS))}.mp4")
    (folder / "runs" / "mine" / "adapter").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").touch()
    world.config(folder / "run.toml", {"data": {"root": "data"}, "model": {"path": "base"}})
    return folder


@pytest.mark.parametrize(("words", "message"), CASES, ids=lambda part: part if isinstance(part, str) else "")
def test_what_is_not_there_is_named(
    words: tuple[str, ...],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    module, *rest = words
    before = sorted(folder.rglob("*"))
    main = partial(importlib.import_module(module).main, prog="vft")
    done = run_main(lambda argv: main(argv=argv), capsys, *rest)
    assert done.status == 2 and message in done.stderr.splitlines()[-1], done.stderr
    assert sorted(folder.rglob("*")) == before


def test_what_a_path_lacks(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for path, reason in (
        ("a/c/d", "no such file: there is no folder {0}/a/c; look"),
        ("file/x", "no such file: {0}/file is no folder; look"),
        ("link", "is a link that leads nowhere; look"),
        ("a", "is a folder, not a file; look"),
        ("zzz", "no such file; look"),
        ("flie", "no such file; did you mean '{0}/file'?"),
    ):
        assert missing(tmp_path / path, "file", "look") == reason.format(tmp_path)
