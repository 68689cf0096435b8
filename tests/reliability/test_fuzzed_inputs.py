"""Damaged records, tables, archives and settings of every kind: never a traceback, and lines that say where.

`--count 10000` is so many inputs over all kinds, the same in every run. tests/unit/data/test_fuzzed_records.py has as
many for the readers of records alone, in CI.
"""

from __future__ import annotations

import io
import json
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.formats import read_kinetics, read_ucf101, read_video_mme
from tests.unit.data import test_fuzzed_records as records
from tests.unit.data.test_fuzzed_records import CUTS, EDITS, Records, check, check_samples, cut, damaged, is_line
from vft.common.errors import UserError
from vft.config import run as configs
from vft.data.formats import pe_video
from vft.data.streaming.tar import DamagedArchive

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))
ALL_SETTINGS = {
    "output_dir": "runs/x",
    "seed": 1,
    "model": {"path": "m", "quantize": "none"},
    "lora": {"rank": 8, "alpha": 16, "ranks": {"language_model.q_proj": 3}, "targets": ["language_model.*"]},
    "data": {
        "root": "d",
        "sources": [{"format": "messages", "path": "a.jsonl"}, {"format": "llava_video", "path": "b", "weight": 2}],
        "video": {"fps": 1.5, "max_frames": 8},
        "workers": 2,
        "cache": "none",
    },
    "train": {
        "max_steps": 20,
        "warmup_steps": 2,
        "precision": "fp32",
        "component_learning_rates": {"language_model": 1e-4},
    },
    "parallel": {"shard": 1, "memory_budget_gib": 3.5, "activation_checkpointing": "auto"},
    "checkpoint": {"every_steps": 5, "keep_last": 2},
    "eval": {"every_steps": 0, "sources": [{"format": "story", "path": "e.jsonl"}]},
    "log": {"every_steps": 1, "profile_steps": [1, 2]},
}
ODD_TOML = b"\" ' \n = [ ] { } . # \\ \\ud800 nan inf 0x 1e999 1979-05-27 '''\n \0 \xff \xc3 \xe2\x80\xa8".split(b" ")
TOML_BYTES = [*ODD_TOML, b"9" * 5000, b"0x" + b"f" * 6000, b"[" * 3000, b"a=" + b"[" * 3000 + b"]" * 3000, b"x." * 3000]
TOML_CUTS = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 12), st.sampled_from(TOML_BYTES)), min_size=1, max_size=3
)
OVERRIDES = st.tuples(
    st.sampled_from(
        ["data.workers", "data.sources.0.path", "lora", "data.sources.9.path", "a.b", "", ".", "model.path"]
    )
    | st.text(max_size=8),
    st.sampled_from(["", "=", "==", "=[", "={a=1}", "=" + "[" * 3000, "=0x" + "f" * 6000, "=1\nseed=2", "='"])
    | st.text(max_size=8),
).map("".join)

Body = Callable[[Path, Any], str]
"""Reads what a drawn example makes in a folder; what came of it, in a word."""


def outcome(result: Records) -> str:
    """Of a reader: whether records were left out."""
    return "bad records" if result[1] else "good"


def json_body(name: str) -> Body:
    read, good = records.JSON[name]

    def body(root: Path, edits: Any) -> str:
        (root / "labels.json").write_text(json.dumps(records.SSV2_LABELS))
        (root / "records.json").write_text("\n".join(map(json.dumps, damaged(good, edits))))
        check(read, root / "records.json", root)
        return "read"

    return body


def of_parquet(root: Path, drawn: Any) -> str:
    edits, cuts = drawn
    path = root / "mme.parquet"
    try:
        rows = [row for row in damaged([records.ROW, records.ROW], edits) if isinstance(row, dict)]
        pq.write_table(pa.Table.from_pylist(rows), path)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return "no table"
    if cuts:
        path.write_bytes(cut(path.read_bytes(), cuts))
    check(lambda file, top: read_video_mme(file, top), path, root)
    return "read"


