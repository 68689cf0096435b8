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
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field

from torch.distributed import Store  # type: ignore[attr-defined]

from vft.common.errors import first_line
from vft.distributed.members import Members, names

INTERVAL_S = 1.0
"""Between two beats."""
LONG_SILENCE_S = 3600.0
"""Allowed silence while the main thread prepares or writes: reading a large file may block all other threads."""
SUSPICIOUS_SILENCE_S = 6.0
"""Allowed silence after a connection broke."""
LAUNCHER_S = 5.0
"""For torchrun to end by itself."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a process writes into the store every second."""

    number: int
    progress: int
    """How many activities the main thread has begun."""
    silence_s: float
    """How long the process may be silent after this beat."""
    activity: str

    def to_json(self) -> str:
        """The text for the store."""
        return json.dumps(astuple(self))

    @classmethod
    def from_json(cls, text: bytes) -> Beat:
        """The beat that `to_json` wrote."""
        return cls(*json.loads(text))


def beat_key(rank: int) -> str:
    """Key of the store under which a process writes its beats."""
    return f"beat/{rank}"


@dataclass(slots=True)
class Activity:
    """What the main thread of this process is doing. The main thread writes it, the heartbeat thread reads it."""

    text: str = "preparing"
    progress: int = 0
    """Activities begun so far. If everybody waits, the processes with the fewest hold up the others."""
    since_s: float = field(default_factory=time.monotonic)
    has_timeout: bool = False
    """Whether the next activity must begin within `timeout_s`."""
    may_block: bool = True
    """Whether it may keep the heartbeat thread from running for long."""

    def begin(self, text: str, has_timeout: bool, may_block: bool) -> None:
        """The main thread turns to another activity."""
        self.since_s = time.monotonic()  # first, so that the other thread never sees an old time with a timeout
        self.text, self.has_timeout, self.may_block = text, has_timeout, may_block
        self.progress += 1


class BeatReader:
    """The beats of the processes that this process watches: all others on rank 0, elsewhere rank 0."""

    def __init__(self, store: Store, ranks: Sequence[int]) -> None:
        self.store, self.ranks = store, ranks
        self.beats: dict[int, Beat] = {}
        """Newest beat of each process."""
        self.changed_s = dict.fromkeys(ranks, time.monotonic())
        """When this process saw a new beat of each other one."""
        self.is_suspicious = False
        """Whether a connection broke: shorter silence is then enough."""

    def read(self) -> None:
        """Fetch the beats from the store."""
        self.is_suspicious = self.is_suspicious or self.store.check(["suspicion"])
        now_s = time.monotonic()
        for rank, text in zip(self.ranks, self.store.multi_get([beat_key(rank) for rank in self.ranks]), strict=True):
            beat = Beat.from_json(text)
            if self.beats.get(rank) != beat:
                self.beats[rank], self.changed_s[rank] = beat, now_s

    def silent(self) -> dict[int, float]:
        """Processes that are silent for longer than they may, with the seconds."""
        now_s = time.monotonic()
        silence_s = {rank: now_s - self.changed_s[rank] for rank in self.ranks}
        limit_s = SUSPICIOUS_SILENCE_S if self.is_suspicious else None
        return {rank: s for rank, s in silence_s.items() if s > (limit_s or self.beats[rank].silence_s)}


