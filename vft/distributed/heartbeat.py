"""Heartbeats of all processes, so that one that fails is named instead of waited for.

A collective knows that an answer is missing, but not whose: gloo ends with a socket error, and NCCL hangs until its
watchdog aborts the process. So every process has a thread that writes a beat into the store of the rendezvous each
second: what the main thread is doing, and how long the process may be silent. Rank 0 reads the beats of all processes,
and the others read that of rank 0. Nothing here touches the device or a collective; a step costs a few assignments.

A process that fails, or finds that another one is lost, writes the reason into the store. All others read it there and
end. If the main thread waits in a collective, only its heartbeat thread can end the process.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread
from typing import NamedTuple

from torch.distributed import Store  # type: ignore[attr-defined]

from vft.common.errors import first_line

INTERVAL_S = 1.0
"""Between two beats."""
LONG_SILENCE_S = 3600.0
"""Allowed silence while the main thread prepares or writes: reading a large file may block all other threads."""
SUSPICIOUS_SILENCE_S = 6.0
"""Allowed silence after a connection broke."""
LAUNCHER_S = 5.0
"""For torchrun to end by itself."""


class Beat(NamedTuple):
    """What a process writes into the store every second, as a JSON list."""

    number: int
    progress: int
    """How many activities the main thread has begun. If all wait, those with the fewest hold up the others."""
    silence_s: float
    """How long the process may be silent after this beat."""
    activity: str


def beat_key(rank: int) -> str:
    """Key of the store under which a process writes its beats."""
    return f"beat/{rank}"


class Member(NamedTuple):
    """One process of a run, as it introduces itself to the others."""

    rank: int
    local_rank: int
    host: str
    """Name of its host."""
    torch: str
    """Version of torch."""
    runtime: str
    """CUDA or ROCm, with its version."""
    code: str
    """Digest of vft's own files."""
    address: str
    """IP address from which it reaches the rendezvous."""
    port: int
    """TCP port on which other processes can test whether they reach it."""


def names(members: Iterable[Member]) -> str:
    """Hosts and ranks for messages: `host a (ranks 0, 1), host b (rank 2)`."""
    ranks: dict[str, list[str]] = {}
    for member in members:
        ranks.setdefault(member.host, []).append(str(member.rank))
    return ", ".join(f"host {host} (rank{'s' * (len(r) > 1)} {', '.join(r)})" for host, r in ranks.items())


