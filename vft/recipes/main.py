"""Fine-tune a model: vft train [TASK] CONFIG.toml [section.key=value ...]

TASK is caption, qa, classify, summarize, story or ground, or a task of your own as module:Class; without it, the one
that CONFIG.toml names. The same command again resumes the run. On several GPUs:
torchrun --nproc-per-node N -m vft.recipes TASK CONFIG.toml

CONFIG.toml has the tables [model], [lora], [data] with [data.video], [data.image] and a list [[data.sources]], [train],
[objective], [parallel], [checkpoint], [eval] and [log]. `vft settings [SECTION]` prints what each may hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vft.common.console import user_errors
from vft.common.errors import UserError
from vft.config import run as configs
from vft.config.command_line import Parser
from vft.config.run import Config
from vft.distributed.process_group import environment, together
from vft.distributed.signals import signals_stop
from vft.recipes import TASKS, task_of
from vft.training import trainer
from vft.training.checks import check_shares
from vft.training.preferences import objective_of


def main(task: str | None = None, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train `task` (by default the first argument) with a configuration. `prog` is the program's name in usage lines;
    by default that of `python -m vft.recipes.TASK`, which calls this with its task."""
    with user_errors(), signals_stop():
        _run(task, argv, prog or f"python -m vft.recipes{f'.{task}' if task else ''}")


def _run(task: str | None, argv: Sequence[str] | None, prog: str) -> None:
    parser = Parser(prog, __doc__)
    if task is None:
        names = f"{', '.join(TASKS)}, or module:Class for one of your own"
        parser.add_argument(
            "task", metavar="TASK", nargs="?", help=f"{names}; by default the one that CONFIG.toml names"
        )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="TOML file, such as recipes/demo/caption.toml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="prepare everything and try the longest row, then stop; writes nothing but the cache",
    )
    parsed = parser.read(argv)  # settings may stand behind options
    name: str | None = task or parsed.task
    file, overrides = parsed.config, parsed.overrides
    if task is None and name is not None and name.endswith(".toml"):
        # the task was left out, and a setting took the file's place
        file, overrides, name = Path(name), [str(file), *overrides], None
    if misplaced := {*TASKS} & {*overrides}:
        raise UserError(f"{misplaced.pop()}: the task comes first: {prog} TASK {file} section.key=value")
    if task is None and str(file) in TASKS and not file.exists():
        raise UserError(f"CONFIG.toml missing: {prog} {file} CONFIG.toml; recipes/ has one for each task and model")
    config = configs.load(file, overrides)
    if not (name := name or config.task):
        raise UserError(f"{file}: no task there; name it, vft train TASK {file}: {', '.join(TASKS)}, or module:Class")
    train_config(config, name, parsed.dry_run)


def train_config(config: Config, task: str, dry_run: bool = False) -> None:
    """Train `task` with a configuration, in the processes that the environment says. UserError if it names another."""
    if config.task not in (None, task):
        raise UserError(f"task = {config.task!r}: the command trains {task!r}; change the one or the other")
    config = config.model_copy(update={"task": task})
    check_shares(config, environment().size)
    with together(config.parallel.silence_s, config.parallel.timeout_s) as world:
        trainer.run(task_of(config), config, world, dry_run, objective_of(config))
