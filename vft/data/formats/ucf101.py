"""UCF101: lists of clips in a folder for each class; each of the three folds is a list to train on and one to test on.

`trainlist01.txt` has lines `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`, `testlist01.txt` the same without a number;
`classInd.txt` beside them has `1 ApplyEyeMakeup`.
"""

from __future__ import annotations

import re
from pathlib import Path

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format
from vft.data.records.files import label_classes, labelled_sample, read_lines
from vft.data.records.paths import find_path, first_present, media_folders
from vft.data.records.record import RecordError, Records, make_samples, short_repr

_CLASS = re.compile(r"([0-9]{1,9})\s+(\S+)")
_CLIP = re.compile(r"(.+?)(?:\s+([0-9]{1,9}))?")
_WORD_START = re.compile(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z0-9])(?=[A-Z][a-z])")


class UCF101(Format):
    """The clips of one list; files are `Class/clip.avi` in `media` or `UCF-101`. The label is the class's name as words
    in lower case, `apply eye makeup`."""

    settings = frozenset({"media"})

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`. UserError also if `classInd.txt` beside the list cannot be read."""
        path, root = find_path(data.root, source.path), data.root
        numbers = _read_numbers(path.parent / "classInd.txt")
        label_of = label_classes(numbers, _words, path.parent / "classInd.txt")
        labels = tuple(label_of.values())
        folders = media_folders(path, root, source.media, "UCF-101", "")

        def parse(line: str, origin: str) -> list[Sample]:
            match = _CLIP.fullmatch(line)
            name, number = match.groups() if match else (line, None)
            folder, _, clip = name.partition("/")
            if not clip:
                raise RecordError("video", f"{short_repr(name)} names no class folder; write Class/clip.avi")
            if folder not in label_of:
                raise RecordError(
                    "video", f"the folder {short_repr(folder)} is no class of classInd.txt; correct one of them"
                )
            if number is not None and int(number) != numbers[folder]:
                expected = f"the folder {short_repr(folder)} is class {numbers[folder]} in classInd.txt"
                raise RecordError("label", f"{number} disagrees: {expected}; correct one of them")
            file = first_present(root, [f"{place}/{name}" for place in folders], "video")
            ref = MediaRef("video", file, field="video")
            return [labelled_sample(Path(clip).stem, ref, label_of[folder], labels, origin)]

        return make_samples(((f"{path.name}:{line}", text) for line, text in read_lines(path)), parse)


def _read_numbers(path: Path) -> dict[str, int]:
    """The number of each class, in the order of the numbers."""
    if not path.is_file():
        raise UserError(f"{path}: No such file; put the set's list of classes beside the list of clips")
    numbers: dict[str, int] = {}
    for line, text in read_lines(path):
        match = _CLASS.fullmatch(text)
        if match is None:
            raise UserError(f"{path}:{line}: {short_repr(text)} must be a number and a class, as in '1 ApplyEyeMakeup'")
        number, name = int(match[1]), match[2]
        if name in numbers or number in numbers.values():
            raise UserError(f"{path}:{line}: {short_repr(text)} repeats a number or a class; give each once")
        numbers[name] = number
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def _words(name: str) -> str:
    """`YoYo` as `yo yo`. A number is a word, with the letters after it (`Jump3D`: `jump 3d`); `TV` stays one word."""
    return " ".join(_WORD_START.sub(" ", name).replace("_", " ").lower().split())
