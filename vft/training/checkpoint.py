"""Checkpoints: the state from which a run resumes exactly. Safetensors and JSON only; complete on disk or absent.

    step-000100/   trainable.safetensors  optimizer.safetensors  state.json  manifest.json

If the model is sharded, each process writes its own rows (`trainable-00001-of-00004.safetensors`, ...). Headers say
where these belong, in the form of torch.distributed.checkpoint, whose HuggingFaceStorageReader can read them. The
number of processes may change between writing and reading.

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
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vft.adapters.lora import is_start
from vft.common.errors import UserError
from vft.common.files import cannot_write, partial_of, read_object, whole_folder
from vft.common.safetensors_io import open_tensors, write_tensors
from vft.config.run import CheckpointConfig
from vft.distributed.heartbeat import main_process_work
from vft.distributed.process_group import World, all_of, background_group, local_part, local_rows, writes_rows

logger = logging.getLogger(__name__)

T = TypeVar("T")

MANIFEST = "manifest.json"
STATE = "state.json"
TRAINABLE, OPTIMIZER = "trainable", "optimizer"
"""Beginnings of the names of tensor files."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SHARDING = "DCP_SHARDING_INFO"
"""Key in the metadata of a header: for each tensor `saved_offsets`, where its part begins in the whole tensor."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one tensor, which this process writes."""

    file: str
    """`TRAINABLE` or `OPTIMIZER`."""
    rows: Tensor
    first: int
    """Index of the first row in the whole tensor."""


# ------------------------------------------------------------------------------------------------------------ writing


def parts_to_write(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
    """The tensors of the state that this process writes, by name. These are not copies: training changes them."""
    parts = {}
    for name, parameter in _state_parameters(model):
        if not writes_rows(parameter):
            continue
        first = local_rows(parameter).start or 0
        parts[name] = Part(TRAINABLE, local_part(parameter.detach()), first)
        if not parameter.requires_grad:
            continue
        slots = optimizer.state[parameter]
        for moment in MOMENTS:
            parts[f"{moment}.{name}"] = Part(OPTIMIZER, local_part(slots[moment]).detach(), first)
        if first == 0:
            parts[f"step.{name}"] = Part(OPTIMIZER, slots["step"].detach(), 0)
    return parts


def write_parts(folder: Path, parts: Mapping[str, Part], number: int, count: int) -> dict[str, dict[str, Any]]:
    """Write the files of writer `number` (from 1) of `count`, flushed to the disk. Returns their manifest entries."""
    described = {}
    for file in (TRAINABLE, OPTIMIZER):
        mine = {name: part for name, part in parts.items() if part.file == file}
        layout = {name: (part.rows.dtype, part.rows.shape) for name, part in mine.items()}
        name, metadata = f"{file}.safetensors", None
        if count > 1:
            name = f"{file}-{number:05d}-of-{count:05d}.safetensors"
            offsets = {key: {"saved_offsets": _offsets(part)} for key, part in mine.items()}
            metadata = {SHARDING: json.dumps(offsets)}
        described[name] = write_tensors(folder / name, layout, lambda key: parts[key].rows, metadata)
    return described


def write_rest(folder: Path, step: int, state: str, files: Mapping[str, dict[str, Any]]) -> None:
    """Write the state that is not tensors, as JSON, and last the manifest, of `files` and of this one."""
    (folder / STATE).write_text(state, encoding="utf-8")
    text = _manifest(step, {**files, STATE: _describe(folder / STATE)})
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _manifest(step: int, files: Mapping[str, dict[str, Any]]) -> str:
    return json.dumps({"step": step, "files": dict(sorted(files.items()))}, indent=1) + "\n"


def _offsets(part: Part) -> list[int]:
    return [part.first, *[0] * (part.rows.dim() - 1)] if part.rows.dim() else []


# ------------------------------------------------------------------------------------------------------------ choosing


def list_checkpoints(root: Path) -> list[Path]:
    """Folders of checkpoints, newest first."""
    folders = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)] if root.is_dir() else []
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def newest_intact(root: Path, world: World) -> Path | None:
    """The newest checkpoint whose files match its manifest, or None if there are no checkpoints.

    Every process calls it, hashes its share of the files, and gets the same answer. If a checkpoint is damaged, a
    message says so, and the one before it is tried. Raises UserError if all are damaged.
    """
    folders = all_of(list_checkpoints(root))[0]
    for folder in folders:
        damage = next(filter(None, all_of(find_damage(folder, world.rank, world.size))), None)
        if damage is None:
            return folder
        logger.info("%s: %s; trying the checkpoint before it", folder, damage)
    if folders:
        raise UserError(f"{root}: none of {len(folders)} checkpoints is whole; remove the folder to begin anew")
    return None


