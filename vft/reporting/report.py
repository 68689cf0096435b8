"""`report.html`: what a run was, how it went and what its model answers, as one page that needs no other file; and
`README.md`, the card of an exported adapter or model.

Both are made from the files that the run leaves (`run_folder`), so they can be made again at any time. `report.html`
and `card.md` beside this module are their templates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from pprint import pformat

from vft.adapters.peft_format import recorded
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.common.scores import Interval
from vft.data.dataset import Dataset
from vft.data.media.errors import MediaError
from vft.metrics import paired_difference, rouge_l_scores, scale_of, token_f1_scores
from vft.models.pretrained import Pretrained
from vft.models.processor import VisionProcessor
from vft.reporting.page import Curve, line_chart, render
from vft.reporting.run_folder import RecordedRun, Row, Scores, is_number, read_run
from vft.reporting.samples import MediumView, evenly, medium_decoded
from vft.reporting.serving import TEMPLATE_FILE, processor_kwargs, served_template, vllm_serve

Text = tuple[str, str]
"""A value and its interval, each as text; empty if there is none."""
Rank = tuple[float, float]
"""Orders answers, better ones last."""

NUM_EXTREMES, NUM_BETWEEN = 3, 6
"""Examples at each end of the scores, and between them."""
MAX_PAIRS = 24
"""Shown of the held-out pairs."""
MAX_FRAMES = 8
"""Shown of each video."""
FRAME_PIXELS = 224
"""Longest side of a frame on the page."""
MAX_CLASSES = 30
"""Of a confusion matrix. With more classes, as many of the most confused pairs are listed instead."""
MAX_LINES = 6
"""Of a chart: scores of more groups are not drawn."""
CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "margin": "reward_margin",
    "reward_accuracy": "reward_accuracy",
    "likelier_chosen": "likelier_chosen",
    "kl": "kl",
    "log_p_chosen": "log-probabilities/chosen",
    "log_p_rejected": "log-probabilities/rejected",
}
"""Figures of training steps that are drawn, with their titles: `FAMILY/CURVE` in one chart, or the name of the score
that is the same of held-out samples."""
DIFFERENCE = "difference"
"""Name under which `vft evaluate` stores the difference of two models."""
COUNTS = ("answered", "unreadable", "cut_off")
"""Scores that count samples; they have no curves."""
HELD_OUT = "held-out "
"""Before the name of a score, where its curve stands among those of training."""


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
        warnings=[(row["step"], text) for row in run.steps for text in row.get("warnings", ())],
        sources=sources(run.config),
        seen=sampling(run.config.get("data", {}).get("video", {})),
        tables=[*score_tables(run.evaluations), *score_tables(run.compared, ", by tools/evaluate.py")],
        charts=charts(run),
        confusion=confusion_table(run.predictions) if task == "classify" else None,
        examples=examples(run.predictions, held_out, processor),
        pairs=pair_examples(run.pairs, held_out, processor),
        quarantine=reasons(run.quarantine),
        settings=run.settings,
    )
    replace_text(folder / "report.html", page)
    return folder / "report.html"


def write_card(folder: Path, target: Path, step: int | None, checkpoint: Pretrained) -> None:
    """Write `target/README.md` from what the run in `folder` has left so far; `checkpoint` is its base.

    Where `folder` is no run's, as for an adapter of another program that was merged, the card tells what vft.json does.
    Raises UserError if the file can't be written.
    """
    run = read_run(folder)
    # An older vft.json has not all of it.
    asked: Row = dict.fromkeys(("prompt", "prompt_before_media", "system", "pack_tokens"), "")
    asked |= {"other_prompts": 0, "other_systems": 0, **recorded(target)}
    config, merged = run.config or {"data": asked}, "adapter" in asked
    lora = None if merged else config.get("lora")
    video, image = (config["data"].get(name) or {} for name in ("video", "image"))
    options, template = config["data"].get("template_options"), served_template(checkpoint, video)
    if template and lora:  # that of a whole model is corrected already
        replace_text(target / TEMPLATE_FILE, template)
    own, kind = template and (str(target / TEMPLATE_FILE) if lora else ""), checkpoint.config.model_type
    limits = {"processor_kwargs": processor_kwargs(kind, video, image)} if lora and video else {}
    card = render(
        "card.md",
        base=checkpoint.path,
        target=str(target),
        task=config.get("task") or asked.get("task"),
        step=step,
        asked=asked,
        version=version("vft"),
        frames=sampling(video),
        lora=lora,
        merged=merged,
        messages=messages(asked),
        chat_options=repr({**limits, **(options or {})}),
        serve=serve_command(target, checkpoint, lora, config["data"]),
        chat_template=own or "",
        options=options,
        tables=[table for table in score_tables(run.evaluations) if table["title"] == "Scores"],
        facts=facts(run, None),
        sources=[f"{path} ({kind}, {often})" for use, path, kind, often in sources(config) if use == "trained on"],
        settings=run.settings.strip(),
    )
    replace_text(target / "README.md", card)


def serve_command(
    target: Path, base: Pretrained | None = None, lora: Row | None = None, about: Row | None = None
) -> str:
    """How vLLM serves the model that was written to `target`, or on `base` an adapter with its `[lora]` table, with the
    frames and pixels of `about` (its vft.json). Empty for adapters that vLLM doesn't serve."""
    if lora and (lora.get("dora") or "experts" in "".join(lora["targets"])):
        return ""
    about, checkpoint = about or recorded(target), base or Pretrained.open(str(target))
    video, image = about.get("video") or {}, about.get("image") or {}
    template = served_template(checkpoint, video)
    return vllm_serve(
        checkpoint.path if lora else str(target),
        checkpoint.config.model_type,
        video,
        image,
        checkpoint.weight_bytes,
        str(target),
        lora,
        template and (str(target / TEMPLATE_FILE) if lora else ""),
        about.get("template_options"),
    )


