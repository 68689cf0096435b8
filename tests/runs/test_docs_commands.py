"""The commands of the documentation, run as they stand there, page by page, in a fresh shell.

What stands for the released model is the demo's small base: it lies in the hub's cache under that name. Clips and
records are where a page says that the reader has put them, and the recipes train for a few steps.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import write_json
from tests.helpers.clips import make_clip
from tests.runs.commands import REPOSITORY
from tests.runs.shell import Shell, shell_in
from tests.runs.test_docs import PAGES, PLACEHOLDER, blocks
from tests.runs.world import record
from vft.config import run as configs

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
RECIPE = "recipes/qwen2_5_vl_7b/caption.toml"
SMALL = ("README.md", "start.md")
"""Pages of which all runs here, with the small base; on the others a comment may say what a command needs."""
NEEDS = re.compile(r"#.*\b(GPUs?|hosts|the set's files)\b")
COMMAND = re.compile(r"(tools/\w+(?= |$)|python |torchrun |vft |pip |docker |podman )")
NOT_HERE = {
    "tools/test": "it is what runs this test",
    "vft app": "it serves until it is stopped (tests/runs/test_app_runs.py)",
    "pip install": "the tests' own packages shall stay as they are (tools/setup: test_demo_world.py)",
    "docker": "there is no Docker here",
    "vllm serve": "vLLM is no dependency",
}
"""Beginnings of commands that do not run here, and why."""
SMALLER = {
    RECIPE: (
        *("train.max_steps=4", "train.warmup_steps=2", "train.packs_per_step=2", "data.video.max_pixels=12544"),
        *("train.precision=fp32", "data.workers=0"),
    ),
    "recipes/demo/caption.toml": (
        *("train.max_steps=2", "train.warmup_steps=1", "eval.every_steps=0", "data.workers=0"),
    ),
}
"""Settings of recipes that would otherwise take long."""
PROMPT, ANSWERS = "Describe the video.", ("A red square.", "A green square.", "A blue square.")
TUNED = f"--model {MODEL} --adapter runs/mine/adapter"
HELD_OUT = """'eval.sources=[{format="messages",path="val.jsonl"}]'"""
FILLED_IN = {
    "torchrun --nproc-per-node N -m vft.recipes.TASK CONFIG.toml [section.key=value ...]": [],  # in the steps above
    "vft train TASK CONFIG.toml ...": [f"vft train caption {RECIPE} output_dir=runs/other seed=1"],
    "vft predict --model MODEL [--adapter DIR] [--prompt TEXT] [--json] [--output FILE] [--table FILE.csv] "
    "[--columns NAME=KEY,...] [--segments SECONDS] VIDEO...": [
        f"vft predict {TUNED} --prompt 'What moves?' --json --segments 30 lecture.mp4",
        f"vft predict {TUNED} --columns video=clip,question=ask --output rows.jsonl --table rows.csv data/rows.csv",
    ],
    "vft chat --model MODEL [--adapter DIR] [CLIP...]": [f"echo 'What is it?' | vft chat {TUNED} new_clip.mp4"],
    "vft evaluate CONFIG.toml [--adapter DIR] [--compare-base]": [
        f"vft evaluate {RECIPE} --adapter runs/mine/adapter --compare-base {HELD_OUT}"
    ],
    "vft benchmark NAME... --model MODEL [--adapter DIR]": [f"vft benchmark mvbench {TUNED} --workers 0 --frames 4"],
    "vft pairs CONFIG.toml [--adapter DIR] [--samples N] [--by SCORE] [--best-only]": [
        f"vft pairs {RECIPE} --adapter runs/mine/adapter --samples 2 --by rouge_l --best-only --output pairs.jsonl "
        "eval.max_new_tokens=8"
    ],
    "vft plan CONFIG.toml --gpus N --gpu CARD [--gpu-memory-gib G] [--json]": [
        f"vft plan {RECIPE} --gpus 2 --gpu H100 --gpu-memory-gib 80 --json"
    ],
    "vft inspect CONFIG.toml --output DIR [--samples N] [--decode-all] [--forward]": [
        f"vft inspect {RECIPE} --output runs/forward --samples 2 --decode-all --forward"
    ],
    "vft app [--folder DIR]": [],
    "vft live RUN [--svg FILE]": ["vft live runs/mine --svg live.svg"],
    "vft compare RUN RUN... [--html FILE]": ["vft compare runs/mine runs/other --html both.html"],
    "vft merge --base MODEL --adapter DIR --output DIR": [],  # in the steps above
    "vft export RUN [--step N] [--output DIR]": ["vft export runs/mine --step 4 --output exported"],
    "vft download SET [--yes]": ["vft download ucf101"],  # --yes asks the hub
    "vft doctor [CONFIG.toml]": [],  # in the steps above
    "vft settings [SECTION]": ["vft settings lora"],
    "vft config import FILE [--output FILE] [--gpus N]": ["vft config import their.sh --output our.toml --gpus 2"],
    "vft new task NAME": ["vft new task count_people"],
    "vft new format NAME": ["vft new format rows"],
    "python tools/bench/NAME.py": ["python tools/bench/checkpoint.py --shape tiny --repeats 1 --steps 0 --ranks 8"],
}
"""The README's table of commands, and lines that are each of its commands with its placeholders filled in."""
MADE = (
    *(
        "answers.jsonl",
        "rows.jsonl",
        "rows.csv",
        "pairs.jsonl",
        "live.svg",
        "both.html",
        "our.toml",
        "count_people.py",
        "rows.py",
    ),
    *("exported/adapter_model.safetensors", "benchmarks/scores.json", "runs/forward/batch.safetensors"),
)


