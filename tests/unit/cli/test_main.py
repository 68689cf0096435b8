"""The command `vft`: its help, misspelt names, and a Python without vft's packages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.main import run_main
from vft.cli import main

REPOSITORY = Path(__file__).parents[3]
BARE = (sys.executable, "-I", "-S")
"""This Python without any installed package."""


def run(*words: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package and the tools, without a .venv."""
    shutil.copytree(REPOSITORY / "vft", tmp_path / "vft", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tools").mkdir()
    for file in (*(REPOSITORY / "tools").glob("*.py"), REPOSITORY / "tools" / "setup", REPOSITORY / "pyproject.toml"):
        shutil.copy(file, tmp_path / file.relative_to(REPOSITORY))
    shutil.copy(REPOSITORY / "constraints.txt", tmp_path)
    return tmp_path


def fake_venv(checkout: Path, script: str) -> None:
    """A .venv whose Python is a shell script."""
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


@pytest.mark.parametrize(
    "words", [("-m", "vft.recipes.caption", "run.toml"), ("-m", "vft.cli.main", "predict", "a.mp4")]
)
def test_ctrl_c_during_the_imports_is_quiet(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as it is in a shell's background
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)
    signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_help_lists_every_command_and_imports_no_torch() -> None:
    code = "import sys; from vft.cli.main import usage; print(usage()); print('torch' in sys.modules)"
    done = run(sys.executable, "-c", code)
    *lines, torch_is_imported = done.stdout.splitlines()
    assert torch_is_imported == "False"
    for name, (module, _) in main.COMMANDS.items():
        assert any(line.startswith(f"  {name} ") for line in lines)
        assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file()


def test_every_command_is_a_tool_too() -> None:
    """Except those that are new with `vft`."""
    tools = "".join(file.read_text() for file in (REPOSITORY / "tools").glob("*.py"))
    assert [name for name in main.COMMANDS if f'run_tool("{name}")' not in tools] == ["train", "new"]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["evalute"], 2, "did you mean `vft evaluate`?"),
        (["zzz"], 2, "vft has no command 'zzz': `vft --help` lists all of them"),
        (["--version"], 0, ""),
        ([], 2, ""),
    ],
)
def test_names(words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_main(main.main, capsys, *words)
    assert done.status == status and message in done.stderr


def test_usage_lines_have_the_name_that_was_called() -> None:
    for words, name in (
        ((sys.executable, "-m", "vft.cli.main", "download"), "vft download"),
        ((sys.executable, "tools/download.py"), "python tools/download.py"),
    ):
        done = run(*words, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: {name} "), done.stdout + done.stderr


@pytest.mark.parametrize("words", [["--help"], ["download", "--help"]])
def test_help_ends_in_silence_when_its_reader_has_gone(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vft.cli.main", *words]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert done.stderr == b""


def test_without_packages_the_checkouts_venv_runs_the_command(checkout: Path) -> None:
    fake_venv(checkout, 'echo "in the venv: $@"')
    script = checkout / "tools" / "predict.py"
    done = run(*BARE, script, "--model", "my model", "clip.mp4")
    assert done.stdout == f"in the venv: {script} --model my model clip.mp4\n" and not done.stderr


def test_without_packages_or_venv_there_is_one_line(checkout: Path) -> None:
    done = run(*BARE, checkout / "tools" / "predict.py", "--model", "m", "clip.mp4")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and f"Run {checkout / 'tools' / 'setup'} once" in line and "lacks the package" in line


def test_scripts_of_the_tools_hand_over_as_commands_do(tmp_path: Path) -> None:
    """All of them: in a checkout whose .venv is another Python, and with one line if there is none."""
    names = [file for file in sorted(REPOSITORY.glob("tools/*/*.py")) if "__main__" in file.read_text()]
    assert len(names) >= 20
    for file in names:
        assert "import in_venv" in file.read_text(), file
    checkout = tmp_path / "vft"
    shutil.copytree(REPOSITORY / "vft/common", checkout / "vft/common")
    shutil.copytree(REPOSITORY / "tools", checkout / "tools", symlinks=True, ignore=shutil.ignore_patterns("base"))
    (checkout / "vft/__init__.py").touch()
    bare = (sys.executable, "-E", "-S")  # -I would leave out the script's own folder
    for name in ("bench/step.py", "convert/vist.py", "demo_world/make_data.py"):
        (line,) = run(*bare, checkout / "tools" / name).stderr.splitlines()
        assert "lacks the package 'torch'" in line
    fake_venv(checkout, 'echo "in the venv: $@"')
    script = checkout / "tools/convert/vist.py"
    assert run(*bare, script, "--help").stdout == f"in the venv: {script} --help\n"


def test_a_recipe_without_packages_is_one_line_too(checkout: Path) -> None:
    bare = (sys.executable, "-E", "-S", "-m", "vft.recipes.caption", "run.toml")
    (line,) = run(*bare, cwd=checkout).stderr.splitlines()
    assert "lacks the package 'torch'" in line
    fake_venv(checkout, 'echo "in the venv: $@"')
    assert run(*bare, cwd=checkout).stdout == "in the venv: -E -S -m vft.recipes.caption run.toml\n"


def test_a_venv_without_packages_does_not_start_itself_again(checkout: Path) -> None:
    fake_venv(checkout, f'exec {sys.executable} -I -S "$@"')
    done = run(*BARE, checkout / "tools" / "plan.py", "--help")
    assert done.returncode == 2 and "lacks the package" in done.stderr


def test_doctor_needs_no_packages(checkout: Path) -> None:
    done = run(*BARE, checkout / "tools" / "doctor.py", "--json")
    assert done.returncode == 1 and not done.stderr
    packages = json.loads(done.stdout)[0]
    assert "packages not installed" in packages["found"] and "torchcodec" in packages["found"]
    assert packages["fix"] == f"run {checkout / 'tools' / 'setup'}"
    shown = run(*BARE, checkout / "tools" / "doctor.py")
    assert shown.returncode == 1 and f"fix: {packages['fix']}" in shown.stdout
