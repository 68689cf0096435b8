"""Every public set in its publishers' layout, a few clips each: read, trained on and scored, two steps."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import vft
from tests.helpers.formats import write
from tests.helpers.tars import write_tar
from tests.runs.commands import Commands, metrics
from tests.runs.world import ANSWERS, COLOURS, World

Layout = Callable[[Path, Path], tuple[list[dict[str, Any]], set[str]]]
"""Lays a set out in a root, out of the clips in a folder; gives its sources and scores that only this set has."""


def put(clips: Path, name: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(clips / name, target)
    return target


def llava(name: str, video: str, *turns: str, source: str = "0_30_s_youtube_v0_1") -> dict[str, Any]:
    """A record of LLaVA-Video-178K."""
    asked = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    asked[0]["value"] = f"<image>\n{asked[0]['value']}"
    return {"id": name, "conversations": asked, "data_source": source, "video": video}


CHOICE = "Which colour?\nA. red\nB. green\nC. blue\nD. yellow\n"
CHOICE += "Please provide your answer by stating the letter followed by the full option."
LETTERS = dict(zip(COLOURS, "ABCD", strict=True))


def llava_video(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    folder = root / "0_30_s_youtube_v0_1"
    for colour in COLOURS:
        put(clips, f"{colour}.mp4", folder / "liwei_youtube_videos" / f"{colour}.mp4")
    videos = {colour: f"liwei_youtube_videos/{colour}.mp4" for colour in COLOURS}
    caption = [llava(f"c-{c}", videos[c], "What happens?", ANSWERS[c]) for c in COLOURS]
    choice = [llava(f"m-{c}", videos[c], CHOICE, f"{LETTERS[c]}. {c}.") for c in COLOURS]
    several = ["What moves?", "A bar.", "What colour is the ground?"]
    open_ended = [llava(f"o-{c}", videos[c], *several, c.capitalize() + ".") for c in COLOURS]
    for kind, records in (("cap", caption), ("mc", choice), ("oe", open_ended)):
        write(folder / f"0_30_s_youtube_{kind}_v0_1.json", records)
    return [{"format": "llava_video", "path": folder.name}], {"choice_accuracy", "open_anls"}


def llava_hound(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    for colour in ("red", "blue"):
        for i in (1, 2, 10):
            put(clips, f"{colour}.png", root / "llava_hound" / colour / f"c01_{i:04d}.jpeg")
    records = [llava(c, c, "What is it?", ANSWERS[c], source="llava_hound") for c in ("red", "blue")]
    write(root / "llava_hound" / "cap.json", records)
    return [{"format": "llava_video", "path": "llava_hound/cap.json"}], set()


def video_mme(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    rows = []
    for number, colour in enumerate(COLOURS):
        put(clips, f"{colour}.mp4", root / "data" / f"vid_{colour}{('.mp4', '.MP4')[number % 2]}")
        write(root / "subtitle" / f"vid_{colour}.srt", f"1\n00:00:00,000 --> 00:00:02,000\nIt is {colour}.\n")
        for question in range(3):
            rows.append(
                {
                    "video_id": f"{number:03d}",
                    "duration": ("short", "medium", "long")[number % 3],
                    "domain": "Knowledge",
                    "sub_category": "Geography",
                    "url": f"https://www.youtube.com/watch?v=vid_{colour}",
                    "videoID": f"vid_{colour}",
                    "question_id": f"{number:03d}-{question + 1}",
                    "task_type": "Counting Problem" if question else "Object Recognition",
                    "question": f"Question {question}: which colour?",
                    "options": ["A. red.", "B. green.", "C. blue.", "D. yellow."],
                    "answer": LETTERS[colour],
                }
            )
    (root / "videomme").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "videomme" / "test-00000-of-00001.parquet")
    source = {"format": "video_mme", "path": "videomme", "subtitles": True}
    groups = {"accuracy/duration/short", "accuracy/domain/Knowledge", "accuracy/sub_category/Geography"}
    return [source], {"choice_accuracy", "choice_accuracy_generated", "accuracy/task_type/Counting Problem"} | groups


def pe_video(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    for number, colour in enumerate(COLOURS):
        about = {"human_caption": ANSWERS[colour] if number % 2 else None, "model_caption": "A bar.", "fps": 4.0}
        members = {"0.mp4": (clips / f"{colour}.mp4").read_bytes(), "0.json": json.dumps(about).encode()}
        write_tar(root / "train" / f"{number:06d}.tar", {name.replace("0", colour): v for name, v in members.items()})
    return [{"format": "pe_video", "path": "train", "take": "first:4"}], set()


def llava_instruct(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    records = []
    for number, colour in enumerate(COLOURS):
        put(clips, f"{colour}.png", root / "coco" / "train2017" / f"{number:012d}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": ANSWERS[colour]}]
        turns += [{"from": "human", "value": "Is it warm?"}, {"from": "gpt", "value": "Perhaps."}]
        records.append({"id": f"{number:012d}", "image": f"{number:012d}.png", "conversations": turns})
    write(root / "llava_instruct_150k.json", records)
    return [{"format": "llava_instruct", "path": "llava_instruct_150k.json"}], set()


def folders(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    for colour in COLOURS:
        for split in ("train", "val"):
            put(clips, f"{colour}.mp4", root / split / f"a_{colour}_bar" / "clip.mp4")
    return [{"format": "folders", "path": "train"}], {"top1", "top5", "top1/a red bar"}


def ucf101(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    classes = {"red": "ApplyEyeMakeup", "green": "YoYo", "blue": "TaiChi", "yellow": "HandstandPushups"}
    lines = []
    for number, (colour, name) in enumerate(classes.items(), 1):
        clip = f"{name}/v_{name}_g08_c01.avi"
        put(clips, f"{colour}.mp4", root / "UCF-101" / clip)
        lines.append(f"{clip} {number}")
    lists = root / "ucfTrainTestlist"
    write(lists / "classInd.txt", "".join(f"{i} {name}\n" for i, name in enumerate(classes.values(), 1)))
    write(lists / "trainlist01.txt", "\n".join(lines) + "\n")
    source = {"format": "ucf101", "path": "ucfTrainTestlist/trainlist01.txt", "media": "UCF-101"}
    return [source], {"top1", "top1/apply eye makeup"}


def kinetics(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    with io.StringIO() as text:
        rows = csv.writer(text)
        rows.writerow(["label", "youtube_id", "time_start", "time_end", "split", "is_cc"])
        for colour in COLOURS:
            rows.writerow([f"watching {colour}", f"-id_{colour}", 5, 15, "train", 0])
            put(clips, f"{colour}.mp4", root / "k400" / f"-id_{colour}_000005_000015.mp4")
        write(root / "train.csv", text.getvalue())
    return [{"format": "kinetics", "path": "train.csv", "media": "k400"}], {"top1", "top1/watching red"}


def ssv2(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    records = []
    for number, colour in enumerate(COLOURS):
        put(clips, f"{colour}.mp4", root / "20bn-something-something-v2" / f"{number}.webm")
        template = f"Watching [something] {colour}"
        label = {"label": f"watching a bar {colour}", "template": template, "placeholders": ["a bar"]}
        records.append({"id": str(number), **label})
    write(root / "labels.json", {f"Watching something {c}": str(i) for i, c in enumerate(COLOURS)})
    write(root / "train.json", records)
    return [{"format": "ssv2", "path": "train.json"}], {"top1", "top1/Watching something red"}


def summaries(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    lines = []
    for colour in COLOURS:
        put(clips, f"{colour}.mp4", root / "long" / f"{colour}.mp4")
        segments = [{"start_s": 0, "end_s": 1.5, "text": "A bar."}, {"start_s": 1.5, "end_s": 3, "text": "Gone."}]
        lines.append({"video": f"long/{colour}.mp4", "segments": segments, "text": ANSWERS[colour], "speech": "Oh!"})
    write(root / "summaries.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return [{"format": "story", "path": "summaries.jsonl"}], {"rouge_l", "coverage"}


def stories(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    for colour in COLOURS:
        put(clips, f"{colour}.png", root / "vist" / f"{colour}.png")
    images = [f"vist/{colour}.png" for colour in COLOURS]
    lines = [{"images": images[i:] + images[:i], "text": f"Once there was {c}."} for i, c in enumerate(COLOURS)]
    write(root / "stories.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return [{"format": "story", "path": "stories.jsonl"}], {"rouge_l", "distinct_2"}


def moments(root: Path, clips: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """Four sets, of which two have the videos beside them; the end of one span is not in its video."""
    for colour in COLOURS:
        put(clips, f"{colour}.mp4", root / "Charades_v1_480" / f"{colour}.mp4")
    write(root / "sta.txt", "red 0.5 999.5##a bar moves.\nblue 0 1.5##a bar moves.\n")
    windows = {"qid": 1, "query": "A bar.", "vid": "green", "duration": 3, "relevant_windows": [[0, 1], [2, 3]]}
    write(root / "qvh.jsonl", json.dumps(windows) + "\n")
    write(root / "didemo.json", [{"video": "yellow.mov", "description": "a bar", "times": [[0, 0], [0, 0], [0, 1]]}])
    told = {"duration": 3, "timestamps": [[0, 1.5], [1.5, 3]], "sentences": ["A bar comes in.", "It has gone away."]}
    write(root / "captions.json", {"v_red": told})
    names = {"sta.txt": "moments", "qvh.jsonl": "moments", "didemo.json": "moments", "captions.json": "dense_captions"}
    sources = [{"format": format, "path": path, "media": "Charades_v1_480"} for path, format in names.items()]
    return sources, {"miou", "r1@0.5", "map", "soda_d", "dense_cider_d", "no_time"}


SETS: dict[str, tuple[str, Layout]] = {
    "LLaVA-Video-178K": ("qa", llava_video),
    "llava_hound": ("caption", llava_hound),
    "Video-MME": ("qa", video_mme),
    "PE-Video": ("caption", pe_video),
    "LLaVA-Instruct": ("caption", llava_instruct),
    "folders": ("classify", folders),
    "UCF101": ("classify", ucf101),
    "Kinetics": ("classify", kinetics),
    "SSv2": ("classify", ssv2),
    "summaries": ("summarize", summaries),
    "stories": ("story", stories),
    "moments": ("ground", moments),
}


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_trained_on_and_scored(name: str, world: World, commands: Commands, tmp_path: Path) -> None:
    task, lay_out = SETS[name]
    root = tmp_path / "data"
    root.mkdir()
    sources, own_scores = lay_out(root, world.root)
    settings = {
        "task": task,
        "data": {"root": str(root), "sources": sources, "pack_tokens": 1024, "max_bad_fraction": 0.0},
        "train": {"max_steps": 2},
        "eval": {"every_steps": 2, "max_new_tokens": 6},
    }
    config = world.config(tmp_path / "run.toml", settings)
    ended = commands.run(f"vft.recipes.{task}", config).ok()
    assert ("Video-MME is a benchmark" in ended.stderr) == (name == "Video-MME")
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert all(line["loss"] > 1.0 for line in lines[1:3])
    scores = {key.removeprefix("eval_") for key in lines[-1]}
    assert scores >= {"loss", "answered", *own_scores}, sorted(scores)
    assert lines[-1]["eval_unreadable"] == 0
    assert (tmp_path / "run" / "quarantine.jsonl").read_text() == ""
    rows = [json.loads(row) for row in (tmp_path / "run/predictions/step-000002.jsonl").read_text().splitlines()]
    assert len(rows) == lines[-1]["eval_answered"] >= 2
    assert all(("option_scores" in row) == ("choice" in row) for row in rows)
    scored = commands.run("tools/evaluate.py", config, "--adapter", tmp_path / "run/adapter").ok()
    assert own_scores - {s for s in own_scores if "/" in s} <= set(scored.stdout.split())
    if name == "folders":
        assert "classes (4), samples + held out: a blue bar 1 + 1, a green bar 1 + 1" in ended.stderr
        check_prediction_of_labels(commands, world, tmp_path, rows)


def check_prediction_of_labels(commands: Commands, world: World, folder: Path, scored: list[dict[str, Any]]) -> None:
    """Clips are given the labels of training, as likely as evaluation found them; another question gets a text."""
    asked = ("tools/predict.py", "--model", world.base, "--adapter", folder / "run/adapter")
    files = ("--output", folder / "answers.jsonl", "--table", folder / "answers.csv")
    for _ in range(2):  # the second time all are answered before, and the table is the same
        commands.run(*asked, *files, folder / "data/train").ok()
        with (folder / "answers.csv").open(encoding="utf-8-sig", newline="") as file:
            table = {row["video"]: row for row in csv.DictReader(file)}
        assert len(table) == len(scored)
    for row in scored:
        found, labels = table[row["media"][0]], list(row["option_scores"])
        shares = torch.tensor(list(row["option_scores"].values())).softmax(0)
        assert found["prediction"] == row["choice"]
        assert [float(found[label]) for label in labels] == pytest.approx(shares.tolist(), abs=2e-3)
        assert float(found["probability"]) == max(float(found[label]) for label in labels)
    clip = scored[0]["media"][0]
    assert re.fullmatch(r"a \w+ bar \(\d+%\)\n", commands.run(*asked, clip).ok().stdout)
    model = vft.load_model(world.base, folder / "run/adapter")
    shares = model.probabilities(clip)
    assert model.ask(clip) == next(iter(shares)) == scored[0]["choice"]
    assert shares == pytest.approx({label: float(table[clip][label]) for label in shares}, abs=1e-3)
    other = commands.run(*asked, "--prompt", "What?", "--max-new-tokens", 2, "--json", clip).ok()
    assert "probabilities" not in json.loads(other.stdout)
