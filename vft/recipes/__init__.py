"""Recipes. A recipe is a `Task` (how a sample becomes conversations, how answers are scored) and a TOML file.

A task is named by a key of `TASKS`, or as `module:Class` if it lives outside this package.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from vft.common.errors import UserError, did_you_mean
from vft.common.files import read_object
from vft.common.plugins import load_class
from vft.common.task import Task
from vft.config.run import Config

TASKS = {
    "caption": "vft.recipes.caption:Caption",
    "qa": "vft.recipes.qa:QuestionAnswering",
    "classify": "vft.recipes.classify:Classify",
    "summarize": "vft.recipes.summarize:Summarize",
    "story": "vft.recipes.story:Story",
    "ground": "vft.recipes.ground:Ground",
}
"""Imported when asked for: `python -m vft.recipes.caption` would warn if its module were imported already."""


def load_task(name: str) -> Task:
    """The task with this name: a key of `TASKS`, or `module:Class` of an installed package or the current folder.

    Raises:
        UserError: there is no such module or class, or the class is not a task.
    """
    path = TASKS.get(name, name)
    if ":" not in path:
        names = f"must be {', '.join(TASKS)}, or module:Class for a task of your own"
        raise UserError(f"task = {name!r}: {did_you_mean(name, TASKS)}{names}")
    try:
        task_class = load_class(path)
    except UserError as error:
        raise UserError(f"task = {name!r}: {error}") from error.__cause__
    if not is_dataclass(task_class):
        raise UserError(f"task = {name!r}: {task_class.__name__} must be a dataclass, with a field `prompt`")
    try:
        task: Any = task_class()
    except TypeError as error:
        raise UserError(
            f"task = {name!r}: {task_class.__name__}() fails: {error}; give every field a default"
        ) from error
    parts = ("name", "prompt", "main_metric", "conversations", "score")
    if missing := [part for part in parts if not hasattr(task, part)]:
        raise UserError(f"task = {name!r}: {task_class.__name__} has no {', '.join(missing)}; see vft.common.task.Task")
    return cast(Task, task)


def task_of(config: Config) -> Task:
    """The task that a configuration names; captioning if it names none. Of its fields, `prompt` is
    `data.prompt` (unless empty), `japanese` and `coco` are those of `eval`, `event_form` that of `data`."""
    task: Any = load_task(config.task or "caption")
    limits, family = config.eval, _family(config.model.path)
    given = {"prompt": config.data.prompt or task.prompt, "japanese": limits.japanese, "coco": limits.coco}
    given["event_form"] = config.data.event_form or ("qwen3_vl" if "qwen3" in family else "qwen2_5_vl")
    return replace(task, **{field.name: given[field.name] for field in fields(task) if field.name in given})


def _family(path: str) -> str:
    """The family of a model's folder, by its config.json; a hub name says it itself."""
    file = Path(path).expanduser() / "config.json"
    return str(read_object(file).get("model_type")) if file.is_file() else path.lower()
