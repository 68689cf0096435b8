"""vft: fine-tuning of video language models in plain PyTorch.

    import vft

    model = vft.load_model("tools/demo_world/base", adapter="runs/demo/caption/adapter")
    model.ask("clip.mp4", "What happens?")

The names are those of `vft.api`, and are imported when they are first used: `import vft` alone is quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from vft.common.interpreter import require_packages
from vft.common.version import __version__

if TYPE_CHECKING:
    from vft.api import VideoModel, evaluate, load_model, load_run, train
    from vft.common.errors import UserError

__all__ = ["UserError", "VideoModel", "__version__", "evaluate", "load_model", "load_run", "train"]

# Allocate CPU tensors of 2 MiB and more in pages of 2 MiB instead of 4 KiB, if the system offers such pages. Frames are
# written to new memory all the time, and getting that memory page by page costs as much as copying it several times.
# torch reads the variable when it first allocates; worker processes inherit it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


if sys.argv[:1] == ["-m"]:  # Python looks for the module of `python -m vft.recipes.NAME`
    require_packages()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vft' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module("vft.common.errors" if name == "UserError" else "vft.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
