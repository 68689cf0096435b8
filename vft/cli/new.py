"""Write a skeleton of your own task or data format: vft new task NAME, vft new format NAME

NAME is the module: NAME.py is written to the current folder, with a class that runs as it is and that you change. It is
used without installing anything: `vft train NAME:Class CONFIG.toml`, or format = "NAME:Class" on a source.
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Annotated

from vft.cli.arguments import Arguments, Choices, Positional, command
from vft.common.errors import UserError
from vft.recipes import caption

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
NEXT_STEP = {
    "task": "train it: vft train {module}:{name} CONFIG.toml",
    "format": 'look at it with vft inspect CONFIG.toml; sources = [{{ format = "{module}:{name}", path = ... }}]',
}


class NewArguments(Arguments):
    """Arguments of `vft new`."""

    kind: Annotated[str, Positional("KIND"), Choices(NEXT_STEP)]
    """what to write: task or format"""
    name: Annotated[str, Positional("NAME")]
    """name of the module, such as count_people"""


@command(NewArguments, __doc__)
def main(arguments: NewArguments) -> None:
    """Command line."""
    module, file = arguments.name, Path(f"{arguments.name}.py")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", module) or keyword.iskeyword(module):
        raise UserError(f"NAME = {module!r}: must be the name of a Python module: small letters, digits and _")
    if file.exists():
        raise UserError(f"{file}: exists; choose another name, or delete it")
    names = {"module": module, "name": class_name(module), "title": module.replace("_", " ").capitalize()}
    text = task_like_caption(**names) if arguments.kind == "task" else FORMAT.format(**names)
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file}; {NEXT_STEP[arguments.kind].format(**names)}")


def task_like_caption(module: str, name: str, title: str) -> str:
    """The source of the recipe for captions under other names."""
    source = Path(caption.__file__).read_text(encoding="utf-8")
    source = re.sub(r"Captioning: .*", f"{title}: describe here what the model learns.", source)
    source = source.replace("vft.recipes.caption", f"vft.recipes {module}:{name}")
    return re.sub(r"\bCaption\b", name, source).replace('"caption"', f'"{module}:{name}"')


def class_name(module: str) -> str:
    """`count_people` as `CountPeople`."""
    return "".join(part.capitalize() for part in module.split("_"))