def find_damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What does not match the manifest in one of several shares of the files; None if all of them are intact."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text != _manifest(step_of(folder), files):  # no digest covers the manifest itself
            return f"{MANIFEST} is not what was written for this step"
        for name, expected in sorted(files.items(), key=lambda item: -item[1]["bytes"])[share::shares]:
            if _describe(folder / name) != expected:
                return f"{name} is not what the manifest says (size or SHA-256)"
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return f"{MANIFEST} or a file that it names can't be read ({error})"
    return None


def _describe(path: Path) -> dict[str, Any]:
    digest = sha256()
    if not path.is_file():  # opening a FIFO would block, and a device has no end
        raise OSError(f"{path.name} is no file")
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


# ------------------------------------------------------------------------------------------------------------- loading


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read the checkpoint into model and optimizer, each process its own rows. Returns the content of state.json.

    Raises UserError if the tensors are not those of the model.
    """
    load_weights(folder, model)
    with ExitStack() as stack:
        moments = _stored(folder, OPTIMIZER, stack)
        for name, parameter in _state_parameters(model):
            if not parameter.requires_grad:
                continue
            slots = optimizer.state[parameter]
            targets = {f"{moment}.{name}": slots[moment] for moment in MOMENTS} | {f"step.{name}": slots["step"]}
            for key, target in targets.items():
                _fill(target, moments.get(key, []), f"{folder}: {key}")
    return read_object(folder / STATE)


def load_weights(folder: Path, model: nn.Module) -> None:
    """`load` of what was trained alone."""
    parameters = dict(_state_parameters(model))
    with ExitStack() as stack:
        stored = _stored(folder, TRAINABLE, stack)
        if stored.keys() != parameters.keys():
            different = sorted(stored.keys() ^ parameters.keys())
            raise UserError(
                f"{folder}: {len(different)} trained tensors differ from the model's, {different[0]} among them"
            )
        for name, parameter in parameters.items():
            _fill(parameter, stored[name], f"{folder}: {name}")


def _stored(folder: Path, file: str, stack: ExitStack) -> dict[str, list[tuple[int, Any]]]:
    """For each tensor its parts in order: the index of the first row, and a slice to read from."""
    parts: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    names = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name in names:
        if name == f"{file}.safetensors" or name.startswith(f"{file}-"):
            reader = stack.enter_context(open_tensors(folder / name))
            offsets = json.loads((reader.metadata() or {}).get(SHARDING, "{}"))
            for key in list(reader.keys()):
                first = [*offsets.get(key, {}).get("saved_offsets", ()), 0][0]
                parts[key].append((first, reader.get_slice(key)))
    return {key: sorted(found, key=lambda part: part[0]) for key, found in parts.items()}


def _fill(target: Tensor, parts: list[tuple[int, Any]], where: str) -> None:
    """Read the rows of `target` that this process has. Raises UserError unless the parts make up exactly its shape."""
    shape, end = list(target.shape), 0
    rows = range(*local_rows(target).indices(shape[0])) if shape else range(1)
    local = local_part(target.detach())
    for first, part in parts:
        length = part.get_shape()[0] if shape else 1
        if first != end or part.get_shape()[1:] != shape[1:]:
            break
        end += length
        begin, stop = max(first, rows.start), min(end, rows.stop)
        if not shape:
            local.copy_(part[...])
        elif begin < stop:
            local[begin - rows.start : stop - rows.start].copy_(part[begin - first : stop - first])
    if end != (shape[0] if shape else 1) or not parts:
        stored = [f"{part.get_shape()} from row {first}" for first, part in parts]
        raise UserError(f"{where}: the model's has shape {shape}, the files have {', '.join(stored) or 'none'}")


def _state_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, and PiSSA's initial values: another machine's decomposition might differ in the last bits."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad or is_start(name))


# ----------------------------------------------------------------------------------------------------- when and by whom


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
        copies, free = sum(size for name, size in by_rank if name == host), available_memory()
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


def available_memory() -> float:
    """Bytes that this host can give without swapping, as Linux estimates them; infinite on other systems."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")), math.inf)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
