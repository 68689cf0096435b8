"""Clips learnt by heart, the whole way, by each family: real ones, and some of the demo's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import tomli_w

from tests.runs.commands import CAPTION, Commands, metrics

if TYPE_CHECKING:
    from tests.helpers.tiny import Tiny

OTHER_FAMILIES = ("llava_next_video", "llava_next_video_mistral", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
HEAD_TOO = {"rank": 16, "alpha": 32, "targets": ["language_model.*", "language_model.lm_head"]}
"""For random weights: the head has to learn, too, for its logits are too small to be sure of anything."""


class Clip(NamedTuple):
    """What is asked of a clip, and answered."""

    path: Path
    prompt: str
    answer: str


def real_clips(videos: Path) -> list[Clip]:
    folder = videos / "mllm_demo_data"
    return [
        Clip(folder / "1.mp4", "Why is this video funny?", "Because a baby is reading, and he is so cute!"),
        Clip(folder / "2.avi", "What is she doing?", "She is cooking."),
        Clip(folder / "3.mp4", "What's in the video?", "A baby is playing in the living room."),
    ]


@pytest.fixture(scope="module")
def demo_world(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> tuple[Path, list[Clip]]:
    """A folder with three captioned clips of the demo's world, and what they say."""
    root = tmp_path_factory.mktemp("demo_world")
    counts = ("--train", 3, "--held-out", 1, "--processes", 1)
    commands.run("tools/demo_world/make_data.py", "captions", root, *counts).ok()
    clips = []
    for record in json.loads((root / DEMO_RECORDS).read_text()):
        prompt, answer = (turn["value"] for turn in record["conversations"])
        clips.append(Clip(root / DEMO_RECORDS.parent / record["video"], prompt.removeprefix("<image>\n"), answer))
    assert len({clip.answer for clip in clips}) == 3
    return root, clips


DEMO_RECORDS = Path("0_30_s_demo/0_30_s_demo_cap_train.json")


def assert_learnt_by_heart(
    model: Path,
    clips: Sequence[Clip],
    data: dict[str, Any],
    commands: Commands,
    folder: Path,
    *,
    lora: dict[str, Any],
    **train: Any,
) -> None:
    """A short run ends with a loss below 0.05, and then the model answers word for word."""
    config = folder / "learn.toml"
    common = {"pack_tokens": 1024, "workers": 1, "cache": "frames", "cache_dir": str(folder / "cache")}
    table = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "lora": lora,
        "data": {**common, "video": {"frames": 8, "max_pixels": 25088}, **data},
        "train": {"packs_per_step": 2, "schedule": "linear", "precision": "fp32", **train},
    }
    config.write_text(tomli_w.dumps(table))
    commands.run(CAPTION, config).ok()
    loss = metrics(folder / "run")[-1]["loss"]
    print(f"loss {loss:.2g}")
    assert loss < 0.05
    for clip, prompt, answer in clips:
        arguments = ("--model", model, "--adapter", folder / "run" / "adapter", "--prompt", prompt, "--json")
        line = json.loads(commands.run("tools/predict.py", *arguments, clip).ok().stdout)
        assert line == {"video": str(clip), "prompt": prompt, "prediction": answer}


def of_messages(videos: Path) -> dict[str, Any]:
    return {"root": str(videos), "sources": [{"format": "messages", "path": "mllm_video_demo.json"}]}


def test_three_real_clips_are_learnt_by_heart(
    reference: Path, videos: Path, commands: Commands, tmp_path: Path
) -> None:
    model, lora = reference / "qwen2_5_vl_tiny", {"rank": 16, "alpha": 32}
    clips, data = real_clips(videos), of_messages(videos)
    assert_learnt_by_heart(model, clips, data, commands, tmp_path, lora=lora, max_steps=25, learning_rate=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_by_models_of_other_families(
    family: str, make_tiny: Callable[[str, str], Tiny], videos: Path, commands: Commands, tmp_path: Path
) -> None:
    model, clips, data = make_tiny(family, "untied").path, real_clips(videos), of_messages(videos)
    assert_learnt_by_heart(model, clips, data, commands, tmp_path, lora=HEAD_TOO, max_steps=40, learning_rate=1e-2)


@pytest.mark.slow
def test_the_demo_s_world_is_learnt_by_every_family(
    each_untied: Tiny, demo_world: tuple[Path, list[Clip]], commands: Commands, tmp_path: Path
) -> None:
    root, clips = demo_world
    data = {"root": str(root), "sources": [{"format": "llava_video", "path": str(DEMO_RECORDS)}]}
    data["video"] = {"frames": 4, "max_pixels": 25088}
    model = each_untied.path
    assert_learnt_by_heart(model, clips, data, commands, tmp_path, lora=HEAD_TOO, max_steps=60, learning_rate=1e-2)


@pytest.mark.slow
def test_every_real_clip_can_be_asked_about(reference: Path, videos: Path, commands: Commands) -> None:
    clips = sorted(path for path in videos.rglob("*") if path.suffix in (".mp4", ".avi", ".mkv", ".jpg"))
    assert len(clips) > 10
    model = ("--model", reference / "qwen2_5_vl_tiny", "--frames", 4, "--max-pixels", 25088, "--max-new-tokens", 2)
    result = commands.run("tools/predict.py", *model, "--json", *clips).ok()
    assert [json.loads(line)["video"] for line in result.stdout.splitlines()] == [str(clip) for clip in clips]
