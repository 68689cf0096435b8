#!/usr/bin/env python
"""VIST's stories of images in sequence to stories: {"annotations": [[{story_id, photo_flickr_id, text, ...}], ...]}.

A story is five photos, in the workers' order, with a sentence for each. `original_text` is preferred: `text` is
tokenised, in lower case, and has [male] and [location] instead of names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import in_venv  # noqa: F401
from converter import Conversion, clean, run

KEYS = ("story_id", "photo_flickr_id", "worker_arranged_photo_order", "text")


def convert(conversion: Conversion) -> Iterator[dict[str, Any]]:
    """A record for each story whose photos all exist."""
    stories: dict[str, list[dict[str, Any]]] = {}
    for document in conversion.records("VIST", ("annotations",)):
        for group in document["annotations"]:
            for part in group:
                conversion.check(part, "VIST", KEYS)
                stories.setdefault(str(part["story_id"]), []).append(part)
    for name, parts in stories.items():
        parts.sort(key=lambda part: int(part["worker_arranged_photo_order"]))
        photos = [conversion.find_all(str(part["photo_flickr_id"])) for part in parts]
        texts = clean([part.get("original_text") or part["text"] for part in parts])
        if not all(photos):
            conversion.left_out[f"a photo not in {conversion.folder}"] += 1
        elif any(len(files) > 1 for files in photos):
            conversion.left_out[f"a photo of which several are in {conversion.folder}"] += 1
        elif not any(texts):
            conversion.left_out["no text"] += 1
        else:
            yield {"id": name, "images": [files[0] for files in photos], "text": " ".join(filter(None, texts))}


if __name__ == "__main__":
    run(__doc__, "--media", convert)
