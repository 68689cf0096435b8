"""`report.html`: what a run was, how it went and what it says now, as one page that needs nothing beside itself.

It is made of the files that a run leaves, so it can be made anew at any time. `report.html` beside this module is the
page's layout; it escapes all that it is given but the charts.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from vft.common.files import replace_text
from vft.common.scores import Interval, Parts
from vft.data.dataset import Dataset
from vft.metrics import confusion, paired_difference, parts_from_json
from vft.models.processor import VisionProcessor
from vft.reporting.chart import Curve, line_chart
from vft.reporting.examples import examples, references_of

Row = dict[str, Any]
"""A line of a JSONL file, or what the page's layout takes."""
Scores = Mapping[str, Interval]

LAYOUT = Path(__file__).with_name("report.html")
MAX_CLASSES = 30
"""Of a confusion matrix; of more classes the most confused pairs are listed, as many."""
MAX_LINES = 6
"""Groups whose curves share a chart; more would be a tangle."""
DIFFERENCE = "difference"
CURVES = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens per second"}
"""Figures of a training step that are drawn, with their titles."""
COUNTS = ("answered", "unreadable", "cut_off")
"""Among the scores, but of the data: they need no curves."""


def write_report(folder: Path, held_out: Dataset | None, processor: VisionProcessor | None) -> Path:
    """Write `report.html` into a run's folder, from what has been written there so far.

    The frames of the examples are decoded anew from `held_out`; without it there are texts alone.
    """
    run = read_run(folder)
    task, base = run.config.get("task", "run"), run.config.get("model", {}).get("path", folder.name)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(LAYOUT.read_text(encoding="utf-8")).render(
        title=f"{task}: {base}",
        facts=facts(run, held_out),
        sources=sources(run.config),
        seen=sampling(run.config.get("data", {}).get("video", {})),
        tables=[*comparison(run.evaluations), *comparison(run.compared, ", by tools/evaluate.py")],
        charts=charts(run),
        confusion=confused(run.predictions) if task == "classify" else None,
        examples=examples(run.predictions, held_out, processor),
        quarantine=reasons(run.quarantine),
        settings=run.settings,
    )
    replace_text(folder / "report.html", page)
    return folder / "report.html"


# ------------------------------------------------------------------------------------------------- what a run leaves


@dataclass(frozen=True, slots=True)
class Run:
    """What a run's folder says."""

    settings: str
    """config.toml as it is."""
    about: Row
    """run.json: what no other file tells, by name; empty where there is none."""
    steps: list[Row]
    last_written: datetime | None
    evaluations: dict[str, Scores]
    """By `step N`, in order."""
    compared: dict[str, Scores]
    """By model, of tools/evaluate.py, two models' difference under `DIFFERENCE`; empty where it didn't run."""
    predictions: dict[str, list[Row]]
    """Of the first and the last evaluation, by `step N`; of tools/evaluate.py where the run had none."""
    quarantine: list[Row]

    @property
    def config(self) -> Row:
        """The settings as a table, of any version of the project; empty where they can't be read."""
        with suppress(tomllib.TOMLDecodeError):
            return tomllib.loads(self.settings)
        return {}


def read_run(folder: Path) -> Run:
    """All that there is; lines that were cut off are left out."""
    settings, metrics, answers = folder / "config.toml", folder / "metrics.jsonl", folder / "predictions"
    lines = [line for line in read_lines(metrics) if isinstance(line.get("step"), int)]
    evaluations: dict[int, Scores] = {line["step"]: scores for line in lines if (scores := scores_of(line))}
    compared = next(iter(read_lines(answers / "scores.json", whole=True)), {})
    for step in {min(evaluations), max(evaluations)} if evaluations else ():
        evaluations[step] = with_parts(evaluations[step], folder / "scores" / f"step-{step:06d}.json")
    return Run(
        settings=settings.read_text(encoding="utf-8") if settings.is_file() else "",
        about=next(iter(read_lines(folder / "run.json", whole=True)), {}),
        steps=[line for line in lines if is_number(line.get("loss"))],
        last_written=datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.is_file() else None,
        evaluations={f"step {step}": evaluations[step] for step in sorted(evaluations)},
        compared={
            name: {
                metric: Interval(one["value"], one["low"], one["high"], tokenization=one.get("tokenization", ""))
                for metric, one in scores.items()
            }
            for name, scores in compared.items()
            if isinstance(scores, dict)
        },
        predictions=read_predictions(answers, sorted(evaluations)),
        quarantine=read_lines(folder / "quarantine.jsonl"),
    )


def with_parts(scores: Scores, file: Path) -> Scores:
    """The scores with what they were computed from, where that was kept."""
    parts: dict[str, Parts] = {}
    with suppress(KeyError, TypeError, ValueError, IndexError):
        parts = parts_from_json(next(iter(read_lines(file, whole=True)), {}))
    return {name: replace(score, parts=parts.get(name)) for name, score in scores.items()}


