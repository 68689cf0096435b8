"""Score a model on held-out samples: python tools/evaluate.py CONFIG.toml [--adapter DIR] [--compare-base] [key=value]

The samples are those of `eval.sources`, or held out by `eval.split`, in a training configuration, the scores those of
its `task`, each with a 95 % interval. Answers go to a file, a line each, scores to the terminal and to scores.json
beside the answers. Two models are compared question by question: an interval of their difference that leaves out 0 says
that one is better.

Several processes share the questions, and the weights as `parallel.shard` says, so that they answer with a model that
no device holds: torchrun --nproc-per-node 8 tools/evaluate.py ...
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vft.cli.arguments import add_config_arguments, parse_arguments
from vft.common.console import user_errors
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.common.scores import Interval
from vft.config import run as configs
from vft.config.run import Config
from vft.data.dataset import Dataset
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel, World, environment, make_mesh, process_group
from vft.inference.as_trained import evaluation_config
from vft.inference.engine import Answerer
from vft.inference.evaluate import evaluate
from vft.inference.generate import Sampling
from vft.metrics import paired_difference
from vft.preparation.documents import load_held_out, warn_of_overlap
from vft.preparation.run import DTYPES, PreparedModel, load_for_inference, open_for_inference
from vft.recipes import task_of
from vft.reporting.examples import key_of
from vft.reporting.score_tables import COUNTS, DIFFERENCE, change_text, score_text

logger = logging.getLogger(__name__)

Scores = dict[str, Interval]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(__doc__, add_arguments, argv, prog)
    with user_errors():
        if arguments.adapter is not None and not arguments.adapter.is_dir():
            raise UserError(f"--adapter = {str(arguments.adapter)!r}: no such folder")
        if arguments.compare_base and arguments.adapter is None:
            raise UserError("--compare-base needs --adapter: there is nothing else to compare the base with")
        config = evaluation_config(configs.load(arguments.config, arguments.overrides), arguments.adapter)
        folder = arguments.output or config.output_dir / "predictions"
        runs = {"base": None} if arguments.compare_base or arguments.adapter is None else {}
        if arguments.adapter is not None:
            runs["adapter"] = arguments.adapter
        world = environment()
        if not config.eval.sources and config.eval.split is None:
            logger.info("eval.sources = []: scored are the samples of data.sources, those of training")
        scores = score_all(config, {folder / f"{name}.jsonl": adapter for name, adapter in runs.items()}, world)
        if not world.is_main:
            return
        plain = {
            name: {metric: score_record(one) for metric, one in found.items()}
            for name, found in {**scores, **differences(scores)}.items()
        }
        replace_text(folder / "scores.json", json.dumps({"task": task_of(config).name, **plain}, indent=1) + "\n")
    show_answers({name: folder / f"{name}.jsonl" for name in scores}, arguments.show)
    show_scores(scores, f"{task_of(config).name}: answers in {folder}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_config_arguments(parser)
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter (default: the base model alone)")
    parser.add_argument("--compare-base", action="store_true", help="score the base model too, side by side")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="also print N of the answers")
    parser.add_argument("--output", type=Path, help="folder of the answers (default: OUTPUT_DIR/predictions)")


def score_all(config: Config, runs: Mapping[Path, Path | None], world: World) -> dict[str, Scores]:
    """Scores by the name of the file that the answers go to; `runs` says which adapter each file is of (None: the base
    alone)."""
    dtype = DTYPES[config.train.precision]
    models = {file: open_for_inference(config.model, adapter, dtype) for file, adapter in runs.items()}
    # Before the process group, as in training: the first scan of many files may outlast any timeout.
    encoder = next(iter(models.values())).encoder(config.data)
    held_out = load_held_out(task_of(config), config, encoder)
    warn_of_overlap(task_of(config), config, held_out)
    scores = {}
    with (
        process_group(world, alone=config.parallel.offload != "none"),
        WorkerPool(config.data.workers, config.data.decode_timeout_s) as pool,
    ):
        for file in runs:
            scores[file.stem] = score(config, models.pop(file), file, held_out, pool, world)
            gc.collect()  # a sharded model holds itself through its hooks; two may not fit in memory
    return scores


def score(
    config: Config, prepared: PreparedModel, file: Path, held_out: Dataset, pool: WorkerPool, world: World
) -> Scores:
    """Scores of a model; its answers go to `file`."""
    mesh = make_mesh(world, config.parallel.shard)
    load_for_inference(prepared, world.device, mesh, config.parallel)
    parallel = DataParallel.of(mesh)
    answerer = Answerer(prepared.model, held_out.encoder, config.data, held_out.info, pool, world, parallel)
    sampling = Sampling(max_new_tokens=config.eval.max_new_tokens)
    return evaluate(
        task_of(config), answerer, held_out, sampling, config.eval.batch_size, config.eval.max_samples, file
    )


def score_record(score: Interval) -> dict[str, Any]:
    """A score in scores.json: its value, the ends of its interval, and for a score of texts how they were tokenized."""
    record = {"value": score.value, "low": score.low, "high": score.high}
    return {**record, "tokenization": score.tokenization} if score.tokenization else record


def show_answers(files: dict[str, Path], count: int) -> None:
    """Some answers of every model under their references."""
    read = {name: [json.loads(line) for line in file.open(encoding="utf-8")] for name, file in files.items()}
    by_key = {name: {key_of(row): row for row in rows} for name, rows in read.items()}
    first = next(iter(read.values()))
    for row in first[:: max(1, len(first) // max(1, count))][:count]:
        print(f"\n{row['id']}: {row['prompt']}\n  reference  {row['reference']}")
        for name, answers in by_key.items():
            print(f"  {name:9}  {described(answers[key_of(row)]) if key_of(row) in answers else '(not read)'}")


def described(row: dict[str, str]) -> str:
    """A model's answer, whether it was cut off, and which option is likeliest."""
    answer = row["prediction"] + ("   [cut off]" if "cut_off" in row else "")
    return f"{answer}   [likeliest: {row['choice']}]" if "choice" in row else answer


def differences(scores: dict[str, Scores]) -> dict[str, Scores]:
    """The adapter's scores less the base's, on the questions that both answered; nothing for one model alone."""
    if len(scores) < 2:
        return {}
    base, adapter = scores.values()
    pairs = {metric: paired_difference(base[metric], adapter[metric]) for metric in base if metric in adapter}
    return {DIFFERENCE: {metric: pair[0] for metric, pair in pairs.items() if pair is not None}}


def show_scores(scores: dict[str, Scores], title: str) -> None:
    """A table with a row for each metric and a column for each model, and the difference of two models with an interval
    of its own. Below the name of a score of texts stands how they were tokenized."""
    table = Table(title=title)
    for number, name in enumerate(("metric", *scores, *([DIFFERENCE] if len(scores) > 1 else []))):
        table.add_column(name, justify="right" if number else "left")
    for metric in dict.fromkeys(metric for found in scores.values() for metric in found):
        row = [found.get(metric) for found in scores.values()]
        cells = [" ".join(score_text(one)).strip() for one in row]
        if len(row) > 1 and metric not in COUNTS:
            cells.append(" ".join(change_text(row[0], row[1])).strip())
        cut = next((one.how_cut.strip() for one in row if one is not None), "")
        table.add_row(f"{metric}\n{cut}".rstrip(), *cells)
    Console(markup=False, emoji=False).print(table)  # brackets and colons of labels are text


if __name__ == "__main__":
    main()
