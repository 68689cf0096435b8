"""Check this machine's set-up and say how to fix it.

Looks at packages, FFmpeg, GPUs, a sum over two processes, shared memory, disk space, processors and the hub; with a
configuration also at its model, data and folders. Needs nothing but Python itself. The exit status is 1 if something
would stop or spoil a run.
"""

# Only the standard library is imported here. What else a check needs, which may be what is broken, it imports itself.

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vft.common.errors import UserError
from vft.common.interpreter import CHECKOUT, fail
from vft.config.command_line import Parser

if TYPE_CHECKING:
    from vft.config.data import DataConfig
    from vft.config.run import Config

COLOURS = {"ok": 32, "warning": 33, "error": 31}
"""ANSI's number for the colour of a status."""
GIB = 1 << 30
NOT_INSTALLED = "not installed"
MANY = 3
"""More missing packages than this are one finding."""
TIMEOUT_S = 180.0
"""For a child process; importing torch from a slow network disk takes minutes."""
HUB_TIMEOUT_S = 10.0
FFMPEG = {58: 4, 59: 5, 60: 6, 61: 7, 62: 8}
"""FFmpeg's version by that of its libavcodec, for the versions that torchcodec takes."""
DRIVERS = {"/dev/kfd": "ROCm", "/dev/nvidia0": "CUDA"}
"""Device files that the drivers of GPUs create."""
TOKEN_BYTES = 4 * 3 * 2 * 14 * 14
"""Bytes of one vision token of Qwen2.5-VL as workers send it: 4 patches, RGB, 2 frames, 14 x 14 pixels."""
MAX_PENDING_BYTES = 2 << 30
"""The same as in `vft.data.loader`, which cannot be imported if torchcodec is broken."""
LOW_GIB, EMPTY_GIB = 20.0, 1.0
"""Free space below which there is a warning, and an error."""
OPEN_FILES = 4096
DECODE = """
import sys, av, numpy, torch
from torchcodec.decoders import VideoDecoder
with av.open(sys.argv[1], "w") as container:
    stream = container.add_stream("mpeg4", rate=4)
    stream.width = stream.height = 64
    for _ in range(4):
        frame = av.VideoFrame.from_ndarray(numpy.full((64, 64, 3), 128, numpy.uint8), format="rgb24")
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
frames = VideoDecoder(sys.argv[1])[:]
assert tuple(frames.shape) == (4, 3, 64, 64), frames.shape
"""
ASK = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method='HEAD'))"
SUM = """
from vft.common.console import user_errors
from vft.distributed.process_group import process_group, together
with user_errors(), together(30, 60) as world, process_group(world):
    pass
"""


