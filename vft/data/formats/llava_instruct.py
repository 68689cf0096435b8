"""LLaVA-Instruct-150K: JSON lists of conversations about pictures of COCO.

Records hold `image`, mostly a bare name in COCO's train2017, and `conversations` with `<image>` in the first question.
In COCO's release of 2014 the same picture is called `COCO_train2014_` and that name. Records without `image` (there are
some in the mixes made of this set) are conversations without a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vft.common.types import Sample
from vft.data.formats import messages
from vft.data.formats.records import BadRecord, Parsed, check_text, collect, files_below
from vft.data.formats.tables import first_present

COCO = ("train2017/", "coco/train2017/", "train2014/COCO_train2014_", "coco/train2014/COCO_train2014_")
"""What comes before a bare name, in the order in which it is tried."""


def read(path: Path, root: Path, media: str = "") -> tuple[list[Sample], list[BadRecord]]:
    """The samples of one JSON file, or of every JSON file in a folder, and the records that can't be used.

    Bare names are looked for in `media` itself, then in COCO's folders in `media` and in `root`.

    Raises:
        UserError: a file as a whole can't be read, or there is none.
    """
    named = files_below(path, ".json") if path.is_dir() else [(path, path.name)]
    return collect(named, lambda record, _: _parse(record, root, media))


def _parse(record: Mapping[str, Any], root: Path, media: str) -> Parsed:
    value = record.get("image")
    if value is not None:
        name = check_text(value, "image")
        bases = (f"{media}/", "") if media else ("",)
        names = [f"{base}{name}" for base in bases]
        if name and "/" not in name:
            names += [f"{base}{prefix}{name}" for base in bases for prefix in COCO]
        value = str(first_present(root, names, "image"))
    return messages.parse({**record, "image": value}, root)
