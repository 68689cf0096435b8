"""What a step's line of `metrics.jsonl` holds, and how it is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from vft.common.device_specs import peak_flops
from vft.common.types import Batch
from vft.distributed.process_group import World
from vft.models.flops import Flops

COUNTED = ("num_targets", "tokens", "samples", "frames", "patches", "flops", "hardware_flops", "digest")
"""Summed over the packs and processes of a step."""


class Tally:
    """Counts of this process's packs of one step."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTED, 0)
        self.sample_ids: list[str] = []

    def add(self, batch: Batch, flops: Flops, digest: int) -> None:
        """Count one pack."""
        self.sample_ids += batch.sample_ids
        for name, count in {
            "num_targets": batch.num_targets,
            "tokens": batch.num_tokens,
            "samples": len(batch.sample_ids),
            "frames": sum(len(media.frame_indices) for document in batch.documents for media in document.media),
            "patches": batch.pixels_PD.shape[0],
            "flops": int(flops.model),
            "hardware_flops": int(flops.hardware),
            "digest": digest,
        }.items():
            self.counts[name] += count


class Stopwatch:
    """Seconds of a step, and how many of them went by waiting for data."""

    def __init__(self) -> None:
        self.begin_s = time.perf_counter()
        self.waited_s = 0.0

    def waiting(self, since_s: float) -> None:
        """Count the time from `since_s` (of `time.perf_counter`) until now as waiting."""
        self.waited_s += time.perf_counter() - since_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self.begin_s


def describe_step(
    loss: float, grad_norm: float, rate: float, counts: Mapping[str, int], watch: Stopwatch, world: World
) -> dict[str, Any]:
    """The line of a step in metrics.jsonl, without its number and epoch.

    `loss` is the mean over the supervised tokens, `grad_norm` that before clipping, `rate` the learning rate; `counts`
    are of all processes.
    """
    seconds, peak, processes = watch.elapsed_s, peak_flops(world.device), world.size
    return {
        "loss": finite(loss) if counts["num_targets"] else None,
        "num_targets": counts["num_targets"],
        "tokens": counts["tokens"],
        "samples": counts["samples"],
        "grad_norm": finite(grad_norm),
        "lr": rate,
        "step_time_s": seconds,
        "data_wait_s": watch.waited_s,
        "tokens_per_s": counts["tokens"] / seconds,
        "samples_per_s": counts["samples"] / seconds,
        "frames_per_s": counts["frames"] / seconds,
        "tflops": counts["flops"] / seconds / processes / 1e12,
        "mfu": None if peak is None else counts["flops"] / seconds / peak / processes,
        "hfu": None if peak is None else counts["hardware_flops"] / seconds / peak / processes,
        "peak_memory_bytes": peak_memory_bytes(world.device),
        "sample_digest": f"{counts['digest']:x}",
    }


def finite(value: float) -> float | None:
    """`value`, or None if it is infinite or not a number: JSON has no such numbers."""
    return value if math.isfinite(value) else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: by torch on a GPU; on a CPU by the whole process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
