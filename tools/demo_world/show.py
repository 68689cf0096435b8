#!/usr/bin/env python
"""Show what tools/evaluate.py --compare-base left in the folders of finished demos.

python show.py --picture CONFIG.toml OUTPUT.png     held-out clips with their captions before and after training
python show.py --table RECIPE.toml=SECONDS ...      the metric that stands for each task
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import in_venv  # noqa: F401
from rich.console import Console
from rich.table import Table

import vft.data.formats  # noqa: F401  # checks the sources of a configuration
from vft.common.console import user_errors
from vft.common.errors import UserError
from vft.config import run as configs
from vft.config.run import Config
from vft.recipes import task_of

CLIPS = 6
FRAMES = 4
SIDE = 96
"""Pixels of a frame in the picture."""
TEXT_WIDTH = 620
LINES = (("reference", "#666666"), ("before", "#b03030"), ("after", "#207030"))


def draw(config: Config, output: str) -> None:
    """One row a clip: frames on the left, reference, caption before and after on the right."""
    # Imported here, because the table needs none of them.
    import torch
    from PIL import Image, ImageDraw, ImageFont
    from torchcodec.decoders import VideoDecoder

    before, after = (by_id(read(config, f"{name}.jsonl").splitlines()) for name in ("base", "adapter"))
    records = json.loads((config.data.root / config.eval.sources[0].path).read_text(encoding="utf-8"))
    videos = {record["id"]: f"{record['data_source']}/{record['video']}" for record in records}
    ids = sorted(random.Random(0).sample(sorted(after), min(CLIPS, len(after))))
    height = SIDE + 14
    sheet = Image.new("RGB", (FRAMES * (SIDE + 4) + 16 + TEXT_WIDTH, height * len(ids) + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for number, id in enumerate(ids):
        top = 8 + number * height
        decoder = VideoDecoder(str(config.data.root / videos[id]))
        spread = torch.linspace(0, len(decoder) - 1, FRAMES).round().long().tolist()
        for index, frame_CHW in enumerate(decoder.get_frames_at(spread).data):
            picture = Image.fromarray(frame_CHW.permute(1, 2, 0).numpy()).resize((SIDE, SIDE))
            sheet.paste(picture, (8 + index * (SIDE + 4), top))
        texts = (after[id]["reference"], before[id]["prediction"], after[id]["prediction"])
        for line, ((name, colour), text) in enumerate(zip(LINES, texts, strict=True)):
            pen.text((FRAMES * (SIDE + 4) + 20, top + 8 + line * 28), f"{name}: {text}", fill=colour, font=font)
    sheet.save(output)
    print(f"wrote {output}")


def by_id(lines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Answers by their sample."""
    return {row["id"]: row for row in map(json.loads, lines)}


def table(recipes: Sequence[tuple[Path, str]]) -> Table:
    """Task, metric, base, tuned, and how many seconds it took."""
    shown = Table(title="held-out clips")
    for name in ("task", "metric", "base", "tuned", "time"):
        shown.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for recipe, seconds in recipes:
        config = configs.load(recipe)
        task, scores = task_of(config), json.loads(read(config, "scores.json"))
        figures = (f"{scores[model][task.main_metric]['value']:.3g}" for model in ("base", "adapter"))
        shown.add_row(task.name, task.main_metric, *figures, f"{seconds} s")
    return shown


def read(config: Config, name: str) -> str:
    """A file that the evaluation wrote."""
    file = config.output_dir / "predictions" / name
    if not file.is_file():
        raise UserError(f"{file}: no such file; run tools/evaluate.py with --compare-base first")
    return file.read_text(encoding="utf-8")


def main() -> None:
    """Command line."""
    with user_errors():
        match sys.argv[1:]:
            case ["--picture", config, output]:
                draw(configs.load(Path(config)), output)
            case ["--table", *pairs] if pairs and all("=" in pair for pair in pairs):
                recipes = [pair.rpartition("=") for pair in pairs]
                Console().print(table([(Path(recipe), seconds) for recipe, _, seconds in recipes]))
            case _:
                sys.exit(__doc__)


if __name__ == "__main__":
    main()
