#!/usr/bin/env python
"""Frames a second of the whole data path: python tools/bench/data.py [--clips FOLDER] [--output FILE]

Ways to the same frames of the same clips, in equally many processes on equally many CPU cores, taken in turns:

  vft        records, index, documents, decoding, resizing, patches, collating: `Loader` and `WorkerPool`
             as in training, the training process on the same cores as its workers
  torchcodec VideoDecoder(num_ffmpeg_threads=1).get_frames_at of the same indices; the frames are thrown away
  patches    what a worker of vft does with a clip, without the rest of the data path
  cached     the same with `data.cache = "frames"`, once the cache holds the clips
  processor  qwen-vl-utils' fetch_video and one call of transformers' Qwen2.5-VL processor a sample, also thrown away;
             left out if qwen_vl_utils or torchvision cannot be imported

The clips are in the file cache: they are indexed and decoded once before. Only frames that the model gets are counted,
not those in between that a decoder has to go through. CPU seconds are those of all processes of a side together; on a
busy machine they are more reliable than the clock.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import in_venv  # noqa: F401
import torch
from data_sides import decode_bare, decode_to_patches, fetch_and_process, read_cache, start_on
from measure import benchmark, report
from workload import DEMO_BASE, FPS, write_clips, write_records

from vft.common.errors import UserError
from vft.common.types import MediaPlan
from vft.config.data import DataConfig, SourceConfig, VideoConfig
from vft.config.run import ModelConfig
from vft.data.dataset import Dataset, load_dataset
from vft.data.loader import Loader
from vft.data.media.errors import MediaError
from vft.data.media.video import scan_file
from vft.data.records.paths import VIDEO_SUFFIXES
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel
from vft.preparation.run import open_for_inference
from vft.recipes.caption import Caption

DEADLINE_S = 600.0


@dataclass(frozen=True)
class Case:
    """Clips of one size, sampled at one rate."""

    name: str
    documents: Dataset
    plans: tuple[MediaPlan, ...]
    """One for each sample."""

    @property
    def frames(self) -> int:
        """Number of frames that the model gets, of all samples."""
        return sum(len(plan.frame_indices) for plan in self.plans)


@dataclass
class Side:
    """One way to the frames, and the times of its runs."""

    name: str
    run: Callable[[], int]
    """Goes through all samples once and returns the number of frames."""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def take(self, frames: int) -> None:
        """One timed run."""
        cpu_s, since = all_cpu_seconds(), time.perf_counter()
        found = self.run()
        self.seconds.append(time.perf_counter() - since)
        self.cpu_seconds.append(all_cpu_seconds() - cpu_s)
        assert found == frames, (self.name, found, frames)


def main() -> None:
    """Command line."""
    with benchmark(__doc__, add_arguments) as (options, folder):
        available = len(os.sched_getaffinity(0))
        for cores in options.cores:
            if cores > available:
                raise UserError(f"--cores {cores}: must be from 1 to {available}, which this process may use")
        if options.clips is not None and not options.clips.is_dir():
            raise UserError(f"--clips {str(options.clips)!r}: no such folder")
        compare(options, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--clips", type=Path, help="folder of videos; without it H.264 clips are made")
    parser.add_argument(
        "--sizes", nargs="+", default=["640x360", "1280x720"], help="width x height of made clips, pixels"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help=f"length of made clips, at {FPS:g} fps (8)")
    parser.add_argument("--count", type=int, default=2, help="made clips of each size (2)")
    parser.add_argument("--samples", type=int, default=16, help="samples of each size, round the clips (16)")
    parser.add_argument("--fps", type=float, nargs="+", default=[2.0, 8.0], help="frames sampled a second (2 8)")
    parser.add_argument("--max-frames", type=int, default=64, help="frames sampled of a clip, at most (64)")
    parser.add_argument("--max-pixels", type=int, default=128 * 28 * 28, help="height x width after resizing (100352)")
    available = len(os.sched_getaffinity(0))
    cores = sorted({1, min(available, 8)})
    parser.add_argument("--cores", type=int, nargs="+", default=cores, help=f"CPU cores, each with a worker ({cores})")
    parser.add_argument("--without-processor", action="store_true", help="leave out the usual processor, which is slow")


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Time all sides on all cases and report."""
    torch.set_num_threads(1)
    everywhere = os.sched_getaffinity(0)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for case in list(cases(options, folder)):
        for count in options.cores:
            cores = sorted(everywhere)[:count]
            os.sched_setaffinity(0, cores)  # before the pools, whose threads and workers inherit it
            try:
                with sides_of(case, cores, folder / "frames", not options.without_processor, notes) as sides:
                    for side in sides * options.repeats:
                        side.take(case.frames)
                    rows += table(case, count, sides)
            finally:
                os.sched_setaffinity(0, everywhere)
            print(f"{case.name}, {count} core(s): done", file=sys.stderr)
    for note in dict.fromkeys(notes):
        rows.append({"clips": "left out", "side": note})
    report("Delivered frames", rows, options)


