"""The best score of a run so far (`eval.best_metric`), in a file, so that a resumed run knows it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vft.common.errors import UserError
from vft.common.files import digest, replace_text
from vft.common.scores import Interval
from vft.config.run import Config
from vft.data.dataset import Dataset
from vft.distributed.process_group import World, all_of
from vft.inference.evaluate import questions_digest

logger = logging.getLogger(__name__)

SCORING_VERSION = 3
"""Version of the rules by which answers are scored. Raise it with every change, so that nothing is compared with older
scores."""


@dataclass(frozen=True)
class BestScore:
    """The best value of a metric so far."""

    file: Path
    metric: str
    world: World
    questions: str = ""
    """Digest of what is asked and of how it is scored. A value with another digest is not compared."""

    @staticmethod
    def of(config: Config, held_out: Dataset, world: World) -> BestScore:
        """That of a run."""
        asked, limits = questions_digest(held_out, config.eval.max_samples), config.eval
        rules = f"{SCORING_VERSION}:{asked}:{limits.max_new_tokens}:{limits.max_samples}:{limits.japanese}"
        return BestScore(config.output_dir / "best.json", config.eval.best_metric, world, digest(rules))

    def is_beaten_by(self, scores: Mapping[str, Interval]) -> bool:
        """Whether `scores` are the best so far: the lowest `loss`, the highest value of another metric. If another
        number of samples could be read, the score on more samples is the best. Every process must call it.

        Raises:
            UserError: the metric is not among the scores.
        """
        if self.metric not in scores:
            raise UserError(f"eval.best_metric = {self.metric!r}: not among the scores, {', '.join(scores)}")
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.world.is_main and self.file.exists() else {}
        best = all_of(known)[0]
        if not best:
            return True
        before = f"{self.file}: {best.get('metric')} {best.get('value')} of step {best.get('step')} was taken on other"
        if best.get("metric") != self.metric or best.get("questions") != self.questions:
            if best.get("metric") == self.metric:
                logger.info("%s questions, or by other rules: the best score starts anew", before)
            return True
        value, samples = scores[self.metric].value, self._samples(scores)
        if samples != best["samples"]:
            which = "this one, on more samples, is the best" if samples > best["samples"] else "it stays the best"
            logger.info("%s samples (%d were readable then, %d now): %s", before, best["samples"], samples, which)
            return samples > int(best["samples"])
        return value < best["value"] if self.metric == "loss" else value > best["value"]

    def record(self, step: int, scores: Mapping[str, Interval]) -> None:
        """Write `scores` as the best."""
        if self.world.is_main:
            line = {"step": step, "metric": self.metric, "value": scores[self.metric].value}
            line |= {"samples": self._samples(scores), "questions": self.questions}
            replace_text(self.file, json.dumps(line) + "\n")

    def _samples(self, scores: Mapping[str, Interval]) -> int:
        """How many samples the score was taken on; 0 for that of a group."""
        parts = scores[self.metric].parts
        return 0 if parts is None else len(parts.samples.names)
