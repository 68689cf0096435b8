"""The caption recipe where something takes long, so that a signal finds it there; the tests start it.

PAUSE says where: `start` (before the first step, in Python), `deaf` (there, in C, where no handler runs), `answers` or
`losses` (of an evaluation), `write` (a checkpoint). The file `paused` in the folder PAUSED tells the test.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import HashStore

from vft.inference import engine as answer
from vft.inference import evaluate
from vft.recipes.main import main
from vft.training import checkpoint as saving
from vft.training import trainer as train

PLACES: dict[str, tuple[Any, str, float]] = {
    "start": (train, "largest_rows", 60.0),
    "deaf": (train, "largest_rows", 60.0),
    "answers": (answer, "generate", 1.0),
    "losses": (evaluate, "held_out_scores", 1.0),
    "write": (saving, "write_parts", 60.0),
}
"""Of each: the function that is slow, and by how many seconds."""


def pause(where: str, seconds: float) -> None:
    """Tell the test, and wait."""
    (Path(os.environ["PAUSED"]) / "paused").touch()
    if where == "deaf":
        HashStore().wait(["never"], timedelta(seconds=seconds))
    time.sleep(seconds)


if __name__ == "__main__":
    place = os.environ["PAUSE"]
    module, name, seconds = PLACES[place]
    original: Any = getattr(module, name)

    def slow(*arguments: Any, **named: Any) -> Any:
        """The module's own, later."""
        pause(place, seconds)
        return original(*arguments, **named)

    setattr(module, name, slow)
    main("caption")
