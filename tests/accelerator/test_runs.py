"""Whole runs on the pretend device give what they give on the CPU, and wait for it no more often than is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.accelerator.conftest import Pretend, PretendRun
from tests.runs.commands import CAPTION, Commands, column, largest_difference, metrics
from tests.runs.world import FULL_TUNING, MIXED, VISION_LORA, World, make_world

# Damped, as AdamW would make a whole step of a gradient that is rounding alone.
STEPS: dict[str, Any] = {"train": {"max_steps": 4, "eps": 1e-3}, "checkpoint": {"every_steps": 2, "keep_last": 0}}
IN_A_STEP = {"training.trainer:Trainer.train_step": 1}
"""Waits of a step from the second on: for its loss and the norm of its gradients, together."""


@pytest.fixture(
    scope="module", params=["qwen2_5_vl", "llava_next_video", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]
)
def each_world(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world with a model of each family."""
    family = request.param
    return world if world.family == family else make_world(tmp_path_factory.mktemp(family), family)


def classes(world: World, folder: Path) -> dict[str, Any]:
    """Settings of a classification that evaluates: generated answers, and the likelihood of each label."""
    for clip in world.root.glob("*.mp4"):
        (folder / "classes" / clip.stem).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder / "classes" / clip.stem)
    source = {"format": "folders", "path": "classes"}
    evaluated = {"every_steps": 4, "at_start": False, "max_new_tokens": 6}
    return {"data": {"root": str(folder), "sources": [source]}, "eval": evaluated}


def waits_of_steps(run: PretendRun) -> dict[str, int]:
    """Most waits of a step from the second on, by place."""
    most: dict[str, int] = {}
    for step in (2, 3, 4):
        places: dict[str, int] = {}
        for name, count in run.waits(f"step-{step:06d}").items():
            place = name.partition(": ")[0]
            places[place] = places.get(place, 0) + count
        most = {place: max(most.get(place, 0), places.get(place, 0)) for place in most | places}
    return most


def same(one: Path, other: Path) -> None:
    """Losses, and what was trained, within rounding."""
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (one, other)]
    assert len(losses[0]) == 4 and largest_difference(*losses) <= 1e-6
    for file in (*one.glob("adapter/*.safetensors"), *one.glob("model/*.safetensors")):
        weights, others = load_file(file), load_file(other / file.relative_to(one))
        assert weights.keys() == others.keys()
        for name, values in weights.items():
            torch.testing.assert_close(values.float(), others[name].float(), rtol=1e-4, atol=1e-6, msg=name)


def test_every_family_trains_answers_saves_and_resumes(
    each_world: World, commands: Commands, pretend: Pretend, tmp_path: Path
) -> None:
    settings = classes(each_world, tmp_path)
    here, there = (each_world.config(tmp_path / name / "run.toml", settings, STEPS) for name in ("cpu", "device"))
    commands.run("vft.recipes.classify", here).ok()
    run = pretend("vft.recipes.classify", there)
    run.result.ok()
    cpu, device = here.with_suffix(""), there.with_suffix("")
    same(cpu, device)
    rows = [[json.loads(line) for line in (f / "predictions/step-000004.jsonl").open()] for f in (cpu, device)]
    for right, found in zip(*rows, strict=True):
        assert found["prediction"] == right["prediction"]
        assert found["option_scores"] == pytest.approx(right["option_scores"], rel=1e-5)
    assert waits_of_steps(run) == IN_A_STEP
    assert "preparation.memory:memory_preflight: synchronize" in run.waits()  # its seconds are the device's

    written = (device / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(device / "checkpoints/step-000004")
    shutil.rmtree(device / "adapter")
    again = pretend("vft.recipes.classify", there)
    assert "going on from" in again.result.ok().stderr
    assert (device / "adapter/adapter_model.safetensors").read_bytes() == written


VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "full": (FULL_TUNING,),
    "vision": (MIXED, VISION_LORA, {"lora": {"dropout": 0.05}}),
    "dora": ({"lora": {"dora": True}},),
    "pissa": ({"lora": {"init": "pissa"}},),
    "nf4": ({"model": {"quantize": "nf4"}},),
    "mlp": ({"parallel": {"activation_checkpointing": "mlp"}},),
    "selective": ({"parallel": {"activation_checkpointing": "selective"}},),
    "offload": ({"parallel": {"offload": "frozen"}},),
    "recomputed": ({"parallel": {"activation_checkpointing": "full"}},),
}


