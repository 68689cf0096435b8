"""The demo's data sets: what each one shows, what is asked and answered, and in which layout it is written.

A data set is a pure function of its kind, the numbers of clips and a seed: `make` gives the files to render and the
texts to write. Training clips have only training combinations in them, held-out clips only held-out ones, in every
scene (`world.Scene.held_out`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import readings
import words
import world
from rendering import Job

CONFIG = "0_30_s_demo"
"""Folder of the records in LLaVA-Video-178K's layout."""
CAPTION_WEIGHTS = (3, 1, 1)
"""How often each way of `words.captions` is used: one leads, so that a trained model has a favourite."""
SPLITS = ("train", "held_out")


@dataclass
class Contents:
    """The files of a data set."""

    jobs: list[Job] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """Files of records by path, relative to the root."""


@dataclass(frozen=True)
class Clip:
    """One clip of a split: its name, scenes, and seed."""

    name: str
    scenes: tuple[world.Scene, ...]
    seed: tuple[int, int]


@dataclass(frozen=True)
class Kind:
    """A data set that can be made."""

    make: Callable[[Path, dict[str, list[Clip]]], Contents]
    train: int
    held_out: int
    """Clips of each split, unless others are asked for."""
    seed: int
    """First part of the training clips' seeds; held-out clips have the number after it. No two sets share a clip."""
    lengths: tuple[int, ...] = (1,)
    """Scenes of a clip; the lengths take turns."""


def make(kind: str, root: Path, counts: dict[str, int]) -> Contents:
    """The data set `kind` with `counts` clips a split.

    Raises ValueError where a count is no positive number.
    """
    clips = {}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"{split} clips = {count}: at least 1")
        seed = KINDS[kind].seed + (split == "held_out")
        chosen = choose_scenes(count, KINDS[kind].lengths, split == "held_out", seed)
        clips[split] = [Clip(f"{i:05d}", scenes, (seed, i)) for i, scenes in enumerate(chosen)]
    return KINDS[kind].make(root, clips)


def choose_scenes(count: int, lengths: Sequence[int], held_out: bool, seed: int) -> Iterator[tuple[world.Scene, ...]]:
    """Scenes of `count` clips. Single scenes take turns, so each comes equally often; rows of them are drawn.

    Figures within a clip differ in colour or shape, so that a text can tell them apart.
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
            if all((scene.color, scene.shape) != (other.color, other.shape) for other in row):
                row.append(scene)
        yield tuple(row)


# ------------------------------------------------------------------------------------- LLaVA-Video-178K's layout


def _captions(root: Path, clips: dict[str, list[Clip]]) -> Contents:
    """A caption for each training clip, every right caption for a held-out one: its references."""
    contents = Contents()
    for split, members in clips.items():
        records = []
        for clip in members:
            answers = words.captions(clip.scenes[0])
            if split == "train":
                answers = random.Random(f"caption {clip.seed}").choices(answers, CAPTION_WEIGHTS)
            pairs = [(words.CAPTION_PROMPT, answer) for answer in answers]
            records += _video_records("captions", root, split, clip, pairs, contents.jobs)
        contents.texts[_records_path("cap", split)] = _json(records)
    return contents


def _tags(root: Path, clips: dict[str, list[Clip]]) -> Contents:
    """The base model's own answers, and texts without a video."""
    contents = Contents()
    for split, members in clips.items():
        records = []
        for clip in members:
            pairs = [(words.TAG_PROMPT, words.tags(clip.scenes))]
            records += _video_records("tags", root, split, clip, pairs, contents.jobs)
        contents.texts[_records_path("tags", split)] = _json(records)
    contents.texts["sentences.jsonl"] = _json_lines(readings.sentences())
    return contents


def _scene_tags(root: Path, clips: dict[str, list[Clip]]) -> Contents:
    """Tags of several scenes, and texts without a video in the words of all tasks."""
    contents = _tags(root, clips)
    rows = choose_scenes(480, (2, 3, 4), held_out=False, seed=KINDS["scene_tags"].seed)
    contents.texts["tales.jsonl"] = _json_lines(readings.tales(rows))
    contents.texts["copies.jsonl"] = _json_lines(readings.copies(2400, random.Random("copies")))
    contents.texts["choices.jsonl"] = _json_lines(readings.choices(1200, random.Random("choices")))
    return contents


