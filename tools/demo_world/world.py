"""A small world of moving shapes: its scenes and their pixels.

A `Scene` is one figure with a colour, a shape and a motion on a dark or light ground. A clip is one scene, or
several in a row. Pixels are a pure function of the scenes and a seed.

One combination of colour, shape and motion in six is held out (`Scene.held_out`): neither the base model nor the
fine-tuning data ever shows it, while each pair of its attributes is common in both. So a model that memorises whole
combinations fails on the held-out clips; one that reads the attributes from the pixels does not.

Axes: T frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIZE_PX = 84
"""Height and width of a frame: three of the model's 28-pixel token cells."""
FRAMES_PER_SCENE = 16
FRAME_RATE = 8.0
"""Frames per second: a scene lasts two seconds."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 175, 50),
    "blue": (45, 65, 235),
    "yellow": (240, 215, 30),
    "purple": (190, 50, 215),
    "cyan": (30, 205, 215),
}
SHAPES = ("ring", "square", "triangle", "cross")
MOTIONS = ("left", "right", "up", "down", "grow", "shrink")
GROUNDS: dict[str, tuple[int, int]] = {"dark": (60, 90), "light": (150, 185)}
"""Range of the grey level, 0..255. Not far from the mean of natural pictures, so that the figure stands out after
normalising: with black and white grounds a small model learns several times more slowly."""

RADIUS_PX = (19.0, 23.0)
"""Radius of a figure that keeps its size. It fills about half of the frame's height, for the same reason."""
SMALL_RADIUS_PX, LARGE_RADIUS_PX = (11.0, 14.0), (27.0, 32.0)
"""Radii at the ends of growing and shrinking."""
TRAVEL_PX = (24.0, 28.0)
"""Distance that a moving figure covers in its scene."""
REACH = 1.2
"""How far the widest shapes reach from their centre, in radii."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One figure doing one thing. The fields are keys of the tables above."""

    color: str
    shape: str
    motion: str
    ground: str

    @property
    def held_out(self) -> bool:
        """Whether training never shows this colour, shape and motion together."""
        places = list(COLORS).index(self.color), SHAPES.index(self.shape), MOTIONS.index(self.motion)
        return sum(places) % len(COLORS) == 0


def all_scenes(held_out: bool) -> list[Scene]:
    """Every scene of one side of the split, in a fixed order: 48 held out, 240 others."""
    scenes = [Scene(c, s, m, g) for c in COLORS for s in SHAPES for m in MOTIONS for g in GROUNDS]
    return [scene for scene in scenes if scene.held_out == held_out]


def render_clip(scenes: Sequence[Scene], seed: int | Sequence[int], frames: Sequence[int] = ()) -> np.ndarray:
    """Frames of the scenes in a row: uint8 TCHW. `frames` says how many each has; else it is `FRAMES_PER_SCENE`."""
    rng = np.random.default_rng(seed)
    counts = frames or [FRAMES_PER_SCENE] * len(scenes)
    return np.concatenate([_render_scene(scene, rng, count) for scene, count in zip(scenes, counts, strict=True)])


def _render_scene(scene: Scene, rng: np.random.Generator, frames: int) -> np.ndarray:
    """Frames of one scene, place, speed, size and shades drawn from `rng`: uint8 TCHW."""
    center_T2, radius_T = (values.astype(np.float32) for values in _path(scene.motion, rng, frames))
    pixel = np.arange(SIZE_PX, dtype=np.float32) + 0.5
    x_T1W = (pixel[None, None, :] - center_T2[:, 0, None, None]) / radius_T[:, None, None]
    y_TH1 = (pixel[None, :, None] - center_T2[:, 1, None, None]) / radius_T[:, None, None]
    distance_THW = _distance(scene.shape, x_T1W, y_TH1) * radius_T[:, None, None]
    cover_T1HW = np.clip(0.5 - distance_THW, 0.0, 1.0)[:, None].astype(np.float32)
    ground = np.float32(rng.uniform(*GROUNDS[scene.ground]))
    figure_C = np.clip(np.array(COLORS[scene.color]) + rng.uniform(-12, 12, 3), 0, 255).astype(np.float32)
    return np.round(ground + cover_T1HW * (figure_C[:, None, None] - ground)).astype(np.uint8)


def _path(motion: str, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre [T, 2] (x, y) and radius [T] of the figure in pixels; it never leaves the frame."""
    time_T = np.linspace(0.0, 1.0, frames)
    if motion in ("grow", "shrink"):
        small, large = rng.uniform(*SMALL_RADIUS_PX), rng.uniform(*LARGE_RADIUS_PX)
        margin = REACH * large
        center = rng.uniform(margin, SIZE_PX - margin, 2)
        radius_T = small + (large - small) * (time_T if motion == "grow" else 1.0 - time_T)
        return np.tile(center, (frames, 1)), radius_T
    radius = rng.uniform(*RADIUS_PX)
    low, high = REACH * radius, SIZE_PX - REACH * radius
    travel = rng.uniform(*TRAVEL_PX)
    along_T = rng.uniform(low, high - travel) + travel * (time_T if motion in ("right", "down") else 1.0 - time_T)
    across_T = np.full(frames, rng.uniform(low, high))
    axes = (along_T, across_T) if motion in ("left", "right") else (across_T, along_T)
    return np.stack(axes, axis=1), np.full(frames, radius)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the shape's edge, negative inside; x right, y down, 1 is the radius."""
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.8) - 0.3
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9
    if shape == "triangle":
        return np.maximum(np.maximum(0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y), y) - 0.6
    if shape == "cross":
        return np.minimum(np.maximum(abs(x), 3.0 * abs(y)), np.maximum(3.0 * abs(x), abs(y))) - REACH
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
