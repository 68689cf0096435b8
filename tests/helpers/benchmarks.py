"""Records of benchmarks read, and answers to them as a model would give them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vft.benchmarks import Benchmark
from vft.common.task import Answer, Question
from vft.common.types import Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats
from vft.preparation.documents import questions


def write_json(path: Path, content: Any) -> None:
    """A JSON file, with its folder; a JSONL file of a list if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one) for one in content] if path.suffix == ".jsonl" else [json.dumps(content)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A Parquet file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def write_empty(*files: Path) -> None:
    """Files without content, with their folders: reading records does not open media."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def read(benchmark: Benchmark, root: Path, **settings: Any) -> tuple[list[Sample], list[str]]:
    """The samples of a benchmark that lies in its place below `root`, and the messages about bad records."""
    kind = type(benchmark)
    source = SourceConfig(format=f"{kind.__module__}:{kind.__name__}", **{"path": benchmark.path, **settings})
    samples, bad = formats.read(source, DataConfig(root=root))
    return samples, [str(one) for one in bad]


def asked(benchmark: Benchmark, samples: Sequence[Sample]) -> list[Question]:
    """The questions that are put to the model."""
    return questions([one for sample in samples for one in benchmark.conversations(sample)])


def answered(benchmark: Benchmark, samples: Sequence[Sample], texts: Sequence[str]) -> list[Answer]:
    """An answer to each question; the first option is always the likeliest."""
    pairs = zip(asked(benchmark, samples), texts, strict=True)
    return [
        Answer(one, text, scores := tuple(-float(i) for i in range(len(one.prompt.options))), scores)
        for one, text in pairs
    ]
