"""tools/live.py: what a run shows, seen from elsewhere."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.runs.commands import Commands, metrics
from tests.runs.world import World

TOOL = "tools/live.py"


def test_a_picture_of_a_run_and_a_look_at_it(world: World, commands: Commands, tmp_path: Path) -> None:
    settings = {"train": {"max_steps": 3}, "eval": {"every_steps": 3, "max_new_tokens": 4}}
    folder = commands.train(world.config(tmp_path / "run.toml", settings))
    picture = tmp_path / "live.svg"
    assert commands.run(TOOL, folder, "--svg", picture, "--step", 3).ok().stdout == f"wrote {picture}\n"
    text = " ".join("".join(ET.parse(picture).getroot().itertext()).replace("\xa0", " ").split())
    last = metrics(folder)[-2]
    assert "step 3/3" in text and f"{last['loss']:.4f}" in text and "step 3: cider_d" in text and "saved" in text
    links = re.findall(r"https?://[^\"') ]*", picture.read_text())
    assert set(links) <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}, "a comment and the namespace"
    assert commands.run(TOOL, folder).ok().stdout == ""  # it is done, so it ends
    assert commands.run(TOOL, tmp_path).error == f"error: {tmp_path}: no run.json; name the output_dir of a run"
