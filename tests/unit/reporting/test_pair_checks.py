"""Warnings of a run that learns from pairs: each rule on steps made by hand, where it holds and where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vft.config.run import Config, ObjectiveConfig
from vft.reporting.monitor import Monitor
from vft.reporting.pair_checks import WINDOW, Gains, PairChecks

STEPS = 3 * WINDOW


def told(steps: list[dict[str, Any]], kind: str = "dpo", **settings: Any) -> list[tuple[int, str]]:
    """The warnings with their steps."""
    checks = PairChecks(ObjectiveConfig(kind=kind, **settings))
    return [(number, text) for number, line in enumerate(steps, 1) for text in checks.add(line)]


def steps(chosen: float, rejected: float, lengths: tuple[float, float] = (40.0, 40.0)) -> list[dict[str, Any]]:
    """A run at whose last step c - c0 and r - r0 are these; beta is 0.1."""
    return [
        {
            "loss": 0.5,
            "reward_chosen": 0.1 * chosen * i / STEPS,
            "reward_rejected": 0.1 * rejected * i / STEPS,
            "tokens_chosen": lengths[0],
            "tokens_rejected": lengths[1],
        }
        for i in range(1, STEPS + 1)
    ]


def test_both_fall() -> None:
    ((step, text),) = told(steps(-9.0, -30.0))
    assert step == 2 * WINDOW  # as soon as there is a window before the last one
    mean = 9.0 * (1.5 * WINDOW + 0.5) / STEPS
    assert f"less likely too, by {mean:.1f} in log-probability" in text
    assert "set objective.rpo_alpha = 1.0 or a smaller train.learning_rate" in text
    ((_, text),) = told(steps(-9.0, -30.0), rpo_alpha=0.5)
    assert "raise objective.rpo_alpha or" in text
    ((_, text),) = told(steps(-9.0, -30.0), "kto")
    assert "raise objective.desirable_weight or" in text


@pytest.mark.parametrize(
    "run",
    [
        steps(9.0, -30.0),
        steps(-0.9, -30.0),  # hardly
        steps(-30.0, -9.0),  # the chosen ones fall more: that is no failure of the objective's, accuracy shows it
        steps(-9.0, -30.0)[::-1],  # they rise again
        steps(-9.0, -30.0)[: 2 * WINDOW - 1],
        [{**line, "reward_chosen": None} for line in steps(-9.0, -30.0)],  # not finite
        [{**line, "loss": None} for line in steps(-9.0, -30.0)],
        [{"loss": 1.0}] * STEPS,  # of an objective without pairs
    ],
)
def test_nothing_to_tell(run: list[dict[str, Any]]) -> None:
    assert told(run) == []


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_without_a_reference_nothing_is_checked(kind: str) -> None:
    assert told(steps(-9.0, -30.0), kind) == []
    assert PairChecks(None).add(steps(1.0, 1.0)[0]) == []


@pytest.mark.parametrize(
    ("by_token", "lengths", "fires"),
    [
        ((0.1, 0.1), (80.0, 40.0), True),  # every token gains alike: the longer answer is preferred
        ((0.11, 0.1), (80.0, 40.0), True),
        ((0.05, 0.1), (120.0, 40.0), True),  # even those of the rejected ones gain more
        ((0.2, 0.1), (80.0, 40.0), False),
        ((0.1, -0.1), (80.0, 40.0), False),
        ((0.1, 0.1), (42.0, 40.0), False),  # no margin
        ((0.2, 0.1), (40.0, 40.0), False),
    ],
)
def test_length_alone(by_token: tuple[float, float], lengths: tuple[float, float], fires: bool) -> None:
    gains = [gain * length for gain, length in zip(by_token, lengths, strict=True)]
    found = told(steps(gains[0], gains[1], lengths))
    assert len(found) == fires
    if fires:
        assert f"of {lengths[0]:.0f} and {lengths[1]:.0f} tokens" in found[0][1] and "length alone" in found[0][1]
    for kind in ("ipo", "kto"):  # it counts by token; it has no pairs
        assert told(steps(gains[0], gains[1], lengths), kind) == []


def test_length_alone_where_both_fall() -> None:
    """Every token loses alike, and rejected answers are longer."""
    texts = [text for _, text in told(steps(-4.0, -8.0, (40.0, 80.0)))]
    assert len(texts) == 2 and "less likely too" in texts[0] and "explains 100% of the margin" in texts[1]


def test_the_parts_of_a_margin() -> None:
    """What length does not explain is the difference of the gains of a token, times the mean length."""
    for gains in (Gains(3.0, -2.0, 10.0, 4.0), Gains(-1.0, -5.0, 3.0, 9.0), Gains(6.0, 2.0, 9.0, 5.0)):
        p, q = gains.chosen / gains.chosen_tokens, gains.rejected / gains.rejected_tokens
        rest = (p - q) * (gains.chosen_tokens + gains.rejected_tokens) / 2
        assert gains.length_share == pytest.approx(1 - rest / (gains.chosen - gains.rejected))


def test_told_once_in_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the log and in the step's line of metrics.jsonl; not again after a resume from a later step."""
    figures = {"lr": 0.1, "tokens_per_s": 1.0, "samples_per_s": 1.0, "frames_per_s": 1.0, "mfu": None, "grad_norm": 1.0}
    figures |= {"step_time_s": 1.0, "data_wait_s": 0.0, "peak_memory_bytes": 1}
    run = [{"step": i, **figures, **line} for i, line in enumerate(steps(-9.0, -30.0), 1)]
    data = {"sources": [{"format": "messages", "path": "pairs.jsonl"}]}
    config = Config(output_dir=tmp_path, model={"path": "x"}, lora={}, objective={"kind": "dpo"}, data=data)
    for first, last in ((0, STEPS - 9), (STEPS - 10, STEPS)):  # nine steps before the end, from one step earlier
        monitor = Monitor(config, STEPS, is_main=True)
        monitor.resume_at(first, STEPS)
        for line in run[first:last]:
            monitor.step(line)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    (text,) = [text for line in lines for text in line.get("warnings", ())]
    assert lines[2 * WINDOW - 1]["warnings"] == [text]
    logged = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert logged == [f"step {2 * WINDOW}: {text}"]
