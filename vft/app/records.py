"""Data before a run: which files there are, what was read of them, what is wrong, and how a model sees them."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from vft.app.workspace import Workspace, is_run, is_text
from vft.cli.inspect_batch import summary
from vft.common.errors import UserError
from vft.common.task import main_conversation
from vft.common.types import Sample
from vft.config.data import DataConfig, SourceConfig
from vft.config.run import Config
from vft.config.toml import validated
from vft.data import formats
from vft.data.dataset import Dataset, converse
from vft.data.decode_check import decode_all
from vft.data.detection import NATIVE, detect, media_of
from vft.data.media.patches import load_patches
from vft.data.records.files import RECORD_SUFFIXES
from vft.data.records.paths import look_up
from vft.data.records.preferences import DESIRABLE, REJECTED
from vft.data.records.record import BadRecord
from vft.data.records.unread_keys import describe_unread_keys
from vft.data.workers import WorkerPool
from vft.preparation.documents import held_out_split, load_training, questions
from vft.preparation.run import open_for_inference
from vft.recipes import load_task, task_of
from vft.reporting.page import render
from vft.reporting.samples import evenly, samples_shown

DETECTED = "as detected"
MAX_FILES = 500
"""Files of records that are offered."""
MAX_WRONG, MAX_TEXT = 2000, 1000
"""Bad records that are listed, and characters that are shown of a text."""
WORKERS = 2
"""Processes that decode."""
MAX_MEDIA = 20_000
"""Media that are looked for, so that a slow disk doesn't hold the page up."""


def record_files_in(space: Workspace, root: Path) -> list[str]:
    """Files that may hold records, relative to `root`; none of a run or a model."""
    found: list[str] = []
    for folder in space.walk():
        if root != folder and root not in folder.parents:
            continue
        names = set(os.listdir(folder))
        if names & {"config.json", "adapter_config.json", "pyproject.toml"} or is_run(folder):
            continue
        files = sorted(
            name for name in names if Path(name).suffix.lower() in RECORD_SUFFIXES and name[0] != "." and is_text(name)
        )
        found += (os.path.relpath(folder / name, root) for name in files)
    return found[:MAX_FILES]


def data_of(space: Workspace, root: str) -> DataConfig:
    """`[data]` with the folder `root` alone. UserError if there is no such folder in the chosen ones."""
    folder = space.existing(root or ".", "data.root")
    if not folder.is_dir():
        raise UserError(f"data.root = {root!r}: is a file; name the folder that holds it")
    return DataConfig(root=Path(space.shown(folder) if folder != space.home else "."))


def sources_of(
    space: Workspace, data: DataConfig, paths: Sequence[str], format: str, media: str, columns: Mapping[str, str]
) -> list[SourceConfig]:
    """The sources at `paths`, which are relative to `data.root`, or to the page's folder. UserError if one isn't."""
    if not paths:
        raise UserError("data.sources: none is named; choose a file, or write its path")
    look_up.cache_clear()  # files may have come since they were last looked for
    root, made = space.home / data.root, []
    for path in paths:
        file = space.path(root / path, "data.sources.path")
        if not file.exists() and "*" not in path and (file := space.path(path, "data.sources.path")).exists():
            path = os.path.relpath(file, root)
        if not file.exists() and "*" not in path:
            raise UserError(f"data.sources.path = {path!r}: there is no {file}")
        for match in root.glob(path) if "*" in path and not os.path.isabs(path) else ():
            space.path(match, "data.sources.path")  # a link may lead out
        if media:
            space.existing(root / media, "data.sources.media")
        table = {"format": NATIVE if format == DETECTED else format, "path": path, "media": media}
        source = validated(SourceConfig, {**table, "columns": dict(columns)}, "data.sources: {}")
        made.append(detect(path, data, media, columns) if format == DETECTED else source)
    return made


@dataclass(frozen=True)
class Found:
    """What was read of a source."""

    source: SourceConfig
    samples: list[Sample]
    bad: list[BadRecord]