def _qa(root: Path, clips: dict[str, list[Clip]]) -> Contents:
    """A question about each attribute of a clip, asked as multiple choice and openly.

    The options of a question always have the same order. If they are shuffled, a model of this size learns which option
    is right (99 % by likelihood), but not to begin its answer with that option's letter (42 %: chance).
    """
    contents = Contents()
    for split, members in clips.items():
        choices, opens = [], []
        for clip in members:
            questions = words.questions(clip.scenes[0])
            offered = [words.choice(*question) for question in questions]
            choices += _video_records("mc", root, split, clip, offered, contents.jobs)
            answered = [(question, f"{right.capitalize()}.") for question, _, right in questions]
            opens += _video_records("oe", root, split, clip, answered)
        contents.texts[_records_path("mc", split)] = _json(choices)
        contents.texts[_records_path("oe", split)] = _json(opens)
    return contents


def _records_path(short: str, split: str) -> str:
    return f"{CONFIG}/{CONFIG}_{short}_{split}.json"


def _video_records(
    name: str, root: Path, split: str, clip: Clip, pairs: Sequence[tuple[str, str]], jobs: list[Job] | None = None
) -> list[dict[str, Any]]:
    """A record with LLaVA-Video-178K's keys for each question and answer; the clip's rendering goes to `jobs`."""
    video = f"demo/{split}/{clip.name}.mp4"
    if jobs is not None:
        jobs.append(Job(root / CONFIG / video, clip.scenes, clip.seed))
    return [
        {
            "id": f"{name}-{split}-{clip.name}-{n}",
            "conversations": _turns(question, answer),
            "data_source": CONFIG,
            "video": video,
        }
        for n, (question, answer) in enumerate(pairs)
    ]


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    """LLaVA's two turns; `<image>` stands for a video too."""
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


# --------------------------------------------------------------------------------------------------- other layouts


def _actions(root: Path, clips: dict[str, list[Clip]]) -> Contents:
    """A folder for each action, in each split: the label of a clip is its folder's name."""
    jobs = [
        Job(root / split / words.PARTICIPLES[clip.scenes[0].motion] / f"{clip.name}.mp4", clip.scenes, clip.seed)
        for split, members in clips.items()
        for clip in members
    ]
    return Contents(jobs)


def _scenes(root: Path, clips: dict[str, list[Clip]]) -> Contents:
    """Clips of several scenes, with what each shows, and a summary and a story of the whole."""
    contents = Contents()
    for split, members in clips.items():
        for name, tell in (("summarize", words.summary), ("story", words.story)):
            records = [_scene_record(name, split, clip, tell(clip.scenes)) for clip in members]
            contents.texts[f"{name}_{split}.jsonl"] = _json_lines(records)
        contents.jobs += [Job(root / _scene_path(split, clip), clip.scenes, clip.seed) for clip in members]
    return contents


def _scene_path(split: str, clip: Clip) -> str:
    return f"clips/{split}/{clip.name}.mp4"


def _scene_record(name: str, split: str, clip: Clip, text: str) -> dict[str, Any]:
    seconds = world.FRAMES_PER_SCENE / world.FRAME_RATE
    segments = [
        {"start_s": n * seconds, "end_s": (n + 1) * seconds, "text": words.captions(scene)[0]}
        for n, scene in enumerate(clip.scenes)
    ]
    video = _scene_path(split, clip)
    return {"id": f"{name}-{split}-{clip.name}", "video": video, "segments": segments, "text": text}


def _pictures(root: Path, clips: dict[str, list[Clip]]) -> Contents:
    """Stills and captions without motion, in LLaVA-Instruct-150K's layout."""
    contents = Contents()
    for split, members in clips.items():
        records = []
        for clip in members:
            image = f"{int(clip.name) + 1:012d}.jpg"
            contents.jobs.append(Job(root / split / image, clip.scenes, clip.seed))
            answers = words.picture_captions(clip.scenes[0])
            if split == "train":
                answers = random.Random(f"caption {clip.seed}").choices(answers, CAPTION_WEIGHTS)
            for answer in answers:
                turns = _turns(words.PICTURE_PROMPT, answer)
                records.append({"id": image.removesuffix(".jpg"), "image": image, "conversations": turns})
        contents.texts[f"llava_instruct_demo_{split}.json"] = _json(records)
    return contents


def _json(records: list[dict[str, Any]]) -> str:
    return json.dumps(records, indent=1) + "\n"


def _json_lines(records: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


KINDS = {
    "captions": Kind(_captions, 960, 48, seed=1),
    "qa": Kind(_qa, 960, 48, seed=11),
    "actions": Kind(_actions, 960, 96, seed=13),
    "scenes": Kind(_scenes, 960, 48, seed=15, lengths=(3, 4)),
    "pictures": Kind(_pictures, 960, 48, seed=17),
    "tags": Kind(_tags, 9600, 96, seed=3),
    "scene_tags": Kind(_scene_tags, 6000, 96, seed=19, lengths=(1, 2, 3, 4)),
}
