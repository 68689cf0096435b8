"""tools/doctor.py: set-ups that are broken on purpose, each named with its fix."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.runs.fixtures import world as world
from tests.runs.world import World
from vft.cli import doctor

REPOSITORY = Path(__file__).parents[3]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "tools/doctor.py", *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_ENDPOINT", "GLOO_SOCKET_IFNAME")}
    places = f"{environment.pop('FIRST', '')}:{REPOSITORY}"
    given = {**kept, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": places.strip(":"), **environment}
    return subprocess.run(words, cwd=REPOSITORY, env=given, capture_output=True, text=True, timeout=300)


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """The report by what was looked at."""
    return {one["what"]: one for one in json.loads(done.stdout)}


def the_only(found: Any) -> Any:
    (one,) = found
    return one


@pytest.fixture(scope="module")
def config(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that is in order."""
    return world.config(tmp_path_factory.mktemp("doctor") / "run.toml")


def test_a_machine_in_order(config: Path, tmp_path: Path) -> None:
    done = run(config, "--json", VFT_CACHE=str(tmp_path))
    found = findings(done)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {"packages", "torch", "decoding", "GPUs", "two processes", "shared memory", "cache folder"}
    expected |= {"output folder", "processors", "open files", "hub", "model", "data"}
    assert set(found) == expected
    assert all(one["fix"] for one in found.values() if one["status"] != "ok")
    for what in expected - {"GPUs", "processors", "cache folder", "output folder"}:  # those hang on the machine
        assert found[what]["status"] == "ok", found[what]
    assert not list(tmp_path.iterdir())  # what it tried to write is gone


def test_much_that_is_broken_at_once(world: World, tmp_path: Path) -> None:
    """A torchcodec that doesn't load, no network for gloo, a cache that can't be written, no hub, model or data."""
    fake = tmp_path / "fake" / "torchcodec"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec: undefined symbol: _ZN3c10')\n")
    changed = {"model": {"path": "nobody/nothing"}, "data": {"root": str(tmp_path / "none")}}
    broken = world.config(tmp_path / "run.toml", changed)
    done = run(
        broken,
        "--json",
        FIRST=str(fake.parent),
        GLOO_SOCKET_IFNAME="nosuch0",
        VFT_CACHE="/dev/null/cache",
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "hub"),
    )
    assert done.returncode == 1, done.stderr
    found = findings(done)
    pinned = next(line for line in (REPOSITORY / "constraints.txt").read_text().split() if "torchcodec" in line)
    for what, said, fix in (
        ("decoding", "undefined symbol", f"pip install '{pinned}'"),
        ("two processes", "nosuch0", "GLOO_SOCKET_IFNAME=nosuch0"),
        ("cache folder", "/dev/null/cache: cannot be written", "VFT_CACHE"),
        ("model", "nobody/nothing: neither a folder nor in the hub's cache", "hf download nobody/nothing"),
        ("data", f"{tmp_path / 'none'}", "data.root=DIR"),
    ):
        assert found[what]["status"] == "error" and said in found[what]["found"], found[what]
        assert fix in found[what]["fix"] and found[what]["mend"] == found[what]["fix"], found[what]
    assert found["hub"]["status"] == "warning" and "does not answer" in found["hub"]["found"]
    assert "HTTPS_PROXY" in found["hub"]["fix"]


def test_a_configuration_that_is_wrong(tmp_path: Path) -> None:
    done = run(tmp_path / "none.toml")
    assert done.returncode == 2
    assert the_only(done.stderr.splitlines()).startswith("error: ")


def test_no_ffmpeg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    one = doctor.check_decoding(lambda: [])
    assert one.status == "error" and "no FFmpeg of version 4 to 8" in one.found and "apt-get install ffmpeg" in one.fix


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.6.0" if name == "torch" else version(name))
    one = the_only(doctor.check_packages())
    assert (one.status, one.found) == ("error", "torch 2.6.0") and one.fix.startswith("pip install 'torch>=2.11")


