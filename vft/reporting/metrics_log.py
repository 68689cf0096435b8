"""Steps and evaluations of a run as they happen: `metrics.jsonl`, boards, and a live view or log lines."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vft.common.console import stderr_console
from vft.common.files import append_text, replace_text
from vft.common.scores import Interval
from vft.config.run import Config
from vft.reporting.loggers import Board, open_boards
from vft.reporting.progress import LiveView, RunState, loss_text, resources_text, scores_text, speed_text

logger = logging.getLogger(__name__)


class MetricsFile:
    """`metrics.jsonl`: a JSON object a line, one for each step and each evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line. Raises UserError if the disk is full."""
        append_text(self.path, json.dumps(line) + "\n")

    def cut_after(self, step: int) -> list[dict[str, Any]]:
        """Remove the lines of later steps, which will be done again, and return those that stay."""
        if not self.path.exists():
            return []
        texts = self.path.read_text(encoding="utf-8").splitlines() if step else []  # at step 0 the run starts anew
        texts = [text for text in texts if _step_of(text) <= step]
        replace_text(self.path, "".join(f"{text}\n" for text in texts))
        return [json.loads(text) for text in texts]


def _step_of(text: str) -> int:
    try:
        return int(json.loads(text)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # the process was killed while it wrote this line: remove it


class Monitor:
    """Records and shows each step and evaluation. Does nothing in processes other than the main one."""

    def __init__(self, config: Config, max_steps: int, is_main: bool) -> None:
        self.config, self.is_main = config, is_main
        self.metrics = MetricsFile(config.output_dir / "metrics.jsonl")
        self.state = RunState(f"{config.task}: {config.output_dir}", max_steps)
        self.view = LiveView(self.state, stderr_console())
        self.boards: list[Board] = []
        self.evaluated = False
        """Whether metrics.jsonl has the scores of the step that the run resumes from."""

    def resume_at(self, step: int, max_steps: int) -> None:
        """Remove what later steps have left."""
        self.state.max_steps = max_steps
        for line in self.metrics.cut_after(step) if self.is_main else ():
            if "loss" in line:
                self.state.add_step(line)
            self.evaluated = self.evaluated or (line["step"] == step and any(key.startswith("eval_") for key in line))

    def start(self, step: int) -> None:
        """Open the boards, and on a terminal the live view. `step` is the last one that is done."""
        if self.is_main:
            self.boards = open_boards(self.config, step)
            if self.view.console.is_terminal and not self.view.console.is_dumb_terminal:
                self.view.start()

    def step(self, line: Mapping[str, Any]) -> None:
        """Record a step, and show it if it is its turn."""
        if not self.is_main:
            return
        self._record(line)
        self.state.add_step(line, time.monotonic())
        step, max_steps = line["step"], self.state.max_steps
        if not self.view.is_drawn and (step % self.config.log.every_steps == 0 or step == max_steps):
            figures = f"loss {loss_text(line)}  lr {line['lr']:.2e}  {speed_text(line)}  {resources_text(line)}"
            logger.info("step %d/%d  %s", step, max_steps, figures)

    def evaluation(self, step: int, scores: Mapping[str, Interval]) -> None:
        """Record and show the scores of an evaluation.

        The line has them under `eval_` keys, their 95 % intervals under `eval_intervals`, and how texts were cut into
        words under `eval_tokenization`.
        """
        if not self.is_main:
            return
        line: dict[str, Any] = {"step": step, **{f"eval_{name}": score.value for name, score in scores.items()}}
        line["eval_intervals"] = {name: [one.low, one.high] for name, one in scores.items() if one.low < one.high}
        if tokenization := {name: score.tokenization for name, score in scores.items() if score.tokenization}:
            line["eval_tokenization"] = tokenization
        self._record(line)
        self.state.add_scores(step, scores)
        logger.info("step %d  %s", step, scores_text(scores))

    def close(self) -> None:
        """Close the live view and the boards."""
        if self.view.is_drawn:
            self.view.stop()
        for board in self.boards:
            board.close()

    def _record(self, line: Mapping[str, Any]) -> None:
        self.metrics.append(line)
        for board in self.boards:
            board.log(line["step"], {key: value for key, value in line.items() if isinstance(value, int | float)})
