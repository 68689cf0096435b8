"""Whole runs that read archives as they come: interrupted, prolonged, on several processes, and with bad data."""

from __future__ import annotations

import io
import json
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.streaming import clip, damaged_clip, llava_record, pe_pair, pe_shards
from tests.helpers.tars import cut, write_tar
from tests.runs.commands import CAPTION, Commands, column, largest_difference, metrics
from tests.runs.processes import run_together
from tests.runs.same import without_times
from tests.runs.world import World, record

PE = {"format": "pe_video", "path": "pe", "stream": True}
LLAVA = {"format": "llava_video", "path": "llava", "stream": True}
TEXTS = {"format": "messages", "path": "texts.jsonl"}
SETS: dict[str, dict[str, Any]] = {
    "pe": {"sources": [PE]},
    # Three questions a video, each a row of its own: runs stop within a video.
    "llava": {"sources": [LLAVA], "max_samples_per_pack": 1},
    "mixture": {"sources": [{**TEXTS, "weight": 2.0}, PE, LLAVA], "max_samples_per_pack": 1},
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of each kind."""
    root = tmp_path_factory.mktemp("archives")
    pe_shards(root / "pe", [4, 3, 5])
    names = [f"v/{number}.mp4" for number in range(7)]
    records = [llava_record(name, number * 3 + i) for number, name in enumerate(names) for i in range(3)]
    (root / "llava").mkdir()
    (root / "llava" / "oe.json").write_text(json.dumps(records))
    for part in range(2):
        write_tar(root / "llava" / f"{part}.tar.gz", {name: clip(8 + part) for name in names[part::2]})
    lines = [{"id": f"t{i}", **record(f"What is {i}?", f"It is {i}.")} for i in range(9)]
    (root / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def settings(root: Path, data: dict[str, Any], **train: Any) -> dict[str, Any]:
    """Six steps of four rows from the data at `root`, dropout on."""
    return {
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"root": str(root), "max_bad_fraction": 1.0, **data},
        "train": {"max_steps": 6, "packs_per_step": 4, "schedule": "constant", **train},
        "checkpoint": {"every_steps": 2},
    }


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def quarantined(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def spools(commands: Commands) -> list[Path]:
    """Folders of copies, each of one process."""
    return list((Path(commands.environment["VFT_CACHE"]) / "stream").glob("*/"))


@pytest.fixture(scope="module")
def undisturbed(
    world: World, commands: Commands, archives: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run of each set that nobody interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {}
    for name, data in SETS.items():
        found[name] = commands.train(world.config(folder / f"{name}.toml", settings(archives, data)))
        assert all(column(found[name], "samples")) and len(set(column(found[name], "sample_digest"))) == 6
    return found


@pytest.mark.parametrize("name", SETS)
def test_a_run_that_is_prolonged(
    world: World, commands: Commands, archives: Path, undisturbed: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Three steps, then three more by a second command: the same samples and losses, bit for bit."""
    config = world.config(tmp_path / "run.toml", settings(archives, SETS[name]))
    commands.train(config, "train.max_steps=3")
    folder = commands.train(config)
    assert without_times(folder) == without_times(undisturbed[name])
    assert weights(folder) == weights(undisturbed[name])
    assert spools(commands) == []


def test_runs_killed_at_any_moment(
    world: World, commands: Commands, archives: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    """The next one goes on from the last checkpoint and clears away the copies that were left."""
    config = world.config(tmp_path / "run.toml", settings(archives, SETS["llava"]), {"checkpoint": {"every_steps": 1}})
    folder = config.with_suffix("")
    for step in (2, 4):
        command = commands.start(CAPTION, config)
        while command.is_running and (not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < step):
            time.sleep(0.002)
        assert command.kill().status == -signal.SIGKILL
        assert len(spools(commands)) == 1 and list(spools(commands)[0].glob("*.mp4"))
    commands.train(config, "checkpoint.every_steps=2")
    assert without_times(folder) == without_times(undisturbed["llava"])
    assert weights(folder) == weights(undisturbed["llava"])
    assert spools(commands) == []


@pytest.mark.parametrize("name", ["llava", pytest.param("mixture", marks=pytest.mark.slow)])
def test_one_process_then_two_then_one(
    world: World, commands: Commands, archives: Path, undisturbed: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Which process reads a stream changes nothing, nor that another one read it before."""
    config = world.config(tmp_path / "run.toml", settings(archives, SETS[name]))
    folder = config.with_suffix("")
    commands.train(config, "train.max_steps=1")
    for result in run_together(commands, 2, CAPTION, config, "train.max_steps=4"):
        result.ok()
    commands.train(config, "train.max_steps=5")
    commands.train(config)
    for key in ("step", "epoch", "sample_digest", "num_targets", "tokens", "samples"):
        assert column(folder, key) == column(undisturbed[name], key), key
    assert largest_difference(column(undisturbed[name], "loss"), column(folder, "loss")) <= 1e-5
    assert spools(commands) == []


def test_pairs_of_answers(world: World, commands: Commands, tmp_path: Path) -> None:
    """In both formats, as records in three forms: a pair is whole in its row, also where a run goes on within a video.
    What is no pair is a bad item."""
    root = tmp_path / "data"
    said = [{"chosen": f"It is {n} much.", "rejected": f"Nothing of {n}."} for n in range(6)]
    asked = [{"from": "human", "value": "<image>\nWhat?"}]
    forms: list[dict[str, Any]] = [
        {"prompt": "<video>\nWhat?"},
        {"conversations": asked},
        {"prompt": [{"role": "user", "content": "<video>What?"}]},
    ]
    records = [{"id": f"q{n}", "video": ("v/1.mp4", "v_0")[n // 3], **forms[n % 3], **said[n]} for n in range(6)]
    records += [{"id": "equal", "video": "v_0", **forms[0], "chosen": "A.", "rejected": "A."}]
    records += [llava_record("v/1.mp4", 7)]
    (root / "llava").mkdir(parents=True)
    (root / "llava" / "pairs.json").write_text(json.dumps(records))
    frame = io.BytesIO()
    Image.new("RGB", (84, 56), "red").save(frame, "JPEG")
    frames = {f"v_0/c01_{n}.jpeg": frame.getvalue() for n in range(4)}  # as LLaVA-Hound's videos are published
    write_tar(root / "llava" / "0.tar.gz", {"v/1.mp4": clip(), **frames})
    texts: list[Any] = ["Not seen.", "A cat.", " ", 3, None]
    pairs = [pe_pair(f"{n}", rejected_response=text) for n, text in enumerate(texts)]
    pairs += [pe_pair("5", rejected_response="Clip 5 is seen.")]
    (root / "pe").mkdir()
    write_tar(root / "pe" / "0.tar", [member for pair in pairs for member in pair])
    sources = [{**PE, "share": 0.5}, {**LLAVA, "share": 0.5}]
    data = {"sources": sources, "max_samples_per_pack": 1}
    more = {"objective": {"kind": "dpo"}, "train": {"max_steps": 5, "packs_per_step": 2}, "lora": {"dropout": 0.0}}
    configs = [world.config(tmp_path / f"{name}.toml", settings(root, data), more) for name in ("whole", "parts")]
    whole = commands.train(configs[0])
    commands.train(configs[1], "train.max_steps=3")
    parts = commands.train(configs[1])
    assert without_times(parts) == without_times(whole) and weights(parts) == weights(whole)
    assert column(whole, "loss")[0] == pytest.approx(0.6931472, rel=1e-6) and min(column(whole, "samples")) == 2
    assert column(whole, "loss")[-1] != column(whole, "loss")[0]
    found = [json.dumps(item) for item in quarantined(whole)]
    for place, reason in {
        "pairs.json:1": "rejected: 'A.' is the chosen answer too",
        "0.tar/2.json": "rejected_response: is an empty answer",
        "0.tar/3.json": "rejected_response: 3 is of type int",
        "0.tar/4.json": "learns from pairs, and the record has one answer",
        "0.tar/5.json": "rejected_response: 'Clip 5 is seen.' is the chosen answer too",
        "q7": "learns from pairs",
    }.items():
        assert any(place in item and reason in item for item in found), (place, found)


def test_a_mistake_that_one_of_two_processes_meets(world: World, commands: Commands, tmp_path: Path) -> None:
    """Of four streams the last finds no clip, and the second process reads it: the same cause ends both."""
    pe_shards(tmp_path / "data" / "pe", [3])
    config = world.config(tmp_path / "run.toml", settings(tmp_path / "data", SETS["pe"]))
    results = run_together(commands, 2, CAPTION, config)
    assert [result.status for result in results] == [2, 2]
    errors = [line for result in results for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: pe: too few clips"), errors


# --------------------------------------------------------------------------------------------------------- bad data


def spoil(root: Path) -> Path:
    """Four archives: a damaged clip, one that is no video, a record that is no JSON, and an archive that is cut off."""
    for shard in range(4):
        members = [pe_pair(f"{shard}-{number}") for number in range(5)]
        if shard == 1:
            members[1] = pe_pair("1-1", damaged_clip())
            members[3] = pe_pair("1-3", b"<html>404</html>")
            members[4] = [members[4][0], ("1-4.json", b'{"human_caption": ')]
        write_tar(root / "pe" / f"{shard}.tar", [one for pair in members for one in pair])
    archive = root / "pe" / "2.tar"
    with tarfile.open(archive) as tar:
        within = tar.getmember("2-2.mp4").offset + 600
    cut(archive, within)
    return root


BAD = {
    ("1.tar/1-1.mp4", "decode_error"),
    ("1.tar/1-3.mp4", "not_a_video"),
    ("1.tar/1-4.json", "record"),
    ("2.tar", "archive"),
}


@pytest.mark.parametrize("slots", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_bad_data_in_the_middle_of_a_run(world: World, commands: Commands, tmp_path: Path, slots: int) -> None:
    """The run goes on, and says what it left out by the names in the archives; a second one decides alike."""
    root = spoil(tmp_path / "data")
    folders = []
    for name in ("one", "two"):
        changed = settings(root, {"sources": [PE], "max_samples_per_pack": 1}, packs_per_step=slots, max_steps=8)
        folders.append(commands.train(world.config(tmp_path / f"{name}.toml", changed)))
    assert without_times(folders[0]) == without_times(folders[1])
    lines = quarantined(folders[0])
    assert sorted(map(json.dumps, lines)) == sorted(map(json.dumps, quarantined(folders[1])))
    paths = Counter((line["path"].removeprefix(f"{root}/pe/"), line["reason"]) for line in lines)
    assert paths == Counter(BAD)
    assert not [line for line in lines if "/stream/" in json.dumps(line)]
    assert "2.tar: " in next(line["message"] for line in lines if line["reason"] == "archive")
    # A clip that can't be decoded leaves its place in a row empty, in every epoch.
    assert 0 < 8 * slots - sum(column(folders[0], "samples")) <= 3
    assert spools(commands) == []


def test_bad_data_and_an_interruption(world: World, commands: Commands, tmp_path: Path) -> None:
    """What was found bad before is known after; nothing is told twice."""
    root = spoil(tmp_path / "data")
    changed = settings(root, {"sources": [PE], "max_samples_per_pack": 1}, max_steps=8)
    straight = commands.train(world.config(tmp_path / "straight.toml", changed))
    config = world.config(tmp_path / "run.toml", changed)
    for steps in (2, 5, 8):
        folder = commands.train(config, f"train.max_steps={steps}")
    assert without_times(folder) == without_times(straight)
    assert sorted(map(json.dumps, quarantined(folder))) == sorted(map(json.dumps, quarantined(straight)))


def test_too_much_bad_data(world: World, commands: Commands, tmp_path: Path) -> None:
    """A few bad clips at the start say nothing of the rest; ten are enough to stop, with their reasons counted."""
    root = tmp_path / "data"
    for shard in range(2):
        pairs = [pe_pair(f"{shard}-{n}", b"no video" if n % 4 == 1 else None) for n in range(40)]
        pairs = [[pair[0], (f"{shard}-{n}.json", b"{")] if n % 8 == 3 else pair for n, pair in enumerate(pairs)]
        write_tar(root / "pe" / f"{shard}.tar", [one for pair in pairs for one in pair])
    data = {"sources": [PE], "max_samples_per_pack": 1, "max_bad_fraction": 0.05}
    config = world.config(tmp_path / "run.toml", settings(root, data, max_steps=40, packs_per_step=2))
    result = commands.run(CAPTION, config)
    assert "can't be used (" in result.error and "not_a_video" in result.error and "record" in result.error
    assert "more than data.max_bad_fraction = 0.05" in result.error
    folder = config.with_suffix("")
    assert 10 <= len(quarantined(folder)) <= 16 and len(metrics(folder)) >= 6
    assert spools(commands) == []
    commands.train(config, "data.max_bad_fraction=0.5", "train.max_steps=12")
    assert len(metrics(folder)) == 12


# --------------------------------------------------------------------------------------------- beside other settings


def test_evaluation_beside_a_stream(world: World, commands: Commands, archives: Path, tmp_path: Path) -> None:
    """On the first clips of a set, unpacked once; the stream goes on as without."""
    held_out = {"format": "pe_video", "path": "pe", "take": "first:3"}
    evaluation = {"eval": {"every_steps": 2, "sources": [held_out], "max_new_tokens": 4}}
    folder = commands.train(
        world.config(tmp_path / "run.toml", settings(archives, SETS["pe"], max_steps=2), evaluation)
    )
    answers = [json.loads(line) for line in (folder / "predictions" / "step-000002.jsonl").read_text().splitlines()]
    assert sorted(answer["id"] for answer in answers) == ["000-00", "000-01", "000-02"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "epochs": ({"train": {"max_steps": None, "epochs": 2}}, "train.max_steps is needed"),
    "take": ({"data": {"sources": [{**PE, "take": "first:5"}]}}, "stream = true and take = "),
    "format": ({"data": {"sources": [{**TEXTS, "stream": True}]}}, "stream = true goes with llava_video and pe_video"),
    "eval": ({"eval": {"every_steps": 1, "sources": [PE]}}, "stream = true is for training"),
    "nothing to evaluate": ({"eval": {"every_steps": 1}}, "eval.sources = []: a stream has no held-out records"),
    "neither": ({"data": {"sources": [{**PE, "stream": False}]}}, 'needs stream = true, or take = "first:N"'),
    "no archives": ({"data": {"sources": [{**PE, "path": "texts.jsonl"}]}}, "no .tar or .tar.gz or .tgz files there"),
    "too many rows": ({"train": {"packs_per_step": 16}}, "too few clips with records in 3 archive(s) for the 16"),
    "offline": ({"data": {"sources": [{**PE, "path": "hf://datasets/x/y"}]}}, "hf://datasets/x/y: can't be listed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_contradict_a_stream(
    world: World, commands: Commands, archives: Path, tmp_path: Path, name: str
) -> None:
    """One line that names the key."""
    changed, message = WRONG[name]
    config = world.config(tmp_path / "run.toml", settings(archives, SETS["pe"]), changed)
    assert message in commands.run(CAPTION, config).error
