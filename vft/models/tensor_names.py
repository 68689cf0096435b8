"""Tensor names as files have them: one model was saved under several spellings of the same names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vft.common.errors import UserError

Spellings = Mapping[str, tuple[str, ...]]
"""Prefix of a part's parameter names in this project's model to its prefixes in files, its own among them. An empty one
stands for names that begin with the decoder's own parts."""

WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
"""Of DistributedDataParallel, torch.compile, FSDP and activation checkpointing, where the wrapped model was saved."""
DECODER_PARTS = ("layers.", "embed_tokens.", "norm.")


def our_names(stored: Iterable[str], spellings: Spellings, where: object) -> dict[str, str]:
    """Names of this project's model to the names in a file; what fits no spelling stays as it is.

    Raises:
        UserError: a part has two spellings, so that nobody knows which of its tensors count.
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
