"""The worker pool when tasks hang, crash, raise and return tensors, and when the parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from vft.common.errors import UserError
from vft.data.media.errors import MediaError
from vft.data.media.video import scan_file
from vft.data.workers import MAX_FAILED_STARTS, WorkerPool, empty_bytes


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2, timeout_s=1.0) as pool:
        yield pool


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: object, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def test_many_small_tasks(pool: WorkerPool) -> None:
    futures = [pool.submit(divmod, i, 7) for i in range(500)]
    assert [future.result(30) for future in futures] == [divmod(i, 7) for i in range(500)]


def test_workers_are_other_processes_with_one_thread(pool: WorkerPool) -> None:
    assert pool.submit(os.getpid).result(30) != os.getpid()
    assert pool.submit(torch.get_num_threads).result(30) == 1


def test_deadline_costs_the_worker_not_the_others(pool: WorkerPool) -> None:
    before = {pool.submit(os.getpid).result(30) for _ in range(20)}
    start = time.monotonic()
    hung = pool.submit(time.sleep, 60)
    assert [pool.submit(abs, -i).result(30) for i in range(50)] == list(range(50))
    with pytest.raises(MediaError, match=r"^sleep: took longer than the deadline of 1 s") as caught:
        hung.result(30)
    assert caught.value.reason == "deadline"
    assert 0.9 < time.monotonic() - start < 10
    after = {pool.submit(os.getpid).result(30) for _ in range(50)}
    assert len(before - after) <= 1
    assert until(lambda: sum(is_running(pid) for pid in before | after) == len(after))


@pytest.mark.parametrize(("function", "args", "how"), [(os._exit, (3,), "exit status 3"), (os.abort, (), "signal 6")])
def test_crash(pool: WorkerPool, function: object, args: tuple[int, ...], how: str) -> None:
    with pytest.raises(MediaError, match=how) as caught:
        pool.submit(function, *args).result(30)  # type: ignore[arg-type]
    assert caught.value.reason == "crashed"
    assert pool.submit(abs, -1).result(30) == 1


def test_killed_from_outside_while_idle(pool: WorkerPool) -> None:
    pid = pool.submit(os.getpid).result(30)
    os.kill(pid, signal.SIGKILL)
    futures = [pool.submit(abs, -i) for i in range(20)]
    results = [future.exception(30) or future.result() for future in futures]
    lost = [result for result in results if isinstance(result, MediaError)]
    assert len(lost) <= 1 and all(error.reason == "crashed" for error in lost)  # the one it was given as it died
    assert pool.submit(os.getpid).result(30) != pid


def test_killed_before_its_tensors_are_fetched() -> None:
    """The message has come; the memory that it tells of is asked for from the worker, which is no more."""
    with WorkerPool(1, timeout_s=20.0) as pool:
        with pytest.raises(MediaError, match=r"die_once_it_has_sent: its worker process died \(signal 9\)") as caught:
            pool.submit(die_once_it_has_sent).result(60)
        assert caught.value.reason == "crashed"
        assert pool.submit(abs, -1).result(60) == 1


def die_once_it_has_sent() -> torch.Tensor:
    real = Connection.send_bytes

    def send_bytes(self: Connection, message: bytes) -> None:
        real(self, message)
        os.kill(os.getpid(), signal.SIGKILL)

    Connection.send_bytes = send_bytes  # type: ignore[assignment, method-assign]
    return torch.zeros(5)


def test_killed_while_it_starts() -> None:
    """Now and then that is bad luck; every time it is the pool's error."""
    with WorkerPool(1, timeout_s=20.0, initializer=start_slowly) as pool:
        first = pool.submit(os.getpid).result(60)
        server = int(Path(f"/proc/{first}/stat").read_text().rsplit(")", 1)[1].split()[1])
        others = children(server) - {first}

        def kill_one_after_another(times: int) -> None:
            for _ in range(times):
                (worker,) = children(server) - others
                os.kill(worker, signal.SIGKILL)
                assert until(lambda worker=worker: children(server) - others - {worker} or pool._close_reason, 30)

        kill_one_after_another(1 + MAX_FAILED_STARTS)  # of which the first had started
        assert pool.submit(os.getpid).result(60) != first
        kill_one_after_another(1)
        waiting = pool.submit(os.getpid)
        kill_one_after_another(MAX_FAILED_STARTS + 1)
        with pytest.raises(RuntimeError, match="died while it started"):
            waiting.result(30)
        with pytest.raises(RuntimeError, match=r"a worker process died while it started \(signal 9\)"):
            pool.submit(os.getpid)


def start_slowly() -> None:
    time.sleep(1.5)


