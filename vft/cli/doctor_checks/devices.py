"""Checks of GPUs, and of a sum over two processes."""

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
"""Device files that the drivers of GPUs create."""
SUM = """
from vft.common.console import user_errors
from vft.distributed.process_group import process_group, together
with user_errors(), together(30, 60) as world, process_group(world):
    pass
"""


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
            yield Finding("ok", "GPU", f"{found}, bf16")
        else:
            fix = 'train.precision = "fp32", or a GPU from 2020 on (Ampere, MI200)'
            yield Finding("warning", "GPU", f"{found}, bf16 is emulated and slow", fix)
    yield _check_attention(torch)


def _explain_no_gpu(build: str, platform: str) -> Finding:
    """Why torch, built for `platform` (empty: for CPUs only), has no GPU."""
    drivers = {node: kind for node, kind in DRIVERS.items() if Path(node).exists()}
    if not drivers:
        fix = "install the driver, or give the container its GPUs (--gpus all)"
        return Finding(
            "warning", "GPUs", f"none; torch is built for {build}", fix if platform else "enough for the demo"
        )
    node, kind = next(iter(drivers.items()))
    if not platform:
        fix = f"install torch from pytorch.org's index for {kind}, then run tools/setup"
        return Finding("error", "GPUs", f"{node} exists, but torch is built for CPUs only", fix)
    if platform not in drivers.values():
        fix = f"install a torch for {kind}, then run tools/setup"
    elif platform == "ROCm":
        fix = "add the user to the groups video and render, and check that rocminfo lists the GPU"
    else:
        fix = f"update the driver until nvidia-smi shows {build} or later, or install a torch for an older CUDA"
    return Finding("error", "GPUs", f"{node} exists, but torch for {build} can't use it", fix)


def _check_attention(torch: Any) -> Finding:
    """One call of the attention kernel for packed rows, if this torch has it."""
    if not has_kernel(torch.device("cuda"), torch.bfloat16) or varlen_attn is None:
        return Finding("warning", "attention", "no varlen kernel: SDPA in groups, slower", "torch 2.11 or later")
    try:
        rows = torch.ones(16, 2, 64, dtype=torch.bfloat16, device="cuda")
        ends = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
        torch.cuda.synchronize(varlen_attn(rows, rows, rows, ends, ends, 16, 16).device)
    except RuntimeError as error:
        fix = "install a torch built for this GPU, which must be of compute capability 8.0 (Ampere), MI200, or newer"
        return Finding("error", "attention", f"the varlen kernel fails: {str(error).splitlines()[0]}", fix)
    return Finding("ok", "attention", "one varlen call a layer")


def check_two_processes(gpus: int) -> Iterator[Finding]:
    """Let two processes of this host form a group as those of a run do, and sum a tensor."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    hidden = {} if gpus >= 2 else {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    backend = "gloo" if gpus < 2 else "NCCL (RCCL on ROCm) and gloo"
    environments = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **address, **hidden} for rank in range(2)]
    processes = [start(SUM, environment) for environment in environments]
    results = [finish(process) for process in processes]
    failed = [result for result in results if result.returncode]
    if not failed:
        yield Finding("ok", "two processes", f"a sum through {backend}")
        return
    names = ["GLOO_SOCKET_IFNAME"] if gpus < 2 else ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"]
    set_names = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    if set_names:
        fix = f"unset {', '.join(set_names)}, or name an interface of `ip address`"
    else:
        fix = f"set {' and '.join(names)}"
    fix += "" if gpus < 2 else "; NCCL_DEBUG=INFO says more"
    yield Finding("error", "two processes", f"no sum through {backend}: {last_line(failed[0])}", fix)
