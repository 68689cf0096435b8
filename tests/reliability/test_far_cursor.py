"""A run goes on ten million samples into its data as fast as at the beginning: nothing is read or decoded to get there.

`--count` is the number of documents in the large index, in thousands.
"""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.streaming import MAKE, clip, data_config, pe_pair, pe_shards
from tests.helpers.tars import write_tar
from tests.helpers.tiny import Tiny
from tests.runs.world import record, write_clip
from vft.config.data import DataConfig
from vft.data.dataset import Dataset, load_dataset
from vft.data.loader import Loader
from vft.data.packing import Cursor
from vft.data.streaming.stream import Streams
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel

FAR = 10_000_000
"""Samples trained on before."""
LIMIT_S = 10.0
PACKS_PER_STEP = 4


class CountingPool(WorkerPool):
    """Does at once what it is asked to, and notes what that was."""

    def __init__(self) -> None:
        super().__init__(0, 60.0)
        self.asked: list[str] = []

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """As the pool without workers."""
        self.asked.append(function.__name__)
        return super().submit(function, *args)


def first_step(loader: Loader, cursor: Cursor, streams: dict[str, Sequence[int]]) -> tuple[list[str], float, float]:
    """The samples of the first step of a run that goes on there; seconds to its first batch, by the clock and of this
    process's computing: what else the machine does counts in the first alone."""
    since, busy = time.monotonic(), time.process_time()
    state = {"cursor": {"epoch": cursor.epoch, "pack": cursor.pack, "step": cursor.step}, "bad": [], "streams": streams}
    loader.restore(json.loads(json.dumps(state)))
    packs = loader.step(is_last=True)
    ids = list(next(packs).batch.sample_ids)
    took = time.monotonic() - since, time.process_time() - busy
    for pack in packs:
        ids += pack.batch.sample_ids
    return ids, *took


@pytest.fixture
def few(tiny: Tiny, tmp_path: Path) -> Dataset:
    """Four clips, one question each."""
    for colour in ("red", "green", "blue", "yellow"):
        write_clip(tmp_path / f"{colour}.mp4", colour)
    lines = [{"id": c, **record("<video>What?", c, videos=[f"{c}.mp4"])} for c in ("red", "green", "blue", "yellow")]
    (tmp_path / "videos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = data_config(tmp_path, {"format": "messages", "path": "videos.jsonl"}, max_samples_per_pack=1)
    return load_dataset(config, config.sources, MAKE, tiny.encoder, seed=0)


def loader_of(documents: Dataset, pool: WorkerPool, **more: Any) -> Loader:
    """Of one process that prepares nothing ahead."""
    plan = documents.pack_plan(seed=0)
    return Loader(documents, plan, pool, DataParallel(), PACKS_PER_STEP, prefetch_packs=1, last_epoch=None, **more)


def in_millions(documents: Dataset, number: int) -> Dataset:
    """As many documents as that, made of the same conversations over and over, each with a name of its own."""
    times = number // len(documents.documents)
    planned = [
        replace(one, conversations=tuple(replace(talk, id=f"{talk.id}-{again}") for talk in one.conversations))
        for again in range(times)
        for one in documents.documents
    ]
    made = Dataset(documents.encoder, documents.config, documents.info)
    made.documents = planned
    return made


def test_in_a_small_set_after_millions_of_epochs(few: Dataset) -> None:
    pool = CountingPool()
    epoch, pack = divmod(FAR, len(few.documents))
    ids, by_clock_s, busy_s = first_step(loader_of(few, pool), Cursor(epoch, pack, FAR // PACKS_PER_STEP), {})
    assert sorted(ids) == ["blue", "green", "red", "yellow"]  # an epoch begins there, and a step is all of it
    assert pool.asked == ["load_patches"] * PACKS_PER_STEP
    print(f"4 clips, epoch {epoch:,}: {by_clock_s:.2f} s to the first batch ({busy_s:.2f} s of computing)")
    assert busy_s < LIMIT_S


def test_in_a_large_index(few: Dataset, count: Callable[[int], int]) -> None:
    number = count(100) * 1000
    documents, pool = in_millions(few, number), CountingPool()
    epoch, pack = divmod(FAR + number // 3, number)
    ids, by_clock_s, busy_s = first_step(loader_of(documents, pool), Cursor(epoch, pack, FAR // PACKS_PER_STEP), {})
    # One sample a pack: the epoch's order is that of the packs.
    order = documents.pack_plan(seed=0).documents(epoch)[pack : pack + PACKS_PER_STEP]
    assert ids == [documents.documents[one].conversations[0].id for one in order]
    assert pool.asked == ["load_patches"] * PACKS_PER_STEP
    print(
        f"{number:,} documents, sample {FAR + number // 3:,}, epoch {epoch}: "
        f"{by_clock_s:.2f} s to the first batch ({busy_s:.2f} s of computing)"
    )
    assert busy_s < LIMIT_S


def test_in_streams(tiny: Tiny, tmp_path: Path) -> None:
    """Shards of a set that has been read hundreds of thousands of times, and the last clips of a large one."""
    small, large, clips = [5, 4, 3, 5], 4000, 17
    pe_shards(tmp_path / "data" / "small", small)
    pairs = [member for number in range(large) for member in pe_pair(f"{number:06d}")]
    write_tar(tmp_path / "data" / "large" / "0.tar", pairs)
    with tarfile.open(tmp_path / "data" / "large" / "0.tar") as tar:
        offsets = [member.offset for member in tar if member.name.endswith(".mp4")]
    where: dict[str, list[list[int]]] = {
        # A slot has a shard to itself in `small`, every fourth clip of the one in `large`.
        "small": [[FAR // clips, 0, 0, 0, 0]] * PACKS_PER_STEP,
        "large": [[FAR // large, 0, offsets[large - 4 + slot], large - 4 + slot, 0] for slot in range(PACKS_PER_STEP)],
    }
    for name, positions in where.items():
        source = {"format": "pe_video", "path": name, "stream": True}
        config: DataConfig = data_config(tmp_path / "data", source, max_samples_per_pack=1)
        none, pool = load_dataset(config, [], MAKE, tiny.encoder, seed=0), CountingPool()
        with closing(Streams(config, MAKE, tiny.encoder, pool, PACKS_PER_STEP, seed=0)) as streams:
            streams_at = {f"0:{slot}": position for slot, position in enumerate(positions)}
            loader = loader_of(none, pool, streams=streams)
            ids, by_clock_s, busy_s = first_step(loader, Cursor(0, 0, FAR // PACKS_PER_STEP), streams_at)
        if name == "large":
            assert ids == [f"{large - 4 + slot:06d}" for slot in range(PACKS_PER_STEP)]
        else:
            assert sorted(one[-2:] for one in ids) == ["00"] * 4 and len({one[:3] for one in ids}) == 4
        assert pool.asked.count("load_patches") == PACKS_PER_STEP
        print(f"streams of {name}: {by_clock_s:.2f} s to the first batch ({busy_s:.2f} s of computing)")
        assert busy_s < LIMIT_S
    assert len(clip()) * large > 1 << 22
