"""The processes of a run find each other, and compare their versions, before there is a process group.

torch's own rendezvous (`torch.distributed.rendezvous`) does less: it does not say which process is missing, and it
reads what an earlier run left in the store. torchrun keeps one store over restarts, so every run puts its keys under a
token that rank 0 makes up. A process that joins can't know whether a token in the store is an old one. It therefore
asks rank 0 for it with a request of its own making, which only the rank 0 of this run answers.
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
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from vft.common.errors import UserError, first_line
from vft.distributed.heartbeat import LONG_SILENCE_S, Beat, Heartbeat, Member, beat_key, current, linger, names

logger = logging.getLogger(__name__)

MUST_AGREE = {"torch": "torch", "code": "vft's own files (a digest)", "runtime": "CUDA or ROCm of torch"}
"""Fields of a Member that must be equal in all processes, in words."""
NOTICE_S = 30.0
"""After which rank 0 says for whom it waits."""
PROBE_S = 3.0
"""For a host to answer, if the first collective fails."""
SIOCGIFADDR = 0x8915
"""Asks for the address of an interface: netdevice(7)."""


@contextmanager
def connected(rank: int, size: int, local_rank: int, silence_s: float, timeout_s: float) -> Iterator[None]:
    """All processes find each other, and have a heartbeat until the end.

    Does nothing for one process, or inside another such context. Raises UserError if a process does not join within
    `timeout_s`, or runs another version.
    """
    if size == 1 or current() is not None:
        yield
        return
    with socket.socket() as door:
        door.bind(("", 0))
        door.listen(512)  # never accepted: that the kernel answers is enough for `link_check`
        store = _connect(rank, size, timeout_s)
        me = _introduce(rank, local_rank, port=door.getsockname()[1])
        run, known = (_gather if rank == 0 else _join)(store, me, size, timeout_s)
        heartbeat = Heartbeat(run, rank, size, known, silence_s, timeout_s)
        with heartbeat.running():
            try:
                if rank == 0:
                    _check_versions(list(known.values()))
                yield
            except BaseException as error:
                if _is_broken_connection(error):
                    heartbeat.find_cause()
                    error = UserError(
                        f"{names([me])}: a connection to other processes broke ({first_line(error)})", on_one_rank=True
                    )
                heartbeat.report_failure(error)
                raise error


def _connect(rank: int, size: int, timeout_s: float) -> TCPStore:
    """The store of torchrun's agent, or one that rank 0 serves. Unlike torch's, it does not wait for the others."""
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE = {size} and no MASTER_ADDR in the environment: start it with torchrun")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(host, port, None, serves, timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        message = f"rank {rank} can't reach the rendezvous at {host}:{port} ({first_line(error)})"
        raise UserError(message, on_one_rank=True) from None


def _introduce(rank: int, local_rank: int, port: int) -> Member:
    host = socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.connect((os.environ["MASTER_ADDR"], 1))  # sends nothing: the kernel chooses the address to send from
            address = sender.getsockname()[0]
        except OSError:
            address = host
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return Member(rank, local_rank, host, torch.__version__, runtime, code, address, port)


def _gather(store: TCPStore, me: Member, size: int, timeout_s: float) -> tuple[Store, dict[int, Member]]:
    """On rank 0: answer the requests of the others until all have joined. UserError names those that have not."""
    token = uuid.uuid4().hex
    run = PrefixStore(token, store)
    run.set("failed", "")
    run.set(beat_key(0), json.dumps(Beat(0, 0, timeout_s, "starting")))
    answered, missing = set(), set(range(1, size))
    begin_s, noticed = time.monotonic(), False
    while missing:
        for rank in sorted(missing):
            if store.check([f"request/{rank}"]):
                request = store.get(f"request/{rank}").decode()
                if request not in answered:
                    answered.add(request)
                    store.set(f"answer/{request}", json.dumps([token, me]))
            if run.check([f"member/{rank}"]):
                missing.discard(rank)
        if missing and time.monotonic() - begin_s > timeout_s:
            error = UserError(
                f"{len(missing)} of {size} processes didn't come within {timeout_s:g} s: rank {_places(missing, size)};"
                " look at those hosts' output, and at how long importing takes there (parallel.timeout_s)",
                on_one_rank=True,
            )
            run.set("failed", str(error))
            linger(store)
            raise error
        if missing and not noticed and time.monotonic() - begin_s > NOTICE_S:
            logger.info("waiting for rank %s", _places(missing, size))
            noticed = True
        time.sleep(0.02)
    others = run.multi_get([f"member/{rank}" for rank in range(1, size)])
    return run, {0: me} | {rank: Member(*json.loads(text)) for rank, text in enumerate(others, 1)}


def _places(ranks: set[int], size: int) -> str:
    """The first few ranks with the number of their host."""
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return ", ".join(f"{rank} (host number {rank // per_host})" for rank in sorted(ranks)[:8])


def _join(store: TCPStore, me: Member, size: int, timeout_s: float) -> tuple[Store, dict[int, Member]]:
    """On all other ranks: ask rank 0 for the token, write the first beat, and introduce this process."""
    request = uuid.uuid4().hex
    store.set(f"request/{me.rank}", request)
    try:
        store.wait([f"answer/{request}"], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        message = f"{names([me])}: no answer of rank 0 within {timeout_s:g} s ({first_line(error)}); look at the output"
        raise UserError(f"{message} there", on_one_rank=True) from None
    token, main = json.loads(store.get(f"answer/{request}"))
    run = PrefixStore(token, store)
    run.set(beat_key(me.rank), json.dumps(Beat(0, 0, LONG_SILENCE_S, "preparing")))
    run.set(f"member/{me.rank}", json.dumps(me))
    return run, {0: Member(*main), me.rank: me}


def _check_versions(members: Sequence[Member]) -> None:
    for field, what in MUST_AGREE.items():
        for member in members:
            ours, theirs = getattr(members[0], field), getattr(member, field)
            if ours != theirs:
                raise UserError(
                    f"{what}: {ours} on {names(members[:1])}, {theirs} on {names([member])}; install the same on both",
                    on_one_rank=True,
                )
    hosts = {member.host for member in members}
    if len(hosts) > 1:
        logger.info("%d hosts: %s", len(hosts), names(members))


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective or the store failed, rather than this process. gloo's errors have no type of their own."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


# ----------------------------------------------------------------------------------------------- the first collective


@contextmanager
def link_check(heartbeat: Heartbeat) -> Iterator[None]:
    """Around making the process group and its first collectives: end the run if they fail or take over `silence_s`.

    A thread keeps the time, since NCCL connects without a limit of its own.
    """
    silence_s = heartbeat.silence_s
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
    me = heartbeat.me
    if me.rank:
        time.sleep(2 * PROBE_S)  # rank 0 knows all addresses, so its message says more
    others = {(m.host, m.address): m for m in heartbeat.known.values()}
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
