"""Jobs of the page outlive it, and none is started or stopped twice."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vft.app.jobs import Job
from vft.common.errors import UserError

SCRIPT = """
import signal, sys, time
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
print('10%\\r20%', flush=True)
while not signals: time.sleep(.01)
time.sleep(.3)  # it is saving: a second signal would be seen
print('saved', len(signals), flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    return [sys.executable, str(tmp_path / "script.py")]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_job_is_started_and_stopped_once(tmp_path: Path, script: list[str]) -> None:
    job, other_tab = Job(tmp_path / "job"), Job(tmp_path / "job")
    assert not job.is_alive and job.record == {} and job.tail() == ""
    job.start(script, tmp_path, {}, {"settings.toml": "mine"})
    with pytest.raises(UserError, match="at work already"):
        other_tab.start([sys.executable, "-c", "raise SystemExit"], tmp_path, {}, {"settings.toml": "theirs"})
    assert (job.folder / "settings.toml").read_text() == "mine"
    wait_for(lambda: "20%" in job.tail())
    assert "10%" not in job.tail()  # a line that was drawn again
    job.stop()
    other_tab.stop()  # the second request is no second signal
    wait_for(lambda: not job.is_alive)
    assert job.tail().splitlines()[-1] == "saved 1"
    with pytest.raises(UserError, match="not at work"):
        job.stop()
    job.start([sys.executable, "-c", "print('again')"], tmp_path, {})
    wait_for(lambda: not job.is_alive)
    assert "saved" not in job.tail() and "again" in job.tail() and "saved" in (job.folder / "job.log").read_text()


def test_stopped_by_many_at_once_it_gets_one_signal(tmp_path: Path, script: list[str]) -> None:
    job = Job(tmp_path / "job")
    job.start(script, tmp_path, {})
    wait_for(lambda: "20%" in job.tail())
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: job.stop(), range(20)))
    wait_for(lambda: not job.is_alive)
    assert job.tail().splitlines()[-1] == "saved 1"


@pytest.mark.parametrize(
    "record", ["{}", "garbage", "[1]", '{"pid": 1}', '{"pid": 4, "host": "another"}', "[" * 99999], ids=range(6)
)
def test_no_process_is_stopped_that_may_be_another(tmp_path: Path, record: str) -> None:
    """As after the page was killed while it started the job, or on a disk that two machines share."""
    (tmp_path / "job.json").write_text(record)
    with (tmp_path / "job.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="stop it there"):
            Job(tmp_path).stop()


def test_a_job_outlives_the_page(tmp_path: Path, script: list[str]) -> None:
    """Killed, the page that started it is gone; another one finds the job, and ends it with its children."""
    child = f"import subprocess; subprocess.run({script})"
    page = (
        "import sys, time\nfrom pathlib import Path\nfrom vft.app.jobs import Job\n"
        f"Job(Path('job')).start([sys.executable, '-c', {child!r}], Path('.'), {{}})\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", page], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    job = Job(tmp_path / "job")
    wait_for(lambda: "20%" in job.tail())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert job.is_alive
    job.stop(at_once=True)
    wait_for(lambda: not job.is_alive)
    assert "saved" not in job.tail()
