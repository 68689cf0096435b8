"""The samples of a run, whatever number of processes and workers reads them from one step to another."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tests.helpers.streaming import data_config, running
from tests.helpers.tiny import Tiny
from tests.runs.world import COLOURS, record, write_clip
from vft.config.data import DataConfig

QUESTIONS = 13
"""About each of four clips; with 12 rows a step epochs end within one."""
SLOTS = 12
STAGES = [(1, 0), (2, 2), (4, 0), (3, 0), (1, 8)]
"""Processes and workers of each, two steps long."""


def test_no_sample_is_lost_or_comes_twice(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for colour in COLOURS:
        write_clip(root / f"{colour}.mp4", colour)
    lines = [
        {
            "id": f"{colour}-{number}",
            **record(f"<video>What of {number}?", f"It is {number}.", videos=[f"{colour}.mp4"]),
        }
        for colour in COLOURS
        for number in range(QUESTIONS)
    ]
    (root / "videos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def config(workers: int) -> DataConfig:
        source = {"format": "messages", "path": "videos.jsonl"}
        return data_config(root, source, max_samples_per_pack=1, workers=workers)

    with running(config(0), tiny.encoder, 1, SLOTS) as run:
        undisturbed = run.steps(2 * len(STAGES))
    state, steps = "", []
    for ranks, workers in STAGES:
        with running(config(workers), tiny.encoder, ranks, SLOTS, prefetch=3, state=state) as run:
            steps += run.steps(2)
            state = run.state()
    assert steps == undisturbed
    ids = [one for step in steps for slot in range(SLOTS) for one in step[slot][0]]
    epochs = [ids[begin : begin + len(lines)] for begin in range(0, len(ids), len(lines))]
    assert len(epochs) == 3 and [Counter(epoch) for epoch in epochs[:2]] == [Counter(line["id"] for line in lines)] * 2
    assert len(set(epochs[2])) == len(epochs[2]) and epochs[0] != epochs[1]
    told = ", ".join(f"{ranks}/{workers}" for ranks, workers in STAGES)
    print(f"processes/workers {told}: {len(ids)} samples in {len(steps)} steps, each once an epoch, in the same places")
