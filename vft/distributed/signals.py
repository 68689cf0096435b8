"""Ctrl-C and SIGTERM: training stops after the current step, with a checkpoint; before the first step it stops at once.

Schedulers and spot machines send a signal some time before they kill. Python runs its signal handlers in the main
thread, when that returns from C code, which may be a collective that nobody answers. So a second thread reads each
signal too, from the socket to which Python's C code writes it, and ends the process if the main thread can't.
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
REPEAT_S = 3.0
"""Under torchrun, the same signal within this time is not a second one: a scheduler sends it to all processes, and
torchrun passes it on to its own."""
PATIENCE_S = 5.0
"""For the main thread to return from C code, if there is nothing to save."""


class Stopped(KeyboardInterrupt):
    """A signal ends the run: during training in all processes after the same step, otherwise in this one."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number
        """Exit status, by the convention of shells."""


class _Stop:
    """The request to stop, if any."""

    number = 0
    """The first signal; 0 if none came."""
    is_deferred = False
    """Whether a signal waits until all processes agree to stop."""
    is_handled = False
    """Whether `Stopped` has been raised in the main thread."""
    is_agreed = False
    """Whether all processes stop after the same step."""

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def error(self) -> Stopped:
        return Stopped(f"stopped by {self.name}, with nothing to save; the same command goes on", self.number)

    def handle(self, number: int, _: FrameType | None) -> None:
        """The signal handler, which Python runs in the main thread."""
        self.number = self.number or number
        if not self.is_handled and not self.is_deferred:
            self.is_handled = True
            raise self.error

    def listen(self, receiver: socket.socket) -> None:
        """The second thread: a first signal is announced, another one ends the process at once."""
        first, since_s = 0, 0.0
        while received := receiver.recv(64):
            for number in (n for n in received if n in SIGNALS):
                if not first:
                    first, since_s, self.number = number, time.monotonic(), self.number or number
                    self._announce()
                elif (
                    number != first or time.monotonic() - since_s > REPEAT_S or "TORCHELASTIC_RUN_ID" not in os.environ
                ):
                    os._exit(128 + number)

    def _announce(self) -> None:
        if self.is_deferred:
            message = "%s: stopping after this step with a checkpoint; once more to leave at once"
            logger.info(message, self.name)
        else:
            threading.Timer(PATIENCE_S, self._exit_unless_handled).start()

    def _exit_unless_handled(self) -> None:
        if not self.is_handled:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                # Not through logging: the main thread may be stuck while it holds a lock of it.
                print(self.error, file=sys.stderr, flush=True)
            os._exit(self.error.status)


_stop = _Stop()


@contextmanager
def signals_stop() -> Iterator[None]:
    """From here on a signal raises `Stopped`, and a second one ends the process at once. Ignored signals stay ignored.

    At the end, raises SystemExit with the status of the signal if all processes agreed to stop.
    """
    global _stop
    _stop = _Stop()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_stop.listen, args=(receiver,), name="signals", daemon=True).start()
    for number in before:
        signal.signal(number, _stop.handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        sender.close()
    if _stop.is_agreed:
        sys.exit(_stop.error.status)


@contextmanager
def deferred() -> Iterator[None]:
    """A signal does not raise here; it waits for `stop_if`. One that came too late for that raises at the end."""
    _stop.is_deferred = True
    try:
        yield
    finally:
        _stop.is_deferred = False
    if _stop.number and not _stop.is_agreed:
        _stop.is_handled = True
        raise _stop.error


def stop_requested() -> int:
    """1 if a deferred signal waits in this process. Sum it over all processes, and give the sum to `stop_if`."""
    return int(_stop.is_deferred and _stop.number > 0)


def stop_if(requests: int) -> None:
    """Raise `Stopped` if any process has a request. All processes must call it with the same sum."""
    if requests:
        _stop.number = _stop.number or signal.SIGTERM  # if the signal came to another process
        _stop.is_handled = _stop.is_agreed = True
        raise _stop.error


def stopped_by() -> str:
    """Name of the signal by which all processes agreed to stop; empty if they did not."""
    return _stop.name if _stop.is_agreed else ""