def messages(asked: Row) -> str:
    """The conversation of training about a clip, as Python writes it for transformers."""
    texts = [
        {"type": "text", "text": text} for text in (asked["prompt_before_media"], asked["prompt"] or "Describe it.")
    ]
    content = [*(texts[:1] if texts[0]["text"] else ()), {"type": "video", "path": "clip.mp4"}, texts[1]]
    system = [{"role": "system", "content": asked["system"]}] if asked["system"] else []
    return pformat([*system, {"role": "user", "content": content}], width=110, sort_dicts=False)


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


def sources(config: Row) -> list[tuple[str, str, str, str]]:
    """The sources of training, then those that are held out: use, path, format and how often their records come."""
    sections = {"trained on": config.get("data", {}), "held out": config.get("eval", {})}
    rows = [
        (use, one.get("path", ""), one.get("format", ""), how_often(one))
        for use, section in sections.items()
        for one in section.get("sources") or ()
    ]
    if split := config.get("eval", {}).get("split"):
        rows.append(("held out", f"of these, {split:g} of the media", "", "once"))
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


def curves_of(run: RecordedRun) -> dict[str, Curve]:
    """Curves over steps: those of training, then a score's as `held-out NAME`. None of them is empty."""
    curves: dict[str, list[tuple[int, Interval]]] = {
        title: [(row["step"], Interval.point(row[key])) for row in run.steps if is_number(row.get(key))]
        for key, title in (CURVES | {key: key for row in run.steps for key in row if key.startswith("loss/")}).items()
    }
    for name, evaluation in run.evaluations.items():
        for metric, score in evaluation.items():
            curves.setdefault(HELD_OUT + metric, []).append((int(name.split()[1]), score))
    return {title: curve for title, curve in curves.items() if curve}


def charts(run: RecordedRun) -> list[Row]:
    """Those of training, with the same of held-out samples, then one for each other score, and for each family of
    groups."""
    series: dict[str, dict[str, Curve]] = {}
    for title, curve in curves_of(run).items():
        metric = title.removeprefix(HELD_OUT)
        family, _, group = metric.rpartition("/")
        if title == metric:
            series.setdefault(family or title, {})[group if family else "training"] = curve
        elif metric in CURVES.values():
            series.setdefault(metric, {})["held-out"] = curve
        elif metric not in COUNTS:
            series.setdefault(f"{family}/…" if family else metric, {})[group] = curve
    return [chart(title, lines) for title, lines in series.items() if len(lines) <= MAX_LINES]