class Heartbeat:
    """Two threads beside the main one: the first writes this process's beats and reads those of others, the second
    notices when the store no longer answers the first."""

    def __init__(
        self, store: Store, rank: int, size: int, known: Mapping[int, Member], silence_s: float, timeout_s: float
    ) -> None:
        """`store` holds the keys of this run alone. `known`: all processes on rank 0, elsewhere rank 0 and this one.

        A process is lost after `silence_s` without a beat. A pack or a collective may take `timeout_s`.
        """
        self.store, self.known, self.me, self.size = store, known, known[rank], size
        self.silence_s, self.timeout_s, self.interval_s = silence_s, timeout_s, min(INTERVAL_S, silence_s / 5)
        # What the main thread is doing: it writes this, and the heartbeat thread reads it.
        self.activity, self.progress, self.since_s = "preparing", 0, time.monotonic()
        self.has_timeout = False
        """Whether the next activity must begin within `timeout_s`."""
        self.may_block = True
        """Whether it may keep the heartbeat thread from running for long."""
        self.watched = range(1, size) if rank == 0 else [0]
        """Processes whose beats this one reads."""
        self.beats: dict[int, Beat] = {}
        """Newest beat of each."""
        self.changed_s = dict.fromkeys(self.watched, time.monotonic())
        """When this process saw a new beat of each."""
        self.is_suspicious = False
        """Whether a connection broke: shorter silence is then enough."""
        self._beats_sent = self._barriers = 0
        self._ticks_without_answer = 0
        """Counted, not timed: a process that was stopped and continued must not blame others."""
        self._ended, self._exiting = Event(), Lock()
        self._launcher = os.getppid()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Be the heartbeat of this process. The first beat of every process must be in the store."""
        global _current
        _current = self
        threads = [Thread(target=run, daemon=True) for run in (self._send_and_read, self._guard_store)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:  # one that is still in a call of the store when Python ends would abort the process
                thread.join(timeout=2 * self.interval_s)
            _current = None

    # --------------------------------------------------------------------------------- called by the main thread

    def begin(self, activity: str, has_timeout: bool, may_block: bool) -> None:
        """The main thread turns to another activity."""
        self.since_s = time.monotonic()  # first, so that the other thread never sees an old time with a timeout
        self.activity, self.has_timeout, self.may_block = activity, has_timeout, may_block
        self.progress += 1

    def barrier(self) -> None:
        """Wait for all processes, as long as all of them are alive. A collective would run into its timeout."""
        self._barriers += 1
        key, before = f"barrier/{self._barriers}", (self.has_timeout, self.may_block)
        self.has_timeout = self.may_block = False
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.size:
            time.sleep(0.02)  # not store.wait: it would hold up the heartbeat thread, which uses the same connection
        self.since_s = time.monotonic()
        self.has_timeout, self.may_block = before

    def report_failure(self, error: BaseException) -> None:
        """Tell the others why this process ends, and give them time to read it."""
        self._ended.set()
        with suppress(RuntimeError):  # the store may be gone too
            self.store.compare_set("failed", "", f"{names([self.me])}: {first_line(error)}")
            linger(self.store)

    def find_cause(self) -> None:
        """A collective failed: let the threads find out which process is gone, and end this one.

        Returns if they find nothing.
        """
        self.is_suspicious = True
        with suppress(RuntimeError):  # perhaps the store itself is gone; the threads find that out, too
            self.store.set("suspicion", "1")
        time.sleep(SUSPICIOUS_SILENCE_S + 4 * self.interval_s)

    def end_run(self, reason: str) -> None:
        """End this process, and with it the run. If several processes give a reason, all show the first one."""
        first = self.store.compare_set("failed", "", reason).decode()
        self._exit(f"error: {reason}" if first == reason else f"stopped: {first}", show=first == reason)

    # ---------------------------------------------------------------------------------------- run by the threads

    def _send(self) -> None:
        self._beats_sent += 1
        silence_s = LONG_SILENCE_S if self.may_block else self.silence_s
        beat = Beat(self._beats_sent, self.progress, silence_s, self.activity)
        self.store.set(beat_key(self.me.rank), json.dumps(beat))

    def _read(self) -> None:
        self.is_suspicious = self.is_suspicious or self.store.check(["suspicion"])
        now_s = time.monotonic()
        for rank, text in zip(self.watched, self.store.multi_get(list(map(beat_key, self.watched))), strict=True):
            beat = Beat(*json.loads(text))
            if self.beats.get(rank) != beat:
                self.beats[rank], self.changed_s[rank] = beat, now_s

    def _send_and_read(self) -> None:
        while not self._ended.wait(self.interval_s):
            try:
                self._send()
                self._check_for_failure()
                self._read()
                self._check_for_silence()
                self._check_for_timeout()
                self._ticks_without_answer = 0
            except RuntimeError as error:  # torch raises these for lost connections
                if not self._ended.wait(self.interval_s):
                    self._exit_without_store(first_line(error))

    def _guard_store(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._ticks_without_answer += 1
            if self._ticks_without_answer * self.interval_s > self.silence_s:
                self._exit_without_store(f"no answer for {self.silence_s:g} s")

    def _check_for_failure(self) -> None:
        reason = self.store.get("failed").decode()
        # Wait a moment: the main thread may be about to fail for the same reason, and its own message says more.
        if reason and not self._ended.wait(self.interval_s):
            self._exit(f"stopped: {reason}", show=self.me.local_rank == 0)

    def _check_for_silence(self) -> None:
        now_s = time.monotonic()
        silence_s = {rank: now_s - self.changed_s[rank] for rank in self.watched}
        limit_s = SUSPICIOUS_SILENCE_S if self.is_suspicious else None
        silent = {rank: s for rank, s in silence_s.items() if s > (limit_s or self.beats[rank].silence_s)}
        if silent and not self._ended.is_set():
            who, activity = names(self.known[rank] for rank in silent), self.beats[min(silent)].activity
            self.end_run(
                f"{who}: no sign of life for {min(silent.values()):.0f} s, was {activity} when last heard of; it was "
                "killed or stopped, or its host or the network failed"
            )

    def _check_for_timeout(self) -> None:
        """On rank 0: if all processes are alive and nothing moves, name those that are behind the others."""
        waited_s = time.monotonic() - self.since_s
        if self.me.rank != 0 or not self.has_timeout or waited_s <= self.timeout_s or self._ended.is_set():
            return
        activities = {0: (self.progress, self.activity)}
        activities |= {rank: (beat.progress, beat.activity) for rank, beat in self.beats.items()}
        least = min(progress for progress, _ in activities.values())
        behind = [rank for rank, (progress, _) in activities.items() if progress == least]
        if len(behind) == self.size:
            who = "all processes wait for each other"
        else:
            who = f"{names(self.known[rank] for rank in behind)} holds up the others"
        self.end_run(
            f"{who}: {activities[behind[0]][1]} for more than parallel.timeout_s = {self.timeout_s:g} s; look at "
            "its storage and its GPU, and raise it if a step takes that long"
        )

    def _exit_without_store(self, error: str) -> None:
        me, main = self.me, self.known[0]
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first = "" if me.rank == 0 else f"{names([main])} can't be reached from here: "
        self._exit(
            f"error: {first}the rendezvous at {address} is gone for {names([me])} ({error}); look at that host, at "
            "its torchrun and at the network between",
            show=me.local_rank == 0 or me.host == main.host,
            end_launcher=True,
        )

    def _exit(self, message: str, show: bool, end_launcher: bool = False) -> None:
        self._exiting.acquire()  # if two threads find something, the first one shows its message
        if show:
            # Not through logging: the main thread may be stuck while it holds a lock of it.
            print(message, file=sys.stderr, flush=True)
        if end_launcher and self.me.local_rank == 0 and os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
            # torchrun waits for the same store in a call that no signal interrupts, for minutes, and could only report
            # this end. If it has restarts left, it may find the store again.
            for number in (signal.SIGTERM, signal.SIGKILL):
                if os.getppid() == self._launcher:
                    os.kill(self._launcher, number)
                    time.sleep(LAUNCHER_S)
        os._exit(1)


def linger(store: Store) -> None:
    """Keep this process alive a little longer at its end, so that the others can read in `store` why it ends.

    torchrun ends the other processes as soon as one is gone, and rank 0 may be the store's server.
    """
    atexit.register(lambda _: time.sleep(2.5 * INTERVAL_S), store)


# ------------------------------------------------------------------------------------- the heartbeat of this process

_current: Heartbeat | None = None


def current() -> Heartbeat | None:
    """The heartbeat of this run; None if there is only one process."""
    return _current


def report_progress(activity: str, has_timeout: bool = True) -> None:
    """Tell the others what this process does now. With `has_timeout` the next report must follow in `timeout_s`."""
    if _current is not None:
        _current.begin(activity, has_timeout, may_block=False)


def report_detail(activity: str) -> None:
    """Say more precisely what this process does, for a message if it takes too long; this is no progress."""
    if _current is not None:
        _current.activity = activity


def barrier() -> None:
    """Wait until every process is here, as long as all of them are alive."""
    if _current is not None:
        _current.barrier()


@contextmanager
def main_process_work(activity: str) -> Iterator[None]:
    """What rank 0 does while the others wait, such as writing a checkpoint. Every process enters; also a decorator."""
    if _current is None:
        yield
        return
    _current.begin(activity, has_timeout=False, may_block=True)
    yield
    _current.barrier()
