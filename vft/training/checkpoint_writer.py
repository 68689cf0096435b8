"""When checkpoints are written, and by whom: each process its own rows, in the background while training goes on.

A save copies what training is about to change to host memory and hands it to a thread. Three times the threads of all
processes wait for each other, in a process group of their own: until rank 0 has made the temporary folder, until
every file is on the disk (each process hashes its own), and until rank 0 has written the manifest and renamed the
folder. What fails in one of them fails in all. Writing and hashing don't hold Python's lock.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable, Mapping
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

T = TypeVar("T")


class AsyncCheckpointer:
    """Saves one model with its optimizer. Every process makes one, and calls its methods together with the others."""

    def __init__(
        self,
        root: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: CheckpointConfig,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        self.root, self.model, self.optimizer = root, model, optimizer
        self.config, self.world, self.say = config, world, say
        self.group = background_group()
        host = platform.node()
        told = all_of((host, sum(part.rows.nbytes for part in parts_to_write(model, optimizer).values())))
        sizes = [size for _, size in told]
        self.writers = [rank for rank, size in enumerate(sizes) if size]
        """Ranks that hold rows which nobody before them holds."""
        self.bytes = sum(sizes)
        """Of a checkpoint, but for a few kilobytes."""
        copies, free = sum(size for name, size in told if name == host), _available_memory()
        self.asynchronous = config.asynchronous and all(all_of(copies <= free))
        if config.asynchronous and not self.asynchronous:
            say(
                f"warning: checkpoint.asynchronous = true: the copies take {_size(copies)} of this host's memory, "
                f"{_size(free)} are free; saves will stop the loop instead"
            )
        self.host: dict[str, Tensor] = {}
        """Copies that wait to be written, in memory that is kept from save to save."""
        self.thread: Thread | None = None
        self.step = 0
        """Of the save in flight."""
        self.error: BaseException | None = None
        """How the save in flight failed."""

    @main_process_work("writing a checkpoint")
    def save(self, step: int, state: dict[str, Any]) -> None:
        """A checkpoint of now; with `asynchronous` it is on the disk by the next `save` or `wait`.

        UserError where it can't be written, or the one before couldn't.
        """
        self._join()
        self.require_room()
        text = json.dumps({**state, "step": step}, indent=1) + "\n"  # now: training changes what `state` refers to
        parts = parts_to_write(self.model, self.optimizer)
        if not self.asynchronous:
            self._write(step, parts, text)
            return
        parts = self._copied(parts)
        self.step, self.thread = step, Thread(target=self._run, args=(step, parts, text), daemon=True)
        self.thread.start()

    @property
    def failed(self) -> bool:
        """Whether the save in flight is known to have failed: `wait` then raises, in this process and all others."""
        return self.error is not None

    @main_process_work("writing a checkpoint")
    def wait(self) -> None:
        """Until nothing is in flight any more. UserError where it couldn't be written."""
        self._join()

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread, error, self.error = None, self.error, None
            if error is not None:
                raise error

    def close(self) -> None:
        """Wait after an error of another kind: what is in flight is whole and worth keeping. Ctrl-C leaves it."""
        if self.thread is not None and self.thread.is_alive():
            self.say(f"waiting for the checkpoint of step {self.step} to be written; Ctrl-C to go without it")
        try:
            self._join()
        except Exception as error:  # the run ends by the other one
            self.say(f"the checkpoint of step {self.step} was not written: {error}")

    # -------------------------------------------------------------------------------------------------------- the disk

    def require_room(self) -> int:
        """Free bytes on the disk. UserError where the next checkpoint wouldn't fit."""
        folder = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        free = min(all_of(shutil.disk_usage(folder).free))
        if free < self.bytes:
            raise UserError(
                f"{self.root}: a checkpoint takes {_size(self.bytes)}, {_size(free)} are free on the disk; free space, "
                "or name another output_dir"
            )
        return free

    def expect(self, steps: int) -> None:
        """Before a run of so many more steps: UserError where not even one save fits the disk, a warning where not all
        do that `checkpoint.keep_last` keeps."""
        if not steps:
            return
        free, saves = self.require_room(), math.ceil(steps / (self.config.every_steps or steps))
        if self.config.keep_last:  # one more lies there while the newest is written
            saves = min(saves, max(1, self.config.keep_last + 1 - len(list_checkpoints(self.root))))
        if free < saves * self.bytes:
            self.say(
                f"warning: {saves} more checkpoints of {_size(self.bytes)} come to {_size(saves * self.bytes)}, "
                f"{_size(free)} are free on the disk: lower checkpoint.keep_last, or free space"
            )

    # --------------------------------------------------------------------------------------------------------- writing

    def _copied(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        """The same parts as they are now, in host memory (pinned, where they come from a GPU)."""
        for name, part in parts.items():
            if name not in self.host:
                pinned = part.rows.is_cuda
                self.host[name] = torch.empty(part.rows.shape, dtype=part.rows.dtype, pin_memory=pinned)
            self.host[name].copy_(part.rows, non_blocking=True)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return {name: replace(part, rows=self.host[name]) for name, part in parts.items()}

    def _run(self, step: int, parts: Mapping[str, Part], state: str) -> None:
        try:
            self._write(step, parts, state)
        except BaseException as error:  # the loop raises it
            self.error = error

    def _write(self, step: int, parts: Mapping[str, Part], state: str) -> None:
        folder = self.root / f"step-{step:06d}"
        with ExitStack() as stack:

            def begin() -> None:
                if self.world.is_main:
                    stack.enter_context(whole_folder(folder))

            def write() -> dict[str, dict[str, Any]]:
                return self._write_own(partial_of(folder), parts)

            def finish() -> None:
                if self.world.is_main:
                    every = {name: facts for part in files for name, facts in part.items()}
                    write_rest(partial_of(folder), step, state, every)
                    stack.close()  # renames it
                    self._prune()

            self._together(begin, folder)
            files = self._together(write, folder)
            self._together(finish, folder)

    def _write_own(self, partial: Path, parts: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
        """This process's files, as the manifest is to describe them."""
        rank = self.world.rank
        if not partial.is_dir():
            raise UserError(f"{partial}: made by rank 0, not there for rank {rank}; all hosts must share output_dir")
        return write_parts(partial, parts, self.writers.index(rank) + 1, len(self.writers)) if parts else {}

    def _prune(self) -> None:
        for old in list_checkpoints(self.root)[self.config.keep_last :] if self.config.keep_last else []:
            shutil.rmtree(old)

    def _together(self, work: Callable[[], T], folder: Path) -> list[T]:
        """What every process's `work` gives, by rank; where one fails, the same error in all of them."""
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except OSError as caught:
            error = cannot_write(folder, caught)
        except Exception as caught:  # so that nobody waits for this process
            error = caught
        told = all_of((result, None if error is None else str(error)), self.group)
        if error is not None:
            raise error
        for _, message in told:
            if message is not None:
                raise UserError(message)
        return [one for one, _ in told]


def _available_memory() -> float:
    """Bytes that this host can give without swapping, as Linux estimates it; elsewhere nobody says."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")), math.inf)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