def children(pid: int) -> set[int]:
    """Of a process, those that run."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in found if is_running(int(child))}


def test_exceptions_keep_their_type(pool: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        pool.submit(divmod, 1, 0).result(30)
    assert "In a worker process" in caught.value.__notes__[0]
    with pytest.raises(MediaError) as media:
        pool.submit(scan_file, "video", tmp_path / "gone.mp4").result(30)
    assert media.value.reason == "missing" and not hasattr(media.value, "__notes__")
    with pytest.raises(SystemExit):
        pool.submit(sys.exit, 5).result(30)
    with pytest.raises(Exception, match="pickle"):
        pool.submit(open, os.devnull).result(30)
    with pytest.raises(Exception, match="pickle"):
        pool.submit(lambda: None)


def test_tensors_leave_no_descriptors(pool: WorkerPool) -> None:
    for i in range(20):
        assert pool.submit(torch.full, (1000,), i).result(30)[-1] == i
    before = descriptors()
    for i in range(200):
        tensor = pool.submit(torch.full, (50_000,), i).result(30)
        assert tensor.sum() == 50_000 * i
    assert descriptors() <= before + 4
    kept = [pool.submit(torch.full, (10,), i) for i in range(20)]
    assert [int(future.result(30)[0]) for future in kept] == list(range(20))
    del kept, tensor
    assert descriptors() <= before + 4


def test_results_in_shared_memory_are_sent_as_they_are(pool: WorkerPool) -> None:
    before = descriptors()
    for count in (1, 1000, 3_000_000):
        tensor, was_shared = pool.submit(counted, count).result(30)
        assert was_shared and tensor.is_shared() and tensor.shape == (count, 2)
        assert torch.equal(tensor[:, 1], torch.arange(count).to(torch.uint8))
        del tensor
    assert descriptors() <= before + 4
    assert not empty_bytes(5, 2).is_shared()


def counted(count: int) -> tuple[torch.Tensor, bool]:
    """0, 1, 2, ... in memory that was made to be sent, and whether it was shared before it was."""
    tensor = empty_bytes(count, 2)
    tensor[:] = torch.arange(count).to(torch.uint8)[:, None]
    return tensor, tensor.is_shared()


def test_close_ends_everything() -> None:
    pool = WorkerPool(1, timeout_s=60)
    pid = pool.submit(os.getpid).result(30)
    before = descriptors()
    running, queued = pool.submit(time.sleep, 60), pool.submit(time.sleep, 60)
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 5
    for future in (running, queued):
        with pytest.raises(RuntimeError, match="is closed"):
            future.result(5)
    with pytest.raises(RuntimeError, match="is closed"):
        pool.submit(abs, 1)
    assert until(lambda: not is_running(pid))
    assert descriptors() < before


def test_a_worker_that_cannot_start_is_no_hang() -> None:
    with WorkerPool(1, timeout_s=60, initializer=fail_to_start) as pool, pytest.raises(RuntimeError) as caught:
        pool.submit(abs, 1).result(60)
    assert "could not start" in str(caught.value) and "no codec" in str(caught.value)


def fail_to_start() -> None:
    raise OSError("no codec")


def run_script(script: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in a session of its own."""
    script.write_text(text)
    command = [sys.executable, str(script), *arguments]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, start_new_session=True)


SCRIPT = """
import os, signal, sys, time
from vft.data.workers import WorkerPool
if __name__ == "__main__":
    # A shell that runs the tests in the background has Ctrl-C ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = WorkerPool(2, 600)
    pids = set()
    while len(pids) < 2:
        pids |= {f.result() for f in [pool.submit(os.getpid) for _ in range(10)]}
    print(*pids, flush=True)
    busy = pool.submit(time.sleep, 600)
    time.sleep(0.2)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "interrupt":
        os.killpg(0, signal.SIGINT)
        busy.result()
"""


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_workers_end_with_their_parent(tmp_path: Path, how: str) -> None:
    """Also while one is busy and the pool was not closed: the parent is killed, or ends by Ctrl-C."""
    done = run_script(tmp_path / "script.py", SCRIPT, how)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    assert done.returncode != 0 and ("KeyboardInterrupt" in done.stderr) == (how == "interrupt"), done.stderr
    assert "In a worker" not in done.stderr and "vft-worker-pool" not in done.stderr
    assert until(lambda: not any(is_running(pid) for pid in pids))


SIGNALLED = """
import os, signal
from vft.data.workers import WorkerPool
if __name__ == "__main__":
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    for one in signals:
        signal.signal(one, lambda *_: None)
    with WorkerPool(1, 600) as pool:
        before = pool.submit(os.getpid).result()
        for one in signals:
            os.killpg(0, one)
        print(before == pool.submit(os.getpid).result(), flush=True)
"""


def test_workers_leave_signals_to_their_parent(tmp_path: Path) -> None:
    """Terminals, torchrun and schedulers send them to a whole group; a worker that died would look like a bad clip."""
    done = run_script(tmp_path / "script.py", SIGNALLED)
    assert done.stdout == "True\n" and "Traceback" not in done.stderr, done.stderr


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def test_full_shared_memory_is_no_fault_of_a_clip() -> None:
    """It ends the run; a clip that is quarantined for it would stay so in every checkpoint."""
    with WorkerPool(1, timeout_s=10.0) as pool:
        with pytest.raises(UserError, match="SIGBUS while it decoded die: shared memory, /dev/shm, is full"):
            pool.submit(die, signal.SIGBUS).result(30)
        with pytest.raises(MediaError, match="died"):
            pool.submit(die, signal.SIGSEGV).result(30)
