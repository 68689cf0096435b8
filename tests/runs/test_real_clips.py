"""Real clips, the whole way, once for each family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w

from tests.runs.commands import Commands, metrics

if TYPE_CHECKING:
    from tests.helpers import Tiny

QUESTIONS = {
    "1.mp4": ("Why is this video funny?", "Because a baby is reading, and he is so cute!"),
    "2.avi": ("What is she doing?", "She is cooking."),
    "3.mp4": ("What's in the video?", "A baby is playing in the living room."),
}


def assert_learnt_by_heart(
    model: Path, videos: Path, commands: Commands, folder: Path, train: dict[str, Any], lora: dict[str, Any]
) -> None:
    """A short run ends with a loss below 0.05, and then the model answers word for word."""
    config = folder / "real.toml"
    table = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "lora": lora,
        "data": {
            "root": str(videos),
            "sources": [{"format": "messages", "path": "mllm_video_demo.json"}],
            "pack_tokens": 1024,
            "workers": 1,
            "cache": "frames",
            "cache_dir": str(folder / "cache"),
            "video": {"frames": 8, "max_pixels": 25088},
        },
        "train": {"packs_per_step": 2, "schedule": "linear", "precision": "fp32", **train},
    }
    config.write_text(tomli_w.dumps(table))
    commands.torchrun(1, config).ok()
    assert metrics(folder / "run")[-1]["loss"] < 0.05
    for name, (question, answer) in QUESTIONS.items():
        arguments = ("--model", model, "--adapter", folder / "run" / "adapter", "--prompt", question, "--json")
        clip = videos / "mllm_demo_data" / name
        line = json.loads(commands.run("tools/predict.py", *arguments, clip).ok().stdout)
        assert line == {"video": str(clip), "prompt": question, "prediction": answer}


def test_three_real_clips_are_learnt_by_heart(
    reference: Path, videos: Path, commands: Commands, tmp_path: Path
) -> None:
    train = {"max_steps": 25, "learning_rate": 5e-3}
    assert_learnt_by_heart(reference / "qwen2_5_vl_tiny", videos, commands, tmp_path, train, {"rank": 16, "alpha": 32})


@pytest.mark.parametrize("family", ["llava_next_video", "llava_next_video_mistral", "qwen3_vl"])
def test_by_models_of_other_families(
    family: str, make_tiny: Callable[[str, str], Tiny], videos: Path, commands: Commands, tmp_path: Path
) -> None:
    """Random weights: the head has to learn, too, for its logits are too small to be sure of anything."""
    lora = {"rank": 16, "alpha": 32, "targets": ["language_model.*", "language_model.lm_head"]}
    model = make_tiny(family, "untied").path
    assert_learnt_by_heart(model, videos, commands, tmp_path, {"max_steps": 40, "learning_rate": 1e-2}, lora)


@pytest.mark.slow
def test_every_real_clip_can_be_asked_about(reference: Path, videos: Path, commands: Commands) -> None:
    clips = sorted(path for path in videos.rglob("*") if path.suffix in (".mp4", ".avi", ".mkv", ".jpg"))
    assert len(clips) > 10
    model = ("--model", reference / "qwen2_5_vl_tiny", "--frames", 4, "--max-pixels", 25088, "--max-new-tokens", 2)
    result = commands.run("tools/predict.py", *model, "--json", *clips).ok()
    assert [json.loads(line)["video"] for line in result.stdout.splitlines()] == [str(clip) for clip in clips]
