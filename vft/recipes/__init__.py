"""Recipes. A recipe is a `Task` (how a sample becomes conversations, how answers are scored) and a TOML file.

A task is named by a key of `TASKS`, or as `module:Class` if it lives outside this package.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import is_dataclass
from typing import Any, cast

from vft.common.errors import UserError, first_line
from vft.common.task import Task, configured
from vft.config.run import Config

TASKS = {
    "caption": "vft.recipes.caption:Caption",
    "qa": "vft.recipes.qa:QuestionAnswering",
    "classify": "vft.recipes.classify:Classify",
    "summarize": "vft.recipes.summarize:Summarize",
    "story": "vft.recipes.story:Story",
}
"""Imported when asked for: `python -m vft.recipes.caption` would warn if its module were imported already."""


def load_task(name: str) -> Task:
    """The task with this name: a key of `TASKS`, or `module:Class` of an installed package or the current folder.

    Raises:
        UserError: there is no such module or class, or the class is not a task.
    """
    module_name, colon, class_name = TASKS.get(name, name).partition(":")
    if not colon:
        raise UserError(f"task = {name!r}: must be {', '.join(TASKS)}, or module:Class for a task of your own")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file there hides no installed package
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's file raises
        raise UserError(
            f"task = {name!r}: cannot import {module_name}: {first_line(error)}; looked in the current folder and "
            "among the installed packages"
        ) from error
    task_class: Any = getattr(module, class_name, None)
    if not isinstance(task_class, type):
        raise UserError(f"task = {name!r}: {module_name} has no class {class_name!r}; name it as module:Class")
    if not is_dataclass(task_class):
        raise UserError(f"task = {name!r}: {class_name} must be a dataclass, with a field `prompt`")
    try:
        task: Any = task_class()
    except TypeError as error:
        raise UserError(f"task = {name!r}: {class_name}() fails: {error}; give every field a default") from error
    parts = ("name", "prompt", "main_metric", "conversations", "score")
    if missing := [part for part in parts if not hasattr(task, part)]:
        raise UserError(f"task = {name!r}: {class_name} has no {', '.join(missing)}; see vft.common.task.Task")
    return cast(Task, task)


def task_of(config: Config) -> Task:
    """The task that a configuration names, with its prompt; captioning if it names none."""
    return configured(load_task(config.task or "caption"), config.data.prompt, config.eval.japanese)
