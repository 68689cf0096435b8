"""Checks of memory, disk space and limits of this machine, and of a configuration's model and data."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from vft.cli.doctor_checks.finding import Finding
from vft.config.data import DataConfig
from vft.config.run import Config
from vft.data.records.paths import spellings

GIB = 1 << 30
HUB_TIMEOUT_S = 5.0
TOKEN_BYTES = 4 * 3 * 2 * 14 * 14
"""Bytes of one vision token of Qwen2.5-VL as workers send it: 4 patches, RGB, 2 frames, 14 x 14 pixels."""
MAX_PENDING_BYTES = 2 << 30
"""The same as in `vft.data.loader`, which cannot be imported if torchcodec is broken."""
LOW_GIB, EMPTY_GIB = 20.0, 1.0
"""Free space below which there is a warning, and an error."""
OPEN_FILES = 4096


def max_pending_bytes(data: DataConfig) -> int:
    """Largest number of bytes of decoded pixels that wait in shared memory for one training process."""
    rows = data.prefetch_packs * data.pack_tokens * TOKEN_BYTES
    return min(rows, MAX_PENDING_BYTES) if data.workers else 0


def check_shared_memory(path: Path, needed: int) -> Iterator[Finding]:
    """Compare the free bytes of `path` with what the workers of this host's training processes may put there."""
    fix = "docker run --shm-size=16g (or --ipc=host); Kubernetes: an emptyDir with medium: Memory at /dev/shm"
    if not path.is_dir():
        yield Finding("error", "shared memory", f"{path} is not a folder", fix)
        return
    free = shutil.disk_usage(path).free
    found = f"{free / GIB:.2f} GiB free, workers may fill {needed / GIB:.2f} GiB"
    if free < needed:
        yield Finding("error", "shared memory", found, f"{fix}; or lower data.prefetch_packs")
    else:
        yield Finding("ok", "shared memory", found)


def check_folder(what: str, path: Path, fix: str) -> Iterator[Finding]:
    """Whether a file can be written to the folder, or where it would be created, and how much space is free."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding("error", what, f"{path}: cannot be written ({error.strerror})", f"{fix}, or free space")
        return
    free_gib = shutil.disk_usage(place).free / GIB
    found = f"{path}: {free_gib:,.1f} GiB free"
    if free_gib < EMPTY_GIB:
        yield Finding("error", what, found, f"free space, or {fix}")
    elif free_gib < LOW_GIB:
        yield Finding("warning", what, found, f"checkpoints and frames may need more than {LOW_GIB:g} GiB: free space")
    else:
        yield Finding("ok", what, found)


def check_processors(processes: int) -> Iterator[Finding]:
    """Compare the processors that this process may use with the threads that would run."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and (limit := quota.read_text().split())[0] != "max":
        count = min(count, int(limit[0]) / int(limit[1]))
    setting = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(setting) if setting.isdecimal() else None
    fair = max(1, int(count) // processes)
    found = f"{count:g} CPUs, {processes} training process(es), OMP_NUM_THREADS {setting or 'not set'}"
    if threads is not None and threads * processes > count:
        yield Finding("warning", "processors", found, f"threads will wait for each other: OMP_NUM_THREADS={fair}")
    else:
        yield Finding("ok", "processors", found)


def check_open_files(limit: int) -> Iterator[Finding]:
    """Whether a process may open enough files. `limit` is the hard limit; a run raises its soft limit to it."""
    if limit != resource.RLIM_INFINITY and limit < OPEN_FILES:
        fix = f"ulimit -Hn {OPEN_FILES}; docker run --ulimit nofile=65536; systemd: LimitNOFILE=65536"
        yield Finding("error", "open files", f"{limit} at most, each waiting clip takes one", fix)
    else:
        yield Finding("ok", "open files", "without limit" if limit == resource.RLIM_INFINITY else f"{limit} at most")


def check_hub(config: Config | None) -> Iterator[Finding]:
    """Whether the model's files are in a folder or in the hub's cache, and whether the hub can be reached."""
    path = config.model.path if config else ""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reached = not offline and answers(endpoint)
    state = "HF_HUB_OFFLINE is set" if offline else f"{endpoint} {'answers' if reached else 'does not answer'}"
    if Path(path).is_dir() and path:
        if Path(path, "config.json").is_file():
            yield Finding("ok", "model", f"{path}: a folder")
        else:
            yield Finding("error", "model", f"{path}: no config.json there", "model.path: the folder of a model")
    elif path and _is_cached(path):
        yield Finding("ok", "model", f"{path}: in the hub's cache")
    elif path and not reached:
        fix = f"where there is access: hf download {path} --local-dir DIR; then model.path=DIR"
        yield Finding("error", "model", f"{path}: neither a folder nor in the hub's cache; {state}", fix)
    if reached or offline:
        yield Finding("ok", "hub", state)
    else:
        fix = "check network, HTTPS_PROXY and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 and train from local folders"
        yield Finding("warning", "hub", f"{state} within {HUB_TIMEOUT_S:g} s", fix)


def answers(endpoint: str) -> bool:
    """Whether the server answers in time. In a thread, because looking up its name has no timeout of its own."""
    answered = threading.Event()

    def request() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass  # this is an answer too
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answered.is_set()


def check_data(config: Config) -> Iterator[Finding]:
    """Whether data.root and the files of the sources exist."""
    root = config.data.root
    if not root.is_dir():
        fix = "put the data there, or name its folder: data.root=DIR (vft download fetches public sets)"
        yield Finding("error", "data", f"data.root = {str(root)!r}: no such folder", fix)
        return
    named = [source.path for source in (*config.data.sources, *config.eval.sources) if not source.stream]
    local = [path for path in dict.fromkeys(named) if "://" not in path]
    missing = [path for path in local if not _exists(root, path)]
    for path in missing:
        yield Finding("error", "data", f"{root / path}: no such file", "put it there, or correct path in data.sources")
    if not missing:
        yield Finding("ok", "data", f"{root}: {len(named)} source(s) found")


def _exists(root: Path, path: str) -> bool:
    """Whether a source's path, or a file that matches it, is in `root`."""
    return any((root / form).exists() for form in spellings(path)) or ("*" in path and any(root.glob(path)))


def _is_cached(path: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(path, "config.json"), str)
    except HFValidationError:
        return False
