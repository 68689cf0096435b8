"""`report.html`: what a run was, how it went and what its model answers, as one page that needs no other file.

It is made from the files that the run leaves (`run_folder`), so it can be made again at any time. `report.html` beside
this module is its template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from vft.common.files import replace_text
from vft.common.scores import Interval
from vft.data.dataset import Dataset
from vft.models.processor import VisionProcessor
from vft.reporting.chart import Curve, line_chart
from vft.reporting.examples import examples, references_of
from vft.reporting.run_folder import RecordedRun, Row, is_number, read_run
from vft.reporting.score_tables import COUNTS, score_tables
from vft.reporting.templates import render

MAX_CLASSES = 30
"""Of a confusion matrix. With more classes, as many of the most confused pairs are listed instead."""
MAX_LINES = 6
"""Of a chart: scores of more groups are not drawn."""
CURVES = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens per second"}
"""Figures of training steps that are drawn, with their titles."""


def write_report(folder: Path, held_out: Dataset | None, processor: VisionProcessor | None) -> Path:
    """Write `report.html` into a run's folder, from what is there so far. Returns its path.

    The frames of the examples are decoded again from `held_out`; without it the examples have no frames.
    """
    run = read_run(folder)
    task, base = run.config.get("task", "run"), run.config.get("model", {}).get("path", folder.name)
    page = render(
        "report.html",
        title=f"{task}: {base}",
        facts=facts(run, held_out),
        sources=sources(run.config),
        seen=sampling(run.config.get("data", {}).get("video", {})),
        tables=[*score_tables(run.evaluations), *score_tables(run.compared, ", by tools/evaluate.py")],
        charts=charts(run),
        confusion=confusion_table(run.predictions) if task == "classify" else None,
        examples=examples(run.predictions, held_out, processor),
        quarantine=reasons(run.quarantine),
        settings=run.settings,
    )
    replace_text(folder / "report.html", page)
    return folder / "report.html"


def facts(run: RecordedRun, held_out: Dataset | None) -> dict[str, str]:
    """What was trained, on what, for how long."""
    config, steps = run.config, run.steps
    lora = config.get("lora")
    kind = "DoRA" if lora and lora.get("dora") else "LoRA"
    components = ", ".join(config.get("model", {}).get("train", ()))
    found = {
        "trained": f"{kind} of rank {lora.get('rank')}: {', '.join(lora.get('targets', ()))}" if lora else components,
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
    """The sources of training, then those that are held out."""
    sections = {"trained on": config.get("data", {}), "held out": config.get("eval", {})}
    rows = [
        {
            "use": use,
            "path": source.get("path"),
            "format": source.get("format"),
            "how_often": how_often(source),
        }
        for use, section in sections.items()
        for source in section.get("sources") or ()
    ]
    if split := config.get("eval", {}).get("split"):
        rows.append({"use": "held out", "path": f"of these, {split:g} of the media", "format": "", "how_often": "once"})
    return rows


def how_often(source: Row) -> str:
    """How often the records of a source come, as its settings say: `repeats 2`, or `once`."""
    given = [f"{name} {source[name]:g}" for name in ("repeats", "share", "weight") if source.get(name) is not None]
    return given[0] if given else "once"


def sampling(video: Row) -> str:
    """Frames of a video and their size, from `[data.video]`; empty if the settings don't say."""
    if "max_pixels" not in video or not ("frames" in video or "fps" in video):
        return ""
    if "frames" in video:
        frames = f"{video['frames']} frames"
    else:
        frames = f"{video['fps']:g} frames a second, at most {video['max_frames']}"
    return f"Videos were seen at {frames}, of at most {video['max_pixels']:,} pixels each."


def charts(run: RecordedRun) -> list[Row]:
    """Curves over steps: those of training, then one chart for each score, and one for each family of groups."""
    curves: dict[str, dict[str, Curve]] = {
        title: {"training": [(row["step"], Interval.point(row[key])) for row in run.steps if is_number(row.get(key))]}
        for key, title in CURVES.items()
    }
    scores: dict[str, list[tuple[int, Interval]]] = {}
    for name, evaluation in run.evaluations.items():
        for metric, score in evaluation.items():
            scores.setdefault(metric, []).append((int(name.split()[1]), score))
    curves["loss"] |= {"held-out": scores.pop("loss", [])}
    for metric, curve in scores.items():
        family, _, group = metric.rpartition("/")
        if metric not in COUNTS:
            curves.setdefault(f"{family}/…" if family else metric, {})[group] = curve
    made = []
    for title, lines in curves.items():
        filled = {name: curve for name, curve in lines.items() if curve}
        if 0 < len(filled) <= MAX_LINES:
            made.append({"title": title, "names": list(filled), "svg": line_chart(title, filled)})
    return made


def confusion_table(predictions: Mapping[str, list[Row]]) -> Row | None:
    """Which class was taken for which in the last evaluation: a matrix, or of many classes the most confused pairs.

    As in `top1/LABEL`, a clip with several right labels counts in each of their classes, and as right if it got any.
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
    counts = Counter(pairs)
    totals = Counter(right for _, right in pairs)
    classes = sorted({label for pair in pairs for label in pair})
    if len(classes) <= MAX_CLASSES:
        matrix = [(right, totals[right], [counts[chosen, right] for chosen in classes]) for right in classes]
        return {"name": name, "classes": classes, "rows": matrix, "pairs": []}
    wrong = sorted((-n, right, chosen) for (chosen, right), n in counts.items() if chosen != right)[:MAX_CLASSES]
    most_confused = [(right, chosen, -n, totals[right]) for n, right, chosen in wrong]
    return {"name": name, "classes": [], "rows": [], "pairs": most_confused}


def reasons(quarantine: Sequence[Row]) -> list[Row]:
    """Why samples were left out, the most frequent reason first, each with its first message."""
    messages = {str(row.get("reason")): str(row.get("message")) for row in reversed(quarantine)}
    counts = Counter(str(row.get("reason")) for row in quarantine)
    return [{"reason": reason, "count": n, "message": messages[reason]} for reason, n in counts.most_common()]
