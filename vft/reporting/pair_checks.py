"""Warnings of two known failures of learning from pairs of answers, from the figures of a run's steps.

c - c0 and r - r0 are by how much training has raised the log-probability of a chosen and of a rejected answer: a reward
divided by `beta`. They hardly depend on which pairs are in a step, as log-probabilities do. `simpo` and `orpo` have no
reference and so no such figures: they are not checked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

from vft.config.run import ObjectiveConfig

WINDOW = 20
"""Steps whose mean is looked at: a few hundred pairs as a rule, and long after the first steps of the warm-up."""
MIN_CHANGE = 1.0
"""Smaller changes of an answer's log-probability are not looked at; with this one it is e times as likely as before."""
LENGTH_SHARE = 0.8
"""Of the margin. Whatever the lengths are: if the tokens of chosen answers gain k times what those of rejected ones do,
or the latter lose k times as much, it is below (k + 1) / (2 k), so this share takes k < 5/3. If the former gain and the
latter lose, it is below 1/2."""


class Gains(NamedTuple):
    """Means over pairs: c - c0, r - r0, and the tokens of the answers."""

    chosen: float
    rejected: float
    chosen_tokens: float
    rejected_tokens: float

    @property
    def length_share(self) -> float:
        """The share of the margin that length alone explains.

        With the gains of a token, p = chosen / chosen_tokens and q = rejected / rejected_tokens, the margin is exactly
        (p + q) / 2 times the difference of the tokens, plus p - q times their mean (Kitagawa 1955, as for rates of two
        populations). The first part is the one that remains if every token gains alike, whatever the answers say.
        """
        by_token = self.chosen / self.chosen_tokens + self.rejected / self.rejected_tokens
        return by_token / 2 * (self.chosen_tokens - self.rejected_tokens) / (self.chosen - self.rejected)


class PairChecks:
    """Looks at the steps of a run, one after another.

    Both fall: over the last WINDOW steps c - c0 is below -MIN_CHANGE, lower than over as many steps before, and r - r0
    is lower still. Length: over the last WINDOW steps the margin is at least MIN_CHANGE, and length alone explains
    LENGTH_SHARE of it; not looked for with `ipo`, whose loss counts by token, and `kto`, which compares no two answers.
    """

    def __init__(self, config: ObjectiveConfig | None) -> None:
        self.config = config if config is not None and config.needs_reference else None
        self._steps: deque[Gains] = deque(maxlen=2 * WINDOW)
        self._told: set[str] = set()

    def add(self, line: Mapping[str, Any]) -> list[str]:
        """The warnings that become true with a step's line of metrics.jsonl, each once in a run."""
        values = [line.get(name) for name in ("reward_chosen", "reward_rejected", "tokens_chosen", "tokens_rejected")]
        if self.config is None or line["loss"] is None or None in values:
            return []
        chosen, rejected, *tokens = (float(value or 0) for value in values)
        self._steps.append(Gains(chosen / self.config.strength, rejected / self.config.strength, *tokens))
        if len(self._steps) < 2 * WINDOW:
            return []
        found = {name: text for name, text in self._found(self.config).items() if name not in self._told}
        self._told |= found.keys()
        return [*found.values()]

    def _found(self, config: ObjectiveConfig) -> dict[str, str]:
        """What is true now, by the name of the check."""
        steps, found, by_sum = list(self._steps), {}, config.kind not in ("ipo", "kto")
        before, now = (Gains(*map(fmean, zip(*part, strict=True))) for part in (steps[:WINDOW], steps[WINDOW:]))
        if now.rejected < now.chosen < min(before.chosen, -MIN_CHANGE):
            fix = "raise objective.rpo_alpha" if config.rpo_alpha else "set objective.rpo_alpha = 1.0"
            fix = "raise objective.desirable_weight" if config.kind == "kto" else fix
            found["both fall"] = (
                f"the chosen answers have become less likely too, by {-now.chosen:.1f} in log-probability (mean of "
                f"{WINDOW} steps; the rejected ones by {-now.rejected:.1f}); {fix} or a smaller train.learning_rate"
            )
        if now.chosen - now.rejected >= MIN_CHANGE and now.length_share >= LENGTH_SHARE and by_sum:
            tokens = f"{now.chosen_tokens:.0f} and {now.rejected_tokens:.0f} tokens"
            found["length"] = (
                f"length alone explains {min(now.length_share, 1):.0%} of the margin: by token, chosen and rejected "
                f'answers, of {tokens}, gain alike; take objective.kind = "ipo" or "simpo", which count by token'
            )
        return found