def lines_of(page: Path) -> list[str]:
    """The commands of a page's fenced blocks that run here, each with its comment."""
    lines = [line.strip() for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if COMMAND.match(line) and not PLACEHOLDER.search(line.partition("#")[0])]
    lines = [line for line in lines if not line.startswith(tuple(NOT_HERE))]
    return [line for line in lines if page.name in SMALL or not NEEDS.search(line)]


def table_of(page: Path) -> list[str]:
    """The commands in the first column of a page's tables."""
    cells = re.findall(r"^\| (`.*?`) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [span for cell in cells for span in re.findall(r"`([^`]+)`", cell) if COMMAND.match(span)]


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """The folder of somebody who has done what the pages say before their commands."""
    home = tmp_path / "checkout"
    home.mkdir()
    for name in ("tools", "pyproject.toml", "constraints.txt"):
        (home / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "recipes", home / "recipes")
    for recipe, overrides in SMALLER.items():
        (home / recipe).write_text(configs.dump(configs.load(REPOSITORY / recipe, overrides)))
    clips = [home / "data" / "clips" / f"{number}.mp4" for number in range(3)]
    for clip in (*clips, home / "new_clip.mp4", home / "new_clips" / "a.mp4", home / "clip.mp4"):
        clip.parent.mkdir(parents=True, exist_ok=True)
        make_clip(clip, range(20), fps=10, size=(64, 64))
    make_clip(home / "lecture.mp4", range(650), fps=10, size=(64, 64))
    records = [record(f"<video>{PROMPT}", answer, videos=[f"clips/{i}.mp4"]) for i, answer in enumerate(ANSWERS)]
    for name, kept in (("train.jsonl", records), ("val.jsonl", records[:1])):
        (home / "data" / name).write_text("".join(json.dumps(one) + "\n" for one in kept))
    (home / "data" / "rows.csv").write_text("clip,ask\nclips/0.mp4,What moves?\n")
    (home / "their.sh").write_text(f"swift sft --model {MODEL} --dataset data/train.jsonl\n")
    asked = {"video": "0.mp4", "question": "Which?", "candidates": ["red", "blue"], "answer": "red"}
    write_json(home / "data" / "MVBench" / "json" / "moving_count.json", [asked])
    shutil.copytree(home / "data" / "clips", home / "data" / "MVBench" / "video" / "clevrer" / "video_validation")
    return home


def fill_hub_cache(folder: Path) -> None:
    """A hub's cache in which `MODEL` is the demo's base."""
    home = folder / f"models--{MODEL.replace('/', '--')}"
    shutil.copytree(REPOSITORY / "tools" / "demo_world" / "base", home / "snapshots" / "1")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("1")


def pages() -> list[Any]:
    """Those with commands; what the slow ones run, other tests run too."""
    found = [page for page in PAGES if lines_of(page)]
    return [pytest.param(page, id=page.name, marks=() if page.name in SMALL else pytest.mark.slow) for page in found]


@pytest.mark.parametrize("page", pages())
def test_commands_run(page: Path, reader: Path, tmp_path: Path) -> None:
    """In their order, in one shell: each ends well."""
    fill_hub_cache(tmp_path / ".cache" / "huggingface" / "hub")
    lines = lines_of(page)
    if page.name not in SMALL:
        lines.insert(0, "source .venv/bin/activate")  # the pages in SMALL say so themselves
    if page.name == "start.md":
        lines = [line for line in lines if not line.startswith("tools/demo")]  # as in the README
    if page.name == "README.md":
        lines += [line for command in table_of(page) for line in FILLED_IN[command]]
    elif any(line.startswith("vft compare") for line in lines):
        lines.insert(lines.index("vft compare runs/mine runs/other"), "cp -r runs/mine runs/other")
    with shell_in(tmp_path, reader) as shell:
        done = shell.run(*lines)
        assert done.status == 0, f"{page.name}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if page.name in SMALL:
            check_outcome(reader)
        if page.name == "README.md":
            assert not [name for name in MADE if not (reader / name).is_file()]
            check_card(reader / "runs" / "mine" / "adapter" / "README.md", shell)


def check_outcome(home: Path) -> None:
    """What the pages promise is there after their commands."""
    for name in ("report.html", "config.toml", "adapter/README.md", "merged/config.json"):
        assert (home / "runs" / "mine" / name).is_file(), name
    assert (home / "runs" / "look" / "preview.html").is_file()
    answered = [json.loads(line) for line in (home / "answers.jsonl").read_text().splitlines()]
    assert answered and all("prediction" in one and "error" not in one for one in answered)


def check_card(card: Path, shell: Shell) -> None:
    """The commands and the Python of an adapter's card answer about `clip.mp4`."""
    codes = re.findall(r"^```python\n(.*?)^```", card.read_text(), re.MULTILINE | re.DOTALL)
    scripts = [code for code in codes if "transformers" not in code or importlib.util.find_spec("torchvision")]
    lines = [*lines_of(card), *(f"python - <<'EOF'\n{code}EOF" for code in scripts)]
    assert len(codes) == 2 and scripts and len(lines) > len(scripts)
    for line in lines:
        done = shell.run("source .venv/bin/activate", line)
        assert done.status == 0 and done.stdout.strip(), f"{line}\n{done.stdout}\n{done.stderr[-2000:]}"


def test_every_command_of_the_table_is_filled_in() -> None:
    """With all its options: who adds a command says above how it runs."""
    table = table_of(REPOSITORY / "README.md")
    assert set(table) == set(FILLED_IN)
    steps = lines_of(REPOSITORY / "README.md")
    for command, lines in FILLED_IN.items():
        program = " ".join(command.split()[: 3 if command.startswith("vft new") else 2]).partition("NAME")[0]
        ran = lines or [line for line in steps if line.startswith(program)]
        options = set(re.findall(r"--[a-z-]+", command)) - {"--yes"}
        if command.startswith(tuple(NOT_HERE)):
            continue
        assert ran and options <= set(re.findall(r"--[a-z-]+", " ".join(ran))), command


def test_every_exception_is_one() -> None:
    """What does not run here is still in the documentation."""
    texts = [page.read_text() for page in PAGES] + [(REPOSITORY / "vft/reporting/card.md").read_text()]
    assert all(any(begins in text for text in texts) for begins in NOT_HERE)
