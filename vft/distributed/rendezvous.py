"""How the processes of a run meet: who is there, whether they run the same code, whether they reach each other.

torchrun starts the processes and gives them a store; all that is said before the first collective is said through it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from vft.common.errors import UserError
from vft.distributed.heartbeat import Heartbeat, Member, current, linger, names, set_current

logger = logging.getLogger(__name__)

PROBE_S = 3.0
SAME = {"torch": "torch", "code": "vft's own files (a digest)", "runtime": "CUDA or ROCm of torch"}
"""What must be equal in all processes."""


@contextmanager
def watched(rank: int, size: int, local_rank: int, device: str, silence_s: float, timeout_s: float) -> Iterator[None]:
    """All processes meet, and watch each other until the end. Nothing to do for one process, or within another one.

    Raises UserError where a process doesn't come within `timeout_s`, or comes with other versions.
    """
    if size == 1 or current() is not None:
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE = {size} and no MASTER_ADDR in the environment: start it with torchrun")
    with socket.socket() as door:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        door.bind(("", 0))
        door.listen(512)  # never accepted: the kernel answers, which is all that a probe wants to know
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        limit = timedelta(seconds=timeout_s)
        try:
            store = TCPStore(host, port, None, rank == 0 and not agent, limit, wait_for_workers=False)
        except RuntimeError as error:
            raise _on_one(f"rank {rank} can't reach the rendezvous at {host}:{port} ({_first(error)})") from None
        me = _introduce(rank, local_rank, device, host, door.getsockname()[1])
        if rank == 0:
            watch = _receive(store, me, size, silence_s, timeout_s)
        else:
            watch = _knock(store, me, size, silence_s, timeout_s)
        watch.start()
        with set_current(watch):
            try:
                if rank == 0:
                    _check_versions(list(watch.members.values()))
                yield
            except BaseException as error:
                if _is_broken_link(error):
                    watch.explain()
                    error = _on_one(f"{names([watch.me])}: a connection to other processes broke ({_first(error)})")
                watch.fail(error)
                raise error


def group_store(watch: Heartbeat) -> Store:
    """For a process group: a connection of its own, since an operation of one thread would hold up the other's."""
    return PrefixStore("group", watch.store.clone())  # type: ignore[attr-defined]


def _introduce(rank: int, local_rank: int, device: str, rendezvous: str, port: int) -> Member:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.connect((rendezvous, 1))  # sends nothing: the kernel chooses the address it would send from
            address = sender.getsockname()[0]
        except OSError:
            address = socket.gethostname()
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    host = socket.gethostname()
    return Member(rank, local_rank, host, os.getpid(), device, torch.__version__, runtime, code, address, port)


# A restarted run finds in the store what the run before left there; so keys lie under a token that the first process
# makes, and a process asks for it under a name that nobody had before.


def _receive(store: TCPStore, me: Member, size: int, silence_s: float, timeout_s: float) -> Heartbeat:
    """The first process: answer those who knock until all have come. UserError, with their names, where some don't."""
    token, answered, since_s, said = uuid.uuid4().hex, set(), time.monotonic(), False
    run = PrefixStore(token, store)
    run.set("failed", "")
    run.set("beat/0", json.dumps([0, 0, timeout_s, "starting"]))
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"knock/{rank}"]):
                nonce = store.get(f"knock/{rank}").decode()
                if nonce not in answered:
                    answered.add(nonce)
                    store.set(f"answer/{nonce}", json.dumps([token, asdict(me)]))
            if run.check([f"member/{rank}"]):
                missing.discard(rank)
        waited_s = time.monotonic() - since_s
        local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        who = ", ".join(f"{rank} (host number {rank // local})" for rank in sorted(missing)[:8])
        if missing and waited_s > timeout_s:
            error = _on_one(
                f"{len(missing)} of {size} processes didn't come within {timeout_s:g} s: rank {who}; look at those "
                "hosts' output, and at how long importing takes there (parallel.timeout_s)"
            )
            run.set("failed", str(error))
            linger(store)
            raise error
        if missing and waited_s > 30 and not said:
            logger.info("waiting for rank %s", who)
            said = True
        time.sleep(0.02)
    texts = run.multi_get([f"member/{rank}" for rank in range(1, size)])
    return Heartbeat(run, [me, *(Member(**json.loads(text)) for text in texts)], 0, size, silence_s, timeout_s)


def _knock(store: TCPStore, me: Member, size: int, silence_s: float, timeout_s: float) -> Heartbeat:
    """Any other process: ask the first for the token, and introduce itself."""
    nonce = uuid.uuid4().hex
    store.set(f"knock/{me.rank}", nonce)
    try:
        store.wait([f"answer/{nonce}"], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise _on_one(
            f"{names([me])}: no answer of rank 0 within {timeout_s:g} s ({_first(error)}); look at the output there"
        ) from None
    token, first = json.loads(store.get(f"answer/{nonce}"))
    watch = Heartbeat(PrefixStore(token, store), [Member(**first), me], me.rank, size, silence_s, timeout_s)
    watch.write()
    watch.store.set(f"member/{me.rank}", json.dumps(asdict(me)))
    return watch


def _check_versions(members: Sequence[Member]) -> None:
    for field, what in SAME.items():
        for member in members:
            ours, theirs = getattr(members[0], field), getattr(member, field)
            if ours != theirs:
                raise _on_one(
                    f"{what}: {ours} on {names(members[:1])}, {theirs} on {names([member])}; install the same on both"
                )
    hosts = {member.host for member in members}
    if len(hosts) > 1:
        logger.info("%d hosts: %s", len(hosts), names(members))


# -------------------------------------------------------------------------------------------- the first collective


@contextmanager
def link_check(watch: Heartbeat) -> Iterator[None]:
    """Around making the group and its first sums: where these fail or outlast `silence_s`, say who isn't reached.

    A thread keeps the time: NCCL connects without a limit of its own.
    """
    timer = threading.Timer(watch.silence_s, lambda: _no_link(watch, f"no answer for {watch.silence_s:g} s"))
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        _no_link(watch, _first(error))
    finally:
        timer.cancel()


def _no_link(watch: Heartbeat, why: str) -> None:
    """End the run: with the host that can't be reached, where one can't."""
    if watch.rank:
        time.sleep(2 * PROBE_S)  # the first process knows all addresses; its word is the better one
    home = (watch.me.host, watch.me.address)
    others = {(m.host, m.address): m for m in watch.members.values() if (m.host, m.address) != home}
    unreached = [member for member in others.values() if not _answers(member)]
    interface = f"{_interface(watch.me.address)} on host {watch.me.host}"
    name = f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the hosts ({interface})"
    if unreached:
        at = ", ".join(f"{names([member])} at {member.address}" for member in unreached)
        watch.conclude(f"{at} can't be reached from {names([watch.me])}: look at its firewall, and set {name}")
    watch.conclude(f"the first sum over all processes failed ({why}), though their hosts can be reached: set {name}")


def _answers(member: Member) -> bool:
    try:
        with socket.create_connection((member.address, member.port), PROBE_S):
            return True
    except OSError:
        return False


def _interface(address: str) -> str:
    """The network interface that has `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(any_socket, 0x8915, request)[20:24]  # SIOCGIFADDR, netdevice(7)
            except OSError:
                continue
            if socket.inet_ntoa(found) == address:
                return name
    return address


def _is_broken_link(error: BaseException) -> bool:
    """Whether a collective or the store failed, rather than this process: gloo's errors have no type of their own."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0]


def _on_one(text: str) -> UserError:
    error = UserError(text)
    error.on_one_rank = True
    return error
