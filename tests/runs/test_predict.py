"""tools/predict.py on folders and records, into a file, about segments, and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import REPOSITORY, Commands, Result
from tests.runs.world import ANSWERS, PROMPT, World, damage, write_clip

PREDICT = "tools/predict.py"
Ask = Callable[..., Result]


@pytest.fixture
def ask(world: World, commands: Commands, learned: Path) -> Ask:
    """Runs the command with a model that knows the clips by heart."""
    model = ("--model", world.base, "--adapter", learned / "adapter")
    return lambda *arguments: commands.run(PREDICT, *model, *arguments)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_folders_and_records(world: World, ask: Ask, tmp_path: Path) -> None:
    """On the terminal: an answer a line behind its name, and the errors of those that have none."""
    for name in ("b/red.mp4", "a/green.mp4"):
        (tmp_path / name).parent.mkdir()
        write_clip(tmp_path / name, Path(name).stem)
    asked = [{"id": "first", "video": "blue.mp4", "prompt": PROMPT}, {"video": "../blue.mp4"}]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    result = ask("--prompt", PROMPT, tmp_path, "--root", world.root, tmp_path / "ask.jsonl")
    assert result.status == 1
    found = [f"{tmp_path}/{name}.mp4: {ANSWERS[name[2:]]}" for name in ("a/green", "b/red")]
    assert result.stdout.splitlines() == [*found, f"first: {ANSWERS['blue']}"]
    (error,) = result.stderr.splitlines()
    assert error.startswith(f"error: {tmp_path}/ask.jsonl:2: video: '../blue.mp4'")


def test_the_prompt_of_records_that_ask_nothing_is_said(world: World, ask: Ask, tmp_path: Path) -> None:
    """The adapter's own, in stderr, where --prompt says none; a record's question goes before it."""
    (tmp_path / "ask.jsonl").write_text('{"video": "red.mp4"}\n{"video": "blue.mp4", "question": "Who?"}\n')
    asked = ("--json", "--max-new-tokens", 8, "--root", world.root, tmp_path / "ask.jsonl")
    result = ask(*asked).ok()
    first, second = (json.loads(line)["prompt"] for line in result.stdout.splitlines())
    assert second == "Who?"
    assert f"1 of 2 records ask nothing themselves: {first!r} is asked; --prompt asks another\n" in result.stderr
    assert "ask nothing" not in ask(*asked, "--prompt", "What?").ok().stderr


@pytest.fixture
def batch(world: World, tmp_path: Path) -> Path:
    """Records as those of training, one of a damaged clip."""
    for colour in ANSWERS:
        write_clip(tmp_path / f"{colour}.mp4", colour)
    damage(tmp_path / "green.mp4")
    content = (world.root / "videos.json").read_text()
    (tmp_path / "ask.json").write_text(content)
    return tmp_path / "ask.json"


def test_a_file_of_answers_goes_on_where_it_was(ask: Ask, batch: Path) -> None:
    """Cut off anywhere it ends as if it had not been; answers are not given again, errors are looked at again."""
    output = batch.with_name("out.jsonl")
    result = ask("--output", output, batch)
    assert result.status == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == (f"error: 1 of 4 questions have no answer (decode_error 1): see {output}")
    found = lines(output)
    assert [line["id"] for line in found] == list(ANSWERS)
    for line in found:
        if line["id"] == "green":
            assert line["error"]["file"] == str(batch.with_name("green.mp4")) and "prediction" not in line
            assert line["error"]["reason"] == "decode_error" and str(batch.parent) in line["error"]["message"]
        else:
            assert line["prediction"] == line["reference"] == ANSWERS[line["id"]] and line["prompt"] == PROMPT
    whole = output.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (ends[0] + 40, ends[2]):  # within the line of the error; before the last line's break
        output.write_bytes(whole[:cut])
        assert ask("--output", output, batch).status == 1
        # The error of before is asked again, behind the answers that are there.
        assert sorted(output.read_bytes().splitlines()) == sorted(whole.splitlines())
    write_clip(batch.with_name("green.mp4"), "green")
    again = ask("--output", output, batch).ok()
    assert f"{output}: 3 of 4 answered before" in again.stderr
    assert {line["id"]: line["prediction"] for line in lines(output)} == ANSWERS
    kept = output.stat()
    assert ask("--output", output, batch).ok().stderr == f"{output}: 4 of 4 answered before\n"
    assert (output.stat().st_mtime_ns, output.stat().st_ino) == (kept.st_mtime_ns, kept.st_ino)


def test_extremes_of_sampling(world: World, ask: Ask) -> None:
    """Next to no temperature or mass is the likeliest answer; a batch of any size draws as one does."""
    clips = [world.root / f"{colour}.mp4" for colour in ANSWERS]
    learnt = [f"{clip}: {ANSWERS[clip.stem]}" for clip in clips]
    asked = ("--prompt", PROMPT, *clips)
    for options in (("1e-320", "1"), ("1e10", "1e-46")):
        found = ask(*asked, "--batch-size", 10**18, "--temperature", options[0], "--top-p", options[1]).ok()
        assert found.stdout.splitlines() == learnt
    drawn = [ask(*asked, "--temperature", 1e300, "--max-new-tokens", 9, "--batch-size", n).ok() for n in (1, 3)]
    assert drawn[0].stdout == drawn[1].stdout and drawn[0].stdout.splitlines() != learnt
    assert "answers were cut off at --max-new-tokens = 9" in drawn[0].stderr


def test_another_prompt_is_another_question(world: World, ask: Ask, tmp_path: Path) -> None:
    output, clip = tmp_path / "out.jsonl", world.root / "red.mp4"
    for prompt in (PROMPT, "What else?", PROMPT):
        ask("--output", output, "--prompt", prompt, "--max-new-tokens", 8, clip).ok()
    assert [line["prompt"] for line in lines(output)] == [PROMPT, "What else?"]


def test_other_settings_are_refused(world: World, ask: Ask, learned: Path, tmp_path: Path) -> None:
    """The adapter's path may change, its weights may not."""
    output, clip = tmp_path / "out.jsonl", world.root / "red.mp4"
    same, other = (shutil.copytree(learned / "adapter", tmp_path / name) for name in ("same", "other"))
    with (other / "adapter_model.safetensors").open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\x80\x3f")
    asked = ("--output", output, "--max-new-tokens", 2, clip)
    ask(*asked).ok()
    before = output.read_bytes()
    assert ask(*asked, "--adapter", same).ok().stderr == f"{output}: 1 of 1 answered before\n"
    changes: list[tuple[str, object, str]] = [
        ("--max-pixels", 6272, "--max-pixels = 3136"),
        ("--frames", 2, "--frames = 4"),
        ("--temperature", 0.5, "temperature = 0.0"),
        ("--adapter", other, "weights = "),
    ]
    for option, value, named in changes:
        error = ask(*asked, option, value).error
        assert f"{output}:1: was answered with {named}" in error, error
        assert output.read_bytes() == before


