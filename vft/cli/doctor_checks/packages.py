"""Checks of packages and of video decoding. Nothing here imports torch: it may be what is broken."""

from __future__ import annotations

import ctypes
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata

from vft.cli.doctor_checks.finding import Finding, last_line, run_python
from vft.common.interpreter import CHECKOUT

NOT_INSTALLED = "not installed"
MANY = 3
"""More missing packages than this are one finding."""
FFMPEG = {58: 4, 59: 5, 60: 6, 61: 7, 62: 8}
"""FFmpeg's version by that of its libavcodec, for the versions that torchcodec takes."""
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


def check_packages() -> Iterator[Finding]:
    """Whether the packages that vft depends on are installed in the versions that it asks for."""
    versions = {requirement: version_of(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements()}
    missing = [requirement for requirement, version in versions.items() if version == NOT_INSTALLED]
    wrong = [r for r, version in versions.items() if r not in missing and not is_in_range(r, version)]
    if len(missing) > MANY:
        setup = CHECKOUT / "tools" / "setup"
        fix = f"run {setup}" if setup.is_file() else "pip install PATH_TO_VFT"
        names = ", ".join(re.split(r"[^\w.-]", requirement)[0] for requirement in missing)
        yield Finding("error", "packages", f"{len(missing)} packages {NOT_INSTALLED} in {sys.executable}: {names}", fix)
        missing = []
    for requirement in (*missing, *wrong):
        name = re.split(r"[^\w.-]", requirement)[0]
        yield Finding("error", "packages", f"{name} {versions[requirement]}", f"pip install '{requirement}'")
    if not missing and not wrong and NOT_INSTALLED not in versions.values():
        yield Finding("ok", "packages", f"Python {sys.version.split()[0]}, all packages in their ranges")


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
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # it comes with packages that are missing then, which is an error of its own
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def check_torch() -> Iterator[Finding]:
    """Whether torch can be imported; in a new process, because a broken torch may crash it."""
    done = run_python("import torch; print(torch.__version__)")
    if done.returncode:
        yield Finding("error", "torch", last_line(done), f"pip install --force-reinstall '{tested_version('torch')}'")
    else:
        yield Finding("ok", "torch", done.stdout.strip())


def ffmpeg_versions() -> list[int]:
    """Versions of FFmpeg whose libraries the loader finds."""
    found = []
    for library, version in FFMPEG.items():
        for name in (f"libavcodec.so.{library}", f"libavcodec.{library}.dylib"):
            try:
                ctypes.CDLL(name)
            except OSError:
                continue
            found.append(version)
    return found


def check_decoding(versions: Callable[[], list[int]] = ffmpeg_versions) -> Iterator[Finding]:
    """Write a clip with PyAV, which brings its own FFmpeg, and decode it with torchcodec, which takes the system's."""
    with tempfile.TemporaryDirectory() as scratch:
        done = run_python(DECODE, f"{scratch}/clip.mp4")
    codec, torch = version_of("torchcodec"), version_of("torch")
    pinned = tested_version("torchcodec")
    if done.returncode == 0:
        known = ", ".join(map(str, versions())) or "of its own"
        yield Finding("ok", "decoding", f"torchcodec {codec} with torch {torch}, FFmpeg {known}")
    elif not versions():
        found = f"torchcodec {codec} finds no FFmpeg of version 4 to 8"
        fix = "install its shared libraries: apt-get install ffmpeg, or conda install ffmpeg"
        yield Finding("error", "decoding", found, fix)
    elif any(sign in done.stderr for sign in ("libtorchcodec", "undefined symbol", "ModuleNotFoundError")):
        found = f"torchcodec {codec} does not load beside torch {torch}: {last_line(done)}"
        yield Finding("error", "decoding", found, f"pip install '{pinned}', which goes with torch 2.11 and later")
    else:
        yield Finding("error", "decoding", last_line(done), f"pip install --force-reinstall '{pinned}'")


def tested_version(name: str) -> str:
    """The requirement that CI installs (constraints.txt of a checkout); else the range that vft asks for."""
    pins = CHECKOUT / "constraints.txt"
    lines = pins.read_text(encoding="utf-8").splitlines() if pins.is_file() else requirements()
    return next(line for line in lines if re.match(rf"{name}\b", line))