def chart(title: str, lines: Mapping[str, Curve]) -> Row:
    """For `charts` of parts.html."""
    scale = scale_of(title.removeprefix(HELD_OUT))
    return {"title": title, "scale": scale, "names": list(lines), "svg": line_chart(title, lines)}


def score_tables(evaluations: Mapping[str, Scores], made_by: str = "") -> list[Row]:
    """The first evaluation beside the last one: a table of the scores, and one of those of groups (`top1/LABEL`)."""
    models = [name for name in evaluations if name != DIFFERENCE]
    names = list(dict.fromkeys(models[:1] + models[-1:]))
    sides = [evaluations[name] for name in names]
    tables: dict[str, list[Row]] = {f"Scores{made_by}": [], f"Groups{made_by}": []}
    for metric in dict.fromkeys(metric for side in sides for metric in side):
        scores = [side.get(metric) for side in sides]
        difference = evaluations.get(DIFFERENCE, {}).get(metric)
        change = score_text(difference, "+") if difference or len(sides) < 2 else change_text(*scores)
        cut = " / ".join(dict.fromkeys(one.tokenization for one in scores if one is not None and one.tokenization))
        row = {"metric": metric, "cut": cut, "scores": [score_text(one) for one in scores], "change": change}
        is_group = "/" in metric
        row["scale"] = "" if is_group else scale_of(metric)
        tables[f"{'Groups' if is_group else 'Scores'}{made_by}"].append(row)
    return [
        {
            "title": title,
            "names": names,
            "rows": rows,
            "intervals": any(interval for row in rows for _, interval in row["scores"]),
        }
        for title, rows in tables.items()
        if rows
    ]


def score_text(score: Interval | None, sign: str = "") -> Text:
    """A score and its interval; with `sign` = "+" both have their signs."""
    if score is None:
        return "", ""
    interval = f"[{score.low:{sign}.3g}, {score.high:{sign}.3g}]" if score.low < score.high else ""
    return f"{score.value:{sign}.4g}", interval


def change_text(before: Interval | None, after: Interval | None) -> Text:
    """The difference of two scores, with its interval if both are known sample by sample, on the same questions."""
    if before is None or after is None:
        return "", ""
    if before.tokenization and after.tokenization and before.tokenization != after.tokenization:
        return "", "texts cut in two ways"
    if before.parts is None or after.parts is None:
        return f"{after.value - before.value:+.4g}", ""
    paired = paired_difference(before, after)
    if paired is None:
        return "", "other questions"
    difference, num_common = paired
    value, interval = score_text(difference, "+")
    num_samples = max(len(before.parts.samples.names), len(after.parts.samples.names))
    return value, interval if num_common == num_samples else f"{interval} on the {num_common} of both".strip()


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


# ------------------------------------------------------------------------------------------------------- examples


def examples(
    predictions: Mapping[str, list[Row]], held_out: Dataset | None, processor: VisionProcessor | None
) -> list[Row]:
    """The best answers of the last evaluation, some spread evenly and the worst, beside those of the first one.

    `why` is `best`, `worst` or empty. Each of the `answers` is the name of the evaluation, the line of its predictions
    file and the likeliest option's score.
    """
    if not predictions:
        return []
    rows = [*predictions.values()][-1]
    by_key = {name: {key_of(row): row for row in own} for name, own in predictions.items()}
    grades = grade(rows)
    made = []
    for index, why in choose([rank for rank, _ in grades]).items():
        row = rows[index]
        to_this = [(name, own[key_of(row)]) for name, own in by_key.items() if key_of(row) in own]
        example = {"id": row.get("id", ""), "why": why, "grade": grades[index][1], "prompt": row.get("prompt", "")}
        example["media"] = strips(row, held_out, processor) if held_out and processor else []
        example["references"] = references_of(row)
        example["answers"] = [
            (name, one, max((one.get("option_scores") or {"": 0.0}).values())) for name, one in to_this
        ]
        made.append(example)
    return made