def table_of(source: SourceConfig) -> dict[str, Any]:
    """A source as settings: what differs from the defaults."""
    return source.model_dump(exclude_defaults=True, exclude_none=True)


def read(sources: Sequence[SourceConfig], data: DataConfig) -> list[Found]:
    """What the formats read. A file that can't be read at all is one bad record."""
    found = []
    for source in sources:
        try:
            found.append(Found(source, *formats.read(source, data)))
        except UserError as error:
            found.append(Found(source, [], [BadRecord(source.path, "", str(error).removeprefix(f"{source.path}: "))]))
    return found


def facts(found: Sequence[Found], data: DataConfig, task: str) -> tuple[dict[str, str], list[list[str]]]:
    """What was read, in words, and what is wrong: rows of place, field and message."""
    samples = [sample for one in found for sample in one.samples]
    bad = [[one.origin, one.field, one.message] for part in found for one in part.bad]
    conversations, make = [], main_conversation(load_task(task))
    for sample in samples:
        made, wrong = converse(sample, make, data)
        conversations += made
        bad += ([sample.origin, f"task {task}", item.message.removeprefix(f"{sample.origin}: ")] for item in wrong)
    refs = list(media_of(samples))
    kinds = Counter(_kind_of(ref.kind, isinstance(ref.path, tuple)) for ref in refs)
    files = list(dict.fromkeys(file for ref in refs for file in ref.files))
    looked = evenly(files, MAX_MEDIA)
    gone = [file for file in looked if not os.path.exists(file)]
    bad += (
        [os.path.relpath(file), "media", "there is no such file; check data.root and the media folder"] for file in gone
    )
    turns = Counter(sum(turn.role == "assistant" for turn in sample.turns) for sample in samples)
    asked = questions([one for one in conversations if any(turn.role == "assistant" for turn in one.turns)])
    several = sum(len(set(question.references)) > 1 for question in asked)
    labels = {label for sample in samples for label in sample.fields.get("labels") or ()}
    made_of = {
        "read as": "; ".join(f"{one.source.path}: {_source_text(one.source)}" for one in found),
        "samples": f"{len(samples):,}"
        + (f"; {unread:,} record(s) can't be read" if (unread := sum(len(one.bad) for one in found)) else ""),
        "turns": ", ".join(f"{count:,} with {number} answer(s)" for number, count in sorted(turns.items())[:8]),
        "media": ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()) + f" in {len(files):,} files",
        "not there": f"{len(gone):,} of {len(looked):,} files" if gone else "",
        "without media": f"{n:,}" if (n := sum(not any(media_of([one])) for one in samples)) else "",
        "different questions": f"{len(asked):,}"
        + (f", {several:,} of them with several right answers" * bool(several)),
        "with options": f"{n:,}" if (n := sum(bool(one.options) for one in conversations)) else "",
        "labels": f"{len(labels):,}: {', '.join(sorted(map(str, labels))[:12])}" if labels else "",
        "pairs of answers": f"{n:,}" if (n := sum(s.fields.get(REJECTED) is not None for s in samples)) else "",
        "good or bad answers": f"{n:,}" if (n := sum(DESIRABLE in s.fields for s in samples)) else "",
        "not read": "; ".join(filter(None, (_unread(one) for one in found))),
    }
    return {name: text for name, text in made_of.items() if text}, bad


def _unread(found: Found) -> str:
    return describe_unread_keys(found.source.path, [sample.unread for sample in found.samples])


def _kind_of(kind: str, is_list: bool) -> str:
    return "videos as lists of pictures" if is_list else {"video": "videos", "image": "pictures"}[kind]


def _source_text(source: SourceConfig) -> str:
    columns = ", ".join(f"{name} = {key}" for name, key in source.columns.items())
    return source.format + (f", media in {source.media}" if source.media else "") + (f", {columns}" if columns else "")


