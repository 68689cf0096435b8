"""The first collective of a run: if it fails, name the host that can't be reached, or the wrong interface."""

from __future__ import annotations

import fcntl
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vft.common.errors import first_line
from vft.distributed.heartbeat import Heartbeat
from vft.distributed.members import Member, names

PROBE_S = 3.0
SIOCGIFADDR = 0x8915
"""Asks for the address of an interface: netdevice(7)."""


@contextmanager
def link_check(heartbeat: Heartbeat) -> Iterator[None]:
    """Around making the process group and its first collectives: end the run if they fail or take over `silence_s`.

    A thread keeps the time, since NCCL connects without a limit of its own.
    """
    silence_s = heartbeat.members.silence_s
    timer = threading.Timer(silence_s, lambda: _end_run(heartbeat, f"no answer for {silence_s:g} s"))
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        _end_run(heartbeat, first_line(error))
    finally:
        timer.cancel()


def _end_run(heartbeat: Heartbeat, error: str) -> None:
    me = heartbeat.members.me
    if me.rank:
        time.sleep(2 * PROBE_S)  # rank 0 knows all addresses, so its message says more
    others = {(m.host, m.address): m for m in heartbeat.members.known.values()}
    others.pop((me.host, me.address))
    unreached = [member for member in others.values() if not _answers(member)]
    interface = f"{_interface(me.address)} on host {me.host}"
    settings = f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the hosts ({interface})"
    if unreached:
        at = ", ".join(f"{names([member])} at {member.address}" for member in unreached)
        heartbeat.end_run(f"{at} can't be reached from {names([me])}: look at its firewall, and set {settings}")
    heartbeat.end_run(
        f"the first sum over all processes failed ({error}), though their hosts can be reached: set {settings}"
    )


def _answers(member: Member) -> bool:
    try:
        with socket.create_connection((member.address, member.port), PROBE_S):
            return True
    except OSError:
        return False


def _interface(address: str) -> str:
    """Name of the network interface that has `address`; the address itself if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(any_socket, SIOCGIFADDR, request)[20:24]
            except OSError:
                continue
            if socket.inet_ntoa(found) == address:
                return name
    return address
