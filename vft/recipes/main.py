"""The command that trains a task: `python -m vft.recipes TASK CONFIG.toml [section.key=value ...]`.

`python -m vft.recipes.caption CONFIG.toml ...` and the like are the same with the task given. Several processes:
`torchrun --nproc-per-node N -m ...`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vft.common.console import user_errors
from vft.common.errors import UserError
from vft.config import run as configs
from vft.distributed.process_group import environment, together
from vft.distributed.signals import signals_stop
from vft.recipes import TASKS, task_of
from vft.training import trainer
from vft.training.checks import check_shares


def main(task: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Train `task` (by default the first argument) with a configuration; `arguments` are those of the process."""
    parser = argparse.ArgumentParser(
        prog=f"python -m vft.recipes{f'.{task}' if task else ''}", description=f"Fine-tune for {task or 'a task'}."
    )
    if task is None:
        names = f"{', '.join(TASKS)}, or module:Class for one of your own"
        parser.add_argument("task", metavar="TASK", help=names)
    parser.add_argument("config", type=Path, help="TOML file, such as recipes/demo/caption.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    parser.add_argument("--dry-run", action="store_true", help="all but training: nothing is written but the cache")
    parsed = parser.parse_intermixed_args(arguments)  # settings may stand behind options
    name = task or parsed.task
    with user_errors(), signals_stop():
        config = configs.load(parsed.config, parsed.overrides)
        if config.task not in (None, name):
            raise UserError(f"task = {config.task!r}: the command trains {name!r}; change the one or the other")
        config = config.model_copy(update={"task": name})
        check_shares(config, environment().size)
        with together(config.parallel.silence_s, config.parallel.timeout_s) as world:
            trainer.run(task_of(config), config, world, parsed.dry_run)
