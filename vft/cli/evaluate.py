"""Score a model on held-out samples: python tools/evaluate.py CONFIG.toml [--adapter DIR] [--compare-base] [key=value]

The samples are those of `eval.sources`, or held out by `eval.split`, in a training configuration, the scores those of
its `task`, each with a 95 % interval. Answers go to a file, a line each, scores to the terminal and to scores.json
beside the answers. Two models are compared question by question: an interval of their difference that leaves out 0 says
that one is better.

Several processes share the questions, and the weights as `parallel.shard` says, so that they answer with a model that
no device holds: torchrun --nproc-per-node 8 tools/evaluate.py ...
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vft.cli.arguments import AdapterFolder, ConfigArguments, NewFolder, command
from vft.common.console import make_table, print_table
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.common.scores import Interval
from vft.config import run as configs
from vft.distributed.process_group import environment
from vft.inference.evaluate import evaluation_config, score_all
from vft.metrics import paired_difference
from vft.recipes import task_of
from vft.reporting.report import COUNTS, DIFFERENCE, key_of, score_tables

logger = logging.getLogger(__name__)

Scores = dict[str, Interval]


class EvaluateArguments(ConfigArguments):
    """Arguments of `vft evaluate`."""

    adapter: AdapterFolder | None = None
    """folder of a LoRA adapter, of its run or a checkpoint (default: the base model alone)"""
    compare_base: bool = False
    """score the base model too, side by side"""
    show: int = 0
    """also print so many of the answers"""
    output: NewFolder | None = None
    """folder of the answers (default: OUTPUT_DIR/predictions)"""


@command(EvaluateArguments, __doc__)
def main(arguments: EvaluateArguments) -> None:
    """Command line."""
    if arguments.compare_base and arguments.adapter is None:
        raise UserError("--compare-base needs --adapter: there is nothing else to compare the base with")
    config = evaluation_config(configs.load(arguments.config, arguments.overrides), arguments.adapter)
    task, world, folder = task_of(config), environment(), arguments.output or config.output_dir / "predictions"
    runs: dict[str, Path | None] = {"base": None} if arguments.compare_base or arguments.adapter is None else {}
    if arguments.adapter is not None:
        runs["adapter"] = arguments.adapter
    scores = score_all(task, config, {folder / f"{name}.jsonl": adapter for name, adapter in runs.items()}, world)
    if not world.is_main:
        return
    plain = {
        name: {metric: score_record(one) for metric, one in found.items()}
        for name, found in {**scores, **differences(scores)}.items()
    }
    replace_text(folder / "scores.json", json.dumps({"task": task.name, **plain}, indent=1) + "\n")
    show_answers({name: folder / f"{name}.jsonl" for name in scores}, arguments.show)
    show_scores(scores, f"{task.name}: answers in {folder}")


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


def show_scores(scores: Mapping[str, Scores], title: str) -> None:
    """A table with a row for each metric and a column for each model, and the difference of two models with an interval
    of its own. Below the name of a score of texts stands how they were tokenized."""
    rows = []
    for row in (row for part in score_tables(scores) for row in part["rows"]):
        change = [("", "") if row["metric"] in COUNTS else row["change"]] if len(scores) > 1 else []
        cut = f"\n({row['cut']})" if row["cut"] else ""
        rows.append([row["metric"] + cut, *(" ".join(pair).strip() for pair in (*row["scores"], *change))])
    columns = ["metric", *scores, *([DIFFERENCE] if len(scores) > 1 else [])]
    print_table(make_table(title, columns, rows, justify="right"))
