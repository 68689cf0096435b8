"""`vft pairs`: from records to pairs of a model's own answers, and from these to an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import CAPTION, Commands, Result, metrics
from tests.runs.processes import run_together
from tests.runs.world import ANSWERS, World, damage, record, video_record, write_clip

PAIRS = "tools/pairs.py"
Ask = Callable[..., Result]


@pytest.fixture
def ask(world: World, commands: Commands, learned: Path, tmp_path: Path) -> Ask:
    """Runs the command with a model that knows the clips by heart, and says something else now and then."""
    config = world.config(tmp_path / "run.toml", {"eval": {"max_new_tokens": 40, "batch_size": 2}})
    return lambda *arguments: commands.run(PAIRS, config, "--adapter", learned / "adapter", *arguments)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_train(world: World, commands: Commands, ask: Ask, learned: Path, tmp_path: Path) -> None:
    """From where the answers are from, without a word about the records; the chosen ones are the better ones."""
    output, answers = tmp_path / "own.jsonl", tmp_path / "own.answers.jsonl"
    told = ask("--temperature", 1.4, "--output", output).ok()
    pairs = lines(output)
    assert len(lines(answers)) == 4 and all(len(line["others"]) == 7 for line in lines(answers))
    assert len(pairs) >= 2 and told.stdout.startswith(f"{output}: {len(pairs)} pairs of 4 questions")
    for pair in pairs:
        about = pair["sampled"]
        assert about["chosen"] > about["rejected"] and 2 <= about["distinct"] <= 8
        assert (about["adapter"], about["seed"]) == (str(learned / "adapter"), 0)
        said = next(line for line in lines(answers) if line["id"] == pair["id"])
        texts = [one["prediction"] for one in (said, *said["others"]) if "cut_off" not in one]
        assert pair["messages"][-1]["content"] in texts and pair["rejected_response"] in texts
        assert pair["messages"][-1]["content"] == ANSWERS[pair["id"]] or about["chosen"] < 10
    settings = {
        "model": {"adapter": str(learned / "adapter")},
        "lora": {"rank": 8, "alpha": 16},
        "objective": {"kind": "dpo"},
        "data": {"sources": [{"format": "messages", "path": str(output)}]},
        "train": {"max_steps": 2},
    }
    config = world.config(tmp_path / "dpo.toml", settings)
    result = commands.run(CAPTION, config).ok()
    assert "not read" not in result.stderr and "left out" not in result.stderr
    first = metrics(config.with_suffix(""))[0]
    assert first["loss"] == pytest.approx(0.6931472, rel=1e-6) and first["samples"] == len(pairs)


def test_answers_are_kept(ask: Ask, world: World, commands: Commands, learned: Path, tmp_path: Path) -> None:
    """One process or two, in one go or after a stop: the same bytes. Another choice asks nothing anew; another seed
    is refused."""
    drawn = ("--temperature", 1.4, "--samples", 4)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    told = ask(*drawn, "--output", one).ok()
    arguments = (tmp_path / "run.toml", "--adapter", learned / "adapter", *drawn, "--output", two)
    first, second = run_together(commands, 2, PAIRS, *arguments)
    assert (first.ok().stdout, second.ok().stdout) == (told.stdout.replace("one.jsonl", "two.jsonl"), "")
    whole = (tmp_path / "one.answers.jsonl").read_bytes()
    assert (tmp_path / "two.answers.jsonl").read_bytes() == whole and two.read_bytes() == one.read_bytes()

    (tmp_path / "one.answers.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:3])[:-9])
    one.unlink()
    assert "one.answers.jsonl: 2 of 4 answered before" in ask(*drawn, "--output", one).ok().stderr
    assert (tmp_path / "one.answers.jsonl").read_bytes() == whole and two.read_bytes() == one.read_bytes()

    again = ask(*drawn, "--output", one, "--best-only", "--by", "rouge_l").ok()
    assert "4 of 4 answered before" in again.stderr and "4 answers of 4 questions\nrouge_l of" in again.stdout
    assert all("rejected_response" not in line for line in lines(one))
    assert (tmp_path / "one.answers.jsonl").read_bytes() == whole
    assert "was answered with seed = 0" in ask(*drawn, "--output", one, "--seed", 1).error


def test_held_out_and_bad_records_are_left_out(ask: Ask, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for colour in ANSWERS:
        write_clip(root / f"{colour}.mp4", colour)
    damage(root / "red.mp4")
    records = [*map(video_record, ANSWERS), {"id": "odd", "messages": [], "videos": ["red.mp4"]}]
    records.append({**record("<video>Who?", "Nobody.", videos=["blue.mp4"]), "label": False})  # an answer not to give
    (root / "videos.json").write_text(json.dumps(records))
    data = (f"data.root={root}", "data.max_bad_fraction=0.5", "eval.max_new_tokens=2")
    told = ask("--output", tmp_path / "all.jsonl", *data).ok()
    assert told.stdout.startswith(f"{tmp_path}/all.jsonl: 0 pairs of 5 questions (3 cut off, empty or without this")
    assert "2 unreadable)" in told.stdout and "1 of 4 questions cannot be asked: " in told.stderr
    assert [line["error"]["reason"] for line in lines(tmp_path / "all.answers.jsonl") if "error" in line] == [
        "decode_error"
    ]
    ask("--output", tmp_path / "part.jsonl", *data, "eval.split=0.5", "seed=1").ok()
    assert 0 < len(lines(tmp_path / "part.answers.jsonl")) < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", 1], "--samples = 1: must be greater than or equal to 2"),
        (["--temperature", 0], "--temperature = 0: must be greater than 0"),
        (["--by", "bleu"], "--by = bleu: scores by which caption ranks .* are cider_d, bleu4, rouge_l"),
        (["--min-gap", -1], "--min-gap = -1: must be greater than or equal to 0"),
        (["--output", "."], r"--output = '\.': is a folder; name a file"),
        (["--output", "{root}/videos.json"], "holds something else than pairs of this command; name another file"),
        (["--adapter", "nowhere"], "--adapter = nowhere: no such folder"),
        (["eval.max_new_tokens=40000"], "eval.max_new_tokens = 40000: the model's context is"),
    ],
)
def test_bad_input(ask: Ask, world: World, arguments: list[Any], message: str) -> None:
    before = (world.root / "videos.json").read_bytes()
    words = [str(one).replace("{root}", str(world.root)) for one in arguments]
    assert re.search(message, ask(*words).error)
    assert (world.root / "videos.json").read_bytes() == before
