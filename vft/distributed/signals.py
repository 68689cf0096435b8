"""Ctrl-C and SIGTERM: a run ends after the step that it is at, with a checkpoint; before the first one, at once.

Schedulers and spot machines send a signal some time before they kill. Python's own handlers wait until the main thread
is back from a call into C, which may be a collective that nobody answers; so a thread hears of each signal too, through
the descriptor that Python's C code writes to, and leaves where the main thread can't.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
AGAIN_S = 3.0
"""Under torchrun the same signal within this time is no second one: schedulers send to all, and torchrun passes on."""
PATIENCE_S = 5.0
"""For the main thread to come back from C where nothing is to be saved."""


class Stopped(KeyboardInterrupt):
    """A signal ends the run: while training in all processes alike, before and after it in this one."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.status = 128 + number
        """To exit with, as shells have it."""


class _Stop:
    def __init__(self) -> None:
        self.number = 0
        """Of the first signal; 0: none came."""
        self.handled = self.agreed = False
        self.deferred = False
        """Whether a signal waits until all processes agree to stop."""

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def error(self) -> Stopped:
        return Stopped(f"stopped by {self.name}, with nothing to save; the same command goes on", self.number)

    def handle(self, number: int, _: FrameType | None) -> None:
        """Of the main thread, between two of Python's instructions."""
        self.number = self.number or number
        if not self.handled and not self.deferred:
            self.handled = True
            raise self.error

    def listen(self, door: socket.socket) -> None:
        """Of the thread."""
        first, since_s = 0, 0.0
        while heard := door.recv(64):
            for number in (n for n in heard if n in SIGNALS):
                if not first:
                    first, since_s, self.number = number, time.monotonic(), self.number or number
                    if self.deferred:
                        logger.info(
                            "%s: stopping after this step with a checkpoint; once more to leave at once", self.name
                        )
                    else:
                        threading.Timer(PATIENCE_S, self.leave_unless_handled).start()
                elif number != first or time.monotonic() - since_s > AGAIN_S or "TORCHELASTIC_RUN_ID" not in os.environ:
                    os._exit(128 + number)

    def leave_unless_handled(self) -> None:
        if not self.handled:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(self.error, file=sys.stderr, flush=True)
            os._exit(self.error.status)


_stop = _Stop()


@contextmanager
def signals_stop() -> Iterator[None]:
    """From here on a signal raises `Stopped`; a second one ends the process at once. Those that are ignored stay so.

    At the end the exit status of a run that was stopped, as SystemExit.
    """
    global _stop
    _stop = _Stop()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = {one: signal.getsignal(one) for one in SIGNALS if signal.getsignal(one) != signal.SIG_IGN}
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_stop.listen, args=(ours,), name="signals", daemon=True).start()
    for one in before:
        signal.signal(one, _stop.handle)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        signal.set_wakeup_fd(-1)
        theirs.close()
    if _stop.agreed:
        sys.exit(_stop.error.status)


@contextmanager
def deferred() -> Iterator[None]:
    """A signal is kept for `stop_if`; one that came too late for it raises `Stopped` at the end."""
    _stop.deferred = True
    try:
        yield
    finally:
        _stop.deferred = False
    if _stop.number and not _stop.agreed:
        _stop.handled = True
        raise _stop.error


def asked() -> int:
    """1 where this process is to stop; to be summed over all of them, and the sum given to `stop_if`."""
    return int(_stop.deferred and _stop.number > 0)


def stop_if(count: int) -> None:
    """Raise `Stopped` where any process is to stop: all of them must call it with the same sum."""
    if count:
        _stop.number = _stop.number or signal.SIGTERM  # another process's
        _stop.handled = _stop.agreed = True
        raise _stop.error


def stopped_by() -> str:
    """Name of the signal that stopped the run."""
    return _stop.name
