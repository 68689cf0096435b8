"""Learning from pairs of answers and from labelled ones, from records to an adapter."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from markupsafe import escape
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.runs.commands import CAPTION, Commands, column, largest_difference, metrics
from tests.runs.processes import run_together
from tests.runs.world import ANSWERS, FULL_TUNING, PROMPT, TEXTS, World, damage
from vft.config.run import load
from vft.preparation.documents import load_training
from vft.preparation.planning import Planner
from vft.preparation.run import open_for_training
from vft.preparation.synthetic import filled_row
from vft.recipes import task_of
from vft.reporting.run_folder import read_jsonl
from vft.training import reference
from vft.training.preferences import FIGURES, KINDS, KTO, Preference, objective_of

WRONG = {colour: f"Nothing at all, and no {colour} bar." for colour in ANSWERS}
"""A rejected answer for each clip."""
ONCE = {"objective": {"reference_passes": "once"}}
STREAMED = {"data": {"sources": [{"format": "pe_video", "path": "pe", "stream": True}]}}


@pytest.fixture(scope="module")
def pairs(world: World) -> str:
    """Pairs about clips, two for each, and about texts, in the data's folder."""
    lines: list[dict[str, Any]] = []
    for colour, answer in ANSWERS.items():
        media = {"videos": [f"{colour}.mp4"]}
        lines.append({"prompt": f"<video>{PROMPT}", "chosen": answer, "rejected": WRONG[colour], **media})
        lines.append({"prompt": "<video>Which colour?", "chosen": f"It is {colour}.", "rejected": "Grey.", **media})
    for question, answer in TEXTS.items():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append({"messages": turns, "rejected_response": "I can't say."})
    (world.root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "pairs.jsonl"


@pytest.fixture(scope="module")
def labelled(world: World) -> str:
    """Answers that are desirable or not, in the forms of TRL and ms-swift, in the data's folder."""
    lines: list[dict[str, Any]] = []
    for colour, answer in ANSWERS.items():
        media = {"videos": [f"{colour}.mp4"]}
        lines.append({"prompt": f"<video>{PROMPT}", "completion": answer, "label": True, **media})
        lines.append({"prompt": f"<video>{PROMPT}", "completion": WRONG[colour], "label": False, **media})
    for question, answer in TEXTS.items():
        for text, label in ((answer, True), ("I can't say.", False)):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            lines.append({"messages": turns, "label": label})
    (world.root / "labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "labelled.jsonl"


def settings(pairs: str, kind: str = "dpo", **train: Any) -> dict[str, Any]:
    return {
        "objective": {"kind": kind},
        "lora": {"rank": 8, "alpha": 16},
        "data": {"sources": [{"format": "messages", "path": pairs}]},
        "train": {"max_steps": 12, "learning_rate": 2e-3, "schedule": "constant", **train},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_answers_are_preferred(
    world: World, commands: Commands, tmp_path: Path, pairs: str, kind: str
) -> None:
    learning = {"data": {"pack_tokens": 2048}, "train": {"max_steps": 30, "learning_rate": 5e-3, "packs_per_step": 1}}
    folder = commands.train(world.config(tmp_path / "run.toml", settings(pairs, kind), learning))
    first, last = metrics(folder)[0], metrics(folder)[-1]
    assert first["samples"] == 11
    assert all(isinstance(line[name], float) for line in (first, last) for name in FIGURES)
    assert last["loss"] < first["loss"]
    assert last["reward_accuracy"] == 1.0 and last["likelier_chosen"] >= first["likelier_chosen"]
    if kind == "dpo":  # nothing is learnt yet: log 2, and every reward is a tie
        assert first["loss"] == pytest.approx(0.6931472, rel=1e-6)
        assert (first["reward_chosen"], first["reward_accuracy"]) == (0.0, 0.5)


def test_kto(world: World, commands: Commands, tmp_path: Path, labelled: str) -> None:
    learning = {"data": {"pack_tokens": 2048}, "train": {"max_steps": 30, "learning_rate": 5e-3, "packs_per_step": 1}}
    held_out = {"every_steps": 30, "max_new_tokens": 4, "sources": [{"format": "messages", "path": labelled}]}
    config = world.config(tmp_path / "run.toml", settings(labelled, "kto"), learning, {"eval": held_out})
    found = metrics(commands.train(config))
    before, after = [line for line in found if "eval_loss" in line]
    first, *_, last = [line for line in found if "loss" in line]
    count = 2 * len(ANSWERS) + 2 * len(TEXTS)
    assert (first["samples"], first["desirable"], first["kl"]) == (count, 0.5, 0.0)
    assert first["loss"] == pytest.approx(0.5) and first["reward_chosen"] == first["reward_rejected"] == 0.0
    assert last["loss"] < 0.4 and last["reward_chosen"] > last["reward_rejected"]
    # Held out are the desirable answers alone.
    assert before["eval_answered"] == len(ANSWERS) + len(TEXTS)
    assert before["eval_loss"] * first["tokens_chosen"] == pytest.approx(-first["log_p_chosen"], rel=1e-4)
    assert after["eval_loss"] < before["eval_loss"]


def test_kto_of_pairs(world: World, commands: Commands, tmp_path: Path, pairs: str, labelled: str) -> None:
    """The chosen answer of a pair is desirable, the other is not. With one sort alone there is no mean of the other."""
    short = {"train": {"max_steps": 1, "packs_per_step": 1}, "data": {"pack_tokens": 4096}}
    (line,) = metrics(commands.train(world.config(tmp_path / "pairs.toml", settings(pairs, "kto"), short)))
    assert (line["samples"], line["desirable"]) == (22, 0.5)
    lines = (world.root / labelled).read_text().splitlines()
    (world.root / "good.jsonl").write_text("\n".join(line for line in lines if '"label": true' in line))
    (line,) = metrics(commands.train(world.config(tmp_path / "good.toml", settings("good.jsonl", "kto"), short)))
    assert line["desirable"] == 1.0 and line["reward_rejected"] is None and line["log_p_chosen"] < 0


def test_held_out_pairs(world: World, commands: Commands, tmp_path: Path, pairs: str) -> None:
    """Before training every reward is a tie; after it the scores are those of a step with the same pairs."""
    held_out = {"every_steps": 30, "max_new_tokens": 4, "sources": [{"format": "messages", "path": pairs}]}
    learning = {"data": {"pack_tokens": 2048}, "train": {"max_steps": 30, "learning_rate": 5e-3, "packs_per_step": 1}}
    config = world.config(tmp_path / "run.toml", settings(pairs), learning, {"eval": held_out})
    folder = commands.train(config)
    before, after = [line for line in metrics(folder) if "eval_loss" in line]
    first, *_, last = [line for line in metrics(folder) if "loss" in line]
    assert before["eval_likelier_chosen"] == pytest.approx(first["likelier_chosen"])
    assert (before["eval_reward_accuracy"], before["eval_reward_margin"]) == (0.5, 0.0)
    assert before["eval_loss"] * first["tokens_chosen"] == pytest.approx(-first["log_p_chosen"], rel=1e-4)
    assert after["eval_reward_accuracy"] == 1.0
    margin = last["reward_chosen"] - last["reward_rejected"]
    assert 0.1 * after["eval_reward_margin"] == pytest.approx(margin, rel=0.3)
    low, high = after["eval_intervals"]["reward_margin"]
    assert low < after["eval_reward_margin"] < high
    pairs_are_shown(folder, [json.loads(line) for line in (world.root / pairs).read_text().splitlines()])


def pairs_are_shown(folder: Path, records: list[dict[str, Any]]) -> None:
    """In files beside the predictions and in the report."""
    first, last = (read_jsonl(folder / "predictions" / f"step-{step:06d}.pairs.jsonl") for step in (0, 30))
    wanted = {one.get("chosen") or one["messages"][-1]["content"] for one in records}
    assert len(last) == len(records) and {one["chosen"] for one in last} == wanted
    assert all(one["log_p_chosen"] == one["reference_chosen"] and one["margin"] == 0.0 for one in first)
    before = {one["chosen"]: one for one in first}
    for one in last:
        same = before[one["chosen"]]
        assert one["rejected"] == same["rejected"] and one["prompt"] in (PROMPT, *TEXTS, "Which colour?")
        for which in ("chosen", "rejected"):  # the reference is the model as training began
            assert one[f"reference_{which}"] == pytest.approx(same[f"log_p_{which}"], rel=1e-4)
        gains = [one[f"log_p_{which}"] - one[f"reference_{which}"] for which in ("chosen", "rejected")]
        assert one["margin"] == pytest.approx(gains[0] - gains[1])
    mean = fmean(one["margin"] for one in last)
    assert mean == pytest.approx(metrics(folder)[-1]["eval_reward_margin"]) and mean > 1
    section = (folder / "report.html").read_text(encoding="utf-8").partition("<h2>Held-out pairs</h2>")[2]
    for one in last:
        shown = (str(escape(one["chosen"])), str(escape(one["rejected"])), f"margin {one['margin']:+.2f}")
        assert all(text in section for text in shown), shown
    assert section.count("<article") == len(last) and section.count("<img") > 8


def test_rejected_answers_that_are_not_learnt(world: World, commands: Commands, tmp_path: Path, pairs: str) -> None:
    """A line says so; none if only held-out records are pairs."""
    source = {"sources": [{"format": "messages", "path": pairs}]}
    mine = world.config(tmp_path / "mine.toml", {"data": source})
    said = [line for line in commands.run(CAPTION, mine, "--dry-run").ok().stderr.splitlines() if pairs in line]
    assert said == [
        "pairs.jsonl: of 11 pairs of answers only the chosen one is learnt, as in supervised tuning; add "
        'objective.kind = "dpo" to learn from both'
    ]
    held_out = world.config(tmp_path / "held_out.toml", {"eval": {"every_steps": 4, **source}})
    assert "pairs of answers" not in commands.run(CAPTION, held_out, "--dry-run").ok().stderr


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_one_process_and_two(world: World, commands: Commands, tmp_path: Path, pairs: str, kind: str) -> None:
    config = [world.config(tmp_path / f"{n}.toml", settings(pairs, kind, packs_per_step=4)) for n in (1, 2)]
    folders = []
    for processes, path in zip((1, 2), config, strict=True):
        for one in run_together(commands, processes, CAPTION, path):
            assert "pairs of answers" not in one.ok().stderr
        folders.append(path.with_suffix(""))
    assert column(folders[0], "sample_digest") == column(folders[1], "sample_digest")
    if kind == "kto":
        assert max(column(folders[0], "kl")) > 0.01
        assert column(folders[1], "kl") == pytest.approx(column(folders[0], "kl"), rel=1e-3, abs=1e-5)
    for name in ("loss", "reward_chosen", "log_p_rejected"):
        assert largest_difference(*(column(folder, name)[1:] for folder in folders)) <= 1e-4, name


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_resumed_to_the_same_bits(world: World, commands: Commands, tmp_path: Path, pairs: str, kind: str) -> None:
    stochastic = {"lora": {"dropout": 0.1}}
    whole = commands.train(world.config(tmp_path / "whole.toml", settings(pairs, kind), stochastic))
    config = world.config(tmp_path / "parts.toml", settings(pairs, kind), stochastic)
    commands.train(config, "train.max_steps=5")
    parts = commands.train(config)
    for name in ("loss", "grad_norm", *(KTO.figures if kind == "kto" else FIGURES)):
        assert column(whole, name) == column(parts, name), name
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("processes", [1, 2])
def test_reference_of_an_adapter_that_is_gone_on_with(
    world: World, commands: Commands, tmp_path: Path, pairs: str, processes: int
) -> None:
    """As it was when training began, also after a stop; or the model without it."""
    tuned = commands.train(world.config(tmp_path / "tuned.toml", {"lora": {"rank": 8, "alpha": 16}}))
    base = {"model": {"adapter": str(tuned / "adapter")}}

    def trained(name: str, *more: dict[str, Any], steps: tuple[int, ...] = (6,)) -> Path:
        config = world.config(tmp_path / f"{name}.toml", settings(pairs), base, *more)
        for count in steps:
            for one in run_together(commands, processes, CAPTION, config, f"train.max_steps={count}"):
                one.ok()
        return config.with_suffix("")

    start, stopped = trained("start"), trained("stopped", steps=(3, 6))
    first = metrics(start)[0]
    assert first["loss"] == pytest.approx(0.6931472, rel=1e-6) and first["reward_chosen"] == 0.0
    for name in ("loss", "reward_chosen", "log_p_chosen"):
        assert column(start, name) == column(stopped, name), name
    other = metrics(trained("base", {"objective": {"reference": "base"}}))[0]
    assert other["log_p_chosen"] == first["log_p_chosen"] and abs(other["reward_chosen"]) > 0.1


@pytest.mark.parametrize(("kind", "begin"), [("dpo", "base"), ("dpo", "adapter"), ("kto", "base")])
def test_reference_once_as_in_every_step(
    world: World, commands: Commands, tmp_path: Path, pairs: str, kind: str, begin: str
) -> None:
    """Nothing is dropped out of the reference."""
    base: dict[str, Any] = {}
    if begin == "adapter":
        tuned = commands.train(world.config(tmp_path / "tuned.toml", {"lora": {"rank": 8, "alpha": 16}}))
        base = {"model": {"adapter": str(tuned / "adapter")}, "lora": {"dropout": 0.1}}
    every_step, once = (
        commands.train(world.config(tmp_path / f"{n}.toml", settings(pairs, kind), base, one), "train.max_steps=6")
        for n, one in enumerate(({}, ONCE))
    )
    for name in ("loss", "grad_norm", *(KTO if kind == "kto" else Preference).figures):
        assert column(once, name) == pytest.approx(column(every_step, name), rel=1e-6, abs=1e-6), name


def test_full_tuning_from_what_the_base_was(world: World, commands: Commands, tmp_path: Path, pairs: str) -> None:
    """Also if a resumed run finds the cache gone, and with two processes. Held-out pairs have no rewards then."""
    held_out = {"every_steps": 4, "max_new_tokens": 2, "sources": [{"format": "messages", "path": pairs}]}

    def trained(name: str, processes: int, *steps: int, **more: Any) -> Path:
        cache = tmp_path / f"{name}-cache"
        own = {**FULL_TUNING, "data": {"cache_dir": str(cache)}}
        config = world.config(tmp_path / f"{name}.toml", settings(pairs, learning_rate=1e-3), own, more)
        for count in steps:
            shutil.rmtree(cache, ignore_errors=True)
            for one in run_together(commands, processes, CAPTION, config, f"train.max_steps={count}"):
                one.ok()
        return config.with_suffix("")

    whole, stopped = trained("whole", 1, 4, eval=held_out), trained("stopped", 1, 2, 4)
    scored, *lines, scored_last = metrics(whole)
    assert "eval_likelier_chosen" in scored.keys() & scored_last.keys() and "eval_reward_margin" not in scored
    first, last = lines[0], lines[-1]
    assert first["loss"] == pytest.approx(0.6931472, rel=1e-6)
    assert (first["reward_chosen"], first["reward_rejected"], first["reward_accuracy"]) == (0.0, 0.0, 0.5)
    assert last["reward_chosen"] - last["reward_rejected"] > 0.1
    two = metrics(trained("two", 2, 2, 4))
    for name in ("loss", "grad_norm", *FIGURES):
        assert [line[name] for line in lines] == column(stopped, name), name
        for one, other in zip(lines, two, strict=True):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), name
    files = [folder / "model" / "model.safetensors" for folder in (whole, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_the_reference_computed_is_kept(world: World, commands: Commands, tmp_path: Path, pairs: str) -> None:
    """For other runs, too. Half a file is completed, and a damaged one made again."""

    def trained(name: str, *overrides: str) -> str:
        config = world.config(tmp_path / f"{name}.toml", settings(pairs), ONCE, {"data": {"cache_dir": str(tmp_path)}})
        return commands.run(CAPTION, config, "train.max_steps=1", *overrides).ok().stderr

    def values() -> torch.Tensor:
        return torch.frombuffer(bytearray(file.read_bytes())[32:], dtype=torch.float32)

    assert "computes log-probabilities of 7 of 7 documents, once" in trained("first")
    (file,) = (tmp_path / "reference").glob("*.bin")
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    assert values().isfinite().all() and (values() < 0).all() and len(values()) == 22
    assert "computes" not in trained("second", "objective.kind=ipo", "objective.beta=0.2", "lora.rank=4", "seed=1")
    assert file.stat().st_mtime_ns == written

    half = values()
    half[8:] = torch.nan
    reference._write(file, half)
    assert "computes log-probabilities of 5 of 7 documents" in trained("half")
    torch.testing.assert_close(values(), torch.frombuffer(bytearray(whole)[32:], dtype=torch.float32))
    assert torch.equal(values()[:8], half[:8])

    file.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    message = trained("damaged")
    assert "damaged; the reference computes again" in message and "of 7 of 7" in message
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-1])
    assert reference._read(file) is None


def test_what_the_reference_depends_on(world: World, tmp_path: Path, pairs: str) -> None:
    root = tmp_path / "data"
    shutil.copytree(world.root, root)

    def key(**setting: Any) -> str:
        own = {"data": {"root": str(root), "cache_dir": str(tmp_path)}, **ONCE}
        config = load(world.config(tmp_path / "run.toml", settings(pairs), own, setting))
        prepared, objective = open_for_training(config), objective_of(config)
        assert isinstance(objective, Preference)
        documents = load_training(task_of(config), config, prepared.encoder(config.data))
        return reference._key(objective, prepared, config, documents)

    first = key()
    assert key(seed=3, objective={"beta": 0.5}, lora={"rank": 2}, train={"learning_rate": 1.0}) == first
    other_media = {"video": {"frames": 2}}
    keys = {first, key(data=other_media), key(train={"precision": "bf16"}), key(model={"quantize": "nf4"})}
    keys |= {key(model={"path": str(world.other_base)}), key(**FULL_TUNING), key(data={"pack_tokens": 300})}
    os.utime(root / "red.mp4", (1, 1))
    keys |= {second := key()}
    (root / pairs).write_text((root / pairs).read_text().replace("Grey", "Gray"))
    keys |= {key()}
    assert len(keys) == 9 and second != first


def test_clips_that_the_reference_cannot_see(world: World, commands: Commands, tmp_path: Path, pairs: str) -> None:
    """They are left out from the first step on, and replaced as in a run that meets them later."""
    root = tmp_path / "data"
    shutil.copytree(world.root, root)
    damage(root / "red.mp4")
    own = {"data": {"root": str(root), "cache_dir": str(tmp_path), "max_bad_fraction": 0.2}}
    files = [world.config(tmp_path / f"{n}.toml", settings(pairs), own, one) for n, one in enumerate(({}, ONCE))]
    every_step, once = (commands.train(file, "train.max_steps=6") for file in files)
    assert column(every_step, "sample_digest") == column(once, "sample_digest")
    assert column(every_step, "loss") == pytest.approx(column(once, "loss"), rel=1e-6)
    assert [json.loads(line)["path"] for line in (once / "quarantine.jsonl").read_text().splitlines()] == [
        f"{root}/red.mp4"
    ]
    again = commands.run(CAPTION, files[1], "train.max_steps=8").ok()
    assert "of 1 of 7 documents" in again.stderr
    strict = commands.run(CAPTION, files[1], f"output_dir={tmp_path / 'strict'}", "data.max_bad_fraction=0.1")
    assert "2 of 11 samples can't be used" in strict.error


def test_what_the_reference_cannot_compute_or_keep(
    world: World, commands: Commands, tmp_path: Path, pairs: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    own = {"data": {"cache_dir": str(tmp_path)}}
    config = world.config(tmp_path / "run.toml", settings(pairs), ONCE, own)
    error = commands.run(CAPTION, config, f"model.path={base}").error
    assert re.search(r"samples .*: the reference gives their answers the log-probabilities \[.*nan", error)
    shutil.rmtree(tmp_path / "reference")
    (tmp_path / "reference").write_text("")
    other = f"output_dir={tmp_path / 'other'}"
    assert re.search("reference.*: can't be written .*data.cache_dir", commands.run(CAPTION, config, other).error)


def test_a_plan_without_a_pass_of_the_reference(world: World, tmp_path: Path, pairs: str) -> None:
    """The reference's pass is nearly half of what a step computes besides, layers of adapters in between."""
    flops = {}
    for passes in ("every_step", "once"):
        own = {"objective": {"reference_passes": passes}, "parallel": {"activation_checkpointing": "none"}}
        config = load(world.config(tmp_path / "run.toml", settings(pairs), own))
        planner = Planner(objective_of(config))
        row = filled_row(planner.model_of(config).processor, config.data, 64, answers=2)
        flops[passes] = planner.kernels_of(config, row).product_flops
    assert 1.35 < flops["every_step"] / flops["once"] < 1.5


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_packed_and_alone(world: World, commands: Commands, tmp_path: Path, pairs: str, kind: str) -> None:
    """A step of all pairs, in one row or each in its own with its own copy of the video."""
    packs = 22 if kind == "kto" else 11
    apart = {"data": {"max_samples_per_pack": 1, "share_videos": False}, "train": {"packs_per_step": packs}}
    together = {"data": {"pack_tokens": 4096}, "train": {"packs_per_step": 1}}
    found = [
        metrics(commands.train(world.config(tmp_path / f"{n}.toml", settings(pairs, kind), one), "train.max_steps=2"))
        for n, one in enumerate((apart, together))
    ]
    assert found[1][0]["tokens"] < found[0][0]["tokens"]
    for lines in zip(*found, strict=True):
        for name in ("loss", "samples", *(KTO.figures if kind == "kto" else FIGURES)):
            assert lines[1][name] == pytest.approx(lines[0][name], rel=2e-4, abs=1e-6), name


def test_memory_saved_and_packed_weights(world: World, commands: Commands, tmp_path: Path, pairs: str) -> None:
    """With recomputed layers the same losses; a base of 4 bits learns, too."""
    plain = commands.train(world.config(tmp_path / "plain.toml", settings(pairs)), "train.max_steps=4")
    again = commands.train(
        world.config(tmp_path / "again.toml", settings(pairs)),
        "train.max_steps=4",
        "parallel.activation_checkpointing=full",
    )
    assert column(again, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)
    packed = world.config(tmp_path / "packed.toml", settings(pairs), {"model": {"quantize": "nf4"}})
    losses = column(commands.train(packed), "loss")
    assert losses[-1] < 0.3 < losses[0]


def test_public_sets(world: World, commands: Commands, tmp_path: Path) -> None:
    """Folders laid out as LLaVA-Hound's, RLAIF-V's and TRL's pairs: frames, and pictures inside tables."""
    frames = tmp_path / "data" / "hound" / "train_300k" / "v_1"
    frames.mkdir(parents=True)
    pictures = []
    for number, colour in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (84, 56), colour).save(frames / f"c01_{number:04}.jpeg")
        pictures.append({"bytes": (frames / f"c01_{number:04}.jpeg").read_bytes(), "path": f"{number}.jpg"})
    answers = {"chosen": "It changes.", "rejected": "It is grey."}
    hound = {
        "id": "v_1_0",
        "video": "v_1",
        "prompt": "<video>\nWhat?",
        "answer": "Colours.",
        **answers,
        "chosen_score": 5,
    }
    (tmp_path / "data" / "hound" / "pairs.jsonl").write_text(json.dumps(hound))
    rows = [
        {"image": one, "question": "Which?", **answers, "image_path": f"coco/{i}.jpg"} for i, one in enumerate(pictures)
    ]
    typed = [{"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
    said = {key: [{"role": "assistant", "content": [{"type": "text", "text": one}]}] for key, one in answers.items()}
    (tmp_path / "data" / "trl").mkdir()
    for name, table in (
        ("r.parquet", rows),
        ("trl/t.parquet", [{"images": pictures[:1], "prompt": [{"role": "user", "content": typed}], **said}]),
    ):
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "data" / name)
    paths = ("hound/pairs.jsonl", "r.parquet", "trl")
    sources = [{"format": "messages", "path": path} for path in paths]
    sources[0]["media"] = "hound/train_300k"
    data = {
        "root": str(tmp_path / "data"),
        "sources": sources,
        "cache_dir": str(tmp_path / "cache"),
        "pack_tokens": 1024,
    }
    config = world.config(
        tmp_path / "run.toml", settings(""), {"data": data, "train": {"max_steps": 2, "packs_per_step": 1}}
    )
    (first, _) = metrics(commands.train(config))
    assert first["samples"] == 6 and first["loss"] == pytest.approx(0.6931472, rel=1e-6)
    assert len(list((tmp_path / "cache" / "files").iterdir())) == len(pictures)


@pytest.mark.parametrize(
    ("record", "setting", "named"),
    [
        ({"messages": []}, {}, r"pairs\.jsonl:1: messages"),
        ({"prompt": "<video>What?", "chosen": "A.", "rejected": "A. "}, {}, "pairs.jsonl:1: rejected: .*chosen answer"),
        ({"prompt": "<video>What?", "chosen": " ", "rejected": "B."}, {}, "pairs.jsonl:1: chosen: is an empty answer"),
        ({"prompt": "<video>What?", "chosen": "A.", "rejected": 3}, {}, "pairs.jsonl:1: rejected: 3 is of type int"),
        ({"prompt": "<video>What?", "rejected": "B."}, {}, r"pairs\.jsonl:1: .*rejected_response.*one answer|messages"),
        ({"chosen": "A.", "rejected": "B."}, {}, "pairs.jsonl:1: chosen: needs one prompt"),
        ({"prompt": "x", "question": "y", "chosen": "A.", "rejected": "B."}, {}, "chosen: needs one prompt.*question"),
        ({}, {"objective": {"kind": "dpo", "gamma": 1.0}}, "gamma = 1.0 is of simpo"),
        ({}, {"objective": {"kind": "orpo", "reference": "base"}}, "orpo has no reference"),
        (
            {},
            {**FULL_TUNING, "objective": {"kind": "dpo", "reference_passes": "every_step"}},
            r"reference_passes = .every_step. needs a \[lora\] table",
        ),
        (
            {},
            {"objective": {"kind": "simpo", "reference_passes": "once"}},
            "reference_passes = .*simpo has no reference",
        ),
        ({}, {"objective": {"kind": "dpo", "reference_passes": "twice"}}, "objective.reference_passes"),
        ({}, {**STREAMED, "objective": {"kind": "dpo", "reference_passes": "once"}}, "once.: .pe. has stream = true"),
        (
            {"prompt": "<video>What?", "chosen": "A.", "rejected": "B."},
            {**FULL_TUNING, "eval": {"every_steps": 1, "best_metric": "reward_margin"}},
            "eval.best_metric = 'reward_margin': caption has .*loss, likelier_chosen $",
        ),
        ({}, {**STREAMED, **FULL_TUNING}, "once.: .pe. has stream = true"),
        ({}, {"objective": {"kind": "kto", "rpo_alpha": 1.0}}, "rpo_alpha = 1 is of pairs"),
        ({}, {"objective": {"kind": "dpo", "desirable_weight": 1.0}}, "desirable_weight = 1.0 is of kto"),
        ({"prompt": "<video>What?", "completion": "A.", "label": True}, {}, "pairs.jsonl:1: rejected_response: .*dpo"),
        ({"prompt": "<video>What?", "completion": "A.", "label": False}, {"objective": None}, "label: false marks"),
        ({"prompt": "<video>What?", "completion": "A.", "label": 1}, {}, "pairs.jsonl:1: label: 1 must be true"),
        (
            {"prompt": "<video>What?", "completion": "A.", "label": True},
            {"objective": {"kind": "kto"}},
            "pairs.jsonl:1: no record has another answer",
        ),
        (
            {"messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "A."}]},
            {"objective": {"kind": "kto"}},
            "pairs.jsonl:1: label: objective.kind = 'kto' learns",
        ),
        ({}, {"objective": {"kind": "pdo"}}, "objective.kind"),
    ],
)
def test_bad_input(
    world: World, commands: Commands, tmp_path: Path, record: dict[str, Any], setting: dict[str, Any], named: str
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "red.mp4").write_bytes((world.root / "red.mp4").read_bytes())
    (root / "pairs.jsonl").write_text(json.dumps({"videos": ["red.mp4"], **record}) + "\n")
    config = world.config(tmp_path / "run.toml", settings("pairs.jsonl"), {"data": {"root": str(root)}}, setting)
    result = commands.run(CAPTION, config)
    assert result.status != 0
    assert "Traceback" not in result.stderr

    assert re.search(named, result.stderr.replace("\n", " ")), result.stderr
    assert not (tmp_path / "run").exists()
