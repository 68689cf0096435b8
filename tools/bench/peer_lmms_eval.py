#!/usr/bin/env python
"""vft's figures beside lmms-eval's: python tools/bench/peer_lmms_eval.py --model MERGED [--lmms-python PYTHON]

Both sides ask a merged model (`vft merge`) of the Qwen2.5-VL family the same questions with options about the demo's
held-out clips, in MVBench's layout. lmms-eval takes its own model class and its own task `mvbench_moving_attribute`,
of which only the place of the data is another; vft is `vft benchmark mvbench`. Both load the weights in bf16, on the
CPU, and are given the same number of frames and limits of pixels. Nothing is downloaded.

Printed are both accuracies and every text that differs. The exit status is 1 if the accuracies do.

lmms-eval needs packages that vft does without, so --lmms-python may name another environment's Python. It reads the
model from a folder of links in which `do_sample_frames` is false: it chooses the frames itself, and its call of the
processor would choose among them once more. Where torchvision is there, but its compiled part can't be loaded (a build
for CUDA beside a torch for CPUs), the two operators that it registers when it is imported are declared; its Python
parts, which resize with torch's own functions, are used as they are.

transformers 5 begins the text after a video at start + max(height, width) in tokens, even where the video's time
reached further; the released model was trained with the next free position, as vft has it. --released-positions
corrects this on lmms-eval's side, in the tool alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import in_venv  # noqa: F401

# Found by Python as the demo's own scripts find each other.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo_world"))

from make_data import KINDS, Clip, render_all
from measure import benchmark, report, show_table
from words import questions

from vft.benchmarks.mvbench import FOLDERS
from vft.common.errors import UserError

TASK = "moving_attribute"
"""Of MVBench: one whose videos are whole."""
OWN_TASK = "vft_mvbench"
MOST_OPTIONS = 5
"""MVBench's rule knows the letters A to E."""
MIN_PIXELS = 3136
"""Least height x width of a frame: the setting that vft trains with unless told otherwise."""
START = """
import runpy, sys, torch
try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
RELEASED_POSITIONS = """
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
numbered = Qwen2_5_VLModel.get_rope_index
def get_rope_index(self, input_ids, **given):
    positions, deltas = numbered(self, input_ids, **given)
    for row, types in enumerate(given["mm_token_type_ids"]):
        for end in (1 + ((types[:-1] == 2) & (types[1:] != 2)).nonzero().flatten()).tolist():
            late = positions[:, row, :end].max() + 1 - positions[0, row, end]
            positions[:, row, end:] += late
            deltas[row] += late
    return positions, deltas
Qwen2_5_VLModel.get_rope_index = get_rope_index
"""
RUN = 'runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)'
Row = dict[str, Any]


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_arguments, repeats=1) as (options, folder):
        if not options.model.is_dir():
            raise UserError(f"--model {options.model}: no such folder; vft merge writes one, and tools/demo --task qa")
        tasks = find_tasks(options.lmms_python)
        if tasks is None:
            print(f"skipped: {options.lmms_python} has no lmms_eval; docs/use/lmms_eval.md says how to install it")
            return
        rows = write_questions(folder, options.questions)
        ours, theirs = ask_vft(options, folder), ask_lmms_eval(options, folder, tasks)
        sys.exit(compare(options, rows, ours, theirs))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--model", type=Path, required=True, help="a merged model, such as runs/demo/merged/qa")
    parser.add_argument("--lmms-python", default=sys.executable, help="Python of the environment that has lmms-eval")
    parser.add_argument("--lmms-model", default="qwen2_5_vl", help="its class of the model (qwen2_5_vl)")
    parser.add_argument("--force-simple", action="store_true", help="its older class of that name, without a template")
    parser.add_argument("--questions", type=int, default=20, help="each about a clip of its own (20)")
    parser.add_argument("--frames", type=int, default=4, help="of each clip's 16 (4)")
    parser.add_argument("--max-pixels", type=int, default=7056, help="most height x width (7056: 84 x 84, as rendered)")
    parser.add_argument("--released-positions", action="store_true", help="correct the positions of transformers 5")


def write_questions(folder: Path, count: int) -> list[Row]:
    """MVBench's layout in `folder`: clips and a question about each, on its attributes in turn."""
    clips: list[Clip] = []
    rows: list[Row] = []
    for clip in KINDS["qa"].clips("held_out", 4 * count):
        question, options, right = questions(clip.scenes[0])[len(rows) % 4]
        if right in options[:MOST_OPTIONS] and len(rows) < count:
            name = Path(clip.file).name
            clips.append(clip)
            rows.append({"video": name, "question": question, "candidates": options[:MOST_OPTIONS], "answer": right})
    render_all(clips, folder / "clips", processes=1)
    videos = folder / "MVBench" / "video" / FOLDERS[TASK][0]
    videos.parent.mkdir(parents=True)
    videos.symlink_to((folder / "clips" / clips[0].file).parent)
    questions_file = folder / "MVBench" / "json" / f"{TASK}.json"
    questions_file.parent.mkdir()
    questions_file.write_text(json.dumps(rows))
    return rows


