"""vft: fine-tuning of video language models in plain PyTorch."""

from __future__ import annotations

import os
import sys

from vft.common.interpreter import require_packages
from vft.common.version import __version__

# Allocate CPU tensors of 2 MiB and more in pages of 2 MiB instead of 4 KiB, if the system offers such pages. Frames are
# written to new memory all the time, and getting that memory page by page costs as much as copying it several times.
# torch reads the variable when it first allocates; worker processes inherit it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


if sys.argv[:1] == ["-m"]:  # Python looks for the module of `python -m vft.recipes.NAME`
    require_packages()
