"""Write a skeleton of your own task or data format: vft new task NAME, vft new format NAME

NAME is the module: NAME.py is written to the current folder, with a class that runs as it is and that you change. It is
used without installing anything: `vft train NAME:Class CONFIG.toml`, or format = "NAME:Class" on a source.
"""

from __future__ import annotations

import argparse
import keyword
import re
from collections.abc import Sequence
from pathlib import Path

from vft.cli.arguments import parse_arguments
from vft.common.console import user_errors
from vft.common.errors import UserError

TASK = '''"""{title}: describe here what the model learns.

vft train {module}:{name} CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vft.common.scores import Interval
from vft.common.task import Answer, answer_facts, samples_of, texts_of, with_prompt
from vft.common.types import Conversation, Sample
from vft.metrics import Japanese, rouge_l_interval


@dataclass(frozen=True)
class {name}:
    """The record's own turns; a record without a question is asked `prompt`."""

    prompt: str = "Describe the video."
    japanese: Japanese = "char"
    name = "{module}:{name}"
    main_metric = "rouge_l"

    def conversations(self, sample: Sample) -> list[Conversation]:
        """What to train on. Evaluation asks the first one; the others are further supervision."""
        turns = with_prompt(sample.turns, self.prompt)
        return [Conversation(sample.id, turns, sample.origin, facts=answer_facts(sample))]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """ROUGE-L (0 to 1), with its 95 % interval. Larger values of `main_metric` are better."""
        predictions, references = texts_of(answers)
        return {{"rouge_l": rouge_l_interval(predictions, references, samples_of(answers))}}
'''
FORMAT = '''"""{title}: JSON lines of {{"clip": path below data.root, "text": what it shows}}.

In a configuration: sources = [{{ format = "{module}:{name}", path = "train.jsonl" }}]
"""

from __future__ import annotations

from vft.common.types import MediaRef, Turn
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format
from vft.data.records.paths import resolve_media
from vft.data.records.record import ParsedRecord, Record, check_text
from vft.data.records.unread_keys import other_keys


class {name}(Format):
    """A clip and its text."""

    def parse(self, record: Record, source: SourceConfig, data: DataConfig) -> ParsedRecord:
        """The turns of one record. A turn without text is asked the task's prompt."""
        clip = MediaRef("video", resolve_media(data.root, record.get("clip"), "clip"), field="clip")
        text = check_text(record.get("text"), "text")
        turns = (Turn("user", (clip,)), Turn("assistant", (text,)))
        return ParsedRecord(turns, unread=other_keys(record, {{"id", "clip", "text"}}))
'''
SKELETONS = {"task": TASK, "format": FORMAT}
NEXT_STEP = {
    "task": "train it: vft train {module}:{name} CONFIG.toml",
    "format": 'look at it with vft inspect CONFIG.toml; sources = [{{ format = "{module}:{name}", path = ... }}]',
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(__doc__, add_arguments, argv, prog)
    with user_errors():
        names = {"module": arguments.name, "name": class_name(arguments.name)}
        file = Path(f"{arguments.name}.py")
        if file.exists():
            raise UserError(f"{file}: exists; choose another name, or delete it")
        title = arguments.name.replace("_", " ").capitalize()
        file.write_text(SKELETONS[arguments.kind].format(title=title, **names), encoding="utf-8")
        print(f"wrote {file}; {NEXT_STEP[arguments.kind].format(**names)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("kind", choices=SKELETONS, help="what to write")
    parser.add_argument("name", metavar="NAME", help="name of the module, such as count_people")


def class_name(module: str) -> str:
    """`count_people` as `CountPeople`. UserError if `module` cannot be the name of a module."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", module) or keyword.iskeyword(module):
        raise UserError(f"NAME = {module!r}: must be the name of a Python module: small letters, digits and _")
    return "".join(part.capitalize() for part in module.split("_"))


if __name__ == "__main__":
    main()
