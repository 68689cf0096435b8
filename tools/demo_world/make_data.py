"""Render the demo's clips to H.264 files, described in the layout of LLaVA-Video-178K.

    python tools/demo_world/make_data.py captions data/demo          what the demo fine-tunes on
    python tools/demo_world/make_data.py tags data/demo_pretrain     what its base model was trained on

A second call with the same settings finds the work done. Layout, K being `cap` or `tags`:

    ROOT/0_30_s_demo/0_30_s_demo_K_train.json       records of the clips to train on
    ROOT/0_30_s_demo/0_30_s_demo_K_held_out.json    combinations that training never shows
    ROOT/0_30_s_demo/demo/SPLIT/NNNNN.mp4           `video` of a record, below its `data_source`
    ROOT/sentences.jsonl                            with tags: records without a video, of the training combinations

A held-out clip has a record for each right way to describe it: records that ask the same of the same clip are its
references.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import words
import world

CONFIG = "0_30_s_demo"
KINDS = {"captions": "cap", "tags": "tags"}
PROMPTS = {"captions": words.CAPTION_PROMPT, "tags": words.TAG_PROMPT}
TRAIN_CLIPS = {"captions": 960, "tags": 9600}
HELD_OUT_CLIPS = {"captions": 48, "tags": 96}
TRAIN_SEED = {"captions": 1, "tags": 3}
"""First part of a clip's seed; the held-out clips have the number after it. No two sets share a clip."""
CAPTION_WEIGHTS = (3, 1, 1)
"""How often each way of `words.captions` is used: one leads, so that a trained model has a favourite."""


@dataclass(frozen=True, slots=True)
class Job:
    """One clip to render: where to, of what, and the seed of its randomness."""

    path: Path
    scenes: tuple[world.Scene, ...]
    seed: tuple[int, int]


def make_split(kind: str, root: Path, split: str, count: int) -> tuple[list[Job], list[dict[str, Any]]]:
    """Clips and records of one split; the scenes take turns, so each comes equally often.

    Raises ValueError where `count` is no positive number.
    """
    if count < 1:
        raise ValueError(f"{split} clips = {count}: at least 1")
    held_out = split == "held_out"
    scenes = world.all_scenes(held_out)
    seed = TRAIN_SEED[kind] + held_out
    jobs, records = [], []
    for i in range(count):
        scene = scenes[i % len(scenes)]
        video = f"demo/{split}/{i:05d}.mp4"
        jobs.append(Job(root / CONFIG / video, (scene,), (seed, i)))
        answers = words.captions(scene) if kind == "captions" else [words.tags([scene])]
        if kind == "captions" and not held_out:
            answers = random.Random(f"{seed} {i}").choices(answers, CAPTION_WEIGHTS)
        records += [make_record(f"{kind}-{split}-{i:05d}-{n}", video, PROMPTS[kind], a) for n, a in enumerate(answers)]
    return jobs, records


def make_record(name: str, video: str, prompt: str, answer: str) -> dict[str, Any]:
    """A record with LLaVA-Video-178K's keys."""
    turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, "data_source": CONFIG, "video": video}


def sentence_records() -> Iterator[dict[str, Any]]:
    """Text alone: tags and a sentence that says the same. Unused words would end up out of the model's reach."""
    for scene in world.all_scenes(held_out=False):
        for answer in words.captions(scene):
            question = {"role": "user", "content": words.sentence_request(scene)}
            yield {"messages": [question, {"role": "assistant", "content": answer}]}


def render(job: Job) -> None:
    """Render and encode one clip."""
    # Imported here: the parent process needs neither.
    import torch
    from torchcodec.encoders import VideoEncoder

    torch.set_num_threads(1)
    frames_TCHW = torch.from_numpy(world.render_clip(job.scenes, job.seed))
    encoder = VideoEncoder(frames_TCHW, frame_rate=world.FRAME_RATE)
    encoder.to_file(
        job.path, codec="libx264", pixel_format="yuv420p", crf=18, preset="veryfast", extra_options={"threads": 1}
    )


def render_all(jobs: list[Job], processes: int) -> None:
    """Render every clip, spread over processes, with a progress line."""
    for folder in {job.path.parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        _exhaust(_progress(map(render, jobs), len(jobs)))
        return
    with ProcessPoolExecutor(processes) as pool:
        _exhaust(_progress(pool.map(render, jobs, chunksize=16), len(jobs)))


def _exhaust(items: Iterable[None]) -> None:
    for _ in items:
        pass


def _progress(items: Iterable[None], total: int) -> Iterator[None]:
    """Pass the items on and show how many have come: in place on a terminal, else one line at the end."""
    start = time.monotonic()
    for done, item in enumerate(items, 1):
        if done == total or (sys.stdout.isatty() and done % 32 == 0):
            rate = done / (time.monotonic() - start)
            mark = "\r" if sys.stdout.isatty() else ""
            print(f"{mark}rendered {done}/{total} clips, {rate:.0f} a second", end="", flush=True)
        yield item
    print()


def fingerprint(kind: str, counts: dict[str, int]) -> dict[str, Any]:
    """What the clips depend on: equal fingerprints mean equal clips and records."""
    sources = b"".join(Path(module).read_bytes() for module in (world.__file__, words.__file__, __file__))
    return {"kind": kind, "clips": counts, "sources_sha256": hashlib.sha256(sources).hexdigest()}


def make_data(kind: str, root: Path, counts: dict[str, int], processes: int) -> None:
    """Render all splits and write their JSON files, unless they are there already."""
    # Written last, so that it exists only beside complete work.
    done_file = root / CONFIG / "made.json"
    made = fingerprint(kind, counts)
    if done_file.exists() and json.loads(done_file.read_text()) == made:
        print(f"{root}: {sum(counts.values())} clips are there")
        return
    done_file.unlink(missing_ok=True)
    splits = {split: make_split(kind, root, split, count) for split, count in counts.items()}
    render_all([job for jobs, _ in splits.values() for job in jobs], processes)
    for split, (_, records) in splits.items():
        text = json.dumps(records, indent=1) + "\n"
        (root / CONFIG / f"{CONFIG}_{KINDS[kind]}_{split}.json").write_text(text)
    if kind == "tags":
        (root / "sentences.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sentence_records()))
    done_file.write_text(json.dumps(made) + "\n")
    described = " and ".join(f"{count} {split.replace('_', '-')}" for split, count in counts.items())
    print(f"{root}: {described} clips, {kind}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(KINDS), help="what the records answer with")
    parser.add_argument("root", type=Path, help="folder to write to")
    parser.add_argument("--train", type=int, metavar="N", help=f"clips to train on (default {TRAIN_CLIPS})")
    parser.add_argument("--held-out", type=int, metavar="N", help=f"held-out clips (default {HELD_OUT_CLIPS})")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one a core")
    args = parser.parse_args()
    train = TRAIN_CLIPS[args.kind] if args.train is None else args.train
    held_out = HELD_OUT_CLIPS[args.kind] if args.held_out is None else args.held_out
    try:
        make_data(args.kind, args.root, {"train": train, "held_out": held_out}, max(1, args.processes))
    except (ValueError, OSError) as error:
        sys.exit(f"make_data.py: {error}")


if __name__ == "__main__":
    main()
