"""Real clips, the whole way, once for each family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w

from tests.models.qwen3_vl import save_checkpoint
from tests.runs.commands import Commands, metrics

QUESTIONS = {
    "1.mp4": ("Why is this video funny?", "Because a baby is reading, and he is so cute!"),
    "2.avi": ("What is she doing?", "She is cooking."),
    "3.mp4": ("What's in the video?", "A baby is playing in the living room."),
}


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def model(request: pytest.FixtureRequest, reference: Path, tmp_path: Path) -> Path:
    """The reference checkpoint, and a random one of each other family."""
    if request.param == "qwen2_5_vl":
        return reference / "qwen2_5_vl_tiny"
    return save_checkpoint(tmp_path / "base")


def test_three_real_clips_are_learnt_by_heart(model: Path, videos: Path, commands: Commands, tmp_path: Path) -> None:
    config = tmp_path / "real.toml"
    table = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "lora": {"rank": 16, "alpha": 32},
        "data": {
            "root": str(videos),
            "sources": [{"format": "messages", "path": "mllm_video_demo.json"}],
            "pack_tokens": 1024,
            "workers": 1,
            "video": {"frames": 8, "max_pixels": 25088},
        },
        "train": {
            "max_steps": 25,
            "packs_per_step": 2,
            "learning_rate": 5e-3,
            "schedule": "linear",
            "precision": "fp32",
        },
    }
    config.write_text(tomli_w.dumps(table))
    commands.torchrun(1, config).ok()
    assert metrics(tmp_path / "run")[-1]["loss"] < 0.05
    for name, (question, answer) in QUESTIONS.items():
        arguments = ("--model", model, "--adapter", tmp_path / "run" / "adapter", "--prompt", question, "--json")
        clip = videos / "mllm_demo_data" / name
        line = json.loads(commands.run("tools/predict.py", *arguments, clip).ok().stdout)
        assert line == {"video": str(clip), "prompt": question, "prediction": answer}


@pytest.mark.slow
def test_every_real_clip_can_be_asked_about(reference: Path, videos: Path, commands: Commands) -> None:
    clips = sorted(path for path in videos.rglob("*") if path.suffix in (".mp4", ".avi", ".mkv", ".jpg"))
    assert len(clips) > 10
    model = ("--model", reference / "qwen2_5_vl_tiny", "--frames", 4, "--max-pixels", 25088, "--max-new-tokens", 2)
    result = commands.run("tools/predict.py", *model, "--json", *clips).ok()
    assert [json.loads(line)["video"] for line in result.stdout.splitlines()] == [str(clip) for clip in clips]