@dataclass(frozen=True)
class Finding:
    """What a check found. It is fine if there is nothing to fix."""

    what: str
    found: str
    fix: str = ""
    severity: Literal["warning", "error"] = "error"
    """Of what is to be fixed."""

    @property
    def status(self) -> str:
        """`ok`, `warning` or `error`."""
        return self.severity if self.fix else "ok"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    parser = Parser(prog, __doc__)
    parser.add_argument("config", type=Path, nargs="?", help="TOML file of a training run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file"
    )
    parser.add_argument("--output", type=Path, help="folder of the run (default: output_dir of the configuration)")
    parser.add_argument("--processes", type=int, default=1, help="training processes on this host (default 1)")
    parser.add_argument(
        "--shared-memory", type=Path, default=Path("/dev/shm"), help="folder of shared memory (default /dev/shm)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    try:
        arguments = parser.read(argv)
    except UserError as error:
        fail(str(error))
    findings = list(examine(arguments) if arguments.json else show(examine(arguments)))
    if arguments.json:
        # "mend" is the earlier name of "fix".
        table = [{"status": f.status, "what": f.what, "found": f.found, "fix": f.fix, "mend": f.fix} for f in findings]
        print(json.dumps(table, indent=1))
    raise SystemExit(any(finding.status == "error" for finding in findings))


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    """All findings, in the order in which a user would fix them."""
    basics = [*check_packages(), check_torch()]
    yield from basics
    if basics[-1].fix or any(NOT_INSTALLED in finding.found for finding in basics):
        return  # the other checks need torch and the packages

    import torch

    import vft.data.formats  # noqa: F401  checks the sources of a configuration
    from vft.common.console import user_errors
    from vft.config import run as configs
    from vft.config.data import DataConfig

    with user_errors():
        config = configs.load(arguments.config, arguments.overrides) if arguments.config else None
    yield check_decoding()
    yield from check_gpus(torch)
    yield check_two_processes(torch.cuda.device_count())
    data = config.data if config else DataConfig()
    yield check_shared_memory(arguments.shared_memory, arguments.processes * max_pending_bytes(data))
    yield check_folder("cache folder", data.cache_path, "set VFT_CACHE or data.cache_dir to another folder")
    output = arguments.output or (config.output_dir if config else None)
    if output is not None:
        yield check_folder("output folder", output, "name another output_dir")
    yield check_processors(arguments.processes)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield from check_hub(config)
    if config is not None:
        yield from check_data(config)


def show(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Print each finding as soon as it is known, in plain text: fixes are commands to copy."""
    for finding in findings:
        status = f"{finding.status:8}"
        if sys.stdout.isatty():
            status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
        print(f"{status} {finding.what:14} {finding.found}")
        if finding.fix:
            print(f"{'':23} fix: {finding.fix}", flush=True)
        yield finding


# ------------------------------------------------------------------------------------------ packages and video decoding


def check_packages() -> Iterator[Finding]:
    """Whether the packages that vft depends on are installed in the versions that it asks for."""
    names = {requirement: re.split(r"[^\w.-]", requirement)[0] for requirement in requirements()}
    versions = {requirement: version_of(name) for requirement, name in names.items()}
    wrong = [requirement for requirement, version in versions.items() if not is_in_range(requirement, version)]
    missing = [requirement for requirement in wrong if versions[requirement] == NOT_INSTALLED]
    if len(missing) > MANY:
        setup = CHECKOUT / "tools" / "setup"
        fix = f"run {setup}" if setup.is_file() else "pip install PATH_TO_VFT"
        listed = ", ".join(names[requirement] for requirement in missing)
        yield Finding("packages", f"{len(missing)} packages {NOT_INSTALLED} in {sys.executable}: {listed}", fix)
        wrong = [requirement for requirement in wrong if requirement not in missing]
    for requirement in wrong:
        yield Finding("packages", f"{names[requirement]} {versions[requirement]}", f"pip install '{requirement}'")
    if not wrong and not missing:
        yield Finding("packages", f"Python {sys.version.split()[0]}, all packages in their ranges")


def requirements() -> list[str]:
    """The packages that vft needs, with their ranges of versions: of the checkout, else of the installed package."""
    project = CHECKOUT / "pyproject.toml"
    if project.is_file():
        return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    return [requirement for requirement in metadata.requires("vft") or [] if "extra ==" not in requirement]


def version_of(name: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def is_in_range(requirement: str, version: str) -> bool:
    """Whether an installed version satisfies a requirement such as `torch>=2.11`."""
    if version == NOT_INSTALLED:
        return False
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # it comes with packages that are missing then, which is an error of its own
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def check_torch() -> Finding:
    """Whether torch can be imported; in a new process, because a broken torch may crash it."""
    done = run_python("import torch; print(torch.__version__)")
    if done.returncode:
        return Finding("torch", last_line(done), f"pip install --force-reinstall '{tested_version('torch')}'")
    return Finding("torch", done.stdout.strip())


def ffmpeg_versions() -> list[int]:
    """Versions of FFmpeg whose libraries the loader finds."""
    found = []
    for library, version in FFMPEG.items():
        for name in (f"libavcodec.so.{library}", f"libavcodec.{library}.dylib"):
            with suppress(OSError):
                ctypes.CDLL(name)
                found.append(version)
    return found


def check_decoding(versions: Callable[[], list[int]] = ffmpeg_versions) -> Finding:
    """Write a clip with PyAV, which brings its own FFmpeg, and decode it with torchcodec, which takes the system's."""
    with tempfile.TemporaryDirectory() as scratch:
        done = run_python(DECODE, f"{scratch}/clip.mp4")
    codec, torch, pinned = version_of("torchcodec"), version_of("torch"), tested_version("torchcodec")
    found, fix = last_line(done), f"pip install --force-reinstall '{pinned}'"
    if done.returncode == 0:
        known = ", ".join(map(str, versions())) or "of its own"
        found, fix = f"torchcodec {codec} with torch {torch}, FFmpeg {known}", ""
    elif not versions():
        found = f"torchcodec {codec} finds no FFmpeg of version 4 to 8"
        fix = "install its shared libraries: apt-get install ffmpeg, or conda install ffmpeg"
    elif any(sign in done.stderr for sign in ("libtorchcodec", "undefined symbol", "ModuleNotFoundError")):
        found = f"torchcodec {codec} does not load beside torch {torch}: {found}"
        fix = f"pip install '{pinned}', which goes with torch 2.11 and later"
    return Finding("decoding", found, fix)


def tested_version(name: str) -> str:
    """The requirement that CI installs (constraints.txt of a checkout); else the range that vft asks for."""
    pins = CHECKOUT / "constraints.txt"
    lines = pins.read_text(encoding="utf-8").splitlines() if pins.is_file() else requirements()
    return next(line for line in lines if re.match(rf"{name}\b", line))


def run_python(
    code: str, *arguments: str, timeout_s: float = TIMEOUT_S, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process of this Python; after `timeout_s` it is killed, and its exit status is 1."""
    command = [sys.executable, "-c", code, *arguments]
    try:
        return subprocess.run(
            command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"still running after {timeout_s:g} s")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The exception at the end of a traceback; else the last line on stderr, or the exit status."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
    return (exceptions or lines or [f"exit status {done.returncode}"])[-1].strip()[:200]


# -------------------------------------------------------------------------------------------------- GPUs and processes


def check_gpus(torch: Any) -> Iterator[Finding]:
    """GPUs that `torch` can use, and GPUs that this build of it cannot use."""
    hip, cuda = torch.version.hip, torch.version.cuda
    build = f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "CPU only"
    if not torch.cuda.is_available():
        yield _explain_no_gpu(build, "ROCm" if hip else "CUDA" if cuda else "")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found = f"{number}: {properties.name}, {properties.total_memory / GIB:.0f} GiB, {build}"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding("GPU", f"{found}, bf16")
        else:
            fix = 'train.precision = "fp32", or a GPU from 2020 on (Ampere, MI200)'
            yield Finding("GPU", f"{found}, bf16 is emulated and slow", fix, "warning")
    yield _check_attention(torch)
    yield _check_recurrence(torch)


def _explain_no_gpu(build: str, platform: str) -> Finding:
    """Why torch, built for `platform` (empty: for CPUs only), has no GPU."""
    drivers = {node: kind for node, kind in DRIVERS.items() if Path(node).exists()}
    if not drivers:
        if not platform:
            return Finding("GPUs", f"none; torch is built for {build}: enough for the demo")
        fix = "install the driver, or give the container its GPUs (--gpus all)"
        return Finding("GPUs", f"none; torch is built for {build}", fix, "warning")
    node, kind = next(iter(drivers.items()))
    if platform not in drivers.values():
        fix = f"install a torch for {kind} (pytorch.org's index for {kind}), then run tools/setup"
    elif platform == "ROCm":
        fix = "add the user to the groups video and render, and check that rocminfo lists the GPU"
    else:
        fix = f"update the driver until nvidia-smi shows {build} or later, or install a torch for an older CUDA"
    return Finding("GPUs", f"{node} exists, but torch for {build} can't use it", fix)


def _check_attention(torch: Any) -> Finding:
    """Try the attention kernel for packed rows as a run does."""
    from vft.models.attention import check_kernel, has_kernel

    device, dtype = torch.device("cuda"), torch.bfloat16
    with warnings.catch_warnings(record=True) as caught:
        check_kernel(device, dtype)
    if has_kernel(device, dtype):
        return Finding("attention", "one varlen call a layer")
    found = str(caught[-1].message) if caught else "no varlen kernel: attention takes the slower path"
    fix = "install torch 2.11 or later, built for this GPU: compute capability 8.0 (Ampere), MI200, or newer"
    return Finding("attention", found, fix, "warning")


def _check_recurrence(torch: Any) -> Finding:
    """Try fla's kernels as a run of Qwen3.5 does, with the heads of its 9B."""
    from vft.models.delta_rule import has_fla

    with warnings.catch_warnings(record=True) as caught:
        found = has_fla(torch.device("cuda"), torch.bfloat16, (16, 32, 128, 128))
    if caught and not found:
        fix = "another version of fla-core or triton, or none: results are the same without"
        return Finding("Qwen3.5's recurrence", str(caught[-1].message), fix, "warning")
    return Finding("Qwen3.5's recurrence", "fla's kernels" if found else "the plain form (without vft[fla])")


def check_two_processes(gpus: int) -> Finding:
    """Let two processes of this host form a group as those of a run do, and sum a tensor."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    backend, names, more = "NCCL (RCCL on ROCm) and gloo", ["NCCL_SOCKET_IFNAME"], "; NCCL_DEBUG=INFO says more"
    if gpus < 2:
        backend, names, more = "gloo", [], ""
        common |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    with ThreadPoolExecutor() as threads:
        results = threads.map(
            lambda rank: run_python(SUM, environment={"RANK": rank, "LOCAL_RANK": rank, **common}), "01"
        )
    failed = [result for result in results if result.returncode]
    if not failed:
        return Finding("two processes", f"a sum through {backend}")
    names += ["GLOO_SOCKET_IFNAME"]
    fix = f"set {' and '.join(names)}"
    if set_names := [f"{name}={os.environ[name]}" for name in names if name in os.environ]:
        fix = f"unset {', '.join(set_names)}, or name an interface of `ip address`"
    return Finding("two processes", f"no sum through {backend}: {last_line(failed[0])}", fix + more)


# ------------------------------------------------------------------------------ memory, disks, and what a run refers to


def max_pending_bytes(data: DataConfig) -> int:
    """Largest number of bytes of decoded pixels that wait in shared memory for one training process."""
    rows = data.prefetch_packs * data.pack_tokens * TOKEN_BYTES
    return min(rows, MAX_PENDING_BYTES) if data.workers else 0


def check_shared_memory(path: Path, needed: int) -> Finding:
    """Compare the free bytes of `path` with what the workers of this host's training processes may put there."""
    fix = "docker run --shm-size=16g (or --ipc=host); Kubernetes: an emptyDir with medium: Memory at /dev/shm"
    if not path.is_dir():
        return Finding("shared memory", f"{path} is not a folder", fix)
    free = shutil.disk_usage(path).free
    found = f"{free / GIB:.2f} GiB free, workers may fill {needed / GIB:.2f} GiB"
    return Finding("shared memory", found, f"{fix}; or lower data.prefetch_packs" if free < needed else "")


def check_folder(what: str, path: Path, fix: str) -> Finding:
    """Whether a file can be written to the folder, or where it would be created, and how much space is free."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(what, f"{path}: cannot be written ({error.strerror})", f"{fix}, or free space")
    free_gib = shutil.disk_usage(place).free / GIB
    found = f"{path}: {free_gib:,.1f} GiB free"
    if free_gib < EMPTY_GIB:
        return Finding(what, found, f"free space, or {fix}")
    more = f"checkpoints and frames may need more than {LOW_GIB:g} GiB: free space"
    return Finding(what, found, more if free_gib < LOW_GIB else "", "warning")


def check_processors(processes: int) -> Finding:
    """Compare the processors that this process may use with the threads that would run."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and (limit := quota.read_text().split())[0] != "max":
        count = min(count, int(limit[0]) / int(limit[1]))
    setting = os.environ.get("OMP_NUM_THREADS", "")
    found = f"{count:g} CPUs, {processes} training process(es), OMP_NUM_THREADS {setting or 'not set'}"
    fix = f"threads will wait for each other: OMP_NUM_THREADS={max(1, int(count) // processes)}"
    is_crowded = setting.isdecimal() and int(setting) * processes > count
    return Finding("processors", found, fix if is_crowded else "", "warning")


def check_open_files(limit: int) -> Finding:
    """Whether a process may open enough files. `limit` is the hard limit; a run raises its soft limit to it."""
    if limit != resource.RLIM_INFINITY and limit < OPEN_FILES:
        fix = f"ulimit -Hn {OPEN_FILES}; docker run --ulimit nofile=65536; systemd: LimitNOFILE=65536"
        return Finding("open files", f"{limit} at most, each waiting clip takes one", fix)
    return Finding("open files", "without limit" if limit == resource.RLIM_INFINITY else f"{limit} at most")


def check_hub(config: Config | None) -> Iterator[Finding]:
    """Whether the model's files are in a folder or in the hub's cache, and whether the hub can be reached."""
    path = config.model.path if config else ""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reached = not offline and answers(endpoint)
    state = "HF_HUB_OFFLINE is set" if offline else f"{endpoint} {'answers' if reached else 'does not answer'}"
    if path and Path(path, "config.json").is_file():
        yield Finding("model", f"{path}: a folder")
    elif path and Path(path).is_dir():
        yield Finding("model", f"{path}: no config.json there", "model.path: the folder of a model")
    elif path and _is_cached(path):
        yield Finding("model", f"{path}: in the hub's cache")
    elif path and not reached:
        fix = f"where there is access: hf download {path} --local-dir DIR; then model.path=DIR"
        yield Finding("model", f"{path}: neither a folder nor in the hub's cache; {state}", fix)
    if reached or offline:
        yield Finding("hub", state)
    else:
        fix = "check network, HTTPS_PROXY and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 and train from local folders"
        yield Finding("hub", f"{state} within {HUB_TIMEOUT_S:g} s", fix, "warning")


def _is_cached(path: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # it cannot be the name of a model
        return isinstance(try_to_load_from_cache(path, "config.json"), str)
    return False


def answers(endpoint: str) -> bool:
    """Whether the server answers in time. In a process, because looking up its name has no timeout of its own."""
    done = run_python(ASK, endpoint, timeout_s=HUB_TIMEOUT_S)
    return not done.returncode or "HTTPError" in last_line(done)  # this is an answer too


def check_data(config: Config) -> Iterator[Finding]:
    """Whether data.root and the files of the sources exist."""
    from vft.data.records.paths import path_exists

    root = config.data.root
    if not root.is_dir():
        fix = "put the data there, or name its folder: data.root=DIR (vft download fetches public sets)"
        yield Finding("data", f"data.root = {str(root)!r}: no such folder", fix)
        return
    named = [source.path for source in (*config.data.sources, *config.eval.sources) if not source.stream]
    missing = [
        path
        for path in dict.fromkeys(named)
        if "://" not in path and not path_exists(root, path) and not ("*" in path and any(root.glob(path)))
    ]
    for path in missing:
        yield Finding("data", f"{root / path}: no such file", "put it there, or correct path in data.sources")
    if not missing:
        yield Finding("data", f"{root}: {len(named)} source(s) found")
