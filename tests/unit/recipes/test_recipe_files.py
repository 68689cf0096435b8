"""The shipped configurations: each loads, says its task, and reads what the readers can read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vft.config import run as config
from vft.data import formats

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
TASKS = ("caption", "qa", "classify", "summarize", "story")
GROUND = ("qwen2_5_vl_7b", "qwen3_vl_8b")
"""Models with a recipe for when things happen."""
STREAMED = [path for path in RECIPES if path.stem in ("caption_llava_video_178k", "caption_pe_video")]
CAPTIONS = [path for path in RECIPES if path.name == "caption.toml" and path.parent.name != "demo"] + STREAMED
HUB_NAMES = {
    "qwen2_5_vl_7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen2_5_vl_72b": "Qwen/Qwen2.5-VL-72B-Instruct",
    "llava_next_video_7b": "llava-hf/LLaVA-NeXT-Video-7B-hf",
    "qwen3_vl_8b": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3_vl_30b_a3b": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    **{f"qwen3_5_{size.lower()}": f"Qwen/Qwen3.5-{size}" for size in ("2B", "4B", "9B", "27B")},
}


def name(path: Path) -> str:
    return path.relative_to(ROOT / "recipes").as_posix()


@pytest.mark.parametrize(
    ("task", "model"),
    [*((task, model) for task in TASKS for model in HUB_NAMES), *(("ground", model) for model in GROUND)],
)
def test_every_task_has_one_for_each_size(model: str, task: str) -> None:
    recipe = config.load(ROOT / "recipes" / model / f"{task}.toml")
    assert recipe.model.path == HUB_NAMES[model]
    assert recipe.train.precision == "bf16" and recipe.train.packs_per_step % 8 == 0
    assert recipe.parallel == config.ParallelConfig()  # what fits the GPUs at hand is found at the start


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe(path: Path, tmp_path: Path) -> None:
    recipe = config.load(path)
    recipe.require_training()
    (tmp_path / "again.toml").write_text(config.dump(recipe))
    assert config.load(tmp_path / "again.toml") == recipe
    assert recipe.task in (*TASKS, "ground")
    if not path.stem.startswith("pretrain") and path.parent.name != "image_then_video":
        assert path.stem.partition("_")[0] == recipe.task
    assert {source.format for source in (*recipe.data.sources, *recipe.eval.sources)} <= set(formats.names())
    text = path.read_text(encoding="utf-8")
    assert all(len(line) <= 120 for line in text.splitlines())
    for example in re.findall(r"for example `(train\.[^`]*)`", text):
        config.load(path, example.split())  # what a recipe proposes is not refused


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name != "demo"], ids=name)
def test_no_two_runs_share_a_folder_and_the_command_is_right(path: Path) -> None:
    recipe = config.load(path)
    assert recipe.output_dir == Path("runs") / name(path).removesuffix(".toml")
    assert f"-m vft.recipes.{recipe.task} recipes/{name(path)}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CAPTIONS, ids=name)
def test_captions(path: Path) -> None:
    recipe = config.load(path)
    lora, train, video = recipe.lora, recipe.train, recipe.data.video
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32.0, 0.05)
    attention = tuple(f"language_model.{name}_proj" for name in "qkvo")
    # Most layers of Qwen3.5 have no attention.
    assert lora.targets == (("language_model.*",) if "qwen3_5" in path.parent.name else attention)
    assert train.learning_rate == 2e-4
    assert (recipe.data.max_samples_per_pack, train.packs_per_step) == (1, 16)
    assert (train.warmup_steps, train.max_steps, train.epochs) == (50, 500, None)
    assert (recipe.checkpoint.every_steps, recipe.log.every_steps) == (50, 10)
    assert train.precision == "bf16"
    assert (video.frames, video.fps) == (8, None) and train.schedule == "linear"


def test_streams_are_read_from_the_hub() -> None:
    assert len(STREAMED) == 4  # both sizes stream both sets
    for path in STREAMED:
        (source,) = config.load(path).data.sources
        assert source.stream and source.path.startswith("hf://datasets/"), path


@pytest.mark.parametrize("path", [path for path in RECIPES if "demo" not in path.parts], ids=name)
def test_the_other_tasks_keep_to_the_defaults(path: Path) -> None:
    recipe = config.load(path)
    if path in CAPTIONS:
        return
    assert recipe.lora is not None and not recipe.model.train
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (16, 32.0, ("language_model.*",))
    rate = 5e-5 if "72B" in recipe.model.path else 1e-4
    assert recipe.train.learning_rate == pytest.approx(rate if recipe.objective is None else rate / 10)
    assert (recipe.train.epochs, recipe.train.schedule) == (1, "cosine")
    if path.parent.name.startswith("llava_next_video"):
        # Trained at a fixed count; 144 tokens a frame and some 1,000 of text in 4,096 positions.
        assert recipe.data.video.frames is not None and 144 * recipe.data.video.frames + 1000 <= 4096
        return
    side = 32 if "Qwen3" in recipe.model.path else 28  # of one token's square of pixels
    assert recipe.data.video.max_pixels == 128 * side**2
    if recipe.task not in ("summarize", "ground"):
        assert recipe.data.video.fps == 2.0 and recipe.data.video.max_frames <= 32


def test_the_second_step_goes_on_from_the_first() -> None:
    folder = ROOT / "recipes" / "qwen2_5_vl_7b" / "image_then_video"
    pictures, video = config.load(folder / "1_pictures.toml"), config.load(folder / "2_video.toml")
    assert video.model.adapter == str(pictures.output_dir / "adapter")
    assert video.lora == pictures.lora and video.model.path == pictures.model.path
