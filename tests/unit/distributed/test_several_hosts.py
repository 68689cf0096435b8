"""The Slurm script and the page on several hosts: commands that parse, settings that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from pydantic import BaseModel

import vft.data.formats  # noqa: F401  checks the sources
from vft.config import run as config
from vft.config.run import Config

ROOT = Path(__file__).parents[3]
SCRIPT, PAGE = ROOT / "recipes" / "slurm.sh", ROOT / "docs" / "use" / "several_hosts.md"


def test_bash_reads_the_script() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_script_starts_what_it_says(tmp_path: Path) -> None:
    """Run with stand-ins for Slurm's commands; what would have been started is looked at."""
    for name, body in {"scontrol": "printf 'node7\\nnode8\\n'", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    slurm |= {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[7-8]", "USER": "me"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **slurm}
    recipe = str(ROOT / "recipes/qwen2_5_vl_72b/caption.toml")
    done = subprocess.run(
        ["bash", str(SCRIPT), recipe, "seed=3"], env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.split()
    assert words[words.index("torchrun") :][:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "4"]
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:29500"
    assert words[words.index("--rdzv-id") + 1] == "17"
    assert words[words.index("-m") + 1] == "vft.recipes.caption"
    at = words.index(recipe)
    loaded = config.load(Path(recipe), words[at + 1 :])  # an unknown key, or a wrong value, would be an error
    assert (loaded.seed, loaded.parallel.silence_s, loaded.parallel.timeout_s) == (3, 60, 600)


def test_only_options_that_slurm_has() -> None:
    known = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task mem time signal requeue open-mode output"
    known += " exclusive"
    options = re.findall(r"^#SBATCH --([a-z-]+)", SCRIPT.read_text(), re.MULTILINE)
    assert len(options) >= 10 and set(options) <= set(known.split())


@pytest.mark.parametrize("path", [SCRIPT, PAGE], ids=lambda path: path.name)
def test_settings_that_are_named_exist(path: Path) -> None:
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    named = set(re.findall(r"\b(model|data|train|parallel|checkpoint|eval|log)\.([a-z_]+)\b", path.read_text()))
    assert len(named) >= 3
    for section, key in named:
        kind = sections[section]
        assert isinstance(kind, type) and issubclass(kind, BaseModel)
        assert key in kind.model_fields, f"{section}.{key}"