# ------------------------------------------------------------------------------------------------------------ sides


def ask_vft(options: argparse.Namespace, folder: Path) -> tuple[float, list[str]]:
    """Accuracy, 0 to 1, and texts of `vft benchmark`."""
    output = folder / "vft"
    tool = Path(__file__).parents[1] / "benchmark.py"
    words = ["mvbench", "--model", options.model, "--root", folder, "--output", output, "--precision", "bf16"]
    words += ["--frames", options.frames, "--max-pixels", options.max_pixels, "--workers", 0, "--batch-size", 1]
    run([sys.executable, tool, *words], os.environ)
    scores = json.loads((output / "scores.json").read_text())["mvbench"]["base"]
    lines = [json.loads(line) for line in (output / "mvbench" / "base.jsonl").read_text().splitlines()]
    return scores["accuracy"]["value"], [line["prediction"] for line in lines]


def ask_lmms_eval(options: argparse.Namespace, folder: Path, tasks: Path) -> tuple[float, list[str]]:
    """Accuracy, 0 to 1, and texts of lmms-eval."""
    home, own, output = folder / "hf", folder / "tasks", folder / "lmms_eval"
    for made in (home, own):
        made.mkdir()
    (home / "mvbench_video").symlink_to(folder / "MVBench" / "video")  # where its task looks for videos
    task = {
        "include": str(tasks / "mvbench" / f"mvbench_{TASK}.yaml"),
        "task": OWN_TASK,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"train": str(folder / "MVBench" / "json" / f"{TASK}.json")}},
    }
    (own / f"{OWN_TASK}.yaml").write_text(json.dumps(task))  # JSON is YAML
    model = without_sampling(options.model, folder / "model")
    pixels = f"min_pixels={MIN_PIXELS},max_pixels={options.max_pixels},max_num_frames={options.frames}"
    words = ["--model", options.lmms_model, "--model_args", f"pretrained={model},device_map=cpu,device=cpu,{pixels}"]
    words += ["--tasks", OWN_TASK, "--include_path", own, "--batch_size", 1, "--log_samples", "--output_path", output]
    words += ["--force_simple"] * options.force_simple
    code = START + RELEASED_POSITIONS * options.released_positions + RUN
    run([options.lmms_python, "-c", code, *words], {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"})
    results, samples = (next(output.rglob(f"*_{name}")) for name in ("results.json", f"samples_{OWN_TASK}.jsonl"))
    accuracy = json.loads(results.read_text())["results"][OWN_TASK]["mvbench_accuracy,none"]
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: int(line["doc_id"]))
    return accuracy / 100, [line["mvbench_accuracy"]["pred_answer"] for line in lines]


def find_tasks(python: str) -> Path | None:
    """The folder of lmms-eval's tasks in an environment; None where it is not installed."""
    ask = "import importlib.util as u; print(u.find_spec('lmms_eval').submodule_search_locations[0])"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(done.stdout.strip()) / "tasks"


def without_sampling(model: Path, folder: Path) -> Path:
    """`folder` with links to the model's files, but settings by which the processor takes the frames it is given."""
    folder.mkdir()
    for file in model.resolve().iterdir():
        if file.name.endswith("processor_config.json"):
            content = re.sub(r'"do_sample_frames": *true', '"do_sample_frames": false', file.read_text())
            (folder / file.name).write_text(content)
        else:
            (folder / file.name).symlink_to(file)
    return folder


def run(command: Sequence[object], environment: Any) -> None:
    """A command to its end. UserError, with its last message, if it fails."""
    done = subprocess.run(
        list(map(str, command)), env={**environment, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    failed = re.search("Error during evaluation.*", done.stdout + done.stderr)  # after which lmms-eval exits with 0
    if done.returncode or failed:
        raise UserError(failed[0] if failed else f"{command[1]:.40}: {done.stderr.strip()[-1000:]}")


def compare(
    options: argparse.Namespace, rows: Sequence[Row], ours: tuple[float, list[str]], theirs: tuple[float, list[str]]
) -> int:
    """Print what is equal and what is not, but for spaces at the ends, which lmms-eval takes away; the exit status."""
    texts = [
        {"question": row["question"], "right": row["answer"], "vft": a.strip(), "lmms-eval": b.strip()}
        for row, a, b in zip(rows, ours[1], theirs[1], strict=True)
    ]
    unequal = [line for line in texts if line["vft"] != line["lmms-eval"]]
    if unequal:
        show_table("texts that differ", unequal)
    sides = [{"side": "vft", "accuracy": ours[0]}, {"side": "lmms-eval", "accuracy": theirs[0]}]
    report(f"{len(rows) - len(unequal)} of {len(rows)} texts are equal", sides, options, texts=texts)
    return int(ours[0] != theirs[0])


if __name__ == "__main__":
    main()
