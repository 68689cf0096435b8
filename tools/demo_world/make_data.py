"""Render the demo's data sets: moving shapes as H.264 clips or JPEG pictures, described in the layouts of others.

    python tools/demo_world/make_data.py KIND ROOT

| kind       | what is written under ROOT                                                                     |
|------------|------------------------------------------------------------------------------------------------|
| captions   | `0_30_s_demo/0_30_s_demo_cap_SPLIT.json`, LLaVA-Video-178K's layout; `preferences_SPLIT.jsonl` |
| qa         | `0_30_s_demo/0_30_s_demo_{mc,oe}_SPLIT.json`, the same: multiple choice and open questions     |
| actions    | `SPLIT/LABEL/NNNNN.mp4`, a folder an action                                                    |
| scenes     | `{summarize,story}_SPLIT.jsonl`: clips of three or four scenes, with their times               |
| moments    | `moments_SPLIT.jsonl`: when the first and the last figure of a clip are shown, which takes the |
|            | place of the other at any second; `times.jsonl` without videos                                 |
| pictures   | `llava_instruct_demo_SPLIT.json` and `SPLIT/NNNNNNNNNNNN.jpg`, LLaVA-Instruct-150K's layout    |
| tags       | what the base model was first trained on: as captions, and `sentences.jsonl` without videos    |
| scene_tags | what it was trained on next: up to four scenes a clip, and more texts without videos           |

SPLIT is `train`, or `held_out` for combinations that training never shows, in every scene (`world.Scene.held_out`). A
held-out clip has a record for each right answer: records that ask the same of the same clip are its references. A data
set is a pure function of its kind and the numbers of clips. A second call with the same settings finds the work done.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import in_venv  # noqa: F401
import words
import world

from vft.common.console import progress_bar

CONFIG = "0_30_s_demo"
"""Folder of the records in LLaVA-Video-178K's layout."""
CAPTION_WEIGHTS = (3, 1, 1)
"""How often each way of `words.captions` is used: one leads, so that a trained model has a favourite."""
Named = Iterator[tuple[str, words.Record]]
"""Records, each with the file that it belongs in."""


@dataclass(frozen=True)
class Clip:
    """A clip, or a picture if its name ends with `.jpg`: one frame of the clip."""

    file: str
    """Path relative to the root."""
    split: str
    number: int
    scenes: tuple[world.Scene, ...]
    seed: tuple[int, int]
    frames: tuple[int, ...]
    """How many each scene has."""

    @property
    def name(self) -> str:
        """In the ids of records."""
        return f"{self.split}-{self.number:05d}"

    def said(self, ways: list[str]) -> list[str]:
        """All ways to describe it if it is held out: its references. One of them, drawn, to train on."""
        rng = random.Random(f"caption {self.seed}")
        return ways if self.split == "held_out" else rng.choices(ways, CAPTION_WEIGHTS)


@dataclass(frozen=True)
class Kind:
    """A data set that can be made."""

    file: str
    """Path of a clip, a format of its split, number and action."""
    records: Callable[[Clip], Named]
    train: int
    held_out: int
    """Clips of each split, unless others are asked for."""
    seed: int
    """First part of the training clips' seeds; held-out clips have the number after it. No two sets share a clip."""
    lengths: tuple[int, ...] = (1,)
    """Scenes of a clip; the lengths take turns."""
    seconds: int = 0
    """Length of a clip whose scenes change at whole seconds that are drawn, each to another colour and another shape;
    0: all scenes are equally long, and their figures differ in colour or shape."""
    texts: Callable[[], dict[str, list[words.Record]]] = dict
    """Files of records without a video."""

    def clips(self, split: str, count: int) -> list[Clip]:
        """The clips of a split."""
        seed = self.seed + (split == "held_out")
        clips = []
        chosen = choose_scenes(count, self.lengths, split == "held_out", seed, alike=any if self.seconds else all)
        for number, scenes in enumerate(chosen):
            action = words.PARTICIPLES[scenes[0].motion]
            file = self.file.format(split=split, number=number, after=number + 1, action=action)
            frames = [world.FRAMES_PER_SCENE] * len(scenes)
            if self.seconds:
                cuts_s = random.Random(f"cuts {seed} {number}").sample(range(1, self.seconds), len(scenes) - 1)
                spans = itertools.pairwise((0, *sorted(cuts_s), self.seconds))
                frames = [round((end_s - start_s) * world.FRAME_RATE) for start_s, end_s in spans]
            clips.append(Clip(file, split, number, scenes, (seed, number), tuple(frames)))
        return clips


