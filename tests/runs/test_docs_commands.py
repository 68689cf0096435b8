"""The commands of the documentation, run as they stand there, page by page.

What stands for the released model is the demo's small base: it lies in the hub's cache under that name. Clips and
records are where a page says that the reader has put them.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.clips import make_clip
from tests.runs.commands import REPOSITORY, Commands, Result, commands_in
from tests.runs.test_docs import PAGES, PLACEHOLDER, blocks
from tests.runs.world import record

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
SMALL = ("README.md", "start.md")
"""Pages of which all runs here, with the small base; on the others a comment may say what a command needs."""
NEEDS = re.compile(r"#.*\b(GPUs?|hosts|the set's files)\b")
PROGRAM = re.compile(r"(python |torchrun |vft )")
SMALLER = (
    *("train.max_steps=4", "train.warmup_steps=2", "train.packs_per_step=2", "data.video.max_pixels=12544"),
    *("train.precision=fp32", "data.workers=0"),
)
"""Behind a training command, which would otherwise take 500 steps of 16 videos."""
PROMPT, ANSWERS = "Describe the video.", ("A red square.", "A green square.", "A blue square.")


def lines_of(page: Path) -> list[str]:
    """The commands of a page's fenced blocks that run here, each with its comment."""
    lines = [line.strip() for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if PROGRAM.match(line) and not PLACEHOLDER.search(line.partition("#")[0])]
    return [line for line in lines if page.name in SMALL or not NEEDS.search(line)]


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """The folder of somebody who has done what the pages say before their commands."""
    home = tmp_path / "home"
    for name in ("tools", "recipes"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).symlink_to(REPOSITORY / name)
    clips = [home / "data" / "clips" / f"{number}.mp4" for number in range(3)]
    for clip in (*clips, home / "new_clip.mp4", home / "new_clips" / "a.mp4"):
        clip.parent.mkdir(parents=True, exist_ok=True)
        make_clip(clip, range(20), fps=10, size=(64, 64))
    make_clip(home / "lecture.mp4", range(650), fps=10, size=(64, 64))
    records = [record(f"<video>{PROMPT}", answer, videos=[f"clips/{i}.mp4"]) for i, answer in enumerate(ANSWERS)]
    for name, kept in (("train.jsonl", records), ("val.jsonl", records[:1])):
        (home / "data" / name).write_text("".join(json.dumps(one) + "\n" for one in kept))
    return home


def fill_hub_cache(folder: Path) -> None:
    """A hub's cache in which `MODEL` is the demo's base."""
    home = folder / f"models--{MODEL.replace('/', '--')}"
    shutil.copytree(REPOSITORY / "tools" / "demo_world" / "base", home / "snapshots" / "1")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("1")


def run(commands: Commands, line: str) -> Result:
    """One line of a page."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        return commands.shell("python", "-m", "torch.distributed.run", *words[1:], *SMALLER)
    if words[0] == "vft":
        return commands.run("vft.cli.main", *words[1:], *(SMALLER if words[1] == "train" else ()))
    return commands.run(*words[1:])


def pages() -> Iterator[Any]:
    """Those with commands; what the slow ones run, other tests run too."""
    for page in PAGES:
        if lines_of(page):
            yield pytest.param(page, id=page.name, marks=[] if page.name in SMALL else pytest.mark.slow)


@pytest.mark.parametrize("page", pages())
def test_commands_run(page: Path, reader: Path, tmp_path: Path) -> None:
    """In their order, in one folder: each ends well."""
    fill_hub_cache(tmp_path / "hub")
    with commands_in(tmp_path / "scratch", reader, HF_HUB_CACHE=str(tmp_path / "hub")) as commands:
        for line in lines_of(page):
            if "tools/compare.py" in line or line.startswith("vft compare"):  # beside another run
                shutil.copytree(reader / "runs" / "mine", reader / "runs" / "other")
            result = run(commands, line)
            assert result.status == 0, f"{page.name}: {line}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    if page.name in SMALL:
        check_outcome(reader)


def check_outcome(home: Path) -> None:
    """What the pages promise is there after their commands."""
    for name in ("report.html", "config.toml", "adapter/README.md", "merged/config.json"):
        assert (home / "runs" / "mine" / name).is_file(), name
    assert (home / "runs" / "look" / "preview.html").is_file()
    answered = [json.loads(line) for line in (home / "answers.jsonl").read_text().splitlines()]
    assert answered and all("prediction" in one and "error" not in one for one in answered)
