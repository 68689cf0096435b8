"""LLaVA-Instruct-150K: JSON lists of conversations about pictures of COCO.

Records have `image`, mostly a bare name in COCO's train2017, and `conversations` with `<image>` in the first question.
In COCO's release of 2014 the same picture is called `COCO_train2014_` and that name. Records without `image`, which
some mixes made of this set have, are conversations without a picture.
"""

from __future__ import annotations

from pathlib import Path

from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format, messages
from vft.data.records.files import json_files
from vft.data.records.paths import first_present
from vft.data.records.record import ParsedRecord, Record, check_text

COCO = ("train2017/", "coco/train2017/", "train2014/COCO_train2014_", "coco/train2014/COCO_train2014_")
"""What comes before a bare name, in the order in which it is tried."""


class LlavaInstruct(Format):
    """The samples of a JSON file, or of every JSON file in a folder. Bare names are looked for in `media` itself, then
    in COCO's folders in `media` and in `data.root`."""

    settings = frozenset({"media"})
    notes_inputs = True

    def files(self, path: Path) -> list[tuple[Path, str]]:
        """As `Format.files`."""
        return json_files(path)

    def parse(self, record: Record, source: SourceConfig, data: DataConfig) -> ParsedRecord:
        """As `Format.parse`."""
        image = record.get("image")
        if image is not None:
            name = check_text(image, "image")
            bases = (f"{source.media}/", "") if source.media else ("",)
            names = [f"{base}{name}" for base in bases]
            if name and "/" not in name:
                names += [f"{base}{prefix}{name}" for base in bases for prefix in COCO]
            image = str(first_present(data.root, names, "image"))
        return messages.parse({**record, "image": image}, data.root)
