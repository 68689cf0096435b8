"""Packages, and whether videos can be decoded. Nothing here imports torch: it may be what is broken."""

from __future__ import annotations

import ctypes
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from vft.cli.doctor_checks.finding import Finding, last_line, run_python

REPOSITORY = Path(__file__).resolve().parents[3]
FFMPEG = {58: 4, 59: 5, 60: 6, 61: 7, 62: 8}
"""Version of FFmpeg by that of its libavcodec; those that torchcodec takes."""
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


def packages() -> Iterator[Finding]:
    """Versions against the ranges that the project asks for."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wrong = 0
    for requirement in map(Requirement, project["dependencies"]):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        if version == "not installed" or not requirement.specifier.contains(version, prereleases=True):
            wrong += 1
            yield Finding("error", "packages", f"{requirement.name} {version}", f"pip install '{requirement}'")
    if not wrong:
        yield Finding("ok", "packages", f"Python {sys.version.split()[0]}, all in their ranges")


def torch_loads() -> Iterator[Finding]:
    """Whether torch can be imported; in a process of its own, since a broken one may take ours along."""
    done = run_python("import torch; print(torch.__version__)")
    if done.returncode:
        yield Finding("error", "torch", last_line(done), f"pip install --force-reinstall '{_pinned('torch')}'")
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


def decoding(versions: Callable[[], list[int]] = ffmpeg_versions) -> Iterator[Finding]:
    """Write a clip with PyAV, which brings its own FFmpeg, and decode it with torchcodec, which takes the system's."""
    with tempfile.TemporaryDirectory() as scratch:
        done = run_python(DECODE, f"{scratch}/clip.mp4")
    codec = metadata.version("torchcodec") if _is_installed("torchcodec") else "not installed"
    torch = metadata.version("torch")
    if done.returncode == 0:
        known = ", ".join(map(str, versions())) or "of its own"
        yield Finding("ok", "decoding", f"torchcodec {codec} with torch {torch}, FFmpeg {known}")
    elif not versions():
        yield Finding(
            "error",
            "decoding",
            f"torchcodec {codec} finds no FFmpeg of version 4 to 8",
            "install its shared libraries: apt-get install ffmpeg, or conda install ffmpeg",
        )
    elif any(sign in done.stderr for sign in ("libtorchcodec", "undefined symbol", "ModuleNotFoundError")):
        yield Finding(
            "error",
            "decoding",
            f"torchcodec {codec} doesn't load beside torch {torch}: {last_line(done)}",
            f"pip install '{_pinned('torchcodec')}', which goes with torch 2.11 and later",
        )
    else:
        yield Finding("error", "decoding", last_line(done), f"pip install --force-reinstall '{_pinned('torchcodec')}'")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _pinned(name: str) -> str:
    """The requirement with which CI runs."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))
