#!/usr/bin/env python
"""Score a model on held-out samples: python tools/evaluate.py CONFIG.toml [--adapter DIR] [--compare-base] [key=value]

The samples are those of `eval.sources` in a training configuration. Answers go to a file, scores to the terminal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vft import config as configs
from vft.config import Config
from vft.console import user_errors
from vft.data.documents import load_documents
from vft.data.pool import WorkerPool
from vft.distributed import environment
from vft.evaluate import Answerer, evaluate, load_model, require_folder
from vft.models.generate import Sampling
from vft.recipes.caption import Caption
from vft.types import UserError


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path, help="TOML file of a training run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter (default: the base model alone)")
    parser.add_argument("--compare-base", action="store_true", help="score the base model too, side by side")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="also print N of the answers")
    parser.add_argument("--output", type=Path, help="folder of the answers (default: OUTPUT_DIR/predictions)")
    arguments = parser.parse_args()
    with user_errors():
        require_folder(arguments.adapter, "--adapter")
        if environment().size > 1:
            raise UserError("tools/evaluate.py runs in one process; in training, eval.every_steps uses all of them")
        if arguments.compare_base and arguments.adapter is None:
            raise UserError("--compare-base needs --adapter: there is nothing else to compare the base with")
        config = configs.load(arguments.config, arguments.overrides)
        folder = arguments.output or config.output_dir / "predictions"
        runs = {"base": None} if arguments.compare_base or arguments.adapter is None else {}
        if arguments.adapter is not None:
            runs["adapter"] = arguments.adapter
        scores = {name: score(config, adapter, folder / f"{name}.jsonl") for name, adapter in runs.items()}
    show_answers({name: folder / f"{name}.jsonl" for name in scores}, arguments.show)
    show_scores(scores, folder)


def score(config: Config, adapter: Path | None, file: Path) -> dict[str, float]:
    """Scores of the base model, or of the adapter on it; its answers go to `file`."""
    world = environment()
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    loaded = load_model(config.model.path, adapter, dtype, world.device)
    task = Caption()
    wanted = config.eval.sources or config.data.sources
    held_out = load_documents(config.data, wanted, task.conversation, loaded.encoder, config.seed)
    sampling = Sampling(max_new_tokens=config.eval.max_new_tokens)
    with WorkerPool(config.data.workers, config.data.clip_deadline_s) as pool:
        answerer = Answerer(loaded.skeleton.model, loaded.encoder, config.data, held_out.index.info, pool, world)
        return evaluate(task, answerer, held_out, sampling, config.eval.batch_size, config.eval.max_samples, file)


def show_answers(files: dict[str, Path], count: int) -> None:
    """Some answers of every model under their references."""
    read = {name: [json.loads(line) for line in file.open(encoding="utf-8")] for name, file in files.items()}
    by_id = {name: {row["id"]: row for row in rows} for name, rows in read.items()}
    first = next(iter(read.values()))
    for row in first[:: max(1, len(first) // max(1, count))][:count]:
        print(f"\n{row['id']}\n  reference  {row['reference']}")
        for name, answers in by_id.items():
            print(f"  {name:9}  {answers[row['id']]['prediction'] if row['id'] in answers else '(not read)'}")


def show_scores(scores: dict[str, dict[str, float]], folder: Path) -> None:
    """A table: a row a metric, a column a model."""
    table = Table(title=f"answers in {folder}")
    table.add_column("metric")
    for name in scores:
        table.add_column(name, justify="right")
    for metric in next(iter(scores.values())):
        table.add_row(metric, *(f"{values[metric]:.4g}" for values in scores.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
