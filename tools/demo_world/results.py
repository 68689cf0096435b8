#!/usr/bin/env python
"""One table of finished demos: python results.py RECIPE.toml=SECONDS ...

Reads what tools/evaluate.py --compare-base left in each run's folder, and shows the metric that stands for the task.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import vft.data.formats  # noqa: F401  checks the sources of a configuration
from vft.common.console import user_errors
from vft.common.errors import UserError
from vft.config import run as configs
from vft.recipes import task_of


def row(recipe: Path, seconds: str) -> tuple[str, ...]:
    """Task, metric, base, tuned, time."""
    config = configs.load(recipe)
    task = task_of(config)
    file = config.output_dir / "predictions" / "scores.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; run tools/evaluate.py with --compare-base first")
    scores = json.loads(file.read_text(encoding="utf-8"))
    figures = (f"{scores[model][task.main_metric]['value']:.3g}" for model in ("base", "adapter"))
    return task.name, task.main_metric, *figures, f"{seconds} s"


def main() -> None:
    """Command line."""
    pairs = [argument.rpartition("=") for argument in sys.argv[1:]]
    if not pairs or not all(recipe for recipe, _, _ in pairs):
        sys.exit(f"usage: {Path(sys.argv[0]).name} RECIPE.toml=SECONDS ...")
    table = Table(title="held-out clips")
    for name in ("task", "metric", "base", "tuned", "time"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    with user_errors():
        for recipe, _, seconds in pairs:
            table.add_row(*row(Path(recipe), seconds))
        Console().print(table)


if __name__ == "__main__":
    main()