def table(case: Case, cores: int, sides: Sequence[Side]) -> list[dict[str, Any]]:
    """A line for each side, medians over its runs; the ratios are to bare decoding."""
    bare = next(side for side in sides if side.name == "torchcodec")
    return [
        {
            "clips": case.name,
            "cores": cores,
            "side": side.name,
            "frames/s": case.frames / median(side.seconds),
            "of bare": median(bare.seconds) / median(side.seconds),
            "samples/s": len(case.plans) / median(side.seconds),
            "frames/CPU s": case.frames / median(side.cpu_seconds),
            "of bare, CPU": median(bare.cpu_seconds) / median(side.cpu_seconds),
            "frames": case.frames,
            "seconds": f"{min(side.seconds):.3g} to {max(side.seconds):.3g}",
        }
        for side in sides
    ]


# ----------------------------------------------------------------------------------------------------------- cases


def cases(options: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """Every size at every rate."""
    encoder = open_for_inference(ModelConfig(path=str(DEMO_BASE)), None, torch.float32).encoder(DataConfig())
    root = options.clips or folder
    for size, clips in clips_by_size(options, folder).items():
        questions = -(-options.samples // len(clips))
        records = write_records(folder / f"{size}.json", clips[: options.samples], questions, root=root)
        for rate in options.fps:
            config = DataConfig(
                root=root,
                sources=(SourceConfig(format="llava_video", path=str(records)),),
                share_videos=False,  # a sample is a clip decoded
                workers=0,
                cache_dir=str(folder / "cache"),
                decode_timeout_s=DEADLINE_S,
                video=VideoConfig(fps=rate, max_frames=options.max_frames, max_pixels=options.max_pixels),
            )
            documents = load_dataset(config, config.sources, Caption().conversations, encoder, seed=0)
            plans = [plan for number in range(len(documents.documents)) for plan in documents.build(number).media]
            yield Case(f"{size}, {rate:g} fps", documents, tuple(plans))


def clips_by_size(options: argparse.Namespace, folder: Path) -> dict[str, list[Path]]:
    """Clips by `width x height`: made ones, or those of a folder."""
    if options.clips is None:
        return {size: made_clips(options, folder, size) for size in options.sizes}
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in options.clips.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES):
        try:
            info = scan_file("video", path)
        except MediaError as error:
            raise UserError(f"--clips: {error}") from error
        found.setdefault(f"{info.width}x{info.height}", []).append(path)
    if not found:
        raise UserError(f"--clips {str(options.clips)!r}: no videos there ({', '.join(sorted(VIDEO_SUFFIXES))})")
    return found


def made_clips(options: argparse.Namespace, folder: Path, size: str) -> list[Path]:
    """Clips of the size `--sizes`."""
    width, _, height = size.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) > 1 and int(height) > 1):
        raise UserError(f"--sizes {size}: must be WIDTHxHEIGHT in pixels, as 640x360")
    print(f"making {options.count} clips of {size}", file=sys.stderr)
    frames = max(2, round(options.seconds * FPS))
    return write_clips(folder / size, options.count, int(height), int(width), frames)


# ----------------------------------------------------------------------------------------------------------- sides


@contextmanager
def sides_of(case: Case, cores: Sequence[int], cache: Path, processor: bool, notes: list[str]) -> Iterator[list[Side]]:
    """The sides, started and warmed up. A side that cannot run is explained in `notes`."""
    spec = case.documents.encoder.processor
    tasks: dict[str, Callable[[MediaPlan], int]] = {
        "torchcodec": decode_bare,
        "patches": partial(decode_to_patches, processor=spec),
        "cached": partial(read_cache, processor=spec, folder=cache),
        **({"processor": partial(fetch_and_process, base=DEMO_BASE)} if processor else {}),
    }
    with ExitStack() as stack:
        sides = []
        for name, task in {"vft": None, **tasks}.items():
            pool = stack.enter_context(WorkerPool(len(cores), DEADLINE_S, partial(start_on, cores)))
            side = Side(name, partial(run_task, case, pool, task) if task else partial(run_vft, case, pool))
            try:
                side.run()
                sides.append(side)
            except (ImportError, RuntimeError, ValueError) as error:
                if name != "processor":
                    raise
                notes.append(f"processor, {case.name}: {str(error).splitlines()[0]}")
        yield sides


def run_vft(case: Case, pool: WorkerPool) -> int:
    """An epoch of the data path."""
    plan = case.documents.pack_plan(seed=0)
    loader = Loader(case.documents, plan, pool, DataParallel(), 1, case.documents.config.prefetch_packs, last_epoch=0)
    frames, steps = 0, len(plan.packs(0))
    for step in range(steps):
        for pack in loader.step(is_last=step == steps - 1):
            frames += sum(len(medium.frame_indices) for one in pack.batch.documents for medium in one.media)
    if bad := loader.bad.report.bad:
        raise UserError(f"{len(bad)} clips can't be decoded: {bad[0].message}")
    return frames


def run_task(case: Case, pool: WorkerPool, task: Callable[[MediaPlan], int]) -> int:
    """The same frames another way."""
    return sum(future.result() for future in [pool.submit(task, plan) for plan in case.plans])


def all_cpu_seconds() -> float:
    """CPU seconds of this process and all workers, with their threads. Those of the other sides are idle meanwhile."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
