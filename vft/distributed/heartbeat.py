"""Signs of life of all processes, so that one that fails is named instead of waited for.

Every process has a thread that writes a line into the store of the rendezvous each second: what it is doing, and how
long it may be silent meanwhile. The first process reads all of them, the others its own. Nothing in here touches the
device or a collective; a step costs some assignments. Collectives know that an answer is missing, not whose: gloo ends
with an error of a socket, NCCL hangs until its watchdog aborts the process.

Whoever finds a process lost, or fails itself, puts one line into the store; everybody reads it there and ends. A
process whose main thread waits in a collective can be ended in no other way than at once, by the thread.
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
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_S = 1.0
ALONE_S = 3600.0
"""Silence of a process that prepares or writes: reading a large file may keep its threads from running."""
SUSPECT_S = 6.0
"""Silence that is enough once a connection broke."""
LAUNCHER_S = 5.0
"""For torchrun to end by itself."""


@dataclass(frozen=True, slots=True)
class Member:
    """A process of the run, as it introduced itself."""

    rank: int
    local_rank: int
    host: str
    pid: int
    device: str
    torch: str
    """Version."""
    runtime: str
    """CUDA or ROCm, with its version."""
    code: str
    """Digest of vft's own files."""
    address: str
    """With which it reaches the rendezvous."""
    port: int
    """On which it can be knocked at."""


def names(members: Sequence[Member]) -> str:
    """`host a (ranks 0, 1), host b (rank 2)`."""
    ranks: dict[str, list[str]] = {}
    for member in members:
        ranks.setdefault(member.host, []).append(str(member.rank))
    return ", ".join(f"host {host} (rank{'s' * (len(r) > 1)} {', '.join(r)})" for host, r in ranks.items())


def linger(store: Store) -> None:
    """Leave the others time to read in `store` why this process ends: at its very end, when it has said so itself.
    torchrun ends it as soon as one of them is gone. The first process may be the store's server, which must live on."""
    atexit.register(lambda _: time.sleep(2.5 * BEAT_S), store)