class Heartbeat:
    """Two threads beside the main one: the first writes this process's beats and reads those of others, the second
    notices when the store no longer answers the first."""

    def __init__(self, members: Members) -> None:
        self.members, self.store = members, members.store
        self.activity = Activity()
        self.reader = BeatReader(self.store, range(1, members.size) if members.rank == 0 else [0])
        self.interval_s = min(INTERVAL_S, members.silence_s / 5)
        self._beats_sent = self._barriers = 0
        self._ticks_without_answer = 0
        """Counted, not timed: a process that was stopped and continued must not blame others."""
        self._ended, self._exiting = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._launcher = os.getppid()

    def start(self) -> None:
        """Start the threads. The first beat of every process must be in the store."""
        for run in (self._send_and_read, self._guard_store):
            self._threads.append(threading.Thread(target=run, name=f"heartbeat{run.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """End the threads. A thread that is still in a call of the store when Python ends would abort the process."""
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=2 * self.interval_s)

    # --------------------------------------------------------------------------------- called by the main thread

    def barrier(self) -> None:
        """Wait for all processes, as long as all of them are alive. A collective would run into its timeout."""
        self._barriers += 1
        key, before = f"barrier/{self._barriers}", (self.activity.has_timeout, self.activity.may_block)
        self.activity.has_timeout = self.activity.may_block = False
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.members.size:
            time.sleep(0.02)  # not store.wait: it would hold up the heartbeat thread, which uses the same connection
        self.activity.since_s = time.monotonic()
        self.activity.has_timeout, self.activity.may_block = before

    def report_failure(self, error: BaseException) -> None:
        """Tell the others why this process ends, and give them time to read it."""
        self._ended.set()
        with suppress(RuntimeError):  # the store may be gone too
            self.store.compare_set("failed", "", f"{names([self.members.me])}: {first_line(error)}")
            linger(self.store)

    def find_cause(self) -> None:
        """A collective failed: let the threads find out which process is gone, and end this one.

        Returns if they find nothing.
        """
        self.reader.is_suspicious = True
        with suppress(RuntimeError):  # perhaps the store itself is gone; the threads find that out, too
            self.store.set("suspicion", "1")
        time.sleep(SUSPICIOUS_SILENCE_S + 4 * self.interval_s)

    def end_run(self, reason: str) -> None:
        """End this process, and with it the run. If several processes give a reason, all show the first one."""
        first = self.store.compare_set("failed", "", reason).decode()
        self._exit(f"error: {reason}" if first == reason else f"stopped: {first}", show=first == reason)

    # ---------------------------------------------------------------------------------------- run by the threads

    def send(self) -> None:
        """Write a beat of this process into the store."""
        self._beats_sent += 1
        silence_s = LONG_SILENCE_S if self.activity.may_block else self.members.silence_s
        beat = Beat(self._beats_sent, self.activity.progress, silence_s, self.activity.text)
        self.store.set(beat_key(self.members.rank), beat.to_json())

    def _send_and_read(self) -> None:
        while not self._ended.wait(self.interval_s):
            try:
                self.send()
                self._check_for_failure()
                self.reader.read()
                self._check_for_silence()
                self._check_for_timeout()
                self._ticks_without_answer = 0
            except RuntimeError as error:  # torch raises these for lost connections
                if not self._ended.wait(self.interval_s):
                    self._exit_without_store(first_line(error))

    def _guard_store(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._ticks_without_answer += 1
            if self._ticks_without_answer * self.interval_s > self.members.silence_s:
                self._exit_without_store(f"no answer for {self.members.silence_s:g} s")

    def _check_for_failure(self) -> None:
        reason = self.store.get("failed").decode()
        # Wait a moment: the main thread may be about to fail for the same reason, and its own message says more.
        if reason and not self._ended.wait(self.interval_s):
            self._exit(f"stopped: {reason}", show=self.members.me.local_rank == 0)

    def _check_for_silence(self) -> None:
        silent = self.reader.silent()
        if silent and not self._ended.is_set():
            activity = self.reader.beats[min(silent)].activity
            self.end_run(
                f"{self.members.names(silent)}: no sign of life for {min(silent.values()):.0f} s, was {activity} when "
                "last heard of; it was killed or stopped, or its host or the network failed"
            )

    def _check_for_timeout(self) -> None:
        """On rank 0: if all processes are alive and nothing moves, name those that are behind the others."""
        mine, members = self.activity, self.members
        waited_s = time.monotonic() - mine.since_s
        if members.rank != 0 or not mine.has_timeout or waited_s <= members.timeout_s or self._ended.is_set():
            return
        activities = {0: (mine.progress, mine.text)}
        activities |= {rank: (beat.progress, beat.activity) for rank, beat in self.reader.beats.items()}
        least = min(progress for progress, _ in activities.values())
        behind = [rank for rank, (progress, _) in activities.items() if progress == least]
        if len(behind) == members.size:
            who = "all processes wait for each other"
        else:
            who = f"{members.names(behind)} holds up the others"
        self.end_run(
            f"{who}: {activities[behind[0]][1]} for more than parallel.timeout_s = {members.timeout_s:g} s; look at "
            "its storage and its GPU, and raise it if a step takes that long"
        )

    def _exit_without_store(self, error: str) -> None:
        me, main = self.members.me, self.members.main
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
        if end_launcher and self.members.me.local_rank == 0 and os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
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


@contextmanager
def running(heartbeat: Heartbeat) -> Iterator[None]:
    """Start `heartbeat` as the one of this run, and stop it at the end."""
    global _current
    _current = heartbeat
    heartbeat.start()
    try:
        yield
    finally:
        heartbeat.stop()
        _current = None


def report_progress(activity: str, has_timeout: bool = True) -> None:
    """Tell the others what this process does now. With `has_timeout` the next report must follow in `timeout_s`."""
    if _current is not None:
        _current.activity.begin(activity, has_timeout, may_block=False)


def report_detail(activity: str) -> None:
    """Say more precisely what this process does, for a message if it takes too long; this is no progress."""
    if _current is not None:
        _current.activity.text = activity


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
    _current.activity.begin(activity, has_timeout=False, may_block=True)
    yield
    _current.barrier()
