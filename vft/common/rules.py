"""Versions of the rules by which samples are made and scored. A run does not resume from a checkpoint of other rules.

Raise the version, with a line on each change, whenever the same data and settings give other samples, frames, ids,
labels or scores than before. Index and frame cache have versions of their own (`data.media.index.SCAN_VERSION`,
`data.media.frame_cache.CACHE_VERSION`), and so has scoring (`best.json`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHANGES: dict[int, tuple[str, ...]] = {
    2: (
        "keys of records beside their media (trims, rates, limits) and their system texts are used",
        "times outside a video, and media under unknown keys, are bad records",
        "more files, formats and spellings of paths are read",
        "pictures are upright by EXIF and on white, all of a list are shown at their own times",
        "total_pixels keeps to max_pixels",
        "questions that share a video see the frames that they would see alone",
        "answers are tokenised by themselves, and control tokens in texts are text",
        "where a template hides thoughts of earlier answers, each answer is a document of its own",
        "media are fitted to the model's context",
        "fractional repeats come at even intervals",
        "a stream ends a row after 16 clips in vain, and counts bad samples",
        "options are ranked by the whole answer's summed log-probability, any right label counts",
        "texts are compared and cut by script, letters of answers are read where they are named",
        "every question samples from a stream of its own, and thoughts are no part of an answer",
        "predict asks what most records of the training asked, within the training's pack_tokens",
        "a story's own question is asked",
        "digests cover texts and media, and records are named by their place below data.root",
    ),
}
"""The changes of each version. Version 1 recorded no number."""
VERSION = max(CHANGES)


def changed_since(state: Mapping[str, Any]) -> str:
    """How today's rules differ from those of `state` (a checkpoint's, or run.json), in words; empty if they do not."""
    then = state.get("rules", 1)
    if then == VERSION:
        return ""
    if not isinstance(then, int) or then > VERSION:
        return f"rules {then!r}, which this vft does not know (it has {VERSION})"
    changes = [change for version in range(then + 1, VERSION + 1) for change in CHANGES[version]]
    return f"rules {then}; those of today, {VERSION}, differ: {'; '.join(changes)}"
