"""A little world to train in: two random models, clips of a bar on coloured grounds, records about them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from PIL import Image
from torchcodec.encoders import VideoEncoder

from tests.helpers.families import FAMILIES

COLOURS = {"red": (220, 30, 30), "green": (20, 200, 40), "blue": (30, 40, 230), "yellow": (230, 220, 20)}
PROMPT = "What is moving?"
ANSWERS = {
    "red": "A red bar walks to the right.",
    "green": "Something green is on its way.",
    "blue": "The blue one, slowly.",
    "yellow": "A yellow bar; it looks warm.",
}
TEXTS = {
    "What is two and two?": "Four, as ever.",
    "Name a colour.": "Grey.",
    "Who sees nothing here?": "Whoever has no picture.",
}


@dataclass(frozen=True)
class World:
    """What the tests train with."""

    root: Path
    """Data: `videos.json`, `mixed.jsonl` and their media."""
    base: Path
    """A checkpoint."""
    other_base: Path
    """One of the same shape with other weights."""
    family: str
    """Of both."""

    def config(self, path: Path, *settings: dict[str, Any]) -> Path:
        """Write a configuration to `path`, with tables of `settings` laid over these."""
        table: dict[str, Any] = {
            "output_dir": str(path.with_suffix("")),
            "model": {"path": str(self.base)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {
                "root": str(self.root),
                "sources": [{"format": "messages", "path": "videos.json"}],
                "pack_tokens": 256,
                "workers": 0,
                "video": {"frames": 4, "max_pixels": 56 * 56},
                "image": {"max_pixels": 56 * 56},
            },
            "train": {"max_steps": 4, "packs_per_step": 2, "learning_rate": 2e-3, "precision": "fp32"},
            "checkpoint": {"every_steps": 0},
        }
        for setting in settings:
            _lay_over(table, setting)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps(table))
        return path


FULL_TUNING = {"lora": None, "model": {"train": ["language_model", "vision_encoder", "projector"]}}
"""Settings that train every weight instead of adapters."""
MIXED = {
    "data": {"sources": [{"format": "messages", "path": "mixed.jsonl"}], "max_samples_per_pack": 1},
}
"""Settings under which each pack is one sample: of text alone, with pictures, or with a video."""
VISION_LORA = {"lora": {"targets": ["language_model.*", "vision_encoder.*", "projector.*"]}}


def make_world(folder: Path, family: str = "qwen2_5_vl") -> World:
    """Write everything into `folder`."""
    save_checkpoint = FAMILIES[family].save
    root = folder / "data"
    root.mkdir(parents=True)
    for colour in COLOURS:
        write_clip(root / f"{colour}.mp4", colour)
        Image.new("RGB", (56, 56), COLOURS[colour]).save(root / f"{colour}.png")
    (root / "videos.json").write_text(json.dumps([video_record(colour) for colour in COLOURS]))
    lines = [video_record(colour) for colour in list(COLOURS)[:3]]
    lines += [record(question, answer) for question, answer in TEXTS.items()]
    lines += [
        record("<image>Which colour?", f"It is {colour}.", images=[f"{colour}.png"]) for colour in ("red", "blue")
    ]
    two = record("<image><image>Compare them.", "One is green, the other yellow.", images=["green.png", "yellow.png"])
    (root / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, two]))
    # In float32, so that small differences survive an export.
    return World(root, save_checkpoint(folder / "base"), save_checkpoint(folder / "other_base", seed=1), family)


def record(question: str, answer: str | None, **media: list[str]) -> dict[str, Any]:
    """A conversation of one question; without an answer where that is None."""
    turns = [{"role": "user", "content": question}]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"messages": turns, **media}


def video_record(colour: str) -> dict[str, Any]:
    """The record of one clip; the question is the same for all, so that the answer hangs on the picture alone."""
    return {"id": colour, **record(f"<video>{PROMPT}", ANSWERS[colour], videos=[f"{colour}.mp4"])}


def write_clip(path: Path, colour: str) -> None:
    """12 frames in 3 seconds: a white bar crosses a coloured ground."""
    frames_TCHW = torch.tensor(COLOURS[colour], dtype=torch.uint8)[None, :, None, None].repeat(12, 1, 56, 56)
    for number in range(12):
        frames_TCHW[number, :, :, number * 4 : number * 4 + 8] = 250
    # x264's assembly reads beyond sizes that 16 doesn't divide: it would write one of two clips, by chance.
    VideoEncoder(frames_TCHW, frame_rate=4).to_file(str(path), extra_options={"x264-params": "asm=0"})


def damage(path: Path) -> None:
    """Overwrite the second half of the frames of an MP4 file: its index stays right, decoding fails."""
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    half = length // 2
    content[start + half : start + length] = b"\xff" * (length - half)
    path.write_bytes(content)


def _lay_over(table: dict[str, Any], setting: dict[str, Any]) -> None:
    for key, value in setting.items():
        if value is None:
            table.pop(key, None)
        elif isinstance(value, dict) and isinstance(table.get(key), dict):
            _lay_over(table[key], value)
        else:
            table[key] = value
