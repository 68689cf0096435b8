"""What tools/inspect_batch.py and tools/evaluate.py leave."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs.commands import Commands
from tests.runs.world import ANSWERS, MIXED, PROMPT, World

INSPECT = "tools/inspect_batch.py"
ROWS = {"input_ids_T", "labels_T", "document_T", "branch_T"}
REST = {"positions_3T", "pixels_PD", "grid_thw", "seconds_per_grid", "frame_times_s"}
WHOLE = {"data": {"pack_tokens": 512}}
"""Settings under which all clips fit in one row."""
FORWARD = {"loss_sum", "num_targets", "target_logits_NV"}


def test_first_pack_with_forward(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", WHOLE)
    commands.run(INSPECT, config, "--output", tmp_path / "look", "--forward").ok()
    batch = load_file(tmp_path / "look" / "batch.safetensors")
    assert set(batch) == ROWS | REST | FORWARD
    tokens = batch["input_ids_T"].numel()
    assert {batch[name].shape for name in ROWS} == {(tokens,)} and batch["positions_3T"].shape == (3, tokens)
    # 12 frames in 3 s, of which 4 are seen.
    assert batch["grid_thw"].tolist() == [[2, 4, 4]] * 4
    assert batch["pixels_PD"].shape == (4 * 2 * 4 * 4, 1176) and batch["pixels_PD"].dtype == torch.float32
    assert batch["frame_times_s"].tolist() == [0.0, 1.0, 1.75, 2.75] * 4
    assert batch["seconds_per_grid"].tolist() == [1.5] * 4
    assert torch.equal(batch["document_T"].unique(), torch.arange(4)) and not batch["branch_T"].any()
    # The logits, in row order, are those whose cross-entropies with the labels add up to the loss.
    targets_N = batch["labels_T"][batch["labels_T"] != -100]
    chosen_N = batch["target_logits_NV"].double().log_softmax(-1).gather(-1, targets_N[:, None])
    assert batch["num_targets"] == targets_N.numel()
    torch.testing.assert_close(batch["loss_sum"].double(), -chosen_N.sum(), rtol=1e-5, atol=0)


def test_preview_stands_alone_and_shows_what_is_supervised(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", WHOLE)
    commands.run(INSPECT, config, "--output", tmp_path / "look").ok()
    page = (tmp_path / "look" / "preview.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'\"" in page
    assert not re.search(r"(src|href)=\"?(https?:|//)", page) and "fetch(" not in script
    assert page.count("<img ") == 16
    for kind in ("text", "tokens"):
        rows = re.findall(rf'<div class="{kind}">(.*?)</div>', page, re.DOTALL)
        supervised = [
            "".join(re.findall(r'<span class="mark supervised">(.*?)</span>', row, re.DOTALL)) for row in rows
        ]
        assert sorted(supervised) == sorted(f"{answer}&lt;|im_end|&gt;" for answer in ANSWERS.values())


def test_pictures_and_text_alone(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", MIXED, {"data": {"max_samples_per_pack": 0, "pack_tokens": 1024}})
    commands.run(INSPECT, config, "--output", tmp_path / "look").ok()
    batch = load_file(tmp_path / "look" / "batch.safetensors")
    assert sorted(batch["grid_thw"].tolist()) == sorted([[2, 4, 4]] * 3 + [[1, 4, 4]] * 4)
    assert batch["document_T"].max() == 8


def test_a_folder_with_other_files_is_left_alone(world: World, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "look").mkdir()
    (tmp_path / "look" / "precious.txt").write_text("mine")
    error = commands.run(INSPECT, world.config(tmp_path / "run.toml"), "--output", tmp_path / "look").error
    assert "--output" in error and str(tmp_path / "look") in error
    assert [path.name for path in (tmp_path / "look").iterdir()] == ["precious.txt"]


def test_base_and_adapter_side_by_side(world: World, commands: Commands, learned: Path, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"eval": {"max_new_tokens": 60}})
    shown = commands.run(
        "tools/evaluate.py", config, "--adapter", learned / "adapter", "--compare-base", "--show", "1"
    ).ok()
    folder = tmp_path / "run" / "predictions"
    adapter, base = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("adapter.jsonl", "base.jsonl")
    )
    assert {row["id"]: row["prediction"] for row in adapter} == ANSWERS
    assert all(row["prompt"] == PROMPT and row["reference"] == ANSWERS[row["id"]] for row in adapter + base)
    assert not {row["prediction"] for row in base} & set(ANSWERS.values())
    # A random model never ends; one that has learnt its answers does.
    assert all(row["cut_off"] for row in base) and not any("cut_off" in row for row in adapter)
    assert "warning: base: 4 of 4 answers were cut off at eval.max_new_tokens = 60" in shown.stderr
    assert "warning: adapter" not in shown.stderr
    assert re.search(r"metric\s*┃\s*base\s*┃\s*adapter\s*┃\s*difference", shown.stdout), shown.stdout
    scores = json.loads((folder / "scores.json").read_text())
    before, after, gain = (scores[name]["cider_d"] for name in ("base", "adapter", "difference"))
    assert before["value"] < 1.0 and after["value"] > 5.0
    assert gain["value"] == pytest.approx(after["value"] - before["value"])
    assert 0 < gain["low"] <= gain["value"] <= gain["high"] and f"{gain['value']:+.4g}" in shown.stdout


def test_the_whole_index_in_numbers(world: World, commands: Commands, tmp_path: Path) -> None:
    # Rows too short for a clip with its frames: each loses some, and the page says how many.
    config = world.config(tmp_path / "run.toml", {"data": {"pack_tokens": 73, "video": {"min_frames": 2}}})
    commands.run(INSPECT, config, "--output", tmp_path / "look", "--samples", "2").ok()
    page = (tmp_path / "look" / "preview.html").read_text()
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)", page))
    assert facts["samples"].startswith("4 in 4 documents"), facts
    assert facts["rows of an epoch"].startswith("4, filled to ") and facts["rows of an epoch"].endswith("% on average")
    bars = re.findall(r'title="[\d,]+ to [\d,]+ tokens: (\d+)"', page)
    assert len(bars) == 32 and sum(map(int, bars)) == 4
    kept, of = re.findall(r"frames: (\d+) of (\d+) kept", page)[0]
    assert int(kept) < int(of) and re.search(r"frames in [1-4]\b", facts["dropped to fit a row"]), facts
    # The first row is one of them, two of the others are shown beside it; all can be filtered.
    cards = page.split("<article")[1:]
    for card in cards:
        found = re.search(r'data-source="([^"]*)" data-kinds="([^"]*)"\s+data-shortened="(.)"', card)
        assert found and found.groups() == ("[&#34;videos&#34;]", "video", str(int(" to fit data.pack_tokens" in card)))
    assert [sum(answer in card for answer in ANSWERS.values()) for card in cards] == [1] * 3
    assert len({answer for answer in ANSWERS.values() if answer in page}) == 3
