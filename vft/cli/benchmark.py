"""Score a model on public benchmarks: vft benchmark NAME... --model MODEL [--adapter DIR] [--root data]

Each benchmark is asked with its own prompt and frames, and scored by its own rule; likelihoods of options stand beside.
`vft benchmark` alone lists them with where their questions go below --root; `vft download NAME` says how to get them.
With --adapter the base is scored too, and the difference is paired question by question. Answers, scores and a table
(scores.json, scores.md) go to --output, with the file to upload where answers are withheld; the same command again goes
on. Several processes share the questions: torchrun --nproc-per-node 8 tools/benchmark.py ...
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from vft import benchmarks
from vft.adapters.peft_format import recorded, trained_rope_factor
from vft.benchmarks import Benchmark
from vft.cli.arguments import AdapterFolder, Arguments, ExistingFolder, NewFolder, Positional, command
from vft.cli.evaluate import differences, score_record
from vft.common.console import make_table, print_table
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.common.scores import Interval
from vft.config.run import Config
from vft.config.toml import Count, Name, Positive
from vft.data.dataset import Dataset
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel, World, environment, make_mesh, process_group
from vft.inference.answers_file import answer_settings
from vft.inference.engine import Answerer
from vft.inference.evaluate import answer_questions, evaluating, questions_digest
from vft.inference.generate import Sampling
from vft.inference.kept_answers import KeptAnswers
from vft.inference.requests import data_config
from vft.preparation.documents import load_held_out, questions
from vft.preparation.memory import inference_shard
from vft.preparation.run import DTYPES, PreparedModel, load_for_inference, open_for_inference
from vft.reporting.report import COUNTS, DIFFERENCE, score_text

logger = logging.getLogger(__name__)
Scores = dict[str, Interval]


def _benchmark(name: str) -> str:
    benchmarks.find(name)
    return name


class BenchmarkArguments(Arguments):
    """Arguments of `vft benchmark`."""

    names: Annotated[list[Annotated[str, AfterValidator(_benchmark)]], Positional("NAME")] = Field(default_factory=list)
    """benchmarks, such as mvbench; without any they are listed"""
    model: Name | None = None
    """folder or hub name of a base or merged model"""
    adapter: AdapterFolder | None = None
    """folder of a LoRA adapter on it, of its run or a checkpoint, scored beside the base"""
    root: ExistingFolder = Path("data")
    """folder of all data sets (default: data)"""
    path: str | None = None
    """where the questions of a single benchmark are below --root, if not in its own place"""
    media: str = ""
    """folder of its videos below --root, if not in its own place"""
    frames: Positive | None = None
    """frames of a video (default: the benchmark's)"""
    max_pixels: Positive | None = None
    """most pixels of a frame, height x width"""
    pack_tokens: Positive | None = None
    """most tokens of a question with its media (default: that of training)"""
    max_new_tokens: Positive | None = None
    """most tokens of an answer (default: the benchmark's)"""
    limit: Count = 0
    """questions of each benchmark, chosen at random but always the same; 0: all"""
    precision: Literal["bf16", "fp32"] | None = None
    """bf16 or fp32 (default: bf16 on a GPU, fp32 on a CPU)"""
    quantize: Literal["none", "nf4"] = "none"
    """none (default), or nf4: the layers in 4 bits"""
    batch_size: Positive = 8
    """questions that a process answers at once (default 8)"""
    workers: Count = 4
    """processes that decode (default 4)"""
    output: NewFolder = Path("benchmarks")
    """folder of answers and scores (default: benchmarks)"""

    def config(self, benchmark: Benchmark, about: Mapping[str, Any]) -> Config:
        """The configuration under which a benchmark is asked; `about` is what training has recorded of the model."""
        limits = {"frames": self.frames or benchmark.frames, "max_pixels": self.max_pixels}
        data = data_config(about, limits, self.pack_tokens).model_dump() | {"root": self.root, "workers": self.workers}
        data["max_bad_fraction"] = 1.0  # what cannot be read stands beside the scores
        kind = type(benchmark)
        source = {
            "format": f"{kind.__module__}:{kind.__name__}",
            "path": self.path or benchmark.path,
            "media": self.media,
        }
        return Config.model_validate(
            {
                "output_dir": self.output,
                "model": {
                    "path": self.model,
                    "quantize": self.quantize,
                    "rope_factor": trained_rope_factor(self.adapter, None),
                },
                "data": data,
                "train": {"precision": self.precision or ("bf16" if environment().device.type == "cuda" else "fp32")},
                "eval": {
                    "sources": [source],
                    "max_new_tokens": self.max_new_tokens or benchmark.max_new_tokens,
                    "batch_size": self.batch_size,
                    "max_samples": self.limit,
                },
            }
        )


@command(BenchmarkArguments, __doc__, {"model.path": "--model", "data.root": "--root"})
def main(options: BenchmarkArguments) -> None:
    """Command line."""
    if not options.names:
        rows = [
            [name, one.title, one.path, str(one.frames), one.page] for name, one in _all(benchmarks.names()).items()
        ]
        print_table(make_table("benchmarks", ["name", "title", "below --root", "frames", "page"], rows))
        return
    if options.model is None:
        raise UserError("--model is missing: name the folder or hub name of the model to score")
    if options.path is not None and len(options.names) > 1:
        raise UserError(f"--path = {options.path}: is of one benchmark, and {len(options.names)} are named")
    world = environment()
    asked = _all(options.names)
    found = score_benchmarks(options, asked, world)
    if not world.is_main:
        return
    shown = {name: {**sides, **differences(sides)} for name, sides in found.items()}
    record = {
        name: {
            "title": asked[name].title,
            "main_metric": _figure(asked[name], sides),
            **{side: {metric: score_record(one) for metric, one in scores.items()} for side, scores in sides.items()},
        }
        for name, sides in shown.items()
    }
    replace_text(options.output / "scores.json", json.dumps(record, indent=1) + "\n")
    replace_text(options.output / "scores.md", markdown(asked, shown))
    columns, rows = summary(asked, shown)
    print_table(make_table(f"answers in {options.output}", columns, rows, justify="right"))


def _figure(benchmark: Benchmark, sides: Mapping[str, Scores]) -> str:
    """The score that stands for all."""
    is_there = any(benchmark.main_metric in scores for scores in sides.values())
    return benchmark.main_metric if is_there else benchmark.fallback_metric or benchmark.main_metric


def _all(names: Sequence[str]) -> dict[str, Benchmark]:
    return {benchmarks.find(name).name: benchmarks.find(name) for name in names}


def score_benchmarks(
    options: BenchmarkArguments, asked: Mapping[str, Benchmark], world: World
) -> dict[str, dict[str, Scores]]:
    """Scores by benchmark and model (`base`, `adapter`). Each model is loaded once, and not at all if every answer is
    known from an earlier run."""
    sides: dict[str, Path | None] = {"base": None} | ({"adapter": options.adapter} if options.adapter else {})
    base = options.config(next(iter(asked.values())), {})
    dtype = DTYPES[base.train.precision]
    models = {side: open_for_inference(base.model, adapter, dtype) for side, adapter in sides.items()}
    trained = models["base"].pretrained.json_file("vft.json") if options.adapter is None else recorded(options.adapter)
    configs = {name: options.config(benchmark, trained) for name, benchmark in asked.items()}
    # Before the process group, as in training: the first scan of many files may outlast any timeout.
    held_out = {
        name: load_held_out(benchmark, configs[name], models["base"].encoder(configs[name].data))
        for name, benchmark in asked.items()
    }
    for name, own in held_out.items():
        if own.bad:
            total = own.num_samples + len(own.bad)
            logger.warning("%s: %d of %d questions can't be asked: %s", name, len(own.bad), total, own.bad[0].message)
    found: dict[str, dict[str, Scores]] = {name: {} for name in asked}
    with process_group(world), WorkerPool(options.workers, base.data.decode_timeout_s) as pool:
        for side, adapter in sides.items():
            prepared, is_loaded = models.pop(side), False
            mesh = make_mesh(world, inference_shard(base.parallel, prepared.model, world))
            for name, benchmark in asked.items():
                config, folder, own = configs[name], options.output / name, held_out[name]
                depends_on = _depends_on(config, adapter, prepared, own)
                kept = KeptAnswers(folder / f"{side}.answers.jsonl", depends_on, world)
                wanted = questions(own.conversations, options.limit)
                if not is_loaded and len(kept.known(wanted)) < len(wanted):
                    load_for_inference(prepared, world.device, mesh, config.parallel)
                    is_loaded = True
                parallel = DataParallel.of(mesh)
                answerer = Answerer(prepared.model, own.encoder, config.data, own.info, pool, world, parallel)
                with evaluating(prepared.model):
                    answers, counts = answer_questions(
                        answerer, own, config.eval, folder / f"{side}.jsonl", kept, "--max-new-tokens"
                    )
                found[name][side] = (benchmark.score(answers) if answers and world.is_main else {}) | counts
                for file, content in benchmark.submission(answers).items() if world.is_main else ():
                    replace_text(folder / side / file, content)
            del prepared, answerer
            gc.collect()  # a sharded model holds itself through its hooks; two may not fit in memory
    return found


def _depends_on(config: Config, adapter: Path | None, prepared: PreparedModel, held_out: Dataset) -> str:
    """What answers depend on: weights, settings and questions, wherever they lie."""
    sampling, precision = Sampling(config.eval.max_new_tokens), config.train.precision
    settings = answer_settings(config.model, adapter, prepared.pretrained, precision, sampling, config.data)
    asked = questions_digest(held_out, config.eval.max_samples)
    return json.dumps({**settings, "model": "", "adapter": "", "questions": asked})


def summary(
    asked: Mapping[str, Benchmark], found: Mapping[str, Mapping[str, Scores]]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table: each benchmark's main figure, in the units of the field."""
    sides = list(dict.fromkeys(side for scores in found.values() for side in scores))
    rows = []
    for name, scores in found.items():
        benchmark, figure = asked[name], _figure(asked[name], scores)
        cells = []
        for side in sides:
            score = scores.get(side, {}).get(figure)
            cells.append(
                " ".join(score_text(score and scaled(score, benchmark.scale), "+" * (side == DIFFERENCE))).strip()
            )
        counts = [f"{scores[sides[0]][count].value:.0f}" for count in COUNTS]
        rows.append([benchmark.title, figure, *cells, *counts])
    return ["benchmark", "figure", *sides, *COUNTS], rows


def scaled(score: Interval, scale: float) -> Interval:
    """A score in other units."""
    return Interval(score.value * scale, score.low * scale, score.high * scale)


def markdown(asked: Mapping[str, Benchmark], found: Mapping[str, Mapping[str, Scores]]) -> str:
    """The table, then all scores of each benchmark, 0 to 1 or in their own units."""
    columns, rows = summary(asked, found)
    parts = [_markdown_table(columns, rows)]
    for name, scores in found.items():
        sides = list(scores)
        metrics = dict.fromkeys(metric for side in scores.values() for metric in side)
        own = [
            [m, *(" ".join(score_text(scores[s].get(m), "+" * (s == DIFFERENCE))).strip() for s in sides)]
            for m in metrics
        ]
        parts.append(f"## {asked[name].title}\n\n{_markdown_table(['score', *sides], own)}")
    return "\n".join(parts)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
