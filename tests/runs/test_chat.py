"""`vft chat`: several turns about a clip, as the same questions asked with their history."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.runs.commands import Commands
from tests.runs.world import World
from vft.cli import chat

LIMITS = ["--frames", "4", "--max-pixels", "3136", "--max-new-tokens", "6"]


def said(
    typed: str, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *more: object
) -> tuple[list[str], str]:
    """Lines of answers, and what is told beside them."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    chat.main(["--model", str(world.base), *LIMITS, *map(str, more)], "vft chat")
    shown = capsys.readouterr()
    return shown.out.splitlines(), shown.err


def test_turns_go_on(
    world: World,
    commands: Commands,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clip = world.root / "red.mp4"
    answers, told = said(
        "What is it?\nWhich colour?\n/new\nWhich colour?\n/quit\nNever read.\n", world, capsys, monkeypatch, clip
    )
    assert "red.mp4" in told and "cut off at --max-new-tokens = 6" in told
    asked = [
        [{"role": "user", "content": "<video>What is it?"}],
        [
            {"role": "user", "content": "<video>What is it?"},
            {"role": "assistant", "content": answers[0]},
            {"role": "user", "content": "Which colour?"},
        ],
        [{"role": "user", "content": "<video>Which colour?"}],
    ]
    lines = [json.dumps({"messages": turns, "videos": ["red.mp4"]}) for turns in asked]
    (world.root / "chat.jsonl").write_text("\n".join(lines) + "\n")
    output = tmp_path / "answers.jsonl"
    commands.run("tools/predict.py", "--model", world.base, *LIMITS, "--output", output, world.root / "chat.jsonl").ok()
    wanted = [json.loads(line)["prediction"] for line in output.open(encoding="utf-8")]
    assert [line.strip() for line in answers if line] == [line.strip() for line in wanted]
    assert len({*wanted}) > 1


def test_mistakes_end_no_talk(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.root / "broken.mp4").write_bytes(b"no video")
    typed = "/clop x\n/clip gone.mp4\n/clip {0}/broken.mp4\nHello?\n/clip {0}/red.png\nWhat is it?\nexit\nNo.\n"
    answers, told = said(typed.format(world.root), world, capsys, monkeypatch)
    assert "/clop: there are /clip FILE, /new and /quit" in told
    assert "gone.mp4" in told and "broken.mp4" in told
    assert len([line for line in answers if line]) == 2 and answers[0] != answers[1]
