"""The index of media: every file scanned once, its findings kept in a cache folder.

`media.parquet` holds a row a file, keyed by kind and path and valid while size and modification time stay the same;
`media-headers.parquet` the same where containers' headers are trusted. It is written whole and renamed into place,
under a lock, so that processes and hosts may share the folder. Bad files have a row too, with their reason; what may
pass (a missing or unreadable file, a crash) is looked at again next time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm import tqdm

from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.files import cannot_write, flush
from vft.common.types import MediaInfo, MediaKind, MediaRef
from vft.data.media.errors import MediaError, check_file
from vft.data.media.scan import join_pictures, scan_file
from vft.data.workers import WorkerPool

Key = tuple[MediaKind, str]
"""Kind and path of a file."""
Row = dict[str, Any]

SCAN_VERSION = "3"
"""Raise it when a scan of the same file finds something else than before: older caches are then not read."""
SAVE_EVERY = 2000
"""Files after which progress is saved: what an interrupted scan may lose."""
STAT_THREADS = 16
"""Network disks answer many questions at once."""
LOCK_PATIENCE_S = 2.0
"""After which a process says what it waits for."""

SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("path", pa.string()),
        ("size_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("reason", pa.string()),  # null: the file is good
        ("message", pa.string()),
        ("deadline_s", pa.float64()),  # of the scan: a longer one may succeed
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
    """What is known of each file."""

    def __init__(self, table: pa.Table, passing: dict[Key, MediaError]) -> None:
        self._rows = {key: i for i, key in enumerate(_keys(table))}
        self._passing = passing
        self._reasons, self._messages = (table.column(name).to_pylist() for name in ("reason", "message"))
        self._fields = {name: table.column(name).to_pylist() for name in INFO_FIELDS}
        self._times_s = table.column("times_s")  # left in Arrow: a tenth of the memory that Python's floats take

    def info(self, ref: MediaRef) -> MediaInfo:
        """What the scan of `ref` found.

        Raises:
            MediaError: the file can't be used.
            KeyError: `ref` was not among those that the index was built for.
        """
        found = [self._info(key) for key in _keys_of(ref)]
        return join_pictures(ref, found) if ref.is_list else found[0]

    def _info(self, key: Key) -> MediaInfo:
        if key in self._passing:
            raise self._passing[key].with_traceback(None)
        row = self._rows[key]
        if self._reasons[row] is not None:
            raise MediaError(self._reasons[row], self._messages[row])
        times_s = self._times_s[row].as_py()
        found = {name: column[row] for name, column in self._fields.items()}
        return MediaInfo(key[0], **found, times_s=None if times_s is None else tuple(times_s))


def build(
    refs: Iterable[MediaRef],
    cache_dir: Path,
    workers: int,
    deadline_s: float,
    headers: bool = False,
    show_progress: bool = True,
) -> Index:
    """Index the files of `refs`, scanning those that are new or have changed in `workers` processes.

    `deadline_s` seconds a file. `headers`: count frames from containers' headers where these are complete. Another
    process that builds in the same `cache_dir` is waited for.
    """
    wanted = list(dict.fromkeys(key for ref in refs for key in _keys_of(ref)))
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir = {str(cache_dir)!r}: can't be made ({error.strerror}); name a folder that can be written"
        ) from error
    with _locked(cache_dir / "media.lock"):
        cache = cache_dir / ("media-headers.parquet" if headers else "media.parquet")
        table = _read(cache)
        todo, passing = _find_stale(wanted, table, deadline_s)
        rows: list[Row] = []
        try:
            for row in _scan_all(todo, workers, deadline_s, headers, show_progress):
                if row["reason"] in ("missing", "unreadable", "crashed"):
                    passing[row["kind"], row["path"]] = MediaError(row["reason"], row["message"])
                    continue
                rows.append(row)
                if len(rows) >= SAVE_EVERY:
                    table, rows = _write(cache, table, rows), []
        finally:  # also where the user interrupts
            if rows:
                table = _write(cache, table, rows)
    return Index(table, passing)


def _keys_of(ref: MediaRef) -> list[Key]:
    return [("image" if ref.is_list else ref.kind, str(file)) for file in ref.files]


def _find_stale(
    wanted: list[Key], table: pa.Table, deadline_s: float
) -> tuple[dict[Key, os.stat_result], dict[Key, MediaError]]:
    """The files to scan with their status, and those of which the status alone says that they are bad."""
    columns = (table.column(name).to_pylist() for name in ("size_bytes", "mtime_ns", "reason", "deadline_s"))
    known = dict(zip(_keys(table), zip(*columns, strict=True), strict=True))
    todo: dict[Key, os.stat_result] = {}
    bad: dict[Key, MediaError] = {}
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        for key, status in zip(wanted, threads.map(_status, wanted), strict=True):
            if isinstance(status, MediaError):
                bad[key] = status
                continue
            size_bytes, mtime_ns, reason, given_s = known.get(key, (None, None, None, None))
            is_same = (size_bytes, mtime_ns) == (status.st_size, status.st_mtime_ns)
            if not is_same or (reason == "deadline" and given_s < deadline_s):
                todo[key] = status
    return todo, bad


def _status(key: Key) -> os.stat_result | MediaError:
    try:
        return check_file(Path(key[1]))
    except MediaError as error:
        return error


def _scan_all(
    todo: dict[Key, os.stat_result], workers: int, deadline_s: float, headers: bool, show_progress: bool
) -> Iterator[Row]:
    """The rows of the files, as they are done."""
    if not todo:
        return
    window = max(1, 8 * workers)  # tasks in flight: enough to keep workers busy, few enough to stop at once
    pending: dict[Future[MediaInfo], Key] = {}
    bar = progress_bar(len(todo), "indexing media", "file", show_progress)
    with bar, WorkerPool(min(workers, len(todo)), deadline_s) as pool:
        waiting = iter(todo)
        for key in waiting:
            pending[pool.submit(scan_file, key[0], Path(key[1]), headers)] = key
            while len(pending) >= window:
                yield from _collect(pending, todo, deadline_s, bar)
        while pending:
            yield from _collect(pending, todo, deadline_s, bar)


def _collect(
    pending: dict[Future[MediaInfo], Key], todo: dict[Key, os.stat_result], deadline_s: float, bar: tqdm[Any]
) -> Iterator[Row]:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        key = pending.pop(future)
        status = todo[key]
        row: Row = {"kind": key[0], "path": key[1], "size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        row |= {"deadline_s": deadline_s, "reason": None, "times_s": None}
        try:
            info = future.result()
            row |= {name: getattr(info, name) for name in (*INFO_FIELDS, "times_s")}
        except MediaError as error:
            row |= {"reason": error.reason, "message": error.message}
        bar.update()
        yield row


def _keys(table: pa.Table) -> Iterator[Key]:
    return zip(table.column("kind").to_pylist(), table.column("path").to_pylist(), strict=True)


def _locked(path: Path) -> AbstractContextManager[object]:
    """The lock, held until the context ends; says so where it has to wait."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=LOCK_PATIENCE_S)
    except Timeout:
        print(f"waiting for another process that indexes media ({path})", file=sys.stderr, flush=True)
        return lock.acquire()
    except OSError as error:
        raise cannot_write(path, error) from error


def _read(path: Path) -> pa.Table:
    """The rows in the cache; none where there is no cache of this version."""
    try:
        table = pq.read_table(path)
        version = (table.schema.metadata or {}).get(b"scan_version")
        if version != SCAN_VERSION.encode() or table.schema.names != SCHEMA.names:
            return SCHEMA.empty_table()
        return table.cast(SCHEMA)  # Parquet names the items of lists in its own way
    except FileNotFoundError:
        return SCHEMA.empty_table()
    except (pa.ArrowException, OSError) as error:
        print(f"{path}: can't be read ({error}); all media are indexed again", file=sys.stderr, flush=True)
        return SCHEMA.empty_table()


def _write(path: Path, table: pa.Table, rows: list[Row]) -> pa.Table:
    """Put `rows` in the place of those of the same files, and the whole on disk. A reader sees the old or the new.

    UserError where it can't be written.
    """
    new = pa.Table.from_pylist(rows, SCHEMA)
    replaced = set(_keys(new))
    kept = table.filter(pa.array([key not in replaced for key in _keys(table)], pa.bool_()))
    table = pa.concat_tables([kept, new])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)  # the rename itself
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    return table
