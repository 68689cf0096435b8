"""The demo's world and the base model that ships with it."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import make_data
import pytest
import torch
import words
import world

from vft.common.types import MediaRef
from vft.config import run as configs
from vft.data import formats as sources

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "tools" / "demo_world"


RECIPES = sorted((ROOT / "recipes" / "demo").rglob("*.toml"))
DATA = {
    "captions": "demo",
    "qa": "demo_qa",
    "actions": "demo_actions",
    "scenes": "demo_scenes",
    "pictures": "demo_pictures",
    "moments": "demo_moments",
    "tags": "demo_pretrain",
    "scene_tags": "demo_pretrain_scenes",
}
"""Folder of each data set, as the recipes name it."""
CLIPS = 7
"""Of each split: more than there are motions, so that no action lacks a clip."""


def test_held_out_combinations_are_new_but_their_pairs_are_not() -> None:
    train, held_out = world.all_scenes(held_out=False), world.all_scenes(held_out=True)
    triples = [{(s.color, s.shape, s.motion) for s in scenes} for scenes in (train, held_out)]
    assert not triples[0] & triples[1] and len(triples[1]) * 6 == len(triples[0]) + len(triples[1])
    for first, second in itertools.combinations(range(3), 2):
        seen = {(triple[first], triple[second]) for triple in triples[0]}
        assert {(triple[first], triple[second]) for triple in triples[1]} <= seen


def test_pixels_depend_on_scene_and_seed_alone() -> None:
    scene = world.all_scenes(held_out=False)[17]
    frames = world.render_clip([scene], seed=(1, 2))
    assert frames.shape == (16, 3, 84, 84) and frames.dtype == "uint8"
    assert (frames == world.render_clip([scene], seed=(1, 2))).all()
    assert (frames != world.render_clip([scene], seed=(1, 3))).any()


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_figures_go_where_their_caption_says(motion: str, axis: int, sign: int) -> None:
    scene = world.Scene("red", "square", motion, "dark")
    frames_TCHW = torch.from_numpy(world.render_clip([scene], seed=5)).int()
    is_figure_THW = frames_TCHW[:, 0] - frames_TCHW[:, 2] > 100
    centres = [is_figure.nonzero().float().mean(0)[axis] for is_figure in is_figure_THW]
    assert sign * float(centres[-1] - centres[0]) > 15
    assert motion in words.captions(scene)[0] and f"motion: {motion}" in words.tags([scene])


@pytest.mark.parametrize("kind", make_data.KINDS)
def test_no_held_out_combination_is_in_a_training_clip(kind: str) -> None:
    lengths = make_data.KINDS[kind].lengths
    for held_out in (False, True):
        rows = list(make_data.choose_scenes(40, lengths, held_out, seed=1))
        assert {len(row) for row in rows} == set(lengths)
        assert all(scene.held_out == held_out for row in rows for scene in row)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set, small, in folders as the recipes name them, below `data`."""
    top = tmp_path_factory.mktemp("demo")
    for kind, name in DATA.items():
        make_data.make_data(kind, top / "data" / name, {"train": CLIPS, "held_out": CLIPS}, processes=1)
    return top


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes" / "demo")))
def test_what_is_made_is_what_the_recipes_read(made: Path, recipe: Path) -> None:
    config = configs.load(recipe)
    data = config.data.model_copy(update={"root": made / config.data.root})
    for source in (*config.data.sources, *config.eval.sources):
        samples, bad = sources.read(source, data)
        assert samples and not bad
        parts = [part for sample in samples for turn in sample.turns for part in turn.parts]
        paths = [part.path for part in parts if isinstance(part, MediaRef)]
        assert all(isinstance(path, Path) and path.is_file() for path in paths)
        assert paths or source.format == "messages"