def pair_examples(
    pairs: Mapping[str, list[Row]], held_out: Dataset | None, processor: VisionProcessor | None
) -> list[Row]:
    """The pairs of the last evaluation with the lowest margins, as `examples` gives answers. A `note` has the answer's
    log-probability, and the reference's if there is one."""
    made: list[Row] = []
    rows = [*pairs.values()][-1] if pairs else []
    for row in sorted(rows, key=lambda one: one["margin"])[:MAX_PAIRS]:
        example = {"id": row.get("id", ""), "why": "", "prompt": row.get("prompt", ""), "references": []}
        example["grade"] = f"margin {row['margin']:+.2f}"
        example["media"] = strips(row, held_out, processor) if held_out and processor else []
        example["answers"] = []
        for which in ("chosen", "rejected"):
            values = {"log p": row.get(f"log_p_{which}"), "of the reference": row.get(f"reference_{which}")}
            note = ", ".join(f"{name} {value:.2f}" for name, value in values.items() if is_number(value))
            example["answers"].append((which, {"prediction": row.get(which, ""), "note": note}, 0.0))
        made.append(example)
    return made


def key_of(row: Row) -> tuple[object, ...]:
    """Identifies a question: ids may repeat between sources. Files of earlier versions name no source."""
    return row.get("id"), row.get("prompt"), row.get("source"), tuple(row.get("media") or ())


def references_of(row: Row) -> list[str]:
    """The right answers; none if they are not known."""
    return row.get("references") or [row["reference"]] if row.get("reference") is not None else []


def grade(rows: Sequence[Row]) -> list[tuple[Rank | None, str]]:
    """A rank for each answer, larger is better, and the same in words; None if no right answer is known.

    A chosen option is right or wrong; the further it is ahead of the next option, the better or worse it is.
    """
    grades: list[tuple[Rank | None, str]] = [(None, "")] * len(rows)
    texts = [i for i, row in enumerate(rows) if "choice" not in row and references_of(row)]
    answers, references = [rows[i]["prediction"] for i in texts], [references_of(rows[i]) for i in texts]
    if texts:
        try:
            name, scores = "ROUGE-L", rouge_l_scores(answers, references)
        except UserError:  # its package is not installed
            name, scores = "token F1", token_f1_scores(answers, references)
        for i, score in zip(texts, scores, strict=True):
            grades[i] = (score, 0.0), f"{name} {score:.2f}"
    for i, row in enumerate(rows):
        if "choice" in row and references_of(row):
            right = row["choice"] in references_of(row)
            first, second, *_ = *sorted(row["option_scores"].values(), reverse=True), -math.inf
            grades[i] = (float(right), first - second if right else second - first), "right" if right else "wrong"
    return grades


def choose(ranks: Sequence[Rank | None]) -> dict[int, str]:
    """Indices of the answers to show, each with the reason: the best, some between, the worst."""
    order = sorted((rank, i) for i, rank in enumerate(ranks) if rank is not None)
    count = min(NUM_EXTREMES, len(order) // 2) if order and order[0][0] < order[-1][0] else 0
    best, worst = [i for _, i in order[::-1][:count]], [i for _, i in order[:count]]
    others = [i for i in range(len(ranks)) if i not in (*best, *worst)]
    between = evenly(others, NUM_BETWEEN + 2 * (NUM_EXTREMES - count))
    return {**dict.fromkeys(best, "best"), **dict.fromkeys(between, ""), **dict.fromkeys(worst[::-1], "worst")}


def strips(row: Row, documents: Dataset, processor: VisionProcessor) -> list[MediumView]:
    """The media of a question as the model sees them: frames with their times, or why there are none."""
    matches = {}
    for number, planned in enumerate(documents.documents):
        for member in planned.conversations:
            names = [ref.name for ref in member.media]
            same_source = row.get("source", member.origin) == member.origin and row.get("media", names) == names
            if member.id == row.get("id") and same_source:
                matches[member.origin, *names] = number
    if len(matches) != 1:  # files of earlier versions name no source, and two sources may use the same id
        return []
    try:
        return [
            medium_decoded(plan, processor, documents.config, count=MAX_FRAMES, longest=FRAME_PIXELS)
            for plan in documents.build(*matches.values()).media
        ]
    except (MediaError, UserError) as error:
        return [MediumView("video", "", [], [], str(error))]