def choose_scenes(
    count: int, lengths: Sequence[int], held_out: bool, seed: int, alike: Callable[[tuple[bool, bool]], bool] = all
) -> Iterator[tuple[world.Scene, ...]]:
    """Scenes of `count` clips. Single scenes take turns, so each comes equally often; rows of them are drawn.

    Figures within a clip are not `alike`, told whether they share colour and shape: a text can tell them apart.
    """
    scenes = world.all_scenes(held_out)
    for i in range(count):
        length = lengths[i % len(lengths)]
        if length == 1:
            yield (scenes[i // len(lengths) % len(scenes)],)
            continue
        rng = random.Random(f"{seed} {i}")
        row: list[world.Scene] = []
        while len(row) < length:
            scene = rng.choice(scenes)
            if not any(alike((scene.color == other.color, scene.shape == other.shape)) for other in row):
                row.append(scene)
        yield tuple(row)


# --------------------------------------------------------------------------------------------------------- records


def captions(clip: Clip) -> Named:
    """A caption for each training clip, every right caption for a held-out one; a pair of captions for each."""
    ways = words.captions(clip.scenes[0])
    yield from llava_video(clip, "cap", "captions", [(words.CAPTION_PROMPT, answer) for answer in clip.said(ways)])
    # Two ways that are equally frequent, of which one is to be preferred.
    pair = {"prompt": f"<video>{words.CAPTION_PROMPT}", "chosen": ways[1], "rejected": ways[2], "videos": [clip.file]}
    yield f"preferences_{clip.split}.jsonl", {"id": f"preferences-{clip.name}", **pair}


def tags(clip: Clip) -> Named:
    """The base model's own answers."""
    return llava_video(clip, "tags", "tags", [(words.TAG_PROMPT, words.tags(clip.scenes))])


def qa(clip: Clip) -> Named:
    """A question about each attribute of a clip, asked as multiple choice and openly.

    The options of a question always have the same order. If they are shuffled, a model of this size learns which option
    is right (99 % by likelihood), but not to begin its answer with that option's letter (42 %: chance).
    """
    questions = words.questions(clip.scenes[0])
    yield from llava_video(clip, "mc", "mc", [words.choice(*question) for question in questions])
    yield from llava_video(clip, "oe", "oe", [(text, f"{right.capitalize()}.") for text, _, right in questions])


def llava_video(clip: Clip, short: str, name: str, pairs: Sequence[tuple[str, str]]) -> Named:
    """A record with LLaVA-Video-178K's keys for each question and answer."""
    for n, pair in enumerate(pairs):
        yield (
            f"{CONFIG}/{CONFIG}_{short}_{clip.split}.json",
            {
                "id": f"{name}-{clip.name}-{n}",
                "conversations": turns(*pair),
                "data_source": CONFIG,
                "video": clip.file.removeprefix(f"{CONFIG}/"),
            },
        )


def turns(question: str, answer: str) -> list[dict[str, str]]:
    """LLaVA's two turns; `<image>` stands for a video too."""
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


def pictures(clip: Clip) -> Named:
    """Captions without motion, in LLaVA-Instruct-150K's layout."""
    image = Path(clip.file)
    for answer in clip.said(words.picture_captions(clip.scenes[0])):
        record = {"id": image.stem, "image": image.name, "conversations": turns(words.PICTURE_PROMPT, answer)}
        yield f"llava_instruct_demo_{clip.split}.json", record


def scenes(clip: Clip) -> Named:
    """What each scene of a clip shows, and a summary and a story of the whole."""
    length_s = world.FRAMES_PER_SCENE / world.FRAME_RATE
    segments = [
        {"start_s": n * length_s, "end_s": (n + 1) * length_s, "text": words.captions(scene)[0]}
        for n, scene in enumerate(clip.scenes)
    ]
    for name, tell in (("summarize", words.summary), ("story", words.story)):
        record = {"id": f"{name}-{clip.name}", "video": clip.file, "segments": segments, "text": tell(clip.scenes)}
        yield f"{name}_{clip.split}.jsonl", record


def moments(clip: Clip) -> Named:
    """When the first and when the last figure of a clip is shown."""
    ends = [count / world.FRAME_RATE for count in itertools.accumulate(clip.frames)]
    for which, span in (("first", (0.0, ends[0])), ("last", (ends[-2], ends[-1]))):
        record = {"id": f"{which}-{clip.name}", "video": clip.file, "query": f"the {which} figure", "spans": [span]}
        yield f"moments_{clip.split}.jsonl", record


def first_texts() -> dict[str, list[words.Record]]:
    """What the base model reads beside its first clips."""
    return {"sentences.jsonl": list(words.sentences())}


def later_texts() -> dict[str, list[words.Record]]:
    """What it reads next: the words of all tasks."""
    return {
        **first_texts(),
        "tales.jsonl": list(words.tales(choose_scenes(480, (2, 3, 4), held_out=False, seed=19))),
        "copies.jsonl": list(words.copies(2400, random.Random("copies"))),
        "choices.jsonl": list(words.choices(1200, random.Random("choices"))),
    }


def time_texts() -> dict[str, list[words.Record]]:
    """What the base model reads before it learns when: numbers, of which it has read few."""
    return {"times.jsonl": list(words.times(1920, random.Random("times")))}


VIDEO = CONFIG + "/demo/{split}/{number:05d}.mp4"
KINDS = {
    "captions": Kind(VIDEO, captions, 960, 48, seed=1),
    "qa": Kind(VIDEO, qa, 960, 48, seed=11),
    "actions": Kind("{split}/{action}/{number:05d}.mp4", lambda _: iter(()), 960, 96, seed=13),
    "scenes": Kind("clips/{split}/{number:05d}.mp4", scenes, 960, 48, seed=15, lengths=(3, 4)),
    "moments": Kind("clips/{split}/{number:05d}.mp4", moments, 960, 48, 21, lengths=(2,), seconds=4, texts=time_texts),
    "pictures": Kind("{split}/{after:012d}.jpg", pictures, 960, 48, seed=17),
    "tags": Kind(VIDEO, tags, 9600, 96, seed=3, texts=first_texts),
    "scene_tags": Kind(VIDEO, tags, 6000, 96, seed=19, lengths=(1, 2, 3, 4), texts=later_texts),
}


# ----------------------------------------------------------------------------------------------------------- files


def make_data(kind: str, root: Path, counts: dict[str, int], processes: int) -> None:
    """Render all splits and write their records, unless they are there already. ValueError if a split has no clips."""
    # Written last, so that it exists only beside complete work.
    done_file = root / "made.json"
    sources = b"".join(Path(module).read_bytes() for module in (world.__file__, words.__file__, __file__))
    made = {"kind": kind, "clips": counts, "sources_sha256": hashlib.sha256(sources).hexdigest()}
    if done_file.exists() and json.loads(done_file.read_text()) == made:
        print(f"{root}: {sum(counts.values())} {kind} are there")
        return
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"{split} clips = {count}: at least 1")
    clips = [clip for split, count in counts.items() for clip in KINDS[kind].clips(split, count)]
    done_file.unlink(missing_ok=True)
    render_all(clips, root, processes)
    for name, records in records_of(KINDS[kind], clips).items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(lines if name.endswith(".jsonl") else json.dumps(records, indent=1) + "\n")
    done_file.write_text(json.dumps(made) + "\n")
    described = " and ".join(f"{count} {split.replace('_', '-')}" for split, count in counts.items())
    print(f"{root}: {described}, {kind}")


def records_of(kind: Kind, clips: Sequence[Clip]) -> dict[str, list[words.Record]]:
    """Every file of records, by its path relative to the root."""
    files = kind.texts()
    for name, record in (pair for clip in clips for pair in kind.records(clip)):
        files.setdefault(name, []).append(record)
    return files


def render_all(clips: Sequence[Clip], root: Path, processes: int) -> None:
    """Make every clip, spread over processes, with a progress bar."""
    for folder in {(root / clip.file).parent for clip in clips}:
        folder.mkdir(parents=True, exist_ok=True)
    jobs: list[Any] = [(root / clip.file, clip) for clip in clips]
    with progress_bar(len(jobs), "rendering", "file") as bar, ProcessPoolExecutor(processes) as pool:
        for _ in map(render, jobs) if processes == 1 else pool.map(render, jobs, chunksize=16):
            bar.update()


def render(job: tuple[Path, Clip]) -> None:
    """Render and encode one file."""
    # Imported here, because the parent process needs neither.
    import torch
    from torchcodec.encoders import VideoEncoder

    torch.set_num_threads(1)
    path, clip = job
    frames_TCHW = world.render_clip(clip.scenes, clip.seed, clip.frames)
    if path.suffix == ".jpg":
        from PIL import Image

        # A frame that the clip's seed chooses, so that pictures show every stage of a motion.
        frame_CHW = frames_TCHW[sum(clip.seed) % len(frames_TCHW)]
        Image.fromarray(frame_CHW.transpose(1, 2, 0)).save(path, quality=95)
        return
    encoder = VideoEncoder(torch.from_numpy(frames_TCHW), frame_rate=world.FRAME_RATE)
    encoder.to_file(
        path, codec="libx264", pixel_format="yuv420p", crf=18, preset="veryfast", extra_options={"threads": 1}
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(KINDS), help="which data set")
    parser.add_argument("root", type=Path, help="folder to write to")
    parser.add_argument("--train", type=int, metavar="N", help="clips to train on (default: the kind's own)")
    parser.add_argument("--held-out", type=int, metavar="N", help="held-out clips (default: the kind's own)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one a core")
    args = parser.parse_args()
    counts = {
        split: getattr(KINDS[args.kind], split) if getattr(args, split) is None else getattr(args, split)
        for split in ("train", "held_out")
    }
    try:
        make_data(args.kind, args.root, counts, max(1, args.processes))
    except (ValueError, OSError) as error:
        sys.exit(f"make_data.py: {error}")


if __name__ == "__main__":
    main()