class Heartbeat:
    """Of one process over the others; `members` is all of them on the first process, elsewhere the first and itself."""

    def __init__(
        self, store: Store, members: Sequence[Member], rank: int, size: int, silence_s: float, timeout_s: float
    ) -> None:
        self.store, self.members, self.rank, self.size = store, {m.rank: m for m in members}, rank, size
        self.silence_s, self.timeout_s = silence_s, timeout_s
        self.me = self.members[rank]
        self.beat_s = min(BEAT_S, silence_s / 5)
        self.doing, self.notes, self.noted_s = "preparing", 0, time.monotonic()
        self.alone, self.paced, self.suspicious = True, False, False
        self.beats = self.meetings = 0
        self.threads: list[threading.Thread] = []
        self.ended, self.ending, self.launcher = threading.Event(), threading.Lock(), os.getppid()
        self.missed = 0
        """Ticks since the store last answered. Counted, not timed: a process that was stopped shall blame nobody."""
        self.seen = {r: ("", time.monotonic()) for r in (range(1, size) if rank == 0 else (0,))}

    def start(self) -> None:
        """Call when everybody's first beat is in the store."""
        for run in (self._beat_on, self._guard_store):
            self.threads.append(threading.Thread(target=run, name=f"watch{run.__name__}", daemon=True))
            self.threads[-1].start()

    def stop(self) -> None:
        """End the threads: one that Python's own end finds in a call of the store's aborts the process."""
        self.ended.set()
        for thread in self.threads:
            thread.join(timeout=2 * self.beat_s)

    # ------------------------------------------------------------------------------------------ of the main thread

    def beat(self, doing: str, paced: bool) -> None:
        """What the main thread turns to; `paced`: the next note must follow within the time-out."""
        self.doing, self.paced, self.noted_s = doing, paced, time.monotonic()
        self.notes += 1

    def barrier(self) -> None:
        """Wait for everybody, however long: outside of collectives, whose time would run out."""
        self.meetings += 1
        key, before = f"meeting/{self.meetings}", (self.alone, self.paced)
        self.alone = self.paced = False
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.size:
            time.sleep(0.02)
        self.noted_s, (self.alone, self.paced) = time.monotonic(), before

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends, and leave them time to read it."""
        self.ended.set()
        text = str(error) or type(error).__name__
        with suppress(RuntimeError):  # the store may be gone too
            self.store.compare_set("failed", "", f"{names([self.me])}: {text.splitlines()[0]}")
            linger(self.store)

    def explain(self) -> None:
        """A collective failed: the threads find out who is gone, and end the process. Returns where they don't."""
        self.suspicious = True
        with suppress(RuntimeError):  # the store may be what is gone: that, too, the threads find out
            self.store.set("suspicion", "1")
        time.sleep(SUSPECT_S + 4 * self.beat_s)

    def conclude(self, text: str) -> None:
        """End this process, and with it the run, for the reason `text`; the first reason of all is everybody's."""
        reason = self.store.compare_set("failed", "", text).decode()
        self._exit(f"error: {text}" if reason == text else f"stopped: {reason}", reason == text)

    # --------------------------------------------------------------------------------------------- of the threads

    def write(self) -> None:
        """Write this process's sign of life."""
        may_s = ALONE_S if self.alone else self.silence_s
        self.beats += 1
        self.store.set(f"beat/{self.rank}", json.dumps([self.beats, self.notes, may_s, self.doing]))

    def _beat_on(self) -> None:
        while not self.ended.wait(self.beat_s):
            try:
                self.write()
                self._look()
                self.missed = 0
            except RuntimeError as error:  # torch raises these for lost connections
                if not self.ended.wait(self.beat_s):
                    self._lost_store(str(error).splitlines()[0])

    def _guard_store(self) -> None:
        while not self.ended.wait(self.beat_s):
            self.missed += 1
            if self.missed * self.beat_s > self.silence_s:
                self._lost_store(f"no answer for {self.silence_s:g} s")

    def _lost_store(self, why: str) -> None:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first = "" if self.rank == 0 else f"{names([self.members[0]])} can't be reached from here: "
        say = self.me.local_rank == 0 or self.me.host == self.members[0].host
        self._exit(
            f"error: {first}the rendezvous at {address} is gone for {names([self.me])} ({why}); look at that host, at "
            "its torchrun and at the network between",
            say,
            end_launcher=True,
        )

    def _look(self) -> None:
        """Read what concerns this process, and act on it."""
        failed = self.store.get("failed").decode()
        # A moment for the main thread, which may be about to fail for the same reason and says it better.
        if failed and not self.ended.wait(self.beat_s):
            self._exit(f"stopped: {failed}", self.me.local_rank == 0)
        self.suspicious = self.suspicious or self.store.check(["suspicion"])
        now, beats, silent = time.monotonic(), {}, []
        for rank, text in zip(self.seen, self.store.multi_get([f"beat/{r}" for r in self.seen]), strict=True):
            if text.decode() != self.seen[rank][0]:
                self.seen[rank] = (text.decode(), now)
            beats[rank] = json.loads(text)
            if now - self.seen[rank][1] > (SUSPECT_S if self.suspicious else beats[rank][2]):
                silent.append(rank)
        if silent and not self.ended.is_set():
            since_s = now - max(self.seen[rank][1] for rank in silent)
            who, doing = names([self.members[rank] for rank in silent]), beats[silent[0]][3]
            self.conclude(
                f"{who}: no sign of life for {since_s:.0f} s, was {doing} when last heard of; it was killed or "
                "stopped, or its host or the network failed"
            )
        if self.rank == 0 and self.paced and now - self.noted_s > self.timeout_s and not self.ended.is_set():
            self._blame({0: self.notes, **{rank: beat[1] for rank, beat in beats.items()}}, beats)

    def _blame(self, notes: dict[int, int], beats: dict[int, list[str]]) -> None:
        """Everybody is alive and nothing moves: who is behind the others holds them up."""
        behind = [rank for rank, count in notes.items() if count == min(notes.values())]
        doing = self.doing if behind[0] == 0 else beats[behind[0]][3]
        if len(behind) == self.size:
            who = "all processes wait for each other"
        else:
            who = f"{names([self.members[rank] for rank in behind])} holds up the others"
        self.conclude(
            f"{who}: {doing} for more than parallel.timeout_s = {self.timeout_s:g} s; look at its storage and its GPU, "
            "and raise it where a step takes that long"
        )

    def _exit(self, line: str, say: bool, end_launcher: bool = False) -> None:
        self.ending.acquire()  # of two threads that find something the first speaks
        if say:
            print(line, file=sys.stderr, flush=True)
        if end_launcher and self.me.local_rank == 0 and os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
            # torchrun waits for the same store in a call that no signal interrupts, minutes longer, and could do
            # nothing but report this end. With restarts left it may find the store again.
            for kind in (signal.SIGTERM, signal.SIGKILL):
                if os.getppid() == self.launcher:
                    os.kill(self.launcher, kind)
                    time.sleep(LAUNCHER_S)
        os._exit(1)


_watch: Heartbeat | None = None


def current() -> Heartbeat | None:
    """The watch of this run; None where there is but one process."""
    return _watch


@contextmanager
def set_current(watch: Heartbeat) -> Iterator[None]:
    """`watch` is the one of this run; the threads end with the context."""
    global _watch
    _watch = watch
    try:
        yield
    finally:
        watch.stop()
        _watch = None


def beat(doing: str, paced: bool = True) -> None:
    """What this process turns to, for the message where it fails; `paced`: the next must follow within the time-out."""
    if _watch is not None:
        _watch.beat(doing, paced)
        _watch.alone = False


def busy_with(doing: str) -> None:
    """What this process is at within what it noted last, for the message where it takes too long."""
    if _watch is not None:
        _watch.doing = doing


def barrier() -> None:
    """Wait until every process is here, for as long as all are alive."""
    if _watch is not None:
        _watch.barrier()


@contextmanager
def main_process_work(doing: str) -> Iterator[None]:
    """What the first process does while the others wait, such as writing a checkpoint; also a decorator."""
    if _watch is None:
        yield
        return
    _watch.beat(doing, paced=False)
    _watch.alone = True  # until the next step
    yield
    _watch.barrier()
