"""Names of tensors in files: transformers and other programs have saved the same model under different names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vft.common.errors import UserError

Spellings = Mapping[str, tuple[str, ...]]
"""Prefix of a part's parameter names in this project's model to all its prefixes in files, including its own. An empty
prefix stands for names that begin with the decoder's own parts."""

WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
"""Prefixes that DistributedDataParallel, torch.compile, FSDP and activation checkpointing add to saved names."""
DECODER_PARTS = ("layers.", "embed_tokens.", "norm.")


def our_names(stored: Iterable[str], spellings: Spellings, where: object) -> dict[str, str]:
    """Names in this project's model to the names in a file. A name that fits no spelling stays as it is.

    Raises UserError if a part of the model has two spellings, because it is not known which tensors count.
    """
    prefixes = sorted(((theirs, ours) for ours, all_ in spellings.items() for theirs in all_), key=_longest_first)
    names: dict[str, str] = {}
    spelled: dict[str, tuple[str, str]] = {}
    for name in stored:
        bare = WRAPPERS.sub("", name)
        own = bare
        for theirs, ours in prefixes:
            if bare.startswith(theirs or DECODER_PARTS):
                own = ours + bare.removeprefix(theirs)
                first = spelled.setdefault(ours, (theirs, name))
                if first[0] != theirs:
                    raise UserError(
                        f"{where}: {first[1]} and {name}: one part of the model under two spellings of its "
                        "names; keep the tensors of one"
                    )
                break
        if own in names:
            raise UserError(f"{where}: {names[own]} and {name} are the same tensor; keep one of them")
        names[own] = name
    return names


def _longest_first(pair: tuple[str, str]) -> int:
    return -len(pair[0])
