"""Worker processes for work that may hang or crash: a clip costs at most its worker and its deadline, never the run.

The standard library's executor can't end one task, and gives up as a whole when a process dies. Here a thread of the
parent hands tasks to idle workers and replaces a worker that overruns or dies.

Tensors come back in shared memory, passed by torch's `file_descriptor` strategy: a descriptor is open as long as its
tensor lives in the parent, and nothing is left under /dev/shm whoever is killed. What crosses the pipes is pickled by
our own processes for our own processes; no such data is ever read from a file.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.multiprocessing

from vft.common.types import MediaPlan, MediaRef
from vft.data.media.errors import MediaError

R = TypeVar("R")

START_DEADLINE_S = 300.0
"""For a worker to import what it needs; a cold network disk takes minutes."""
FAILED_STARTS = 3
"""Workers that may die one after another while they start, once one has started: someone kills them."""
JOIN_S = 2.0
"""A killed process that waits for a dead disk can't end: it is left behind after so long."""


@dataclass(eq=False)
class _Worker:
    process: ForkServerProcess
    connection: Connection
    deadline: float
    """Of the start or of the current task, in `time.monotonic` seconds; infinity while idle."""
    ready: bool = False
    future: Future[Any] | None = None
    subject: str = ""
    """What the current task is about, for messages."""


class WorkerPool:
    """Runs functions in `workers` processes, first come first served, each within `deadline_s` seconds.

    The future of a task holds its result or the exception it raised; `MediaError("deadline")` where it took longer
    than `deadline_s`; `MediaError("crashed")` where its process died. Functions, arguments and results are pickled;
    callbacks of futures run in the pool's thread and must be short. `initializer` runs once in every worker before
    its first task, outside any deadline: import there what is slow to import. With 0 workers a task runs at once
    inside `submit` and nothing can stop it.

    Raises:
        RuntimeError: from `submit` and from futures, where workers can't be started or the pool is closed.
    """

    def __init__(self, workers: int, deadline_s: float, initializer: Callable[[], None] | None = None) -> None:
        assert workers >= 0 and deadline_s > 0, (workers, deadline_s)
        self.workers, self.deadline_s = workers, deadline_s
        self._initializer = initializer
        self._lock = threading.Lock()
        self._queue: deque[tuple[Future[Any], bytes, str]] = deque()
        self._closed = ""  # why nothing can be submitted
        self._starts_left = 0  # that may fail: where the first does, none will succeed
        if workers == 0:
            return
        _allow_open_files()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["vft.data.media.decode"])  # so that a new worker starts in milliseconds
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        self._thread = threading.Thread(target=self._dispatch, name="vft-worker-pool", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, function: Callable[..., R], *args: Any) -> Future[R]:
        """Queue `function(*args)`; its future can be cancelled until a worker takes it."""
        future: Future[R] = Future()
        if self.workers == 0:
            try:
                future.set_result(function(*args))
            except Exception as error:
                future.set_exception(error)
            return future
        task = bytes(ForkingPickler.dumps((function, args)))
        with self._lock:
            if self._closed:
                raise RuntimeError(self._closed)
            self._queue.append((future, task, _subject(function, args)))
            self._wake()
        return future

    def close(self) -> None:
        """Kill the workers; tasks that have not ended fail. May be called again."""
        if self.workers == 0:
            return
        self._shut("the worker pool is closed")
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shut(self, why: str) -> None:
        with self._lock:
            if not self._closed:
                self._closed = why
                self._wake()

    def _wake(self) -> None:
        """With the lock held and the pool open: the descriptor may belong to someone else once it is closed."""
        with contextlib.suppress(BlockingIOError):  # a full pipe will wake the thread too
            os.write(self._wake_w, b".")

    # ---------------------------------------------------------------------------------- the pool's thread, from here

    def _dispatch(self) -> None:
        # Workers inherit it: what a terminal or a scheduler sends to all processes alike is their parent's to answer.
        resource_tracker.ensure_running()  # to start it would take the mask off again
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        workers: list[_Worker] = []
        try:
            workers = [self._start() for _ in range(self.workers)]
            while not self._closed:
                self._feed(workers)
                patience_s = max(0.0, min(worker.deadline for worker in workers) - time.monotonic())
                watched: list[Connection | int] = [self._wake_r, *(worker.connection for worker in workers)]
                ready = wait(watched, None if math.isinf(patience_s) else patience_s)
                if self._wake_r in ready:
                    os.read(self._wake_r, 65536)
                for i, worker in enumerate(workers):
                    goes_on = self._receive(worker) if worker.connection in ready else self._in_time(worker)
                    if not goes_on and not self._closed:
                        workers[i] = self._start()
        except Exception as error:  # out of processes, memory or descriptors: everyone who waits is told below
            self._shut(f"the worker pool failed: {error!r}")
        finally:
            for worker in workers:
                self._end(worker, RuntimeError(self._closed))
            for future, _, _ in self._queue:
                if future.set_running_or_notify_cancel():
                    future.set_exception(RuntimeError(self._closed))
            os.close(self._wake_r)
            os.close(self._wake_w)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._initializer), daemon=True)
        with _no_main_module():
            process.start()
        theirs.close()  # so that the worker's end is the only one, and its death is an end of file
        return _Worker(process, ours, time.monotonic() + START_DEADLINE_S)

    def _feed(self, workers: list[_Worker]) -> None:
        for worker in workers:
            while worker.ready and worker.future is None and self._queue:
                future, task, subject = self._queue.popleft()
                if not future.set_running_or_notify_cancel():
                    continue
                worker.future, worker.subject, worker.deadline = future, subject, time.monotonic() + self.deadline_s
                with contextlib.suppress(OSError):  # it has died: the end of file is seen next, and fails the task
                    worker.connection.send_bytes(task)

    def _receive(self, worker: _Worker) -> bool:
        """Take what `worker` sent; False where it is gone."""
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            return self._died(worker)
        try:
            succeeded, value = ForkingPickler.loads(message)
        except (EOFError, OSError) as error:  # tensors' descriptors are fetched from the worker: has it died since?
            worker.process.join(JOIN_S)
            if worker.process.exitcode is not None:
                return self._died(worker)
            succeeded, value = False, error
        except Exception as error:  # a class that can't be rebuilt here
            succeeded, value = False, error
        future, worker.future, worker.deadline = worker.future, None, math.inf
        if future is None:  # the first message: whether the worker could start
            worker.ready, self._starts_left = succeeded, FAILED_STARTS
            if not succeeded:
                self._shut(f"a worker process could not start: {value!r}")
        elif succeeded:
            future.set_result(value)
        else:
            future.set_exception(value)
        return True

    def _in_time(self, worker: _Worker) -> bool:
        if time.monotonic() < worker.deadline:
            return True
        if not worker.ready:
            self._shut(f"a worker process did not start within {START_DEADLINE_S:g} s")
        took = f"took longer than the deadline of {self.deadline_s:g} s"
        message = f"{worker.subject}: {took}; take the record out, or raise the deadline where the disk is slow"
        self._end(worker, MediaError("deadline", message))
        return False

    def _died(self, worker: _Worker) -> bool:
        """A worker's end of the pipe is closed."""
        worker.process.join(JOIN_S)
        code = worker.process.exitcode
        how = f"exit status {code}" if code is None or code >= 0 else f"signal {-code}"
        if not worker.ready:
            self._starts_left -= 1
            if self._starts_left < 0:
                self._shut(f"a worker process died while it started ({how})")
        mend = {
            -signal.SIGBUS: "shared memory (/dev/shm) is full: give the container more (--shm-size)",
            -signal.SIGKILL: "someone killed it, perhaps for want of memory: lower data.workers or the pixel limits",
        }.get(code or 0, "take the record out or encode the file anew")
        self._end(worker, MediaError("crashed", f"{worker.subject}: its worker process died ({how}); {mend}"))
        return False

    def _end(self, worker: _Worker, error: Exception) -> None:
        """Kill a worker and fail its task."""
        with contextlib.suppress(ValueError):  # it was ended before, or still hangs in the kernel
            worker.process.kill()
            worker.process.join(JOIN_S)
            worker.process.close()
        worker.connection.close()
        if worker.future is not None:
            worker.future.set_exception(error)
            worker.future = None


