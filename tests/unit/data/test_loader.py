"""What the loader does ahead of the loop, and what of it shows before a pack is taken."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from tests.helpers.tiny import Tiny, medium, talk
from vft.common.errors import UserError
from vft.common.types import MediaPlan, Patches
from vft.config.data import DataConfig, VideoConfig
from vft.data import loader as loading
from vft.data.dataset import Dataset, make_dataset
from vft.data.loader import Loader
from vft.data.media.errors import MediaError
from vft.data.quarantine import BadItem
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel

CLIPS = dict(medium("video", 4, 56, 56, fps=1.0, name=f"clip{n}") for n in range(3))


class Decoder:
    """Blank frames at once; of some clips none."""

    def __init__(self, *broken: str) -> None:
        self.broken, self.asked = broken, list[str]()

    def submit(self, pool: Any, plan: MediaPlan, processor: Any) -> Future[Patches]:
        """As `FrameCache.submit`."""
        future: Future[Patches] = Future()
        self.asked.append(plan.ref.name)
        if plan.ref.name in self.broken:
            future.set_exception(MediaError("decode", f"{plan.ref.name}: can't be decoded"))
        else:
            shape = (math.prod(plan.grid_thw), processor.patch_features)
            future.set_result(Patches(torch.zeros(shape, dtype=torch.uint8), plan.grid_thw, plan.seconds_per_grid))
        return future


def clips(tiny: Tiny) -> Dataset:
    """A document for each clip, one a row."""
    talks = [talk(("user", [ref, "What?"]), ("assistant", "This."), id=ref.name) for ref in CLIPS]
    config = DataConfig(pack_tokens=400, max_samples_per_pack=1, video=VideoConfig(frames=4, max_pixels=56 * 56))
    return make_dataset(talks, tiny.encoder, config, CLIPS.__getitem__)


def loader_of(dataset: Dataset, decoder: Decoder, pool: WorkerPool | None = None) -> Loader:
    loader = Loader(dataset, dataset.pack_plan(0), pool or WorkerPool(0, 1.0), DataParallel(), 1, 2, None)
    loader._frames = decoder  # type: ignore[assignment]
    return loader


def test_the_next_pack_is_made_while_one_is_worked_on(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread of its own; none of it shows in the state before it is taken, and none is made after the last."""
    threads: list[str] = []
    collate = loading.collate
    monkeypatch.setattr(loading, "collate", lambda *a: threads.append(threading.current_thread().name) or collate(*a))
    loader = loader_of(clips(tiny), Decoder())
    (pack,) = loader.step()
    assert loader._next is not None and loader._next.result(10).batch.sample_ids != pack.batch.sample_ids
    assert threads == ["vft-next-pack"] * 2 and loader.cursor.step == 1
    (after,) = loader.step(is_last=True)
    assert threads == ["vft-next-pack"] * 2 and loader.cursor.step == 2 and loader._next is None
    assert after.batch.sample_ids != pack.batch.sample_ids


def test_what_cannot_be_decoded_is_reported_when_its_pack_is_taken(tiny: Tiny) -> None:
    """Not a step earlier, where a thread was quick."""
    dataset = clips(tiny)
    order = [dataset.documents[n].conversations[0].id for (n,) in dataset.pack_plan(0).packs(0)]
    loader = loader_of(dataset, Decoder(order[1]))
    for step, reported in enumerate((0, 1)):
        (_,) = loader.step()
        assert loader._next is not None and loader._next.result(10)
        assert len(loader.bad.report) == reported, step


def test_a_pack_made_before_a_clip_was_known_to_be_bad_is_made_again(tiny: Tiny) -> None:
    """As a run that resumes there makes it: it knows of the clip, and has nothing made before."""
    dataset = clips(tiny)
    order = [dataset.documents[n].conversations[0].id for (n,) in dataset.pack_plan(0).packs(0)]
    straight = loader_of(dataset, Decoder())
    list(straight.step())
    assert straight._next is not None and straight._next.result(10).batch.sample_ids == (order[1],)
    item = BadItem(order[1], order[1], "deadline", "another process could not decode it")
    straight.bad.known[item.key] = item
    resumed = loader_of(dataset, Decoder())
    resumed.restore(straight.state())
    found = [[pack.batch.sample_ids for pack in loader.step()] for loader in (straight, resumed)]
    assert found[0] == found[1] != [(order[1],)]


def test_shared_memory_that_holds_no_row(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found at the start, with both numbers, not as a bus error in a worker; with little, fewer packs wait."""
    dataset = clips(tiny)
    row_bytes = dataset.documents[0].work.patches * tiny.encoder.processor.patch_features
    with WorkerPool(1, 10.0) as pool:
        monkeypatch.setattr(loading, "shared_memory_bytes", lambda: row_bytes - 1)
        with pytest.raises(
            UserError, match=f"^/dev/shm has {row_bytes - 1:,} bytes free.* take {row_bytes:,} for each"
        ):
            loader_of(dataset, Decoder(), pool)
        monkeypatch.setattr(loading, "shared_memory_bytes", lambda: 3 * row_bytes)
        assert loader_of(dataset, Decoder(), pool)._max_pending_bytes == 2 * row_bytes
        monkeypatch.setattr(loading, "shared_memory_bytes", lambda: 1 << 40)
        assert loader_of(dataset, Decoder(), pool)._max_pending_bytes == loading.MAX_PENDING_BYTES
