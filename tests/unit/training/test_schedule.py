"""Warm-up of the learning rate."""

from __future__ import annotations

import pytest

from vft.config.run import TrainConfig
from vft.training.checks import warn_of_rates
from vft.training.optimizer import learning_rate


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"), [(0.1, 10, 1), (0.05, 1251, 63), (0.07, 100, 7), (0.0, 5, 0), (1.0, 3, 3)]
)
def test_warmup_as_a_share_of_all_steps(ratio: float, steps: int, warmup: int) -> None:
    by_share, by_steps = TrainConfig(warmup_ratio=ratio), TrainConfig(warmup_steps=warmup)
    rates = [learning_rate(by_share, step, steps) for step in range(1, steps + 1)]
    assert rates == [learning_rate(by_steps, step, steps) for step in range(1, steps + 1)]
    assert rates.index(max(rates)) == max(warmup - 1, 0)


def test_one_of_both() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps = 5 and warmup_ratio = 0\.1 contradict each other"):
        TrainConfig(warmup_steps=5, warmup_ratio=0.1)


def test_a_rate_that_no_run_survives(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_rates(TrainConfig(learning_rate=1e-2))
    assert not caplog.messages
    warn_of_rates(TrainConfig(learning_rate=1.0, component_learning_rates={"projector": 2.0}))
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "train.learning_rate = 1",
        "train.component_learning_rates.projector = 2",
    ]
