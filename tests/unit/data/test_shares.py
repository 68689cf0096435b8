"""How often sources come: `repeats` in an epoch, `share` of the samples; and the older `weight`."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import Tiny
from vft.config.data import DataConfig, SourceConfig
from vft.config.run import Config
from vft.data.dataset import Dataset, load_dataset
from vft.data.packing import Cursor, PackPlan, take_step
from vft.recipes.caption import Caption
from vft.training.checks import warn_of_weights


def lay_out(root: Path, **counts: int) -> None:
    for name, count in counts.items():
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
        rows = [json.dumps({"id": f"{name}{i}", "messages": turns}) for i in range(count)]
        (root / f"{name}.jsonl").write_text("\n".join(rows))


def load(root: Path, tiny: Tiny, **keys: dict[str, Any]) -> Dataset:
    sources = [{"format": "messages", "path": f"{name}.jsonl", **own} for name, own in keys.items()]
    config = DataConfig.model_validate(
        {"root": str(root), "sources": sources, "pack_tokens": 200, "workers": 0, "cache_dir": str(root / "cache")}
    )
    return load_dataset(config, config.sources, Caption().conversations, tiny.encoder, seed=0)


def ids_of(documents: Dataset, numbers: Any) -> Counter[str]:
    return Counter(one.id for number in numbers for one in documents.documents[number].conversations)


def test_repeats_count_each_record_in_an_epoch(tiny: Tiny, tmp_path: Path) -> None:
    lay_out(tmp_path, a=9, b=8, c=10, d=3)
    keys = {"a": {"repeats": 2.0}, "b": {"repeats": 0.5}, "c": {"repeats": 1.3}, "d": {}}
    documents = load(tmp_path, tiny, **keys)
    plan = documents.pack_plan(seed=3)
    epochs = [ids_of(documents, plan.documents(epoch)) for epoch in range(10)]
    for epoch in epochs:
        assert all(epoch[f"a{i}"] == 2 for i in range(9)) and all(epoch[f"d{i}"] == 1 for i in range(3))
        assert sum(epoch[f"b{i}"] for i in range(8)) == 4 and sum(epoch[f"c{i}"] for i in range(10)) == 13
    for first, second in pairwise(epochs):  # each record every second epoch
        assert all(first[f"b{i}"] + second[f"b{i}"] == 1 for i in range(8))
    assert all(sum(epoch[f"c{i}"] for epoch in epochs) == 13 for i in range(10))
    assert epochs[0] != ids_of(documents, documents.pack_plan(seed=4).documents(0))
    packed = ids_of(documents, (number for pack in plan.packs(0) for number in pack))
    assert packed == epochs[0]


def test_shares_are_of_the_samples_whatever_the_sizes(tiny: Tiny, tmp_path: Path) -> None:
    lay_out(tmp_path, a=40, b=7, c=100)
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    documents = load(tmp_path, tiny, **{name: {"share": share} for name, share in shares.items()})
    plan, cursor, seen = documents.pack_plan(seed=0), Cursor(), Counter[str]()
    for _ in range(60):
        packs, cursor = take_step(plan, cursor, 8, None)
        seen.update(one[0] for one in ids_of(documents, (n for pack in packs for n in pack.documents)).elements())
    total = seen.total()
    assert total > 1000
    for name, share in shares.items():
        assert seen[name] / total == pytest.approx(share, abs=0.01)
    epoch = ids_of(documents, plan.documents(0))
    assert abs(epoch.total() - 147) <= 3 and {name[0] for name in epoch} == {"a", "b", "c"}


def test_records_of_one_video_in_sources_with_shares_stay_apart(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"")
    from PIL import Image

    Image.new("RGB", (56, 56)).save(tmp_path / "x.jpg")
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"id": name, "image": "x.jpg", "question": name, "answer": "x"})
        )
    assert len(load(tmp_path, tiny, a={}, b={}).documents) == 1
    assert len(load(tmp_path, tiny, a={"share": 0.5}, b={"share": 0.5}).documents) == 2


def test_a_source_without_samples_has_no_share(tiny: Tiny, tmp_path: Path) -> None:
    lay_out(tmp_path, a=2)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"b\.jsonl: share = 0\.5, but it has no samples"):
        load(tmp_path, tiny, a={"share": 0.5}, b={"share": 0.5})


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("weight", [0.01, 0.5, 1.0, 3.0])
def test_a_tiny_set_fills_every_step(count: int, weight: float) -> None:
    plan = PackPlan((10,) * count, (1,) * count, (weight,) * count, 100, 1, seed=0)
    cursor, seen = Cursor(), Counter[int]()
    for _ in range(5):
        packs, cursor = take_step(plan, cursor, 16, None)
        assert all(len(pack.documents) == 1 for pack in packs)
        seen.update(pack.documents[0] for pack in packs)
    assert max(seen.values()) - min(seen.values()) <= max(1, weight) and len(seen) == count


def sources(*keys: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"format": "messages", "path": f"{i}.jsonl", **own} for i, own in enumerate(keys)]


STREAM = {"format": "pe_video", "stream": True}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([{"share": 0.5, "repeats": 2.0}], r"repeats = 2 and share = 0\.5 contradict"),
        ([{"weight": 2.0, "repeats": 2.0}], "repeats = 2 and weight = 2 contradict"),
        ([{"weight": 2.0, "share": 1.0}], "share = 1 and weight = 2 contradict"),
        ([{"share": 0.5}, {}], r"1 of 2 have a share.*1\.jsonl.*has none"),
        ([{"share": 0.5}, {"share": 0.4}], r"0\.5 \+ 0\.4, sum to 0\.9; they must sum to 1"),
        ([{"share": 0.7}, {"share": 0.7}], r"sum to 1\.4"),
        ([{"weight": 2.0}, {"repeats": 3.0}], r"weight = 2 .* repeats = 3 .* contradict"),
        ([{**STREAM, "repeats": 2.0}], "counts in epochs.*share"),
        ([{"repeats": 0.0}], "greater than or equal to 0.001"),
        ([{"share": 1.5}], "less than or equal to 1"),
    ],
)
def test_contradictions(keys: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataConfig.model_validate({"sources": sources(*keys)})


def whole(train: dict[str, Any], eval: dict[str, Any], *keys: dict[str, Any]) -> Config:
    data = {"sources": sources(*keys)}
    return Config.model_validate(
        {"output_dir": "x", "model": {"path": "x"}, "data": data, "train": train, "eval": eval}
    )


def test_shares_have_no_epochs_and_evaluation_asks_once() -> None:
    assert whole({"max_steps": 3}, {}, {"share": 0.1}, {"share": 0.2}, {"share": 0.7}).train.max_steps == 3
    for train in ({}, {"epochs": 2}):
        with pytest.raises(ValueError, match=r"train\.max_steps is needed.*share"):
            whole(train, {}, {"share": 1.0})
    for key in ("repeats", "share"):
        with pytest.raises(ValueError, match="asked once"):
            whole({}, {"sources": sources({key: 1.0})}, {})


def test_weight_is_read_as_before_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vft")
    config = whole({"max_steps": 3}, {}, {"weight": 2.5}, {})
    warn_of_weights(config)
    warn_of_weights(whole({}, {}, {"repeats": 2.5}, {}))
    (message,) = caplog.messages
    assert "0.jsonl 2.5" in message and "repeats" in message
    assert [source.times for source in config.data.sources] == [2.5, 1.0]
    streamed = whole({"max_steps": 3}, {}, {**STREAM, "weight": 2.0}, {})
    warn_of_weights(streamed)
    assert "rows of a step" in caplog.messages[1] and "share" in caplog.messages[1]
    assert SourceConfig(format="messages", path="x").times == 1.0
