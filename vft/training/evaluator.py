"""Evaluation during training: when, on what, and which scores are the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from vft.common.files import digest
from vft.common.scores import Interval
from vft.common.task import Task
from vft.config.run import Config
from vft.data.dataset import Dataset
from vft.distributed.heartbeat import report_progress
from vft.inference.best_score import BestScore
from vft.inference.engine import Answerer
from vft.inference.evaluate import evaluate, questions_digest, write_score_parts
from vft.inference.generate import Sampling


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
            write_score_parts(folder / "scores" / f"step-{step:06d}.json", scores)
        return scores

    def best(self) -> BestScore | None:
        """The best scores so far; None without `eval.best_metric`."""
        if not self.config.eval.best_metric:
            return None
        return BestScore.of(self.config, self.held_out, self.answerer.world)

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """Digests of the questions and of the settings that choose them, for checkpoints."""
        settings = self.config.eval.model_dump_json(include={"sources", "split"})
        return {"held_out": questions_digest(self.held_out), "held_out_settings": digest(settings)}
