"""Splits held-out records off those to train on, by a hash of their medium: `eval.split`.

A record is held out if the hash of (seed, its first medium) is below the split's share. So neither new records nor
another order move a record to the other side. All records of one medium are on one side: a training record that also
shows the medium of a held-out one is left out.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vft.common.types import MediaRef, Sample

_LAST_NUMBER = re.compile(r"[0-9]*(\.[^./]*)?$")


@dataclass(frozen=True)
class Split:
    """One side of a split."""

    share: float
    """Fraction of the media that are held out, between 0 and 1."""
    seed: int
    held_out: bool
    """The held-out side; otherwise the one to train on."""

    def select(self, samples: Sequence[Sample], root: Path) -> tuple[list[bool], int]:
        """For each sample, which may be of several sources, whether it is on this side; and how many are on neither."""
        top = os.path.realpath(root)
        names = [media_of(sample, top) for sample in samples]
        held = [self.is_held_out(own[0]) for own in names]
        if self.held_out:
            return held, 0
        unseen = {name for own, is_held in zip(names, held, strict=True) if is_held for name in own}
        trained = [not is_held and unseen.isdisjoint(own) for own, is_held in zip(names, held, strict=True)]
        return trained, len(samples) - sum(held) - sum(trained)

    def is_held_out(self, name: str) -> bool:
        """Whether a medium of this name is held out."""
        text = f"split:{self.seed}:{unicodedata.normalize('NFC', name)}"
        content = hashlib.sha256(text.encode(errors="surrogateescape"))
        return int.from_bytes(content.digest()[:8], "big") / 2**64 < self.share  # the hash as a fraction


def media_of(sample: Sample, top: str) -> list[str]:
    """Names of a sample's media relative to the real path of `data.root`, or its texts if it has no media.

    A file in an archive has its name there. A video stored as pictures has the start of the pictures' paths, without
    their numbers.
    """
    names = []
    for ref in (part for turn in sample.turns for part in turn.parts if isinstance(part, MediaRef)):
        if ref.member:
            names.append(ref.member.partition("/")[2])
        elif isinstance(ref.path, tuple):
            names.append(_LAST_NUMBER.sub("", os.path.relpath(ref.path[0], top)))
        else:
            names.append(os.path.relpath(ref.path, top))
    return names or ["\n".join(turn.text for turn in sample.turns)]
