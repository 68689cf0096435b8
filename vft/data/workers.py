"""Worker processes for tasks that may hang or crash: a bad clip costs at most a worker and the timeout, not the run.

The executor of the standard library cannot end a single task, and it breaks as a whole if a process dies. Here a thread
of the parent process gives tasks to idle workers, and replaces a worker that takes too long or dies.

Tensors come back in shared memory, passed by torch's `file_descriptor` strategy: a descriptor is open as long as its
tensor lives in the parent, and nothing is left under /dev/shm, whichever process is killed. Only our own processes
write and read the pickles in the pipes; none is ever read from a file.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing
import os
import pickle
import resource
import shutil
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
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.multiprocessing

from vft.common.errors import UserError
from vft.common.types import MediaPlan, MediaRef
from vft.data.media.errors import MediaError

R = TypeVar("R")

START_TIMEOUT_S = 300.0
"""For a worker to import what it needs: from a cold network disk that takes minutes."""
MAX_FAILED_STARTS = 3
"""Workers that may die in sequence while they start, after one has started: then something keeps killing them."""
SHARED_MEMORY = Path("/dev/shm")
MORE_SHARED_MEMORY = (
    "docker run --shm-size=16g (or --ipc=host); Kubernetes: an emptyDir with medium: Memory at /dev/shm; "
    "or lower data.prefetch_packs or data.pack_tokens"
)
JOIN_S = 2.0
"""A killed process that waits for a dead disk cannot end: after this time it is left behind."""


@dataclass(eq=False)
class _Worker:
    process: ForkServerProcess
    connection: Connection
    deadline: float
    """When the start or the current task times out, in `time.monotonic` seconds; infinity while idle."""
    is_ready: bool = False
    future: Future[Any] | None = None
    subject: str = ""
    """What the current task works on, for messages."""


class WorkerPool:
    """Runs functions in `workers` processes, first in first out, each for at most `timeout_s` seconds.

    A task's future holds its result or the exception that it raised, `MediaError("deadline")` if it took longer than
    `timeout_s`, or `MediaError("crashed")` if its process died. Functions, arguments and results are pickled. Callbacks
    of futures run in the pool's thread and must be short. `initializer` runs once in every worker before its first task
    and outside the timeout: slow imports belong there. With 0 workers a task runs inside `submit`, without a timeout.

    Raises:
        RuntimeError: from `submit` and from futures, if workers cannot be started or the pool is closed.
    """

    def __init__(self, workers: int, timeout_s: float, initializer: Callable[[], None] | None = None) -> None:
        assert workers >= 0 and timeout_s > 0, (workers, timeout_s)
        self.workers, self.timeout_s = workers, timeout_s
        self._initializer = initializer
        self._lock = threading.Lock()
        self._queue: deque[tuple[Future[Any], bytes, str]] = deque()
        self._close_reason = ""
        """Why nothing can be submitted any more."""
        self._failed_starts_left = 0
        """0 until a worker has started: if the first one cannot, none will."""
        if workers == 0:
            return
        # Each waiting tensor has an open file, and the 1,024 that are usual are soon used up.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["vft.data.media.patches"])  # so that a new worker starts in milliseconds
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        self._thread = threading.Thread(target=self._dispatch, name="vft-worker-pool", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, function: Callable[..., R], *args: Any) -> Future[R]:
        """Queue `function(*args)`. Its future can be cancelled until a worker takes it."""
        future: Future[R] = Future()
        if self.workers == 0:
            try:
                future.set_result(function(*args))
            except Exception as error:
                future.set_exception(error)
            return future
        task = bytes(ForkingPickler.dumps((function, args)))
        with self._lock:
            if self._close_reason:
                raise RuntimeError(self._close_reason)
            self._queue.append((future, task, _subject(function, args)))
            self._wake()
        return future

    def close(self) -> None:
        """Kill the workers. Unfinished tasks fail. May be called more than once."""
        if self.workers == 0:
            return
        self._shut_down("the worker pool is closed")
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shut_down(self, reason: str) -> None:
        with self._lock:
            if not self._close_reason:
                self._close_reason = reason
                self._wake()

    def _wake(self) -> None:
        """Call it with the lock held and the pool open: a closed descriptor may belong to something else."""
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes the thread too
            os.write(self._wake_w, b".")

    # ------------------------------------------------------------------------------ from here on in the pool's thread

    def _dispatch(self) -> None:
        # Workers inherit the mask: the parent handles signals that a terminal or a scheduler sends to all processes.
        resource_tracker.ensure_running()  # starting it later would unblock the signals
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        workers: list[_Worker] = []
        try:
            workers = [self._start() for _ in range(self.workers)]
            while not self._close_reason:
                self._assign_tasks(workers)
                wait_s = max(0.0, min(worker.deadline for worker in workers) - time.monotonic())
                connections: list[Connection | int] = [self._wake_r, *(worker.connection for worker in workers)]
                ready = wait(connections, None if math.isinf(wait_s) else wait_s)
                if self._wake_r in ready:
                    os.read(self._wake_r, 65536)
                for i, worker in enumerate(workers):
                    is_alive = self._receive(worker) if worker.connection in ready else self._is_in_time(worker)
                    if not is_alive and not self._close_reason:
                        workers[i] = self._start()
        except Exception as error:  # out of processes, memory or descriptors: all futures fail below
            self._shut_down(f"the worker pool failed: {error!r}")
        finally:
            for worker in workers:
                self._end(worker, RuntimeError(self._close_reason))
            for future, _, _ in self._queue:
                if future.set_running_or_notify_cancel():
                    future.set_exception(RuntimeError(self._close_reason))
            os.close(self._wake_r)
            os.close(self._wake_w)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._initializer), daemon=True)
        with _no_main_module():
            process.start()
        theirs.close()  # so that the pipe ends when the worker dies
        return _Worker(process, ours, time.monotonic() + START_TIMEOUT_S)

    def _assign_tasks(self, workers: list[_Worker]) -> None:
        for worker in workers:
            while worker.is_ready and worker.future is None and self._queue:
                future, task, subject = self._queue.popleft()
                if not future.set_running_or_notify_cancel():
                    continue
                worker.future, worker.subject, worker.deadline = future, subject, time.monotonic() + self.timeout_s
                with contextlib.suppress(OSError):  # it has died: `_receive` notices, and fails the task
                    worker.connection.send_bytes(task)

    def _receive(self, worker: _Worker) -> bool:
        """Take what the worker sent; False if it has died."""
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            return self._fail_dead(worker)
        try:
            succeeded, value = ForkingPickler.loads(message)
        except (EOFError, OSError) as error:  # a tensor's descriptor comes from the worker, which may have died
            worker.process.join(JOIN_S)
            if worker.process.exitcode is not None:
                return self._fail_dead(worker)
            succeeded, value = False, error
        except Exception as error:  # a class that cannot be unpickled here
            succeeded, value = False, error
        future, worker.future, worker.deadline = worker.future, None, math.inf
        if future is None:  # the first message: whether the worker could start
            worker.is_ready, self._failed_starts_left = succeeded, MAX_FAILED_STARTS
            if not succeeded:
                self._shut_down(f"a worker process could not start: {value!r}")
        elif succeeded:
            future.set_result(value)
        else:
            future.set_exception(value)
        return True

    def _is_in_time(self, worker: _Worker) -> bool:
        """False if its task or start timed out: it is killed."""
        if time.monotonic() < worker.deadline:
            return True
        if not worker.is_ready:
            self._shut_down(f"a worker process did not start within {START_TIMEOUT_S:g} s")
        took = f"took longer than the deadline of {self.timeout_s:g} s"
        message = f"{worker.subject}: {took}; take the record out, or raise the deadline where the disk is slow"
        self._end(worker, MediaError("deadline", message))
        return False

    def _fail_dead(self, worker: _Worker) -> bool:
        """Fail the task of a worker that has closed its end of the pipe."""
        worker.process.join(JOIN_S)
        code = worker.process.exitcode
        how = f"exit status {code}" if code is None or code >= 0 else f"signal {-code}"
        if not worker.is_ready:
            self._failed_starts_left -= 1
            if self._failed_starts_left < 0:
                self._shut_down(f"a worker process died while it started ({how})")
        fix = "take the record out or encode the file anew"
        if code == -signal.SIGKILL:
            fix = "someone killed it, perhaps for want of memory: lower data.workers or the pixel limits"
        error: Exception = MediaError("crashed", f"{worker.subject}: its worker process died ({how}); {fix}")
        if code == -signal.SIGBUS:  # not the clip's fault, and the next one would meet the same
            error = UserError(
                f"a worker process died of SIGBUS while it decoded {worker.subject}: shared memory, {SHARED_MEMORY}, "
                f"is full ({shared_memory_bytes() or 0:,} bytes are free); {MORE_SHARED_MEMORY}",
                on_one_rank=True,
            )
        self._end(worker, error)
        return False

    def _end(self, worker: _Worker, error: Exception) -> None:
        """Kill a worker and fail its task."""
        with contextlib.suppress(ValueError):  # it has been ended before, or still hangs in the kernel
            worker.process.kill()
            worker.process.join(JOIN_S)
            worker.process.close()
        worker.connection.close()
        if worker.future is not None:
            worker.future.set_exception(error)
            worker.future = None


def shared_memory_bytes() -> int | None:
    """Bytes of shared memory that are free; None on a system without a folder for it."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def empty_bytes(*shape: int) -> torch.Tensor:
    """uint8 memory for a task's result. In a worker it is shared memory, so that sending it copies nothing."""
    if not _in_worker:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep a new process from importing the main program, which takes seconds and hundreds of megabytes.

    multiprocessing imports it to find what `__main__` defines. Nothing that workers run is defined there.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _subject(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """The path that a task works on, or the function's name."""
    for arg in args:
        ref = arg.ref if isinstance(arg, MediaPlan) else arg
        path = ref.path if isinstance(ref, MediaRef) else ref
        if isinstance(path, Path):
            return str(path)
        if isinstance(path, tuple) and path and isinstance(path[0], Path):
            return f"{path[0]} and {len(path) - 1} more pictures"
    return getattr(function, "__qualname__", repr(function))


# ---------------------------------------------------------------------------------------------- in a worker process

_in_worker = False


def _work(connection: Connection, initializer: Callable[[], None] | None) -> None:
    global _in_worker
    _in_worker = True
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    _reply(connection, initializer or (lambda: None))
    while True:
        try:
            task = connection.recv_bytes()
        except (EOFError, OSError):
            return
        _reply(connection, partial(_run, task))


def _die_with_parent() -> None:
    """End this worker when its parent is killed; a busy one would not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _run(task: bytes) -> Any:
    function, args = ForkingPickler.loads(task)
    return function(*args)


def _reply(connection: Connection, work: Callable[[], Any]) -> None:
    """Send (True, result) or (False, exception)."""
    try:
        message = ForkingPickler.dumps((True, work()))
    except BaseException as error:  # the caller of the task handles it, whatever it is
        message = ForkingPickler.dumps((False, _portable(error)))
    with contextlib.suppress(BrokenPipeError):  # the pool has been closed
        connection.send_bytes(message)


def _portable(error: BaseException) -> BaseException:
    """`error` with its traceback as a note, or if it cannot be pickled a RuntimeError that quotes it."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, MediaError):
        error.add_note(f"In a worker process:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    return error
