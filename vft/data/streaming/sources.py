"""The streaming sources of a run, what their streams share, and which of them fills which slot of a step."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Event

from filelock import FileLock, Timeout

from vft.common.errors import UserError
from vft.common.files import cannot_write, digest
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats
from vft.data.chat import ChatEncoder
from vft.data.dataset import MakeConversations, Prompts
from vft.data.quarantine import BadItem, by_kind, check_bad
from vft.data.records.unread_keys import report_unread_keys
from vft.data.workers import WorkerPool
from vft.distributed.process_group import environment

INDEX = -1
"""The feed that is no stream: documents of the index."""


class StreamSource:
    """A source with `stream = true`: its archives (`vft.data.formats.Archives`), and what is known before they are
    read. UserError if there are none."""

    def __init__(self, source: SourceConfig, config: DataConfig) -> None:
        archives = formats.find(source.format).open_archives(formats.locate(source.path, config.root))
        if environment().is_main:
            report_unread_keys(source.path, archives.unread)
        self.name, self.weight = source.path, source.of_rows
        self.shards, self.clips, self.warning = archives.shards, archives.clips, archives.warning
        self.bad = [BadItem(error.origin, "", "record", str(error)) for error in archives.bad]
        check_bad(self.bad, len(archives.unread) + len(self.bad), config.max_bad_fraction)
        names = [shard.rpartition("/")[2] for shard in archives.shards]
        self.digest = digest(f"{names}{archives.digest}")
        """Identifies the archives and their records, wherever they are."""
        self.unread_keys = set(chain.from_iterable(archives.unread))
        """Keys of records that are not read, as far as they have been reported."""


class Streams:
    """The streaming sources of a run and what all their streams in this process share, for `slots` rows a step. Close
    it at the end."""

    def __init__(
        self,
        config: DataConfig,
        make_conversations: MakeConversations,
        encoder: ChatEncoder,
        pool: WorkerPool,
        slots: int,
        seed: int,
    ) -> None:
        self.config, self.encoder, self.make_conversations = config, encoder, make_conversations
        self.pool, self.slots, self.seed = pool, slots, seed
        self.archives = [StreamSource(source, config) for source in config.streamed]
        self.weights = [sum(source.of_rows for source in config.indexed), *(one.weight for one in self.archives)]
        """Of the index, then of each source."""
        self.by_share = config.streamed[0].share is not None
        """The weights are shares of the samples, not of the rows."""
        self.prompts: Prompts = Counter()
        self.is_closing = Event()
        self._threads: list[ThreadPoolExecutor] = []
        self.spool, self._lock = make_spool(config.cache_path / "stream")

    def start_thread(self) -> ThreadPoolExecutor:
        """A thread that reads for one stream: over a network, several threads read faster than one."""
        self._threads.append(ThreadPoolExecutor(1, "vft-archives"))
        return self._threads[-1]

    def close(self) -> None:
        """Stop reading and remove the copies of clips."""
        self.is_closing.set()
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        self._lock.release()
        shutil.rmtree(self.spool, ignore_errors=True)

    def feed_of(self, step: int, slot: int, tally: Sequence[int] = ()) -> int:
        """Number of the stream that fills a slot of a step, or INDEX: drawn by weight from (seed, step, slot).

        If the weights are shares, the draw is by how many samples each feed would lack after one more row. `tally` then
        holds the slot's rows so far and the samples in them by feed, the index first.
        """
        weights = self.weights
        if tally:
            rows, *samples = tally
            total = sum(samples)
            after = total + (total / rows if total else 1.0)
            weights = [max(0.0, share * after - count) for share, count in zip(weights, samples, strict=True)]
        draw = random.Random(f"feed:{self.seed}:{step}:{slot}")
        return draw.choices(range(INDEX, len(self.archives)), weights)[0]

    @property
    def passes(self) -> int:
        """Passes through an archive that make up one epoch of all archives."""
        return sum(max(len(one.shards), self.slots) for one in self.archives)

    def nothing_in(self, name: str, bad: Sequence[BadItem], num_good: int) -> UserError:
        """The error that the source `name` has no document for a row, with what is wrong with the `bad` items found in
        it. It gave `num_good` good samples."""
        sources = [one for one in self.archives if one.name == name]
        shards = sum(len(one.shards) for one in sources)
        warnings = [one.warning for one in sources if one.warning]
        why = by_kind(item for item in bad if item.source == name) or "; ".join(warnings)
        if why and not num_good:
            return UserError(f"{name}: no clip met in {shards} archive(s) can be trained on: {why}")
        return UserError(
            f"{name}: too few clips with records in {shards} archive(s) for the {self.slots} streams of "
            "train.packs_per_step; lower it, or read the source with stream = false" + (f" [{why}]" if why else "")
        )


def make_spool(folder: Path) -> tuple[Path, FileLock]:
    """A folder for this process's copies, and a lock that is held while it is in use.

    Removes the folders of killed processes. UserError if `folder` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without this lock, processes that start now would take a folder that is not locked yet for an abandoned one.
        with FileLock(folder / ".lock"):
            for old in folder.glob("*/"):
                lock = FileLock(old / ".lock")
                try:
                    lock.acquire(timeout=0)
                except (Timeout, OSError):
                    continue
                lock.release()
                shutil.rmtree(old, ignore_errors=True)
            spool = Path(tempfile.mkdtemp(dir=folder))
            lock = FileLock(spool / ".lock")
            lock.acquire(timeout=0)
    except OSError as error:
        raise cannot_write(folder, error, "name another data.cache_dir for copies of streamed clips") from error
    return spool, lock