def read_lines(file: Path, whole: bool = False) -> list[Row]:
    """The tables of a JSONL file, or the one of a JSON file; none where there is no file."""
    found = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for part in [text] if whole else text.split("\n"):
        with suppress(ValueError):
            found.append(json.loads(part))
    return [row for row in found if isinstance(row, dict)]


def read_predictions(folder: Path, steps: Sequence[int]) -> dict[str, list[Row]]:
    """The first and the last file; of steps that a resume undid, files may be left that no evaluation speaks of."""
    files = {f"step {path.stem[5:].lstrip('0') or 0}": path for path in sorted(folder.glob("step-*.jsonl"))}
    names = [name for name in (f"step {step}" for step in steps) if name in files] or [*files]
    if not names:
        files = {name: folder / f"{name}.jsonl" for name in ("base", "adapter")}
        names = [name for name, path in files.items() if path.is_file()]
    read = {name: read_lines(files[name]) for name in names[:1] + names[-1:]}
    return {name: [row for row in rows if isinstance(row.get("prediction"), str)] for name, rows in read.items()}


def scores_of(line: Row) -> dict[str, Interval]:
    """The scores in a line of metrics.jsonl; none in a training step's."""
    intervals, cut = line.get("eval_intervals", {}), line.get("eval_tokenization", {})
    values = {key[5:]: line[key] for key in line if key.startswith("eval_") and is_number(line[key])}
    found = {}
    for name, value in values.items():
        low, high = intervals.get(name, (value, value))
        found[name] = Interval(value, low, high, tokenization=cut.get(name, ""))
    return found


def is_number(value: object) -> bool:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


# ----------------------------------------------------------------------------------------------------------- numbers


def facts(run: Run, held_out: Dataset | None) -> dict[str, str]:
    """What was run, on what, for how long."""
    config, steps = run.config, run.steps
    lora = config.get("lora")
    trained = ", ".join(config.get("model", {}).get("train", ()))
    kind = "DoRA" if lora and lora.get("dora") else "LoRA"
    found = {
        "trained": f"{kind} of rank {lora.get('rank')}: {', '.join(lora.get('targets', ()))}" if lora else trained,
        "steps": f"{steps[-1]['step']:,}" if steps else "none",
        **{name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in run.about.items()},
    }
    if steps:
        samples, tokens, seconds = (
            sum(row[key] for row in steps if is_number(row.get(key))) for key in ("samples", "tokens", "step_time_s")
        )
        found["trained on"] = f"{samples:,} samples, {tokens:,} tokens, repetitions counted"
        found["time in steps"] = str(timedelta(seconds=round(seconds)))
    if run.last_written is not None:
        found["last written"] = f"{run.last_written:%Y-%m-%d %H:%M} UTC"
    if held_out is not None:
        found["held out"] = f"{held_out.num_samples:,} samples in {len(held_out.documents):,} documents"
    found["left out"] = f"{len(run.quarantine):,} samples" if run.quarantine else "nothing"
    return {name: value for name, value in found.items() if value}


def sources(config: Row) -> list[Row]:
    """What was trained on, then what was held out of it."""
    named = {"trained on": config.get("data", {}), "held out": config.get("eval", {})}
    rows = [
        {"use": use, "path": one.get("path"), "format": one.get("format"), "how_often": how_often(one)}
        for use, section in named.items()
        for one in section.get("sources") or ()
    ]
    if split := config.get("eval", {}).get("split"):
        rows.append({"use": "held out", "path": f"of these, {split:g} of the media", "format": "", "how_often": "once"})
    return rows


def how_often(source: Row) -> str:
    """What a source's settings say of how much of it is trained on."""
    given = [f"{name} {source[name]:g}" for name in ("repeats", "share", "weight") if source.get(name) is not None]
    return given[0] if given else "once"


def sampling(video: Row) -> str:
    """Frames of a video and their size, in words; nothing where the settings don't tell."""
    if "max_pixels" not in video or not ("frames" in video or "fps" in video):
        return ""
    frames = f"{video['frames']} frames" if "frames" in video else f"{video['fps']:g} frames a second"
    most = "" if "frames" in video else f", at most {video['max_frames']}"
    return f"Videos were seen at {frames}{most}, of at most {video['max_pixels']:,} pixels each."


