"""The caption recipe on a disk (the folder FILL) that is full from call number FROM of WHERE on; tests start it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vft.recipes.main import main
from vft.reporting.monitor import Monitor
from vft.training import export, run_data
from vft.training import trainer as train
from vft.training.checkpoint import AsyncCheckpointer

PLACES: dict[str, tuple[Any, str]] = {
    "start": (train, "locked_folder"),
    "metrics": (Monitor, "step"),
    "checkpoint": (AsyncCheckpointer, "_write"),
    "predictions": (train.Trainer, "evaluate"),
    "quarantine": (run_data, "write_quarantine"),
    "export": (train.Trainer, "export"),
    "card": (export, "write_card"),
    "report": (train, "write_report"),
}


def fill(folder: Path) -> None:
    """Take all the room that is left."""
    with (folder / "filler").open("ab", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            return


def filling(work: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`work`, on a full disk from call `number` on."""
    calls = 0

    def do(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number:
            fill(Path(os.environ["FILL"]))
        return work(*arguments, **options)

    return do


if __name__ == "__main__":
    owner, name = PLACES[os.environ["WHERE"]]
    setattr(owner, name, filling(getattr(owner, name), int(os.environ.get("FROM", "1"))))
    main("caption")
