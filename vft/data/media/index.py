"""The index of media: every file is scanned once, and what was found is cached.

`media.parquet` has a row for each file, with its kind and path as the key, which is valid as long as size and
modification time stay the same. `media-headers.parquet` is the same for runs that rely on the headers of containers.
A cache is replaced as a whole, under a lock, so that processes and hosts may share the folder. Bad files have a row
with their reason. What may pass (a missing or unreadable file, a crash) has none, and is scanned again next time.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vft.common.console import progress_bar
from vft.common.files import locked, whole_file
from vft.common.types import MediaInfo, MediaKind, MediaRef
from vft.data.media.errors import MediaError, check_file
from vft.data.media.video import join_scans, scan_file
from vft.data.workers import WorkerPool

logger = logging.getLogger(__name__)

Key = tuple[MediaKind, str]
"""Kind and path of a file."""
Row = dict[str, Any]

SCAN_VERSION = "3"
"""Raise it if a scan of the same file gives another result than before: older caches are then ignored."""
SAVE_EVERY = 2000
"""Files after which progress is saved: what an interrupted scan may lose."""
STAT_THREADS = 16
"""Network disks answer many requests at once."""
STAT_BATCH = 2000
"""Files of a stored index that a thread looks at before it takes others."""
TRANSIENT = ("missing", "unreadable", "crashed")
"""Reasons that may not hold next time."""

SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("path", pa.string()),
        ("size_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("reason", pa.string()),  # null: the file is good
        ("message", pa.string()),
        ("deadline_s", pa.float64()),  # time limit of the scan: with a longer one it may succeed
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("stream_index", pa.int32()),
        ("duration_s", pa.float64()),
        ("times_s", pa.list_(pa.float64())),
    ],
    metadata={"scan_version": SCAN_VERSION},
)
INFO_FIELDS = ("height", "width", "num_frames", "fps", "stream_index", "duration_s")


class Index:
    """What is known about each file."""

    def __init__(self, keys: Sequence[Key], table: pa.Table, transient: dict[Key, MediaError]) -> None:
        """`table` may have other rows than those of `keys`."""
        self._keys, self._table, self._transient = keys, table, transient
        self._rows = {key: i for i, key in enumerate(_keys(table))}
        self._reasons, self._messages = (table.column(name).to_pylist() for name in ("reason", "message"))
        self._fields = {name: table.column(name).to_pylist() for name in INFO_FIELDS}
        self._times_s = table.column("times_s")  # in Arrow: a tenth of the memory of Python's floats

    def info(self, ref: MediaRef) -> MediaInfo:
        """The result of the scan of `ref`.

        Raises:
            MediaError: the file cannot be used.
            KeyError: `ref` was not among those for which the index was built.
        """
        return join_scans(ref, [self._info(key) for key in _keys_of(ref)])

    @property
    def table(self) -> pa.Table:
        """What is known about each file, in the order in which `StoredIndex` takes it. Files without a row in the cache
        have a reason and no size."""
        bad = [
            {"kind": key[0], "path": key[1], "reason": error.reason, "message": error.message}
            for key, error in self._transient.items()
        ]
        known = self._table.take([self._rows[key] for key in self._keys if key not in self._transient])
        return pa.concat_tables([known, pa.Table.from_pylist(bad, SCHEMA)]).sort_by([("path", "ascending")])

    def _info(self, key: Key) -> MediaInfo:
        if key in self._transient:
            raise self._transient[key].with_traceback(None)
        row = self._rows[key]
        if self._reasons[row] is not None:
            raise MediaError(self._reasons[row], self._messages[row])
        times_s = self._times_s[row].as_py()
        fields = {name: column[row] for name, column in self._fields.items()}
        return MediaInfo(key[0], **fields, times_s=None if times_s is None else tuple(times_s))


class StoredIndex:
    """As `Index`, from a table that is mapped from a file: nothing of it is held in memory."""

    def __init__(self, table: pa.Table) -> None:
        """`table` is `Index.table`."""
        self.table = table

    def info(self, ref: MediaRef) -> MediaInfo:
        """As `Index.info`."""
        return join_scans(ref, [self._info(key) for key in _keys_of(ref)])

    def _info(self, key: Key) -> MediaInfo:
        paths = self.table.column("path")
        number = bisect_left(range(len(paths)), key[1], key=lambda i: paths[i].as_py())
        while paths[number].as_py() == key[1]:
            (row,) = self.table.slice(number, 1).to_pylist()
            if row["kind"] == key[0]:
                if row["reason"] is not None:
                    raise MediaError(row["reason"], row["message"])
                times_s = row["times_s"]
                fields = {name: row[name] for name in INFO_FIELDS}
                return MediaInfo(key[0], **fields, times_s=None if times_s is None else tuple(times_s))
            number += 1
        raise KeyError(key)

    def is_current(self) -> bool:
        """Whether all files are as they were: the good ones unchanged, the others bad for the same reason."""
        with ThreadPoolExecutor(STAT_THREADS) as threads:
            same = all(threads.map(_are_unchanged, self.table.to_batches(max_chunksize=STAT_BATCH)))
        return same and all(os.path.realpath(folder) == folder for folder in self._folders())

    def _folders(self) -> set[str]:
        batches = self.table.to_batches(max_chunksize=STAT_BATCH)
        return {os.path.dirname(path) for batch in batches for path in batch.column("path").to_pylist()}


def _are_unchanged(batch: pa.RecordBatch) -> bool:
    columns = (batch.column(name).to_pylist() for name in ("kind", "path", "size_bytes", "mtime_ns", "reason"))
    for kind, path, size_bytes, mtime_ns, reason in zip(*columns, strict=True):
        status = _status((kind, path))
        if isinstance(status, MediaError):
            if size_bytes is not None or reason != status.reason:
                return False
        elif (size_bytes, mtime_ns) != (status.st_size, status.st_mtime_ns):
            return False
    return True


def build(
    refs: Iterable[MediaRef],
    cache_dir: Path,
    workers: int,
    timeout_s: float,
    headers: bool = False,
    show_progress: bool = True,
) -> Index:
    """Index the files of `refs`. Those that are new or have changed are scanned in `workers` processes.

    A scan may take `timeout_s` seconds for each file. With `headers`, frames are counted from the headers of
    containers if these are complete. Waits for other processes that build an index in `cache_dir`.
    """
    keys = list(dict.fromkeys(key for ref in refs for key in _keys_of(ref)))
    fix = "name a folder that can be written as data.cache_dir"
    with locked(cache_dir / "media.lock", "another process that indexes media", fix):
        cache = cache_dir / ("media-headers.parquet" if headers else "media.parquet")
        table = _read(cache)
        todo, transient = _find_stale(keys, table, timeout_s)
        rows: list[Row] = []
        try:
            for row in _scan_all(todo, workers, timeout_s, headers, show_progress):
                if row["reason"] in TRANSIENT:
                    transient[row["kind"], row["path"]] = MediaError(row["reason"], row["message"])
                    continue
                rows.append(row)
                if len(rows) >= SAVE_EVERY:
                    table, rows = _write(cache, table, rows), []
        finally:  # also if the user interrupts
            if rows:
                table = _write(cache, table, rows)
    return Index(keys, table, transient)


def _keys_of(ref: MediaRef) -> list[Key]:
    return [(ref.file_kind, str(file)) for file in ref.files]


def _keys(table: pa.Table) -> Iterator[Key]:
    return zip(table.column("kind").to_pylist(), table.column("path").to_pylist(), strict=True)


def _find_stale(
    keys: list[Key], table: pa.Table, timeout_s: float
) -> tuple[dict[Key, os.stat_result], dict[Key, MediaError]]:
    """The files to scan, each with its status; and those whose status alone shows that they are bad."""
    columns = (table.column(name).to_pylist() for name in ("size_bytes", "mtime_ns", "reason", "deadline_s"))
    known = dict(zip(_keys(table), zip(*columns, strict=True), strict=True))
    todo: dict[Key, os.stat_result] = {}
    bad: dict[Key, MediaError] = {}
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        for key, status in zip(keys, threads.map(_status, keys), strict=True):
            if isinstance(status, MediaError):
                bad[key] = status
                continue
            size_bytes, mtime_ns, reason, old_timeout_s = known.get(key, (None, None, None, None))
            is_same = (size_bytes, mtime_ns) == (status.st_size, status.st_mtime_ns)
            if not is_same or (reason == "deadline" and old_timeout_s < timeout_s):
                todo[key] = status
    return todo, bad


def _status(key: Key) -> os.stat_result | MediaError:
    try:
        return check_file(Path(key[1]))
    except MediaError as error:
        return error


def _scan_all(
    todo: dict[Key, os.stat_result], workers: int, timeout_s: float, headers: bool, show_progress: bool
) -> Iterator[Row]:
    """The rows of the files, as they are done."""
    max_pending = max(1, 8 * workers)  # enough to keep the workers busy, few enough to stop at once
    pending: dict[Future[MediaInfo], Key] = {}
    remaining = iter(todo)
    bar = progress_bar(len(todo), "indexing media", "file", show_progress)
    with bar, WorkerPool(min(workers, len(todo)), timeout_s) as pool:
        while True:
            for key in islice(remaining, max_pending - len(pending)):
                pending[pool.submit(scan_file, key[0], Path(key[1]), headers)] = key
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                key = pending.pop(future)
                bar.update()
                yield _row(key, todo[key], timeout_s, future)


def _row(key: Key, status: os.stat_result, timeout_s: float, scan: Future[MediaInfo]) -> Row:
    row: Row = {"kind": key[0], "path": key[1], "size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    row |= {"deadline_s": timeout_s, "reason": None, "times_s": None}
    try:
        info = scan.result()
        return row | {name: getattr(info, name) for name in (*INFO_FIELDS, "times_s")}
    except MediaError as error:
        return row | {"reason": error.reason, "message": error.message}


def _read(path: Path) -> pa.Table:
    """The rows in the cache; none if there is no cache of this version."""
    try:
        table = pq.ParquetFile(path).read()  # pq.read_table would import pandas, if it is installed: a second
        version = (table.schema.metadata or {}).get(b"scan_version")
        if version == SCAN_VERSION.encode() and table.schema.names == SCHEMA.names:
            return table.cast(SCHEMA)  # Parquet names the items of lists in its own way
    except FileNotFoundError:
        pass
    except (pa.ArrowException, OSError) as error:
        logger.warning("%s: can't be read (%s); all media are indexed again", path, error)
    return SCHEMA.empty_table()


def _write(path: Path, table: pa.Table, rows: list[Row]) -> pa.Table:
    """Replace or add the rows of some files, and save the table. UserError if it cannot be written."""
    new = pa.Table.from_pylist(rows, SCHEMA)
    replaced = set(_keys(new))
    others = table.filter(pa.array([key not in replaced for key in _keys(table)], pa.bool_()))
    table = pa.concat_tables([others, new])
    with whole_file(path) as partial, partial.open("wb") as file:
        pq.write_table(table, file)
    return table
