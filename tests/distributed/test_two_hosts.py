"""Two hosts: network namespaces of this machine, joined by a cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launchers import Launcher, ours, wait_for_step
from tests.runs.commands import CAPTION, Commands, column, metrics
from tests.runs.world import World

pytestmark = pytest.mark.slow

ADDRESS = ("10.77.0.1", "10.77.0.2")
STEPS = 60
SETTINGS: dict[str, Any] = {
    "lora": {"dropout": 0.1},
    "train": {"max_steps": STEPS, "packs_per_step": 4},
    "data": {"max_samples_per_pack": 1},
    "checkpoint": {"every_steps": 5},
    "parallel": {"silence_s": 8.0, "timeout_s": 60.0},
}


@dataclass(frozen=True)
class Hosts:
    """Processes that hold the namespaces `host-0` and `host-1` open."""

    holders: tuple[subprocess.Popen[bytes], ...]

    def inside(self, host: int) -> list[str]:
        """What to put before a command so that it runs on that host."""
        pid = str(self.holders[host].pid)
        return ["nsenter", "-t", pid, "-U", "--preserve-credentials", "-n", "-u"]

    def run(self, host: int, command: str) -> None:
        """A command there, to its end."""
        subprocess.run([*self.inside(host), *command.split()], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts and the link `vft0` between them; skipped where this machine doesn't let us make them."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing (packages iproute2 and util-linux)")
    if subprocess.run(["unshare", "-Urnu", "true"], capture_output=True).returncode:
        pytest.skip("namespaces can't be made here (unshare -Urnu)")
    first = subprocess.Popen(["unshare", "-Urnu", "sleep", "900"])
    holders = [first]
    try:
        _wait_for_namespace(first.pid, os.getpid())
        enter = ["nsenter", "-t", str(first.pid), "-U", "--preserve-credentials"]
        holders.append(subprocess.Popen([*enter, "unshare", "-nu", "sleep", "900"]))
        _wait_for_namespace(holders[1].pid, os.getpid())
        made = Hosts(tuple(holders))
        try:
            made.run(0, f"ip link add vft0 type veth peer name vft0 netns {holders[1].pid}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no veth pair can be made here ({error.stderr.decode().strip()})")
        for host, address in enumerate(ADDRESS):
            made.run(host, f"hostname host-{host}")
            made.run(host, f"ip address add {address}/24 dev vft0")
            made.run(host, "ip link set lo up")
            made.run(host, "ip link set vft0 up")
        yield made
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _wait_for_namespace(pid: int, other: int) -> None:
    """Until `unshare` has made the namespace, and become the command behind it."""
    end = time.monotonic() + 10
    while os.readlink(f"/proc/{pid}/ns/net") == os.readlink(f"/proc/{other}/ns/net"):
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)


def launch(hosts: Hosts, commands: Commands, config: Path, log: Path, interface: str = "vft0") -> list[Launcher]:
    """One training process on each host, as a user starts them."""
    started = []
    for host, address in enumerate(ADDRESS):
        # is_host and local-addr, since no name server knows these hosts.
        rendezvous = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint {ADDRESS[0]}:29501 --rdzv-id 1"
        rendezvous += f" --rdzv-conf is_host={1 - host},join_timeout=60 --local-addr {address}"
        words = [*hosts.inside(host), "python", "-m", "torch.distributed.run", *rendezvous.split()]
        environment = commands.environment | {"GLOO_SOCKET_IFNAME": interface}
        python = shutil.which("python", path=environment["PATH"]) or "python"
        words = [python if word == "python" else word for word in words]
        file = log.with_name(f"{log.name}-{host}")
        started.append(Launcher([*words, "-m", CAPTION, str(config)], environment, file))
    return started


def test_a_cable_is_pulled(hosts: Hosts, world: World, commands: Commands, tmp_path: Path) -> None:
    undisturbed = world.config(tmp_path / "undisturbed.toml", SETTINGS)
    commands.torchrun(2, undisturbed).ok()
    config = world.config(tmp_path / "run.toml", SETTINGS)
    folder = config.with_suffix("")

    one, two = launch(hosts, commands, config, tmp_path / "cut")
    with one, two:
        wait_for_step(folder, 12, one.is_running)
        hosts.run(1, "ip link set vft0 down")
        since, before = time.monotonic(), len(metrics(folder))
        assert before < STEPS - 5
        assert one.wait(60) != 0 and two.wait(60) != 0
        print(f"both ended {time.monotonic() - since:.0f} s after the cable was pulled")
    here, there = ours(one.output()), ours(two.output())
    assert len(here) == 1 and here[0].startswith("error: host host-1 (rank 1): no sign of life for "), one.output()
    assert len(there) == 1 and there[0].startswith("error: host host-0 (rank 0) can't be reached from here"), (
        two.output()
    )

    hosts.run(1, "ip link set vft0 up")
    one, two = launch(hosts, commands, config, tmp_path / "again")
    with one, two:
        assert one.wait(120) == 0 and two.wait(60) == 0, one.output() + two.output()
    assert "2 hosts: host host-0 (rank 0), host host-1 (rank 1)" in one.output()
    (resumed,) = (line for line in one.output().splitlines() if "going on from" in line)
    assert int(resumed.rpartition("-")[2]) >= before - before % 5 - 5
    assert column(folder, "loss") == column(undisturbed.with_suffix(""), "loss")
    assert column(folder, "sample_digest") == column(undisturbed.with_suffix(""), "sample_digest")


def test_the_wrong_interface(hosts: Hosts, world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", SETTINGS)
    one, two = launch(hosts, commands, config, tmp_path / "log", interface="lo")
    with one, two:
        assert one.wait(60) != 0 and two.wait(60) != 0
    for launcher in (one, two):
        (line,) = ours(launcher.output())
        assert line.partition(": ")[2].startswith("the first sum over all processes failed"), launcher.output()
        assert "GLOO_SOCKET_IFNAME" in line and "(vft0 on host host-" in line
