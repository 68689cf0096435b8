"""GPUs, and a sum over two processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vft.cli.doctor_checks.finding import Finding, finish, last_line, start
from vft.models.attention import has_kernel, varlen_attn

GIB = 1 << 30
DRIVERS = {"/dev/kfd": "ROCm", "/dev/nvidia0": "CUDA"}
"""Device files that a GPU's driver makes."""
SUM = """
from vft.common.console import user_errors
from vft.distributed.process_group import process_group, together
with user_errors(), together(30, 60) as world, process_group(world):
    pass
"""


def devices(torch: Any) -> Iterator[Finding]:
    """GPUs that `torch` can use, and those that it can't."""
    hip, cuda = torch.version.hip, torch.version.cuda
    build = f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "CPU only"
    if not torch.cuda.is_available():
        yield _unused_gpu(build, "ROCm" if hip else "CUDA" if cuda else "")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found = f"{number}: {about.name}, {about.total_memory / GIB:.0f} GiB, {build}"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding("ok", "GPU", f"{found}, bf16")
        else:
            mend = 'train.precision = "fp32", or a GPU from 2020 on (Ampere, MI200)'
            yield Finding("warning", "GPU", f"{found}, bf16 is emulated and slow", mend)
    yield _attention(torch)


def _unused_gpu(build: str, wanted: str) -> Finding:
    """Why torch, built for `wanted`, has no GPU."""
    there = {node: kind for node, kind in DRIVERS.items() if Path(node).exists()}
    if not there:
        mend = (
            "install the driver, or give the container its GPUs (--gpus all)" if wanted else "fine for the demo alone"
        )
        return Finding("warning", "GPUs", f"none; torch is built for {build}", mend)
    node, kind = next(iter(there.items()))
    if not wanted:
        mend = f"install torch from pytorch.org's index for {kind}, then run tools/setup"
        return Finding("error", "GPUs", f"{node} is there, torch is built for CPUs only", mend)
    if wanted not in there.values():
        mend = f"install a torch for {kind}, then run tools/setup"
    elif wanted == "ROCm":
        mend = "add the user to the groups video and render, and see that rocminfo lists the GPU"
    else:
        mend = f"update the driver until nvidia-smi shows {build} or later, or install a torch for an older CUDA"
    return Finding("error", "GPUs", f"{node} is there, torch for {build} can't use it", mend)


def _attention(torch: Any) -> Finding:
    """One call of the kernel that packed rows take, if there is one."""
    if not has_kernel(torch.device("cuda"), torch.bfloat16) or varlen_attn is None:
        return Finding("warning", "attention", "no varlen kernel: SDPA in groups, slower", "torch 2.11 or later")
    try:
        rows = torch.ones(16, 2, 64, dtype=torch.bfloat16, device="cuda")
        ends = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
        torch.cuda.synchronize(varlen_attn(rows, rows, rows, ends, ends, 16, 16).device)
    except RuntimeError as error:
        mend = "install a torch built for this GPU; compute capability 8.0 (Ampere) or MI200 is the least"
        return Finding("error", "attention", f"the varlen kernel fails: {str(error).splitlines()[0]}", mend)
    return Finding("ok", "attention", "one varlen call a layer")


def round_trip(gpus: int) -> Iterator[Finding]:
    """Two processes of this host meet as those of a run do, and sum."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    hidden = {} if gpus >= 2 else {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    backend = "gloo" if gpus < 2 else "NCCL (RCCL on ROCm) and gloo"
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **address, **hidden} for rank in range(2)]
    started = [start(SUM, place) for place in places]
    texts = [finish(process) for process in started]
    if all(done.returncode == 0 for done in texts):
        yield Finding("ok", "two processes", f"a sum through {backend}")
        return
    failed = next(done for done in texts if done.returncode)
    names = "GLOO_SOCKET_IFNAME" if gpus < 2 else "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
    set_names = [f"{name}={os.environ[name]}" for name in names.split(" and ") if name in os.environ]
    mend = f"unset {', '.join(set_names)}, or name an interface of `ip address`" if set_names else f"set {names}"
    mend += "" if gpus < 2 else "; NCCL_DEBUG=INFO says more"
    yield Finding("error", "two processes", f"no sum through {backend}: {last_line(failed)}", mend)