@pytest.mark.parametrize("content", ["My notes", '{"id": 1}\n', "[1]\n"])
def test_a_file_of_something_else_is_left_alone(world: World, ask: Ask, tmp_path: Path, content: str) -> None:
    (tmp_path / "mine").write_text(content)
    error = ask("--output", tmp_path / "mine", world.root / "red.mp4").error
    assert f"{tmp_path / 'mine'}:1" in error and (tmp_path / "mine").read_text() == content


def test_segments(world: World, ask: Ask, tmp_path: Path) -> None:
    """Each part is answered as a record with that range is, with its times in seconds and on the clock."""
    clip = world.root / "red.mp4"  # 3 s
    said = ("--prompt", "What?", "--max-new-tokens", 12)
    parts = ask(*said, "--json", "--segments", 1.2, clip, world.root / "red.png").ok().stdout.splitlines()
    found = [json.loads(line) for line in parts]
    assert [(one.get("start_s"), one.get("end_s")) for one in found] == [(0, 1.2), (1.2, 2.4), (2.4, 3), (None, None)]
    ranges = [(0, 1.19), (1.19, 2.39), (2.39, 3)]
    content = [[{"type": "video", "video": "red.mp4", "video_start": a, "video_end": b}] for a, b in ranges]
    records = [{"messages": [{"role": "user", "content": one}]} for one in content]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    alone = ask(*said, "--json", "--root", world.root, tmp_path / "ask.jsonl").ok().stdout.splitlines()
    assert [one["prediction"] for one in found[:3]] == [json.loads(line)["prediction"] for line in alone]
    assert len({one["prediction"] for one in found}) > 1
    text = ask(*said, "--segments", 1.2, clip).ok().stdout
    assert text.splitlines()[1].startswith("00:01.2-00:02.4: ") and found[1]["prediction"] in text


def test_text_appears_as_it_comes(world: World, commands: Commands, learned: Path) -> None:
    """On a terminal, and whole lines elsewhere (`test_tools.py`)."""
    words = ["--model", world.base, "--adapter", learned / "adapter", "--prompt", PROMPT, world.root / "red.mp4"]
    command = [sys.executable, PREDICT, *map(str, words)]
    most = 0
    for _ in range(10):  # on a busy machine all of it may be there before this process looks
        terminal, theirs = pty.openpty()
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=commands.environment, stdout=theirs, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        pieces: list[bytes] = []
        while piece := read(terminal):
            pieces.append(piece)
        os.close(terminal)
        assert process.wait() == 0
        assert b"".join(pieces) == f"{ANSWERS['red']}\r\n".encode()
        most = max(most, len(pieces))
        if most > 3:
            break
    assert most > 3


def read(terminal: int) -> bytes:
    """What is on a terminal; nothing once the other side is closed, which Linux tells as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--segments", "0"), ["--segments", "0"]),
        (("--batch-size", "0"), ["--batch-size", "0"]),
        (("--prompt", ""), ["--prompt = ''", "asks nothing"]),
        (("--prompt", " \n"), ["--prompt", "asks nothing"]),
        (("--temperature", "nan"), ["--temperature = nan"]),
        (("--temperature", "inf"), ["--temperature = inf"]),
        (("--temperature", "-1"), ["--temperature = -1"]),
        (("--top-p", "nan"), ["--top-p = nan"]),
        (("--max-new-tokens", "2000000000"), ["--max-new-tokens = 2000000000", "context is 4096"]),
        (("--max-frames", "0"), ["--max-frames = 0"]),
        (("--fps", "nan"), ["--fps = nan"]),
        (("--max-pixels", "-1"), ["--max-pixels = -1"]),
        (("--model", "nowhere"), ["--model = 'nowhere'"]),
        (("--workers", "-1"), ["--workers", "-1"]),
        (("--json", "--output", "x.jsonl"), ["--json", "--output"]),
        (("--root", "."), ["--root", "no file of records"]),
        (("--output", "."), ["--output", "folder"]),
    ],
)
def test_what_does_not_go_together(
    world: World, commands: Commands, arguments: tuple[str, ...], expected: list[str]
) -> None:
    error = commands.run(PREDICT, "--model", world.base, *arguments, world.root / "red.mp4").error
    assert [text for text in expected if text not in error] == [], error
