"""The demo's world and the base model that ships with it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "tools" / "demo_world"
sys.path.insert(0, str(FOLDER))  # its scripts import each other by name, as Python finds them

import words  # noqa: E402
import world  # noqa: E402


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


def test_the_shipped_base_is_small_and_loads_in_transformers() -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    base = FOLDER / "base"
    assert sum(path.stat().st_size for path in base.iterdir()) <= 8e6
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = words.captions(world.all_scenes(held_out=True)[0])[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
