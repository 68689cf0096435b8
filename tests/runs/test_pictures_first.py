"""Pictures first, then video: what an adapter learnt from pictures is a head start on videos."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from vft.metrics import mean_interval

REPOSITORY = Path(__file__).parents[2]
RECIPES = "recipes/demo/image_then_video"
STEPS = 10
"""Of training on videos."""
SEEDS = 3


@pytest.mark.slow
def test_a_head_start(tmp_path: Path) -> None:
    """After as many steps on videos, for every seed, captions are better than those of fresh matrices."""
    for kind in ("pictures", "captions"):
        run("tools/demo_world/make_data.py", kind, str(tmp_path / kind))
    gains: list[float] = []
    for seed in range(SEEDS):
        pictures, after, fresh = (tmp_path / f"{name}-{seed}" for name in ("pictures", "after", "fresh"))
        common = [f"seed={seed}", "eval.every_steps=0", "train.warmup_steps=5"]
        caption(f"{RECIPES}/1_pictures.toml", tmp_path / "pictures", pictures, *common)
        for folder, adapter in ((after, f"{pictures}/adapter"), (fresh, "")):
            short = [*common[:2], f"train.max_steps={STEPS}", f"model.adapter={adapter}"]
            caption(f"{RECIPES}/2_video.toml", tmp_path / "captions", folder, *short)
        scores = {folder: evaluated(tmp_path / "captions", folder) for folder in (after, fresh)}
        print(
            f"seed {seed}: CIDEr-D after {STEPS} steps: {scores[after]:.3f} after pictures, {scores[fresh]:.3f} alone"
        )
        gains.append(scores[after] - scores[fresh])
    interval = mean_interval(gains)
    print(f"gain {statistics.mean(gains):.3f} [{interval.low:.3f}, {interval.high:.3f}] over {SEEDS} seeds")
    assert min(gains) > 0


def caption(config: str, root: Path, output: Path, *settings: str) -> None:
    run("-m", "vft.recipes.caption", config, f"data.root={root}", f"output_dir={output}", *settings)


def evaluated(root: Path, run_folder: Path) -> float:
    """CIDEr-D on held-out clips."""
    overrides = [f"data.root={root}", f"output_dir={run_folder}", "model.adapter="]
    run("tools/evaluate.py", f"{RECIPES}/2_video.toml", *overrides, "--adapter", str(run_folder / "adapter"))
    scores = json.loads((run_folder / "predictions" / "scores.json").read_text())
    return float(scores["adapter"]["cider_d"]["value"])


def run(*arguments: str) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VFT_CACHE": "runs/demo/cache", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