def test_a_second_call_finds_the_work_done(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = made / "data" / DATA["pictures"]
    make_data.make_data("pictures", root, {"train": CLIPS, "held_out": CLIPS}, processes=1)
    assert "are there" in capsys.readouterr().out
    next((root / "train").iterdir()).unlink()
    make_data.make_data("pictures", root, {"train": CLIPS + 1, "held_out": CLIPS}, processes=1)
    assert len(list((root / "train").iterdir())) == CLIPS + 1


def test_the_right_option_is_among_those_offered_and_its_letter_is_the_answer(made: Path) -> None:
    folder = made / "data" / DATA["qa"] / make_data.CONFIG
    read = [json.loads((folder / f"{make_data.CONFIG}_{short}_train.json").read_text()) for short in ("mc", "oe")]
    assert len(read[0]) == len(read[1]) == 4 * CLIPS
    for choice, openly in zip(*read, strict=True):
        question, *options, request = choice["conversations"][0]["value"].removeprefix("<image>\n").splitlines()
        answer = choice["conversations"][1]["value"].removesuffix(".")
        assert answer in options and len({option[0] for option in options}) == len(options)
        assert request.startswith("Please provide your answer by stating the letter")
        assert openly["conversations"][0]["value"] == f"<image>\n{question}" and openly["video"] == choice["video"]
        assert openly["conversations"][1]["value"].lower() == f"{answer[3:]}."


@pytest.mark.parametrize("tell", [words.summary, words.story])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_summaries_and_stories_tell_every_scene_in_order(
    tell: Callable[[Sequence[world.Scene]], str], count: int
) -> None:
    scenes = next(make_data.choose_scenes(1, (count,), held_out=True, seed=count))
    text = tell(scenes)
    places = [text.index(f"{scene.color} {scene.shape}") for scene in scenes]
    assert places == sorted(places) and text.endswith(".")


def test_segments_cover_their_clip(made: Path) -> None:
    lines = (made / "data" / DATA["scenes"] / "story_held_out.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        ends = [segment["end_s"] for segment in record["segments"]]
        assert [segment["start_s"] for segment in record["segments"]] == [0.0, *ends[:-1]]
        assert ends[-1] == len(ends) * world.FRAMES_PER_SCENE / world.FRAME_RATE


def test_moments_are_where_a_clip_changes(made: Path) -> None:
    """The two spans of a clip meet at a whole second, after which its pixels are others."""
    root = made / "data" / DATA["moments"]
    records = [json.loads(line) for line in (root / "moments_held_out.jsonl").read_text().splitlines()]
    assert len(records) == 2 * CLIPS
    for first, second in zip(records[::2], records[1::2], strict=True):
        ((start, cut),), ((again, end),) = first["spans"], second["spans"]
        assert (start, end, first["video"]) == (0.0, 4.0, second["video"]) and cut == again in (1.0, 2.0, 3.0)
        frames_THWC = [
            frame.to_ndarray(format="rgb24").astype(int)
            for frame in av.open(str(root / first["video"])).decode(video=0)
        ]
        assert len(frames_THWC) == 4 * world.FRAME_RATE
        changes = [abs(a - b).mean() for a, b in itertools.pairwise(frames_THWC)]
        assert changes.index(max(changes)) + 1 == cut * world.FRAME_RATE
    assert {record["query"] for record in records} == {"the first figure", "the last figure"}


SET_UP = ("say", "fail", "logged", "tell_progress")


def test_the_demo_explains_itself_and_refuses_what_it_does_not_know() -> None:
    def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([ROOT / "tools" / "demo", *arguments], capture_output=True, text=True, timeout=20)

    assert "--all" in demo("--help").stdout
    wrong = demo("--task", "sing")
    assert wrong.returncode == 2 and "caption" in wrong.stderr


def test_set_up_is_not_silent_for_long(tmp_path: Path) -> None:
    """Its own functions, around other commands than pip."""
    text = (ROOT / "tools" / "setup").read_text()
    functions = [re.search(rf"^{name}\(\) {{(.*}}|\n[\s\S]*?^}})$", text, re.MULTILINE) for name in SET_UP]
    script = "\n".join(["set -euo pipefail", f"log={tmp_path / 'log'}", *(found[0] for found in functions if found)])

    def run(command: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", "-c", f"{script}\nlogged sh -c '{command}'; say done"]
        return subprocess.run(
            words, env={**os.environ, "PROGRESS_S": "0.1"}, capture_output=True, text=True, timeout=20
        )

    done = run("echo Downloading torch; sleep 0.5")
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("setup: ") and first.endswith(" s: Downloading torch") and last == "setup: done"
    assert done.returncode == 0 and done.stderr == ""
    done = run("echo No space left; exit 3")
    assert done.returncode == 1 and "done" not in done.stdout
    assert "No space left" in done.stderr and "setup: failed: sh -c" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("asked", "here", "packages"),
    [
        ("", {}, "--index-url {cpu} torch torchcodec"),
        ("", {"GPU": "yes"}, "torch"),
        ("", {"SLURM": "yes"}, "torch"),
        ("", {"CONFIG": "global.index-url='https://mirror.example/simple'"}, "torch"),
        ("", {"OFFLINE": "yes"}, "torch"),
        ("", {"INSTALLED": "--cpu"}, "--index-url {cpu} torch torchcodec"),
        ("--gpu", {}, "torch"),
        ("--cpu", {"GPU": "yes", "OFFLINE": "yes"}, "--index-url {cpu} torch torchcodec"),
    ],
)
def test_set_up_takes_the_torch_that_fits(tmp_path: Path, asked: str, here: dict[str, str], packages: str) -> None:
    """Its own functions, with a stand-in for Python and pip that notes what is to be installed."""
    text = (ROOT / "tools" / "setup").read_text()
    python, noted = tmp_path / "python", tmp_path / "noted"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
    *"pip config list") echo "$CONFIG" ;;
    *urllib*) [ -z "$OFFLINE" ] ;;
    *metadata*) [ -n "$INSTALLED" ] && echo "$INSTALLED" ;;
    *) echo "$@" >>{noted} ;;
esac
"""
    )
    python.chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    names = ("say", "choose_build", "installed_build", "install_packages")
    functions = [re.search(rf"^{name}\(\) {{(.*}}|\n[\s\S]*?^}})$", text, re.MULTILINE) for name in names]
    index = re.search(r"^cpu_index=(.*)$", text, re.MULTILINE)
    assert index and all(functions)
    has = {key: here.get(key, "") for key in ("GPU", "SLURM", "CONFIG", "OFFLINE", "INSTALLED")}
    script = "\n".join(
        [
            *("set -euo pipefail", f"python={python}", f"asked={asked}", "log=log", index[0]),
            f"nvidia=(no/file {python if has['GPU'] else 'no/file'})",
            *(found[0] for found in functions if found),
            'logged() { "$@"; }',
            "command() { [[ $2 == sbatch && -n $SLURM ]]; }",
            'install_packages ""',
        ]
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, **has}, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    first, second = noted.read_text().splitlines()
    pins = re.sub(r"==\S+", "", first).removeprefix("-m pip install --progress-bar off ")
    assert pins == packages.format(cpu=index[1]) and second.endswith("-e .[dev,eval,app]")


def test_the_shipped_base_is_small_and_loads_in_transformers() -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    base = FOLDER / "base"
    assert sum(path.stat().st_size for path in base.iterdir()) <= 8e6
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = words.captions(world.all_scenes(held_out=True)[0])[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
