"""Atomic writes: files and folders are written under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from vft.common.errors import UserError

logger = logging.getLogger(__name__)

PARTIAL = ".partial-"
FREE_SPACE = "free space, or name a folder that can be written"
LOCK_PATIENCE_S = 2.0
"""Seconds of waiting for a lock after which a message is logged."""


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; at the end it takes the place of `folder`. After an error nothing of it is left.

    Raises UserError if it cannot be written (a full disk, a read-only folder).
    """
    partial = partial_of(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _open_to_all(partial)
        for path in [*(one for one in partial.iterdir() if one.is_file()), partial]:
            flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_of(path: Path) -> Path:
    """The temporary name of a file or folder."""
    return path.with_name(f"{PARTIAL}{path.name}")


def cannot_write(path: Path, error: Exception, fix: str = FREE_SPACE) -> UserError:
    """The error for a file that cannot be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"{path}: can't be written ({reason}); {fix}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write; at the end the file takes the place of `path`. After an error nothing of it is left.

    Raises UserError if it cannot be written.
    """
    partial = partial_of(path)
    try:
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)  # the rename itself
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises UserError if it cannot be written."""
    with whole_file(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path, waiting_for: str, fix: str = FREE_SPACE) -> Iterator[None]:
    """Hold a lock file, and log what it is `waiting_for` if that takes long.

    UserError, which proposes the `fix`, if the file cannot be written.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_PATIENCE_S)
        except Timeout:
            logger.info("waiting for %s (%s)", waiting_for, path, extra={"all_ranks": True})
            lock.acquire()
    except OSError as error:
        raise cannot_write(path, error, fix) from error
    try:
        yield
    finally:
        lock.release()


def append_text(path: Path, text: str) -> None:
    """Append `text` to a file. Raises UserError if it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise cannot_write(path, error) from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if the file cannot be read or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}); fetch it again") from error
    except (ValueError, RecursionError) as error:  # nested too deeply
        raise UserError(f"{file}: not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object; fetch it again")
    return content


def digest(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remove_partials(folder: Path) -> None:
    """Remove temporary files of killed processes in `folder` and its subfolders. Nobody else may be writing there."""
    for partial in [*folder.glob(f"{PARTIAL}*"), *folder.glob(f"*/{PARTIAL}*")]:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def _open_to_all(folder: Path) -> None:
    """Give the files the usual permissions: safetensors makes them readable for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def flush(path: Path) -> None:
    """fsync a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
