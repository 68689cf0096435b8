"""`vft benchmark` on a small model: base beside adapter, going on, several processes, a benchmark of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import write_json
from tests.runs.commands import REPOSITORY, Commands
from tests.runs.processes import run_together
from tests.runs.world import ANSWERS, World

BENCHMARK = "tools/benchmark.py"


@pytest.fixture(scope="module")
def root(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MVBench's layout, with two questions about each clip; one clip is missing."""
    root = tmp_path_factory.mktemp("benchmarks")
    folder = root / "MVBench" / "video" / "clevrer" / "video_validation"
    folder.mkdir(parents=True)
    colours = list(ANSWERS)
    rows: list[dict[str, Any]] = []
    for colour in colours:
        shutil.copy(world.root / f"{colour}.mp4", folder)
        for question in ("Which colour?", "What moves?"):
            rows.append({"video": f"{colour}.mp4", "question": question, "candidates": colours, "answer": colour})
    write_json(root / "MVBench" / "json" / "moving_count.json", rows)
    write_json(root / "MVBench" / "json" / "moving_direction.json", [rows[0], {**rows[1], "video": "gone.mp4"}])
    return root


@pytest.fixture(scope="module")
def adapter(world: World, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = world.config(
        tmp_path_factory.mktemp("adapter") / "run.toml", {"train": {"max_steps": 3, "learning_rate": 0.01}}
    )
    return commands.train(config) / "adapter"


def words(world: World, root: Path, output: Path, *more: object) -> list[object]:
    common = ["mvbench", "--model", world.base, "--root", root, "--output", output, "--workers", 0, "--frames", 4]
    return [*common, "--max-pixels", 3136, *more]


def test_base_beside_adapter(world: World, commands: Commands, tmp_path: Path, root: Path, adapter: Path) -> None:
    arguments = words(world, root, tmp_path / "out", "--adapter", adapter)
    result = commands.run(BENCHMARK, *arguments).ok()
    assert "MVBench" in result.stdout
    assert "--max-new-tokens = 16: raise it" in result.stderr
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["mvbench"]
    assert {"base", "adapter", "difference"} <= found.keys()
    count = 2 * len(ANSWERS) + 1
    for side in ("base", "adapter"):
        assert found[side]["answered"]["value"] == count and found[side]["unreadable"]["value"] == 1
        assert 0 <= found[side]["likelihood_accuracy"]["value"] <= 1
        lines = [json.loads(line) for line in (tmp_path / "out" / "mvbench" / f"{side}.jsonl").open()]
        assert len(lines) == count and all(line["choice"] in "ABCDE" for line in lines)
        tasks = [found[side][f"accuracy/task/{task}"]["value"] for task in ("moving_count", "moving_direction")]
        assert found[side]["accuracy"]["value"] == pytest.approx(sum(tasks) / 2)
    text = (tmp_path / "out" / "scores.md").read_text()
    assert "| MVBench | accuracy |" in text and "likelihood_accuracy/task/moving_count" in text


def test_an_interrupted_command_goes_on(world: World, commands: Commands, tmp_path: Path, root: Path) -> None:
    arguments = words(world, root, tmp_path / "out", "--batch-size", 2)
    commands.run(BENCHMARK, *arguments).ok()
    folder = tmp_path / "out" / "mvbench"
    kept, answers = folder / "base.answers.jsonl", folder / "base.jsonl"
    whole, scores = answers.read_bytes(), (tmp_path / "out" / "scores.json").read_bytes()
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * len(ANSWERS) + 1
    kept.write_text("".join(lines[:5]) + lines[5][:-20])  # killed while it wrote the fifth answer
    answers.unlink()
    result = commands.run(BENCHMARK, *arguments).ok()
    assert f"4 of {len(lines) - 1} questions answered before" in result.stderr
    assert answers.read_bytes() == whole and (tmp_path / "out" / "scores.json").read_bytes() == scores
    # With everything known nothing is asked, and other frames are asked anew.
    before = kept.stat().st_size
    commands.run(BENCHMARK, *arguments).ok()
    assert kept.stat().st_size == before
    result = commands.run(BENCHMARK, *arguments, "--frames", 2).ok()
    assert "answered with other settings" in result.stderr


def test_one_process_and_two(world: World, commands: Commands, tmp_path: Path, root: Path) -> None:
    outputs = [tmp_path / name for name in ("one", "two")]
    for number, output in enumerate(outputs, 1):
        for one in run_together(commands, number, BENCHMARK, *words(world, root, output)):
            one.ok()
    one, two = (json.loads((output / "scores.json").read_text())["mvbench"]["base"] for output in outputs)
    assert one == two


OWN = """
from vft.benchmarks import MultipleChoice, choice, index_of, lettered, texts_of

class Colours(MultipleChoice):
    title, page, path = "Colours", "here", "colours.json"

    def ask(self, record, place):
        options = texts_of(record["options"], "options")
        text = f"Which colour?\\n{lettered(options, '{}. {}'.format)}"
        right = index_of(record["answer"], options, "answer")
        return [choice(str(place.number), (place.video(record["video"], "video"), text), len(options), right, place)]

    def letter_of(self, text, options):
        return text[:1] or None
"""


def test_a_benchmark_of_ones_own(world: World, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    colours = list(ANSWERS)[:3]
    write_json(
        tmp_path / "data" / "colours.json", [{"video": f"{c}.mp4", "options": colours, "answer": c} for c in colours]
    )
    for colour in colours:
        shutil.copy(world.root / f"{colour}.mp4", tmp_path / "data")
    name = "own:Colours"
    arguments = [name, *words(world, tmp_path / "data", tmp_path / "out")[1:]]
    commands.run(str(REPOSITORY / BENCHMARK), *arguments, cwd=tmp_path).ok()
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert next(iter(found.values()))["base"]["answered"]["value"] == 3


def test_what_is_refused(world: World, commands: Commands, tmp_path: Path, root: Path) -> None:
    listed = commands.run(BENCHMARK).ok()
    assert "mvbench" in listed.stdout and "MVBench/json" in listed.stdout
    wrong = commands.run(BENCHMARK, "mvbnch", "--model", world.base)
    assert wrong.status == 2 and "no benchmark 'mvbnch': did you mean 'mvbench'?" in wrong.stderr
    no_model = commands.run(BENCHMARK, "mvbench", "--root", root)
    assert no_model.status == 2 and "--model" in no_model.stderr
    nothing = commands.run(
        BENCHMARK, "mvbench", "--model", world.base, "--root", tmp_path, "--output", tmp_path / "out"
    )
    assert nothing.status == 2 and "MVBench/json" in nothing.stderr and not (tmp_path / "out").exists()
