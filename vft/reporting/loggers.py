"""TensorBoard and Weights & Biases: the figures of metrics.jsonl, under the same names."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vft.common.errors import UserError, first_line
from vft.common.files import digest
from vft.config.run import Config


class Board(Protocol):
    """A service that shows figures over steps."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the figures of a step."""

    def close(self) -> None:
        """Write what is still pending."""


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, config: Config) -> None:
        import wandb

        folder = config.output_dir
        # run.json holds the time of the start: a resumed run continues the same one here, a new run makes another.
        id = digest((folder / "run.json").read_text(encoding="utf-8"))
        try:
            self.run: Any = wandb.init(
                project=config.log.wandb_project,
                name=config.log.wandb_run or folder.absolute().name,
                id=id,
                resume="allow",
                dir=str(folder),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off"),  # it would record the live view
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"log.wandb = true: {first_line(error)}; `wandb login`, or WANDB_MODE=offline to upload later"
            ) from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def require_boards(config: Config) -> None:
    """Raise UserError if the package of a configured board is not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(config.log, name) and not _installed(name):
            raise UserError(f"log.{name} = true: not installed; pip install 'vft[{name}]', or leave it out")


def _installed(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None  # not a folder of that name in the current folder


def open_boards(config: Config, step: int) -> list[Board]:
    """The configured boards. Figures of steps after `step` are logged again."""
    boards: list[Board] = []
    if config.log.tensorboard:
        boards.append(_TensorBoard(config.output_dir / "tensorboard", step))
    if config.log.wandb:
        boards.append(_WandB(config))
    return boards
