"""Memory, disk and limits of this machine; the model and the data of a configuration."""

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
from vft.data.file_names import spellings

GIB = 1 << 30
HUB_S = 5.0
TOKEN_BYTES = 4 * 3 * 2 * 14 * 14
"""Pixels of one vision token of Qwen2.5-VL as workers send them: 4 patches, RGB, 2 frames, 14 x 14."""
MAX_PENDING_BYTES = 2 << 30
"""That of `vft.data.loader`, which can't be imported where torchcodec is broken."""
LOW_GIB, EMPTY_GIB = 20.0, 1.0
DESCRIPTORS = 4096


def pending_bytes(data: DataConfig) -> int:
    """Decoded pixels that wait in shared memory for one training process, at most."""
    rows = data.prefetch_packs * data.pack_tokens * TOKEN_BYTES
    return min(rows, MAX_PENDING_BYTES) if data.workers else 0


def shared_memory(path: Path, needed: int) -> Iterator[Finding]:
    """Free bytes of `path` against what the workers of all training processes of this host may put there."""
    mend = "docker run --shm-size=16g (or --ipc=host); Kubernetes: an emptyDir with medium: Memory at /dev/shm"
    if not path.is_dir():
        yield Finding("error", "shared memory", f"{path} is no folder", mend)
        return
    free = shutil.disk_usage(path).free
    found = f"{free / GIB:.2f} GiB free, workers may fill {needed / GIB:.2f} GiB"
    if free < needed:
        yield Finding("error", "shared memory", found, f"{mend}; or lower data.prefetch_packs")
    else:
        yield Finding("ok", "shared memory", found)


def folder(what: str, path: Path, mend: str) -> Iterator[Finding]:
    """Whether a file can be written to the folder or where it would be made, and how much more fits."""
    place = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding("error", what, f"{path}: can't be written ({error.strerror})", f"{mend}, or free space")
        return
    free_gib = shutil.disk_usage(place).free / GIB
    found = f"{path}: {free_gib:,.1f} GiB free"
    if free_gib < EMPTY_GIB:
        yield Finding("error", what, found, f"free space, or {mend}")
    elif free_gib < LOW_GIB:
        yield Finding("warning", what, found, f"checkpoints and frames may need more than {LOW_GIB:g} GiB: free space")
    else:
        yield Finding("ok", what, found)


def processors(processes: int) -> Iterator[Finding]:
    """Processors that this process may use, against threads."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and (share := quota.read_text().split())[0] != "max":
        count = min(count, int(share[0]) / int(share[1]))
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() else None
    fair = max(1, int(count) // processes)
    found = f"{count:g} CPUs, {processes} training process(es), OMP_NUM_THREADS {given or 'not set'}"
    if threads is not None and threads * processes > count:
        yield Finding("warning", "processors", found, f"threads will wait for each other: OMP_NUM_THREADS={fair}")
    else:
        yield Finding("ok", "processors", found)


def descriptors(limit: int) -> Iterator[Finding]:
    """Files that a process may open, at most; `limit` is the hard one, to which a run raises its own."""
    if limit != resource.RLIM_INFINITY and limit < DESCRIPTORS:
        mend = f"ulimit -Hn {DESCRIPTORS}; docker run --ulimit nofile=65536; systemd: LimitNOFILE=65536"
        yield Finding("error", "open files", f"{limit} at most, each waiting clip takes one", mend)
    else:
        yield Finding("ok", "open files", "without limit" if limit == resource.RLIM_INFINITY else f"{limit} at most")


def hub(config: Config | None) -> Iterator[Finding]:
    """Whether weights can be had: from a folder, the hub's cache, or the hub."""
    path = config.model.path if config else ""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reached = None if offline else reaches(endpoint)
    state = "HF_HUB_OFFLINE is set" if offline else f"{endpoint} {'answers' if reached else 'does not answer'}"
    if Path(path).is_dir() and path:
        if Path(path, "config.json").is_file():
            yield Finding("ok", "model", f"{path}: a folder")
        else:
            yield Finding("error", "model", f"{path}: no config.json there", "model.path: the folder of a checkpoint")
    elif path and _is_cached(path):
        yield Finding("ok", "model", f"{path}: in the hub's cache")
    elif path and not reached:
        mend = f"where there is access: hf download {path} --local-dir DIR; then model.path=DIR"
        yield Finding("error", "model", f"{path}: neither a folder nor in the hub's cache; {state}", mend)
    if reached or offline:
        yield Finding("ok", "hub", state)
    else:
        mend = "check network, HTTPS_PROXY and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 and train from local folders"
        yield Finding("warning", "hub", f"{state} within {HUB_S:g} s", mend)


def reaches(endpoint: str) -> bool:
    """Whether the server says anything at all, in time; looking up its name has no time-out of its own."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_S).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_S)
    return answered.is_set()


def data_of(config: Config) -> Iterator[Finding]:
    """The folder and the files of the data."""
    root = config.data.root
    if not root.is_dir():
        mend = "put the data there, or name its folder: data.root=DIR (python tools/download.py fetches public sets)"
        yield Finding("error", "data", f"data.root = {str(root)!r}: no such folder", mend)
        return
    named = [source.path for source in (*config.data.sources, *config.eval.sources) if not source.stream]
    local = [path for path in dict.fromkeys(named) if "://" not in path]
    missing = [path for path in local if not _is_there(root, path)]
    for path in missing:
        yield Finding("error", "data", f"{root / path}: no such file", "put it there, or mend path in data.sources")
    if not missing:
        yield Finding("ok", "data", f"{root}: {len(named)} source(s) found")


def _is_there(root: Path, path: str) -> bool:
    """Whether a source's path, or for one with `*` some file, is in `root`."""
    return any((root / form).exists() for form in spellings(path)) or ("*" in path and any(root.glob(path)))


def _is_cached(path: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(path, "config.json"), str)
    except HFValidationError:
        return False
