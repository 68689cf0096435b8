"""Evaluation during training: when, on what, and which scores are the best so far."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from vft.common.files import digest
from vft.common.scores import Interval
from vft.common.task import Task
from vft.config.run import Config
from vft.data.dataset import Dataset
from vft.distributed.heartbeat import report_progress
from vft.inference.engine import Answerer
from vft.inference.evaluate import Best, cut_off_warning, evaluate, keep_parts, questions_digest
from vft.inference.generate import Sampling

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """The held-out samples of a run, and the model that answers them."""

    task: Task
    config: Config
    held_out: Dataset
    answerer: Answerer

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether there is an evaluation after `step`: every `eval.every_steps`, and after the last step."""
        return step % self.config.eval.every_steps == 0 or step == max_steps

    def evaluate(self, step: int) -> dict[str, Interval]:
        """Answer the questions and write `predictions/` and `scores/`. Every process calls it and gets the scores."""
        settings, folder = self.config.eval, self.config.output_dir
        report_progress(f"evaluating after step {step}", has_timeout=False)
        scores = evaluate(
            self.task,
            self.answerer,
            self.held_out,
            Sampling(max_new_tokens=settings.max_new_tokens),
            settings.batch_size,
            settings.max_samples,
            folder / "predictions" / f"step-{step:06d}.jsonl",
        )
        if self.answerer.world.is_main:
            keep_parts(folder / "scores" / f"step-{step:06d}.json", scores)
        if line := cut_off_warning(scores, settings.max_new_tokens):
            logger.info("%s", line)
        return scores

    def best(self) -> Best | None:
        """The best scores so far; None without `eval.best_metric`."""
        if not self.config.eval.best_metric:
            return None
        return Best.of(self.config, self.held_out, self.answerer.world, logger.info)

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """Digests of the questions and of the settings that choose them, for checkpoints."""
        settings = self.config.eval.model_dump_json(include={"sources", "split"})
        return {"held_out": questions_digest(self.held_out), "held_out_settings": digest(settings)}