@pytest.mark.parametrize(
    ("free_gib", "status"), [(0.5, "error"), (10, "warning"), (100, "ok")], ids=["none", "little", "enough"]
)
def test_disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_gib: float, status: str) -> None:
    free = int(free_gib * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert doctor.check_folder("output folder", tmp_path / "not" / "yet", "name another").status == status
    assert doctor.check_shared_memory(tmp_path, free + 1).status == "error"
    assert doctor.check_shared_memory(tmp_path, free).status == "ok"


def test_shared_memory_that_workers_need() -> None:
    from vft.config.data import DataConfig
    from vft.data.loader import MAX_PENDING_BYTES

    assert doctor.MAX_PENDING_BYTES == MAX_PENDING_BYTES
    few = DataConfig(pack_tokens=1000, prefetch_packs=2)
    assert doctor.max_pending_bytes(few) == 2 * 1000 * 28 * 28 * 3 * 2  # a token is 28 x 28 pixels of two RGB frames
    assert doctor.max_pending_bytes(few.model_copy(update={"workers": 0})) == 0
    assert doctor.max_pending_bytes(few.model_copy(update={"pack_tokens": 10**7})) == 2 << 30


def torch_with(hip: str | None, cuda: str | None, gpus: int, bf16: bool = True) -> Any:
    """A torch as that build would look on such a machine, its attention left out."""
    about = SimpleNamespace(name="AMD Instinct MI300X" if hip else "Tesla V100", total_memory=192 << 30)
    return SimpleNamespace(
        version=SimpleNamespace(hip=hip, cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            get_device_properties=lambda number: about,
            is_bf16_supported=lambda including_emulation: bf16,
        ),
    )


def test_a_hip_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for check in ("_check_attention", "_check_recurrence"):
        monkeypatch.setattr(doctor, check, lambda torch: doctor.Finding("its kernels", ""))
    found = list(doctor.check_gpus(torch_with("7.0.2", None, 2)))
    assert [one.status for one in found] == ["ok"] * 4
    assert found[1].found == "1: AMD Instinct MI300X, 192 GiB, ROCm 7.0.2, bf16"
    (kfd := tmp_path / "kfd").touch()
    monkeypatch.setattr(doctor, "DRIVERS", {str(kfd): "ROCm"})
    one = the_only(doctor.check_gpus(torch_with("7.0.2", None, 0)))
    assert one.status == "error" and "ROCm 7.0.2 can't use it" in one.found and "video and render" in one.fix


def test_a_gpu_that_this_build_can_not_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (kfd := tmp_path / "kfd").touch()
    (nvidia := tmp_path / "nvidia0").touch()
    for build, node, said, fix in (
        ((None, None), nvidia, "torch for CPU only can't use it", "pytorch.org's index for CUDA"),
        ((None, None), kfd, "torch for CPU only can't use it", "pytorch.org's index for ROCm"),
        ((None, "12.8"), nvidia, "CUDA 12.8 can't use it", "update the driver"),
        ((None, "12.8"), kfd, "CUDA 12.8 can't use it", "install a torch for ROCm"),
        (("7.0", None), nvidia, "ROCm 7.0 can't use it", "install a torch for CUDA"),
    ):
        monkeypatch.setattr(doctor, "DRIVERS", {str(node): "ROCm" if node is kfd else "CUDA"})
        one = the_only(doctor.check_gpus(torch_with(*build, gpus=0)))
        assert one.status == "error" and said in one.found and fix in one.fix, one
    monkeypatch.setattr(doctor, "DRIVERS", {str(tmp_path / "none"): "CUDA"})
    one = the_only(doctor.check_gpus(torch_with(None, "12.8", 0)))
    assert one.status == "warning" and "--gpus all" in one.fix
    one = the_only(doctor.check_gpus(torch_with(None, None, 0)))
    assert one.status == "ok" and "enough for the demo" in one.found and not one.fix


def test_a_gpu_without_bf16() -> None:
    one = next(doctor.check_gpus(torch_with(None, "12.8", 1, bf16=False)))
    assert one.status == "warning" and "emulated" in one.found and 'train.precision = "fp32"' in one.fix


def test_threads_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", str(count + 1))
    one = doctor.check_processors(1)
    assert one.status == "warning" and one.fix.endswith("OMP_NUM_THREADS=" + one.fix.rpartition("=")[2])
    assert 1 <= int(one.fix.rpartition("=")[2]) <= count
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert doctor.check_processors(1).status == "ok"
    assert doctor.check_open_files(1024).status == "error"
    assert doctor.check_open_files(resource.RLIM_INFINITY).status == "ok"


def test_recurrent_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are not installed are no fault; those that do not work are warned of."""
    import torch

    from vft.models import delta_rule

    def wrong(*what: Any) -> bool:
        warnings.warn("fla's gated delta rule can't run (no such kernel): recurrent layers ...", stacklevel=2)
        return False

    for tried, status, said in (
        (lambda *what: True, "ok", "fla's kernels"),
        (lambda *what: False, "ok", "the plain form"),
        (wrong, "warning", "no such kernel"),
    ):
        monkeypatch.setattr(delta_rule, "has_fla", tried)
        found = doctor._check_recurrence(torch)
        assert found.status == status and said in found.found