def held_out_text(config: Config) -> str:
    """How many samples `eval.split` holds out, in words; empty without it. UserError if one side is left with none: a
    run would end with that at its start."""
    split = held_out_split(config, held_out=True)
    if split is None:
        return ""
    samples = [sample for one in read(config.data.indexed, config.data) for sample in one.samples]
    held, count = sum(split.select(samples, config.data.root)[0]), len(samples)
    if count and held in (0, count):
        side, way = ("is held out", "raise") if not held else ("is left to train on", "lower")
        raise UserError(f"eval.split = {split.share:g}: none of {count:,} samples {side}; {way} it, or write it as 0")
    return f", {held:,} of {count:,} samples held out"


def as_html(known: Mapping[str, str], wrong: Sequence[Sequence[str]], samples: Sequence[Sample]) -> str:
    """The facts, what is wrong, and some samples as they were read."""
    made = [f'<dl class="facts">{_pairs(known.items())}</dl>']
    if wrong:
        more = f"the first {MAX_WRONG:,} of {len(wrong):,}" if len(wrong) > MAX_WRONG else f"{len(wrong):,}"
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in wrong[:MAX_WRONG])
        rows = "".join(f"<tr>{row}</tr>" for row in cells)
        head = "<thead><tr><th>where</th><th>field</th><th>what is wrong</th></tr></thead>"
        made.append(f'<h3 class="bad">What is wrong: {more}</h3>')
        made.append(f'<div class="wide tall"><table>{head}<tbody>{rows}</tbody></table></div>')
    for sample in samples:
        media = ", ".join(os.path.basename(str(ref.name)) for ref in media_of([sample]))
        turns = [("media", media or "none"), *((turn.role, turn.text[:MAX_TEXT]) for turn in sample.turns)]
        where = f"<summary>{escape(sample.origin)}</summary>"
        made.append(f'<details>{where}<dl class="facts">{_pairs(turns)}</dl></details>')
    return "".join(made)


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)


def preview(config: Config, shown: int, looked_at: int) -> str:
    """Lengths of `looked_at` random samples, or of all, and `shown` of them as the model sees them.

    Raises UserError if no sample can be used, or the model's files can't be read.
    """
    few = [
        one if one.take != "all" or one.stream else one.model_copy(update={"take": f"random:{looked_at}"})
        for one in config.data.sources
    ]
    config = _lenient(config, sources=tuple(few))
    documents = _planned(config)
    with WorkerPool(WORKERS, config.data.decode_timeout_s) as pool:
        numbers = evenly(range(len(documents.documents)), shown)
        samples = samples_shown(documents, numbers, lambda *one: pool.submit(load_patches, *one).result())
    index = summary(documents, documents.pack_plan(config.seed), config.data)
    return render("samples.html", samples=samples, index=index, left_out=documents.bad)


def decoded(config: Config) -> Iterator[str]:
    """Every video and picture decoded as training does: how far it is, once a second, and at last what can't be used.

    Raises UserError if no sample can be used, or the model's files can't be read.
    """
    yield "reading the records and the clips' headers ..."
    config = _lenient(config)
    documents = _planned(config)
    bad, count, shown_at = [*documents.bad], len(documents.documents), time.monotonic()
    with WorkerPool(WORKERS, config.data.decode_timeout_s) as pool:
        for number, items in enumerate(decode_all(documents, pool), 1):
            bad += items
            if time.monotonic() - shown_at > 1:
                shown_at = time.monotonic()
                yield f"decoded the media of {number:,} of {count:,} documents; {len(bad):,} can't be used"
    known = {"decoded": f"{len(documents.samples_by_medium):,} videos and pictures, as training will"}
    if not bad:
        known["damaged"] = "none"
    yield as_html(known, [[item.id, item.reason, item.message] for item in bad], ())


def _lenient(config: Config, **changes: Any) -> Config:
    """What is bad is shown, however much it is."""
    changes |= {"max_bad_fraction": 1.0, "workers": WORKERS}
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _planned(config: Config) -> Dataset:
    encoder = open_for_inference(config.model, None, torch.float32).encoder(config.data)
    return load_training(task_of(config), config, encoder)
