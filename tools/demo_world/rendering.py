"""Clips and pictures of the world as files: H.264 and JPEG, spread over processes."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import world

from vft.common.console import progress_bar


@dataclass(frozen=True, slots=True)
class Job:
    """One file to make: its path, its scenes and the seed of its randomness. A `.jpg` is one frame of the clip."""

    path: Path
    scenes: tuple[world.Scene, ...]
    seed: tuple[int, int]


def render(job: Job) -> None:
    """Render and encode one file."""
    # Imported here, because the parent process needs neither.
    import torch
    from torchcodec.encoders import VideoEncoder

    torch.set_num_threads(1)
    frames_TCHW = world.render_clip(job.scenes, job.seed)
    if job.path.suffix == ".jpg":
        from PIL import Image

        # A frame that the clip's seed chooses, so that pictures show every stage of a motion.
        frame_CHW = frames_TCHW[sum(job.seed) % len(frames_TCHW)]
        Image.fromarray(frame_CHW.transpose(1, 2, 0)).save(job.path, quality=95)
        return
    encoder = VideoEncoder(torch.from_numpy(frames_TCHW), frame_rate=world.FRAME_RATE)
    encoder.to_file(
        job.path, codec="libx264", pixel_format="yuv420p", crf=18, preset="veryfast", extra_options={"threads": 1}
    )


def render_all(jobs: list[Job], processes: int) -> None:
    """Make every file, spread over processes, with a progress bar."""
    for folder in {job.path.parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(len(jobs), "rendering", "file") as bar, ProcessPoolExecutor(processes) as pool:
        for _ in map(render, jobs) if processes == 1 else pool.map(render, jobs, chunksize=16):
            bar.update()
