"""When checkpoints are written, and by whom: each process writes its own rows in a background thread.

A save copies the state to host memory and gives the copy to a thread, while training goes on. The threads of all
processes wait for each other three times, in a process group of their own: until rank 0 has made the temporary folder,
until all files are on the disk (each process hashes its own), and until rank 0 has written the manifest and renamed the
folder. An error in one of them is raised in all. Writing and hashing do not hold the global interpreter lock.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vft.common.errors import UserError
from vft.common.files import cannot_write, partial_of, whole_folder
from vft.config.run import CheckpointConfig
from vft.distributed.heartbeat import main_process_work
from vft.distributed.process_group import World, all_of, background_group
from vft.training.checkpoint import Part, list_checkpoints, parts_to_write, write_parts, write_rest

logger = logging.getLogger(__name__)

T = TypeVar("T")


class AsyncCheckpointer:
    """Saves a model with its optimizer. Every process makes one, and calls its methods together with the others."""

    def __init__(
        self, root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: CheckpointConfig, world: World
    ) -> None:
        self.root, self.model, self.optimizer, self.config, self.world = root, model, optimizer, config, world
        self.group = background_group()
        host = platform.node()
        own_bytes = sum(part.rows.nbytes for part in parts_to_write(model, optimizer).values())
        by_rank = all_of((host, own_bytes))
        self.writers = [rank for rank, (_, size) in enumerate(by_rank) if size]
        """Ranks that have rows which no rank before them has."""
        self.bytes = sum(size for _, size in by_rank)
        """Size of a checkpoint without its JSON files."""
        copies, free = sum(size for name, size in by_rank if name == host), _available_memory()
        self.asynchronous = config.asynchronous and all(all_of(copies <= free))
        if config.asynchronous and not self.asynchronous:
            logger.warning(
                "checkpoint.asynchronous = true: the copies take %s of this host's memory, %s are free; saves will "
                "stop the loop instead",
                _size(copies),
                _size(free),
            )
        self.copies: dict[str, Tensor] = {}
        """Host memory for copies of the state, reused by every save."""
        self.in_flight: Future[None] | None = None
        """The save that a thread is writing, and its step."""
        self.step = 0

    @main_process_work("writing a checkpoint")
    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save a checkpoint. An asynchronous one is on the disk by the end of the next `save` or `wait`.

        Raises UserError if this one, or the one before, cannot be written.
        """
        self._join()
        self.check_free_space()
        text = json.dumps({**state, "step": step}, indent=1) + "\n"  # now, because training changes the state
        parts = parts_to_write(self.model, self.optimizer)
        if not self.asynchronous:
            self._write(step, parts, text)
            return
        parts = self._copied(parts)
        self.step, self.in_flight = step, Future()
        Thread(target=self._run, args=(self.in_flight, step, parts, text), daemon=True).start()

    @property
    def failed(self) -> bool:
        """Whether the save in flight has failed. `wait` then raises its error in all processes."""
        return self.in_flight is not None and self.in_flight.done() and self.in_flight.exception() is not None

    @main_process_work("writing a checkpoint")
    def wait(self) -> None:
        """Wait for the save in flight, if there is one. Raises UserError if it failed."""
        self._join()

    def _join(self) -> None:
        save = self.in_flight
        if save is not None:
            wait([save])
            self.in_flight = None
            save.result()

    def close(self) -> None:
        """Wait for the save in flight after an error elsewhere: it is worth having. Ctrl-C ends the wait."""
        if self.in_flight is not None and not self.in_flight.done():
            logger.info("waiting for the checkpoint of step %d to be written; Ctrl-C to go without it", self.step)
        try:
            self._join()
        except Exception as error:  # the run ends with the other error
            logger.info("the checkpoint of step %d was not written: %s", self.step, error)

    # --------------------------------------------------------------------------------------------------- disk space

    def check_free_space(self) -> int:
        """Free bytes on the disk. Raises UserError if the next checkpoint does not fit."""
        folder = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        free = min(all_of(shutil.disk_usage(folder).free))
        if free < self.bytes:
            raise UserError(
                f"{self.root}: a checkpoint takes {_size(self.bytes)}, {_size(free)} are free on the disk; free space, "
                "or name another output_dir"
            )
        return free

    def check_space_for(self, steps: int) -> None:
        """Before `steps` more steps: raises UserError if not even one checkpoint fits on the disk, and warns if not all
        of those fit that `checkpoint.keep_last` keeps."""
        if not steps:
            return
        free, saves = self.check_free_space(), math.ceil(steps / (self.config.every_steps or steps))
        if self.config.keep_last:  # there is one more while the newest is written
            saves = min(saves, max(1, self.config.keep_last + 1 - len(list_checkpoints(self.root))))
        if free < saves * self.bytes:
            logger.warning(
                "%d more checkpoints of %s come to %s, %s are free on the disk: lower checkpoint.keep_last, or free "
                "space",
                saves,
                _size(self.bytes),
                _size(saves * self.bytes),
                _size(free),
            )

    # ------------------------------------------------------------------------------------------------------ writing

    def _copied(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        """Copies of the parts in host memory, which is pinned if they come from a GPU."""
        for name, part in parts.items():
            if name not in self.copies:
                pinned = part.rows.is_cuda
                self.copies[name] = torch.empty(part.rows.shape, dtype=part.rows.dtype, pin_memory=pinned)
            self.copies[name].copy_(part.rows, non_blocking=True)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return {name: replace(part, rows=self.copies[name]) for name, part in parts.items()}

    def _run(self, save: Future[None], *arguments: Any) -> None:
        try:
            self._write(*arguments)
            save.set_result(None)
        except BaseException as error:  # raised by `_join` in the main thread
            save.set_exception(error)

    def _write(self, step: int, parts: Mapping[str, Part], state: str) -> None:
        folder = self.root / f"step-{step:06d}"
        with ExitStack() as stack:

            def finish() -> None:
                if self.world.is_main:
                    files = {name: entry for part in written for name, entry in part.items()}
                    write_rest(partial_of(folder), step, state, files)
                    stack.close()  # renames the folder
                    for old in list_checkpoints(self.root)[self.config.keep_last :] if self.config.keep_last else []:
                        shutil.rmtree(old)

            self._together(lambda: stack.enter_context(whole_folder(folder)) if self.world.is_main else None, folder)
            written = self._together(lambda: self._write_own(partial_of(folder), parts), folder)
            self._together(finish, folder)

    def _write_own(self, partial: Path, parts: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
        """Write the files of this process. Returns their manifest entries."""
        rank = self.world.rank
        if not partial.is_dir():
            raise UserError(f"{partial}: made by rank 0, not there for rank {rank}; all hosts must share output_dir")
        return write_parts(partial, parts, self.writers.index(rank) + 1, len(self.writers)) if parts else {}

    def _together(self, work: Callable[[], T], folder: Path) -> list[T]:
        """Run `work` in every process. Returns the results by rank; an error in one process is raised in all."""
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except OSError as caught:
            error = cannot_write(folder, caught)
        except Exception as caught:  # raised below, because the others must not wait for this process
            error = caught
        outcomes = all_of((result, None if error is None else str(error)), self.group, wait=False)
        if error is not None:
            raise error
        for _, message in outcomes:
            if message is not None:
                raise UserError(message)
        return [outcome for outcome, _ in outcomes]


def _available_memory() -> float:
    """Bytes that this host can give without swapping, as Linux estimates them; infinite on other systems."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")), math.inf)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