def comparison(evaluations: Mapping[str, Scores], made_by: str = "") -> list[Row]:
    """Tables of the first evaluation beside the last: of the scores, and of their groups."""
    models = [name for name in evaluations if name != DIFFERENCE]
    names = list(dict.fromkeys(models[:1] + models[-1:]))
    sides = [evaluations[name] for name in names]
    rows = []
    for metric in dict.fromkeys(metric for side in sides for metric in side):
        scores = [side.get(metric) for side in sides]
        found = evaluations.get(DIFFERENCE, {}).get(metric)
        told = ("", "") if len(sides) < 2 else changed(*scores) if found is None else shown(found, "+")
        cut = " / ".join(dict.fromkeys(one.tokenization for one in scores if one is not None and one.tokenization))
        row = {"metric": metric, "cut": cut, "scores": [shown(one) for one in scores]}
        rows.append({**row, "change": told})
    parts = {
        f"Scores{made_by}": [row for row in rows if "/" not in row["metric"]],
        f"Groups{made_by}": [row for row in rows if "/" in row["metric"]],
    }
    return [
        {"title": title, "names": names, "rows": part, "intervals": any(i for row in part for _, i in row["scores"])}
        for title, part in parts.items()
        if part
    ]


def shown(score: Interval | None, sign: str = "") -> tuple[str, str]:
    """A value and its interval, empty where there is none; with `sign` "+" both with their signs."""
    if score is None:
        return "", ""
    ends = f"[{score.low:{sign}.3g}, {score.high:{sign}.3g}]" if score.low < score.high else ""
    return f"{score.value:{sign}.4g}", ends


def changed(before: Interval | None, after: Interval | None) -> tuple[str, str]:
    """The difference of two scores, and its interval where both were taken on questions that are the same."""
    if before is None or after is None:
        return "", ""
    if before.tokenization and after.tokenization and before.tokenization != after.tokenization:
        return "", "texts cut in two ways"
    if before.parts is None or after.parts is None:
        return f"{after.value - before.value:+.4g}", ""
    paired = paired_difference(before, after)
    if paired is None:
        return "", "other questions"
    value, ends = shown(paired[0], "+")
    samples = max(len(one.parts.samples.names) for one in (before, after) if one.parts is not None)
    return value, ends if paired[1] == samples else f"{ends} on the {paired[1]} of both".strip()


def charts(run: Run) -> list[Row]:
    """Curves over steps: of training, then of each score, groups of one kind together."""
    drawn: dict[str, dict[str, Curve]] = {
        title: {"training": [(row["step"], point(row[key])) for row in run.steps if is_number(row.get(key))]}
        for key, title in CURVES.items()
    }
    scores: dict[str, list[tuple[int, Interval]]] = {}
    for name, evaluation in run.evaluations.items():
        for metric, score in evaluation.items():
            scores.setdefault(metric, []).append((int(name.split()[1]), score))
    drawn["loss"] |= {"held-out": scores.pop("loss", [])}
    for metric, curve in scores.items():
        family, _, group = metric.rpartition("/")
        if metric not in COUNTS:
            drawn.setdefault(f"{family}/…" if family else metric, {})[group] = curve
    made = []
    for title, series in drawn.items():
        filled = {name: curve for name, curve in series.items() if curve}
        if 0 < len(filled) <= MAX_LINES:
            made.append({"title": title, "names": list(filled), "svg": line_chart(title, filled)})
    return made


def point(value: float) -> Interval:
    """A value without an interval."""
    return Interval(value, value, value)


def confused(predictions: Mapping[str, list[Row]]) -> Row | None:
    """Which class was taken for which in the last evaluation: all of them, or the most confused pairs of many.

    As in `top1/LABEL`, a clip with several right labels is in each of their classes, and right there if it is at all.
    """
    if not predictions:
        return None
    name, rows = [*predictions.items()][-1]
    pairs = [
        (right if row["choice"] in references_of(row) else row["choice"], right)
        for row in rows
        if "choice" in row
        for right in dict.fromkeys(references_of(row))
    ]
    if not pairs:
        return None
    counts = confusion([chosen for chosen, _ in pairs], [right for _, right in pairs])
    totals = Counter(right for _, right in pairs)
    classes = sorted({one for pair in pairs for one in pair})
    few = len(classes) <= MAX_CLASSES
    wrong = sorted((-n, right, chosen) for (chosen, right), n in counts.items() if chosen != right)[:MAX_CLASSES]
    return {
        "name": name,
        "classes": classes if few else [],
        "rows": [(one, totals[one], [counts.get((c, one), 0) for c in classes]) for one in classes] if few else [],
        "pairs": [] if few else [(right, chosen, -n, totals[right]) for n, right, chosen in wrong],
    }


def reasons(quarantine: Sequence[Row]) -> list[Row]:
    """What was left out, by reason, the most frequent first, with the first message of each."""
    messages = {str(row.get("reason")): str(row.get("message")) for row in reversed(quarantine)}
    counts = Counter(str(row.get("reason")) for row in quarantine)
    return [{"reason": reason, "count": n, "message": messages[reason]} for reason, n in counts.most_common()]
