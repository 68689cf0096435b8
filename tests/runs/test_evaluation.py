"""Evaluations of whole runs: which are written, the best export, and several processes beside one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs.commands import Commands, column, metrics
from tests.runs.processes import run_together
from tests.runs.world import ANSWERS, COLOURS, FULL_TUNING, VISION_LORA, World, damage, record
from vft.common.errors import UserError
from vft.common.scores import Interval
from vft.distributed import process_group as distributed
from vft.inference.evaluate import BestScore
from vft.metrics import mean_interval

ALONE = distributed.World(0, 1, 0, torch.device("cpu"))
LISTED = "Which colour is the ground?\n" + "\n".join(
    f"{a}. {colour}" for a, colour in zip("ABCD", COLOURS, strict=True)
)


def evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl that an evaluation wrote, by step."""
    return {line["step"]: line for line in metrics(folder) if "eval_loss" in line}


def predictions(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The answers of each evaluation, by step."""
    files = {int(path.stem.removeprefix("step-")): path for path in (folder / "predictions").iterdir()}
    return {step: [json.loads(line) for line in files[step].read_text().splitlines()] for step in sorted(files)}


# ------------------------------------------------------------------------------------------------------ best export


@pytest.fixture(scope="module")
def wavering(world: World, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose learning rate grows far too high: its loss goes down and up again."""
    settings = {
        "train": {"max_steps": 7, "learning_rate": 0.2, "schedule": "constant", "warmup_steps": 7},
        "eval": {"every_steps": 1, "max_new_tokens": 4, "best_metric": "loss"},
    }
    return commands.train(world.config(tmp_path_factory.mktemp("wavering") / "run.toml", settings))


def test_the_best_export_is_kept(world: World, commands: Commands, wavering: Path, tmp_path: Path) -> None:
    """Not the last, not the first, and what lies in `best/` has the loss that is claimed for it."""
    losses = {step: line["eval_loss"] for step, line in evaluations(wavering).items() if step}
    step = min(losses, key=losses.__getitem__)
    assert 1 < step < 7 and losses[step - 1] != losses[step + 1], f"the run is to get better, then worse: {losses}"
    noted = json.loads((wavering / "best.json").read_text())
    assert {"step": step, "metric": "loss", "value": losses[step], "samples": 4}.items() <= noted.items()
    assert json.loads((wavering / "best" / "vft.json").read_text())["step"] == step
    arguments = (wavering.with_suffix(".toml"), "--adapter", wavering / "best", "--output", tmp_path)
    commands.run("tools/evaluate.py", *arguments).ok()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["adapter"]["loss"]["value"] == pytest.approx(losses[step], rel=1e-5)


def test_every_evaluation_is_written(wavering: Path) -> None:
    """The one before the first step too: the answers of all records, and the scores in one line."""
    lines, answers = evaluations(wavering), predictions(wavering)
    assert list(lines) == list(answers) == list(range(8))
    for rows in answers.values():
        assert {row["id"]: row["reference"] for row in rows} == ANSWERS
    for line in lines.values():
        assert line["eval_answered"] == 4 and line["eval_unreadable"] == 0
        assert {"eval_cider_d", "eval_bleu4", "eval_rouge_l"} < line.keys()
    # What the base says, by a measure that training has no part in: it is the loss of the first step, all records.
    assert lines[0]["eval_loss"] == pytest.approx(metrics(wavering)[1]["loss"], rel=1e-5)


def test_not_at_the_start(world: World, commands: Commands, tmp_path: Path) -> None:
    settings = {"train": {"max_steps": 2}, "eval": {"every_steps": 2, "max_new_tokens": 2, "at_start": False}}
    folder = commands.train(world.config(tmp_path / "run.toml", settings))
    assert list(evaluations(folder)) == list(predictions(folder)) == [2]
    assert not (folder / "best").exists() and not (folder / "best.json").exists()


def test_which_export_is_the_best(tmp_path: Path) -> None:
    """Larger is better but for the loss; an equal score changes nothing; a resumed run remembers."""
    exported: list[tuple[str, float]] = []

    def keep(metric: str, value: float, folder: str) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        best = BestScore(tmp_path / folder / "best.json", metric, ALONE)  # as after a restart
        scores = {metric: Interval(value, value, value)}
        if best.is_beaten_by(scores):
            exported.append(("best", value))
            best.record(3, scores)

    for value in (0.5, 0.4, 0.5, 0.7, 0.6):
        keep("accuracy", value, "up")
    assert exported == [("best", 0.5), ("best", 0.7)]
    exported.clear()
    for value in (3.0, 3.5, 2.0, 2.0, 2.5):
        keep("loss", value, "down")
    assert exported == [("best", 3.0), ("best", 2.0)]
    noted = json.loads((tmp_path / "down" / "best.json").read_text())
    assert {"step": 3, "metric": "loss", "value": 2.0}.items() <= noted.items()
    best = BestScore(tmp_path / "best.json", "cider", ALONE)
    with pytest.raises(UserError, match=r"^eval\.best_metric = 'cider': not among the scores, bleu4, loss$"):
        best.is_beaten_by({name: Interval(0, 0, 0) for name in ("bleu4", "loss")})


def test_only_scores_on_the_same_questions_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the same rules, and of as many samples; of more that could be read is better, of fewer never."""
    caplog.set_level("INFO")

    def is_kept(value: float, questions: str, count: int = 4, metric: str = "accuracy") -> bool:
        caplog.clear()
        best = BestScore(tmp_path / "best.json", metric, ALONE, questions)
        scores = {metric: mean_interval([value] * count)}
        kept = best.is_beaten_by(scores)
        if kept:
            best.record(1, scores)
        return kept

    assert is_kept(0.9, "a") and not is_kept(0.8, "a") and not caplog.text
    assert is_kept(0.2, "b") and "accuracy 0.9 of step 1 was taken on other questions" in caplog.text
    assert not is_kept(0.9, "b", count=3) and "4 were readable then, 3 now): it stays" in caplog.text
    assert is_kept(0.1, "b", count=5) and "4 were readable then, 5 now): this one" in caplog.text
    assert is_kept(0.05, "b", 5, metric="top1") and not caplog.text
    line = json.loads((tmp_path / "best.json").read_text())
    assert line == {"step": 1, "metric": "top1", "value": 0.05, "samples": 5, "questions": "b"}
    (tmp_path / "best.json").write_text('{"step": 7, "metric": "top1", "value": 0.99}\n')  # by older rules
    assert is_kept(0.5, "b", metric="top1") and "by other rules" in caplog.text


# -------------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def quiz(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of held-out questions of all kinds, an odd number of them, one about a clip that can't be decoded."""
    folder = tmp_path_factory.mktemp("quiz")
    for colour in COLOURS:
        shutil.copy(world.root / f"{colour}.mp4", folder)
        shutil.copy(world.root / f"{colour}.png", folder)
    shutil.copy(world.root / "red.mp4", folder / "broken.mp4")
    damage(folder / "broken.mp4")
    records: list[dict[str, Any]] = []
    for letter, colour in zip("ABCD", COLOURS, strict=True):
        groups = {"warmth": "warm" if colour in ("red", "yellow") else "cold"}
        records.append({**record(f"<video>{LISTED}", letter, videos=[f"{colour}.mp4"]), "groups": groups})
    records.append(record("<video>What is moving?", ANSWERS["blue"], videos=["blue.mp4"]))
    records.append(record("<image>Is it warm?\nA. yes, it is\nB. no", "A. yes, it is", images=["red.png"]))
    records.append(record("What is two and two?", "Four."))
    records.append(record("<video>What is broken?", "This.", videos=["broken.mp4"]))
    records.append(record("<video>And here?\nA. left\nB. left and up\nC. right", "left and up", videos=["green.mp4"]))
    (folder / "quiz.json").write_text(json.dumps(records))
    return folder


QUIZ: dict[str, Any] = {
    "train": {"max_steps": 2, "packs_per_step": 2},
    "data": {"sources": [{"format": "messages", "path": "quiz.json", "take": "first:7"}], "pack_tokens": 220},
    "eval": {
        "every_steps": 2,
        "max_new_tokens": 5,
        "batch_size": 2,
        "sources": [{"format": "messages", "path": "quiz.json"}],
    },
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="adapters"),
        pytest.param(VISION_LORA, id="components", marks=pytest.mark.slow),
        pytest.param(FULL_TUNING, id="full"),
        pytest.param({"parallel": {"shard": 1}}, id="replicas", marks=pytest.mark.slow),
    ],
)
def test_two_processes_evaluate_as_one(
    world: World, commands: Commands, quiz: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The same questions, answers and scores, in the same order, where one process has more of them than the other,
    a question without media, and one without a readable clip. The run goes on, and ends, as if none had been."""
    folders = []
    for processes in (1, 2):
        path = tmp_path / f"run{processes}.toml"
        config = world.config(path, QUIZ, {"data": {"root": str(quiz)}, "train": {"eps": 1e-3}}, settings)
        for result in run_together(commands, processes, "vft.recipes.qa", config):
            result.ok()
        folders.append(path.with_suffix(""))
    one, two = folders
    assert column(one, "step") == column(two, "step") == [0, 1, 2, 2]
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert list(evaluations(one)) == list(evaluations(two)) == [0, 2]
    for step, line in evaluations(one).items():
        other = evaluations(two)[step]
        assert line.keys() == other.keys()
        assert (line["eval_answered"], line["eval_unreadable"]) == (8, 1)
        assert {"eval_accuracy/warmth/warm", "eval_choice_accuracy", "eval_open_token_f1"} < line.keys()
        for key in line.keys() - {"eval_intervals", "eval_tokenization"}:
            assert line[key] == pytest.approx(other[key], rel=1e-5), key
        assert line["eval_tokenization"] == other["eval_tokenization"]
        assert line["eval_intervals"].keys() == other["eval_intervals"].keys()
        for key, ends in line["eval_intervals"].items():  # of the same questions and documents, in the same order
            assert ends == pytest.approx(other["eval_intervals"][key], rel=1e-5), key
    for step, rows in predictions(one).items():
        assert len(rows) == 8 and sum("choice" in row for row in rows) == 6
        for row, other in zip(rows, predictions(two)[step], strict=True):
            for key in ("option_scores", "option_scores_norm"):
                assert row.pop(key, {}) == pytest.approx(other.pop(key, {}), abs=2e-4)  # rounded
            assert row == other
