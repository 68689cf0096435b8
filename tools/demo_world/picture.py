#!/usr/bin/env python
"""Draw held-out clips with their captions before and after training: python picture.py CONFIG.toml OUTPUT.png

Reads the answers that tools/evaluate.py --compare-base left in the run's folder.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchcodec.decoders import VideoDecoder

import vft.data.formats  # noqa: F401  checks the sources of a configuration
from vft.common.console import user_errors
from vft.common.errors import UserError
from vft.config import run as configs

CLIPS = 6
FRAMES = 4
SIDE = 96
"""Pixels of a frame in the picture."""
TEXT_WIDTH = 620
LINES = (("reference", "#666666"), ("before", "#b03030"), ("after", "#207030"))


def draw(rows: list[dict[str, Any]], root: Path) -> Image.Image:
    """One row a clip: frames on the left, reference, caption before and after on the right."""
    height = SIDE + 14
    sheet = Image.new("RGB", (FRAMES * (SIDE + 4) + 16 + TEXT_WIDTH, height * len(rows) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for number, row in enumerate(rows):
        top = 8 + number * height
        for index, frame_CHW in enumerate(frames_of(root / row["video"])):
            picture = Image.fromarray(frame_CHW.permute(1, 2, 0).numpy()).resize((SIDE, SIDE))
            sheet.paste(picture, (8 + index * (SIDE + 4), top))
        for line, (name, colour) in enumerate(LINES):
            place = (FRAMES * (SIDE + 4) + 20, top + 8 + line * 28)
            pen.text(place, f"{name}: {row[name]}", fill=colour, font=font)
    return sheet


def frames_of(path: Path) -> Tensor:
    """`FRAMES` frames spread over the clip, uint8 TCHW."""
    decoder = VideoDecoder(str(path))
    return decoder.get_frames_at(torch.linspace(0, len(decoder) - 1, FRAMES).round().long().tolist()).data


def answers(file: Path) -> dict[str, dict[str, Any]]:
    """Lines of a predictions file by sample."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; run tools/evaluate.py with --compare-base first")
    return {row["id"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def main() -> None:
    """Command line."""
    if len(sys.argv) != 3:
        sys.exit(f"usage: {Path(sys.argv[0]).name} CONFIG.toml OUTPUT.png")
    with user_errors():
        config = configs.load(Path(sys.argv[1]))
        folder = config.output_dir / "predictions"
        before, after = answers(folder / "base.jsonl"), answers(folder / "adapter.jsonl")
        source = config.data.root / config.eval.sources[0].path
        videos = {record["id"]: record for record in json.loads(source.read_text(encoding="utf-8"))}
        rows = []
        for id in sorted(random.Random(0).sample(sorted(after), min(CLIPS, len(after)))):
            row = after[id]
            video = f"{videos[id]['data_source']}/{videos[id]['video']}"
            texts = {"reference": row["reference"], "before": before[id]["prediction"], "after": row["prediction"]}
            rows.append({"video": video, **texts})
        draw(rows, config.data.root).save(sys.argv[2])
        print(f"wrote {sys.argv[2]}")


if __name__ == "__main__":
    main()