HALF: dict[str, Any] = {"train": {"precision": "bf16"}, "parallel": {"compile": False}}


@pytest.mark.parametrize("kind", [pytest.param("exact", marks=pytest.mark.slow), "nan"])
def test_recurrent_layers_by_fla(pretend: Pretend, tmp_path: Path, kind: str) -> None:
    """They give what the plain form gives, without a further wait. If they give NaN, the plain form is used."""
    world, losses = make_world(tmp_path / "world", "qwen3_5"), []
    for name, words in (("fla", ("--fla", kind)), ("plain", ())):
        config = world.config(tmp_path / name / "run.toml", STEPS, HALF)
        run = pretend(*words, CAPTION, config)
        said = "fla's gated delta rule gives other" in run.result.ok().stderr
        assert said == (name == "fla" and kind == "nan")
        losses.append(column(config.with_suffix(""), "loss"))
        assert waits_of_steps(run) == IN_A_STEP
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert (losses[0] == losses[1]) == (kind == "nan")


OFTEN = ("full", "pissa", "nf4", "offload", "recomputed")
"""Variants that always run."""


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in VARIANTS]
)
def test_variants(world: World, commands: Commands, pretend: Pretend, tmp_path: Path, variant: str) -> None:
    here, there = (world.config(tmp_path / name / "run.toml", STEPS, *VARIANTS[variant]) for name in ("cpu", "device"))
    commands.run(CAPTION, here).ok()
    run = pretend(CAPTION, there)
    run.result.ok()
    same(here.with_suffix(""), there.with_suffix(""))
    assert waits_of_steps(run) == IN_A_STEP


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["nf4", "offload"])
def test_variants_of_every_family(
    each_world: World, commands: Commands, pretend: Pretend, tmp_path: Path, variant: str
) -> None:
    test_variants(each_world, commands, pretend, tmp_path, variant)


def test_a_token_of_an_answer_waits_once(world: World, pretend: Pretend, tmp_path: Path) -> None:
    """For the token itself: two answers that differ in length tell what a token costs."""
    waits = []
    for tokens in (4, 12):
        evaluated = {"every_steps": 1, "at_start": False, "max_new_tokens": tokens}
        config = world.config(tmp_path / f"{tokens}.toml", {"train": {"max_steps": 1}, "eval": evaluated})
        run = pretend(CAPTION, config)
        run.result.ok()
        waits.append(run.waits())
    grown = {name: waits[1].get(name, 0) - waits[0].get(name, 0) for name in waits[0] | waits[1]}
    assert {name.partition(":")[0] for name, more in grown.items() if more} == {"inference.generate"}
    assert sum(grown.values()) == 12 - 4


@pytest.mark.parametrize("each_world", ["qwen3_vl_moe"], indirect=True)
def test_adapters_of_experts(each_world: World, commands: Commands, pretend: Pretend, tmp_path: Path) -> None:
    """And with the routers' loss; the figures of experts come with the loss."""
    settings = {"lora": {"targets": ["language_model.*", "language_model.experts.*"]}, "train": {"routing_loss": 0.1}}
    here, there = (each_world.config(tmp_path / name / "run.toml", STEPS, settings) for name in ("cpu", "device"))
    commands.run(CAPTION, here).ok()
    run = pretend(CAPTION, there)
    run.result.ok()
    same(here.with_suffix(""), there.with_suffix(""))
    assert waits_of_steps(run) == IN_A_STEP
