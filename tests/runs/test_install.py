"""A wheel of the package: what it holds, and its commands far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.runs.commands import REPOSITORY

RECIPE = "recipes/qwen2_5_vl_7b/caption.toml"


def run(*words: object, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(path or "")}
    return subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the package, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY / "vft", folder / "source" / "vft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder / "source")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q")
    done = run(*pip, "-w", folder, folder / "source", cwd=folder)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "vft").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if ".dist-info/" not in name} == files


@pytest.mark.slow
def test_its_commands_run_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """Installed into an empty folder, from a folder without a checkout."""
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", target)
    assert run(*pip, wheel, cwd=tmp_path).returncode == 0
    shutil.copy(REPOSITORY / RECIPE, tmp_path / "run.toml")
    for words, output in (
        (("--help",), "usage: vft COMMAND"),
        (("plan", "run.toml", "--gpus", "8", "--gpu-memory-gib", "80"), "fits"),
        (("doctor",), "all packages in their ranges"),
    ):
        done = run(target / "bin" / "vft", *words, cwd=tmp_path, path=target)
        assert output in done.stdout and "Traceback" not in done.stderr, done.stdout + done.stderr
    where = run(sys.executable, "-c", "import vft; print(vft.__file__)", cwd=tmp_path, path=target)
    assert where.stdout.strip() == str(target / "vft" / "__init__.py")
