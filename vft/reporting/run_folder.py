"""What a run has left in its folder, read back: also of earlier versions, and of runs that were killed."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vft.common.scores import Interval, Parts
from vft.metrics import parts_from_json

Row = dict[str, Any]
"""A JSON object, such as a line of a JSONL file."""
Scores = Mapping[str, Interval]
"""By name of the metric; groups are `top1/LABEL`."""
PAIRS = ".pairs.jsonl"
"""Ends the name of the file of held-out pairs, in place of the `.jsonl` of the predictions beside it."""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The files of a run's folder."""

    settings: str
    """config.toml."""
    about: Row
    """run.json: facts that no other file tells; empty if there is none."""
    steps: list[Row]
    """Lines of metrics.jsonl that belong to a training step."""
    last_written: datetime | None
    evaluations: dict[str, Scores]
    """By `step N`, in order."""
    compared: dict[str, Scores]
    """What `vft evaluate` has written: scores by model, and those of two models' difference under "difference"."""
    predictions: dict[str, list[Row]]
    """Of the first and the last evaluation, by `step N`; if there was none, those of `vft evaluate`, by model."""
    quarantine: list[Row]
    pairs: dict[str, list[Row]]
    """Held-out pairs of answers of the same evaluations as `predictions`, if they had any."""

    @property
    def config(self) -> Row:
        """The settings as a table, of any version of vft; empty if they can't be read."""
        return _table(self.settings)


def read_run(folder: Path) -> RecordedRun:
    """Read what there is. Missing files count as empty, and lines that were cut off are skipped."""
    settings, metrics, answers = folder / "config.toml", folder / "metrics.jsonl", folder / "predictions"
    lines = [line for line in read_jsonl(metrics) if isinstance(line.get("step"), int)]
    evaluations: dict[int, Scores] = {line["step"]: scores for line in lines if (scores := scores_of(line))}
    for step in {min(evaluations), max(evaluations)} if evaluations else ():
        evaluations[step] = _with_parts(evaluations[step], folder / "scores" / f"step-{step:06d}.json")
    files = _prediction_files(answers, sorted(evaluations))
    return RecordedRun(
        settings=settings.read_text(encoding="utf-8") if settings.is_file() else "",
        about=read_json(folder / "run.json"),
        steps=[line for line in lines if is_number(line.get("loss"))],
        last_written=datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.is_file() else None,
        evaluations={f"step {step}": evaluations[step] for step in sorted(evaluations)},
        compared={
            name: {
                metric: Interval(one["value"], one["low"], one["high"], tokenization=one.get("tokenization", ""))
                for metric, one in scores.items()
            }
            for name, scores in read_json(answers / "scores.json").items()
            if isinstance(scores, dict)
        },
        predictions={name: _rows(file, "prediction", str) for name, file in files.items()},
        quarantine=read_jsonl(folder / "quarantine.jsonl"),
        pairs={name: _rows(file.with_suffix(PAIRS), "margin", float) for name, file in files.items()},
    )


def read_settings(folder: Path) -> Row:
    """`RecordedRun.config` alone."""
    file = folder / "config.toml"
    return _table(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else {}


def _table(settings: str) -> Row:
    with suppress(tomllib.TOMLDecodeError, RecursionError):
        return tomllib.loads(settings)
    return {}


def read_jsonl(file: Path) -> list[Row]:
    """The objects in a JSONL file; none if there is no file."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return [row for line in text.split("\n") if (row := _parse(line))]


def _rows(file: Path, key: str, kind: type) -> list[Row]:
    """Those in which `key` is of this kind."""
    return [row for row in read_jsonl(file) if isinstance(row.get(key), kind)]


def read_json(file: Path) -> Row:
    """The object in a JSON file; empty if there is no file."""
    return _parse(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else {}


def _parse(text: str) -> Row:
    """A JSON object; empty if `text` is something else."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else {}
    return {}


def _prediction_files(folder: Path, steps: Sequence[int]) -> dict[str, Path]:
    """The first and the last file that belongs to an evaluation: steps that a resume undid may have left others."""
    files = {f"step {path.stem[5:].lstrip('0') or 0}": path for path in sorted(folder.glob("step-*[0-9].jsonl"))}
    names = [name for name in (f"step {step}" for step in steps) if name in files] or [*files]
    if not names:
        files = {name: folder / f"{name}.jsonl" for name in ("base", "adapter")}
        names = [name for name, path in files.items() if path.is_file()]
    return {name: files[name] for name in names[:1] + names[-1:]}


def _with_parts(scores: Scores, file: Path) -> Scores:
    """The scores with the parts that they were computed from, if `file` has them."""
    parts: dict[str, Parts] = {}
    with suppress(KeyError, TypeError, ValueError, IndexError):
        parts = parts_from_json(read_json(file))
    return {name: replace(score, parts=parts.get(name)) for name, score in scores.items()}


def scores_of(line: Row) -> dict[str, Interval]:
    """The scores in a line of metrics.jsonl; none in the line of a training step."""
    intervals, tokenization = line.get("eval_intervals", {}), line.get("eval_tokenization", {})
    values = {key[5:]: line[key] for key in line if key.startswith("eval_") and is_number(line[key])}
    scores = {}
    for name, value in values.items():
        low, high = intervals.get(name, (value, value))
        scores[name] = Interval(value, low, high, tokenization=tokenization.get(name, ""))
    return scores


def is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
