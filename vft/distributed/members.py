"""The processes of a run: who they are, and what they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a run, as it introduces itself to the others."""

    rank: int
    local_rank: int
    host: str
    """Name of its host."""
    pid: int
    device: str
    """Name of its GPU, or `CPU`."""
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


@dataclass(frozen=True, slots=True)
class Members:
    """The processes of one run, as one of them knows them, and the limits on waiting for each other."""

    rank: int
    """Of this process."""
    size: int
    """Number of processes."""
    known: Mapping[int, Member]
    """By rank: all of them on rank 0, elsewhere rank 0 and this process."""
    store: Store
    """Holds the keys of this run alone, though a run before it may have used the same server."""
    silence_s: float
    """Seconds without a heartbeat after which a process counts as lost."""
    timeout_s: float
    """Seconds that a pack or a collective may take."""

    @property
    def me(self) -> Member:
        """This process."""
        return self.known[self.rank]

    @property
    def main(self) -> Member:
        """Rank 0."""
        return self.known[0]

    def names(self, ranks: Iterable[int]) -> str:
        """Hosts and ranks, for messages."""
        return names(self.known[rank] for rank in ranks)


def names(members: Iterable[Member]) -> str:
    """Hosts and ranks for messages: `host a (ranks 0, 1), host b (rank 2)`."""
    ranks: dict[str, list[str]] = {}
    for member in members:
        ranks.setdefault(member.host, []).append(str(member.rank))
    return ", ".join(f"host {host} (rank{'s' * (len(r) > 1)} {', '.join(r)})" for host, r in ranks.items())