def empty_bytes(*shape: int) -> torch.Tensor:
    """uint8 memory for a task's result: in a worker the shared memory itself, so that to send it copies nothing."""
    if not _in_worker:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep a new process from importing the program that it serves: that takes seconds and hundreds of megabytes.

    multiprocessing does so to find what `__main__` defines; nothing that workers run is defined there.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _allow_open_files() -> None:
    """Raise the soft limit on open files to the hard one: each waiting tensor holds one, and 1,024 are soon used up."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _subject(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """The path that a task is about, else the function's name."""
    for arg in args:
        found = arg.ref if isinstance(arg, MediaPlan) else arg
        found = found.path if isinstance(found, MediaRef) else found
        if isinstance(found, Path):
            return str(found)
        if isinstance(found, tuple) and found and isinstance(found[0], Path):
            return f"{found[0]} and {len(found) - 1} more pictures"
    return getattr(function, "__qualname__", repr(function))


# ---------------------------------------------------------------------------------------------- in a worker process

_in_worker = False


def _work(connection: Connection, initializer: Callable[[], None] | None) -> None:
    global _in_worker
    _in_worker = True
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    _reply(connection, initializer or (lambda: None), ())
    while True:
        try:
            task = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            function, args = ForkingPickler.loads(task)
        except Exception as error:
            function, args = _raise, (error,)
        _reply(connection, function, args)
        del function, args


def _die_with_parent() -> None:
    """A worker that is busy would not notice that its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _reply(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Send (True, result) or (False, exception)."""
    try:
        message = ForkingPickler.dumps((True, function(*args)))
    except BaseException as error:  # whatever a task raises is its caller's to judge
        message = ForkingPickler.dumps((False, _portable(error)))
    with contextlib.suppress(BrokenPipeError):  # the pool has been closed
        connection.send_bytes(message)


def _portable(error: BaseException) -> BaseException:
    """`error` with its traceback as a note; a RuntimeError that quotes it where it can't be pickled."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, MediaError):
        error.add_note(f"In a worker process:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    return error


def _raise(error: Exception) -> None:
    raise error
