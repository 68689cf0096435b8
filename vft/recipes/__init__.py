"""A recipe is a Task: how a sample becomes conversations, and how answers are scored."""

from __future__ import annotations

from vft.common.task import Task, configured
from vft.config.run import Config


def task_of(config: Config) -> Task:
    """The task that a configuration names, with its prompt; captioning where it names none."""
    # Imported here: `python -m vft.recipes.caption` runs that module anew, and warns where it is there already.
    from vft.recipes.caption import Caption
    from vft.recipes.classify import Classify
    from vft.recipes.qa import QuestionAnswering
    from vft.recipes.story import Story
    from vft.recipes.summarize import Summarize

    tasks: tuple[Task, ...] = (Caption(), QuestionAnswering(), Classify(), Summarize(), Story())
    return configured(
        {task.name: task for task in tasks}[config.task or "caption"], config.data.prompt, config.eval.japanese
    )