def of_tar(root: Path, drawn: Any) -> str:
    edits, cuts = drawn
    content = io.BytesIO()
    record: dict[str, Any] = {"human_caption": "A cat.", "model_caption": "", "description": {"a": ["b", 1]}}
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number in range(3):
            about = damaged([record], edits) if number == 1 else [record]
            for suffix, text in ((".mp4", b"x"), (".json", json.dumps(about[0] if about else None).encode())):
                entry = tarfile.TarInfo(f"{number}{suffix}")
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text))
    (root / "a.tar").write_bytes(cut(content.getvalue(), cuts) if cuts else content.getvalue())
    (root / "spool").mkdir(exist_ok=True)
    try:
        for group in pe_video.read_clips(str(root / "a.tar"), 0, root / "spool"):
            assert all(is_line(str(one)) and one.origin.startswith("a.tar/") for one in group.bad)
            check_samples(group.samples, root)
            for file in group.files:
                file.unlink()
    except DamagedArchive as error:
        assert is_line(str(error)) and str(error).startswith(str(root / "a.tar"))
        return "damaged"
    return "read"


def of_ucf101(root: Path, cuts: Any) -> str:
    (root / "classInd.txt").write_bytes(records.UCF101_CLASSES)
    (root / "list.txt").write_bytes(cut(records.UCF101, cuts))
    check(read_ucf101, root / "list.txt", root, "classInd.txt")
    return "read"


def of_kinetics(root: Path, cuts: Any) -> str:
    (root / "val.csv").write_bytes(cut(records.KINETICS, cuts))
    check(read_kinetics, root / "val.csv", root)
    return "read"


def load_settings(file: Path, *overrides: str) -> str:
    """A configuration, or one line that names the file or the command line, and what stands there."""
    try:
        configs.load(file, overrides)
    except UserError as error:
        line = str(error)
        assert is_line(line) and len(line) < 1500, line
        assert line.startswith((f"{file}: ", f"{file} and command line: ", "command line: ")), line
        assert line.partition(": ")[2]
        return "refused"
    return "accepted"


def of_settings_text(root: Path, drawn: Any) -> str:
    recipe, cuts = drawn
    (root / "a.toml").write_bytes(cut(RECIPES[recipe % len(RECIPES)].read_bytes(), cuts))
    return load_settings(root / "a.toml")


def of_settings(root: Path, edits: Any) -> str:
    table = (damaged([ALL_SETTINGS], edits) or [{}])[0]
    try:
        text = tomli_w.dumps(table)
        tomllib.loads(text)
        text.encode()
    except (TypeError, ValueError, AttributeError):
        return "no TOML"
    (root / "a.toml").write_text(text)
    return load_settings(root / "a.toml")


def of_overrides(root: Path, override: str) -> str:
    (root / "a.toml").write_text(tomli_w.dumps(ALL_SETTINGS))
    return load_settings(root / "a.toml", override)


MAYBE_CUTS = st.just([]) | CUTS
KINDS: dict[str, tuple[st.SearchStrategy[Any], Body]] = {
    **{name: (EDITS, json_body(name)) for name in records.JSON},
    "Parquet": (st.tuples(EDITS, MAYBE_CUTS), of_parquet),
    "tar": (st.tuples(EDITS, MAYBE_CUTS), of_tar),
    "ucf101": (CUTS, of_ucf101),
    "kinetics": (CUTS, of_kinetics),
    "TOML text": (st.tuples(st.integers(0, 50), TOML_CUTS), of_settings_text),
    "TOML settings": (EDITS, of_settings),
    "overrides": (OVERRIDES, of_overrides),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs(tmp_path: Path, count: Callable[[int], int], kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "root"
    (root / "frames").mkdir(parents=True)
    for name in ("a.mp4", "0.jpg", "1.jpg", "frames/1.jpg"):
        (root / name).write_bytes(b"x")
    strategy, body = KINDS[kind]
    outcomes: dict[str, int] = {}

    @settings(
        max_examples=max(20, -(-count(240) // len(KINDS))),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn=strategy)
    def run(drawn: Any) -> None:
        what = body(root, drawn)
        outcomes[what] = outcomes.get(what, 0) + 1

    run()
    print(f"{kind}: {outcomes}, 0 tracebacks")
