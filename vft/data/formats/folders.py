"""A folder for each class: `train/riding_a_bike/clip.mp4`, with videos or pictures at any depth below the class.

A class's label is its folder's name with underscores as spaces. All splits of a set have the same labels: those of a
`classes.txt` (a name a line) in the folder or the one above it. Without that file, those of the class folders; and if
the folder is called as a split is, also those of the other splits beside it.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

from vft.common.errors import UserError
from vft.common.types import MediaKind, MediaRef, Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format
from vft.data.records.files import label_classes, labelled_sample, read_classes
from vft.data.records.paths import PICTURE_SUFFIXES, SPLITS, VIDEO_SUFFIXES, find_path, is_stray, resolve_media
from vft.data.records.record import Records, make_samples, short_repr

logger = logging.getLogger(__name__)


class Folders(Format):
    """The clips in a folder.

    Left out are hidden files and what systems leave behind (`__MACOSX`), files that are neither video nor picture, and,
    below a class, folders that are links. A link to a file outside `data.root` is a bad record.
    """

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`. UserError also if there are no classes or clips, or classes that contradict each other."""
        path = Path(os.path.abspath(find_path(data.root, source.path)))  # `.` has no name of its own
        classes = _class_folders(path)
        label_of = label_classes(classes, _label, path)
        labels = _labels(path, label_of)

        def parse(file: Path, origin: str) -> list[Sample]:
            kind: MediaKind = "image" if file.suffix.lower() in PICTURE_SUFFIXES else "video"
            ref = MediaRef(kind, resolve_media(data.root, str(file), "file"), field="file")
            name = file.relative_to(path)
            return [labelled_sample(name.as_posix(), ref, label_of[name.parts[0]], labels, origin)]

        files = [file for name in classes for file in clips_below(path / name)]
        _report_odd(source.path, path, files)
        if not files:
            raise UserError(f"{path}: no videos or pictures in its {len(classes)} class folder(s); put clips there")
        origins = (f"{path.name}/{file.relative_to(path).as_posix()}" for file in files)
        printable = (origin if origin.isprintable() else short_repr(origin) for origin in origins)
        return make_samples(zip(printable, files, strict=True), parse)


def _report_odd(name: str, path: Path, files: Sequence[Path]) -> None:
    """Say which files are not what a folder of clips is expected to hold."""
    beside = [
        entry.name for entry in sorted(path.iterdir()) if _suffix(entry.name) in VIDEO_SUFFIXES | PICTURE_SUFFIXES
    ]
    if beside:
        _say(logging.WARNING, f"{name}: what lies in no class folder is left out ({len(beside)}): {_some(beside)}")
    pictures = [file.name for file in files if _suffix(file.name) in PICTURE_SUFFIXES]
    if 0 < len(pictures) < len(files) or any(_suffix(name) == ".gif" for name in pictures):
        count = f"{len(pictures)} of {len(files)} files"
        _say(logging.INFO, f"{name}: {count} are pictures (of a GIF the first frame counts): {_some(pictures)}")


@cache
def _say(level: int, text: str) -> None:
    """Log it once: both sides of a split read the same folder."""
    logger.log(level, "%s", text)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(short_repr, names[:3])) + ", ..." * (len(names) > 3)


def _suffix(name: str) -> str:
    """In lower case; none for what is to be ignored."""
    return "" if is_stray(name) else os.path.splitext(name)[1].lower()


def _class_folders(path: Path) -> list[str]:
    """Names of the class folders, sorted."""
    try:
        names = sorted(entry.name for entry in os.scandir(path) if os.path.isdir(entry) and not is_stray(entry.name))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a folder that holds a folder for each class") from None
    if not names:
        raise UserError(f"{path}: holds no folders; give a folder that holds a folder for each class")
    if all(name.lower() in SPLITS for name in names):
        raise UserError(f"{path}: holds splits ({', '.join(names)}) rather than classes; give one of these folders")
    return names


def _labels(path: Path, label_of: dict[str, str]) -> tuple[str, ...]:
    """All labels of the set, among them those of the class folders in `path`."""
    if listed := read_classes(path, path.parent):
        file, names = listed
        labels = tuple(label_classes(names, _label, file).values())
        for name, label in label_of.items():
            if label not in labels:
                raise UserError(f"{file}: the class folder {short_repr(name)} of {path} is not listed; add it")
        return labels
    classes = {unicodedata.normalize("NFC", name) for name in label_of}
    if path.name.lower() in SPLITS:
        siblings = [entry for entry in path.parent.iterdir() if entry.name.lower() in SPLITS and entry.is_dir()]
        others = (name for split in siblings if split != path for name in _class_folders(split))
        classes.update(unicodedata.normalize("NFC", name) for name in others)
    return tuple(sorted(label_classes(sorted(classes), _label, path.parent).values()))


def _label(name: str) -> str:
    return unicodedata.normalize("NFC", " ".join(name.replace("_", " ").split()))  # macOS writes names in NFD


def clips_below(folder: Path) -> Iterator[Path]:
    """Videos and pictures at any depth, in the order of their names."""
    for inner, folders, names in os.walk(folder, onerror=_fail):
        folders[:] = sorted(name for name in folders if not is_stray(name))
        for name in sorted(names):
            if _suffix(name) in VIDEO_SUFFIXES | PICTURE_SUFFIXES:
                yield Path(inner, name)


def _fail(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: {error.strerror}; make the folder readable")
