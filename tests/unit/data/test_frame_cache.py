"""Frames kept on disk: what is loaded with them is bit for bit what is loaded without, whatever happens to the files.

Where it matters that nothing was decoded, the media are overwritten behind the cache's back, with size and time kept.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.clips import make_clip
from tests.helpers.frames import cache_in, count_decoding, decoded, files_in, film, loaded, overwrite, plan_for
from tests.helpers.patches import HANGING, SPEC, plan_of
from tests.helpers.streaming import MAKE, damaged_clip, data_config, pe_shards, running
from tests.helpers.tiny import CPU, Tiny
from tests.reliability.in_workers import import_all
from vft.common.types import MediaPlan, MediaRef, Patches
from vft.config.data import DataConfig
from vft.config.run import Config, differences
from vft.data.dataset import load_dataset
from vft.data.loader import Loader
from vft.data.media import frame_cache
from vft.data.media.errors import MediaError
from vft.data.media.frame_cache import FrameCache
from vft.data.media.patches import decode_resized
from vft.data.media.video import scan
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel, World
from vft.inference.engine import Answerer, PreparedQuestion
from vft.inference.requests import user_question


@pytest.fixture
def plan(tmp_path: Path) -> MediaPlan:
    return plan_for(film(tmp_path / "clip.mp4"))


# ---------------------------------------------------------------------------------- the same as without, over a run


def write_set(root: Path) -> DataConfig:
    """Videos of several forms, a picture, several questions on one video, and a clip that can't be decoded."""
    root.mkdir()
    for number, size in enumerate([(96, 64), (64, 96), (64, 64)]):
        make_clip(root / f"{number}.mp4", range(8 + number), size=size)
    make_clip(root / "varying.mkv", (0, 1, 5, 6, 12, 13, 14, 20), ticks_per_frame=4)
    noise = np.random.default_rng(0).integers(0, 256, (5, 70, 90, 3), dtype=np.uint8)
    for number, pixels_HWC in enumerate(noise):
        Image.fromarray(pixels_HWC).save(root / f"{number}.png")
    (root / "damaged.mp4").write_bytes(damaged_clip())
    media: list[tuple[str, Any]] = [("videos", f"{number}.mp4") for number in (0, 1, 2, 2)]
    media += [("videos", "varying.mkv"), ("videos", "damaged.mp4"), ("images", "4.png")]
    media += [("videos", [f"{number}.png" for number in range(3)])]
    records = []
    for number, (kind, one) in enumerate(media):
        turns = [{"role": "user", "content": f"<{kind[:-1]}>What {number}?"}, {"role": "assistant", "content": "It."}]
        records.append({"id": str(number), "messages": turns, kind: [one]})
    (root / "set.json").write_text(json.dumps(records))
    return data_config(root, {"format": "messages", "path": "set.json"})


def epochs(config: DataConfig, tiny: Tiny, pool: WorkerPool, epochs: int) -> tuple[list[Any], list[str]]:
    """Everything that a run gets of its packs, and which clips are bad and why."""
    documents = load_dataset(config, config.sources, MAKE, tiny.encoder, seed=0)
    plan, found = documents.pack_plan(seed=0), []
    loader = Loader(documents, plan, pool, DataParallel(), 1, 1, last_epoch=epochs - 1)
    for _ in range(sum(len(plan.packs(epoch)) for epoch in range(epochs))):
        for pack in loader.step():
            batch = pack.batch
            found.append((pack.digest, batch.sample_ids, batch.grids, batch.input_ids_T.tolist(), batch.pixels_PD))
        loader.bad.merge([loader.bad.report])
    return found, [f"{item.reason} {item.message}" for item in loader.bad.known.values()]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    assert [one[:-1] for one in found] == [one[:-1] for one in expected]
    assert all(torch.equal(one[-1], other[-1]) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_sees_the_same_with_and_without(tiny: Tiny, tmp_path: Path, workers: int) -> None:
    """Over two epochs, and in a second run that could not decode anything; a clip that fails does so every time."""
    plain = write_set(tmp_path / "data")
    cached = plain.model_copy(update={"cache": "frames"})
    with WorkerPool(workers, 60.0) as pool:
        expected, bad = epochs(plain, tiny, pool, 2)
        assert len(bad) == 1 and bad[0].startswith("decode_error ")
        assert sum(len(ids) for _, ids, *_ in expected) > 14
        found, found_bad = epochs(cached, tiny, pool, 2)
        assert_equal(found, expected)
        assert found_bad == bad
        assert len(files_in(FrameCache.of(cached))) == 5  # three clips, one of varying rate, a list of pictures
        for path in [*plain.root.glob("*.mp4"), *plain.root.glob("*.mkv"), *plain.root.glob("[0-3].png")]:
            overwrite(path)
        found, found_bad = epochs(cached, tiny, pool, 2)
        assert_equal(found, expected)
        assert [message.partition(" ")[0] for message in found_bad] == ["not_a_video"]
        assert len(epochs(plain, tiny, pool, 1)[1]) == 6  # without the cache it shows


def test_questions_are_asked_about_the_same_frames(tiny: Tiny, tmp_path: Path) -> None:
    """What evaluation and its tool use."""
    path = film(tmp_path / "clip.mp4")
    question = user_question("a", [MediaRef("video", path)], "What?")

    def pixels(cache: str) -> Tensor:
        config = data_config(tmp_path, cache=cache)
        world = World(rank=0, size=1, local_rank=0, device=CPU)
        with WorkerPool(0, 60.0) as pool:
            prompt = Answerer(tiny.ours(), tiny.encoder, config, scan, pool, world).start(question, 1)
        assert isinstance(prompt, PreparedQuestion)
        return prompt.patches[0].pixels_PD

    expected = pixels("none")
    assert torch.equal(pixels("frames"), expected)
    again = scan(question.prompt.media[0])
    overwrite(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "scan", lambda ref: again)
        assert torch.equal(pixels("frames"), expected)


def test_streams_are_not_kept(tiny: Tiny, tmp_path: Path) -> None:
    """Their clips are passing copies that no later epoch would find; the index beside them is kept."""
    root = tmp_path / "data"
    pe_shards(root / "pe", [3, 2])
    make_clip(root / "a.mp4", range(8), fps=4)
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "It."}]
    (root / "set.json").write_text(json.dumps([{"messages": turns, "videos": ["a.mp4"]}]))
    sources: list[dict[str, Any]] = [
        {"format": "pe_video", "path": "pe", "stream": True},
        {"format": "messages", "path": "set.json"},
    ]
    steps = {}
    for cache in ("none", "frames"):
        config = data_config(root, *sources, max_samples_per_pack=1, cache=cache)
        with running(config, tiny.encoder) as run:
            steps[cache] = run.steps(8)
    assert steps["none"] == steps["frames"]
    assert len(files_in(FrameCache.of(config))) == 1


def test_settings() -> None:
    base = {"output_dir": "x", "model": {"path": "m"}, "train": {"max_steps": 1}}
    stream = {"format": "pe_video", "path": "p", "stream": True}
    other = {"format": "messages", "path": "o.json"}
    with pytest.raises(ValueError, match=r'data.cache = "frames" keeps nothing of sources with stream = true'):
        Config.model_validate({**base, "data": {"sources": [stream], "cache": "frames"}})
    for data, held_out in (([stream, other], []), ([stream], [other]), ([], [])):
        Config.model_validate({**base, "data": {"sources": data, "cache": "frames"}, "eval": {"sources": held_out}})
    plain, cached = (Config.model_validate({**base, "data": {"cache": c}}) for c in ("none", "frames"))
    assert not differences(plain, cached)  # a run may go on with it, or without
    assert FrameCache.of(plain.data).folder is None


# ----------------------------------------------------------------------------------------------------- stale entries


def test_a_hit_decodes_nothing(plan: MediaPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, expected, seen = cache_in(tmp_path), decoded(plan), count_decoding(monkeypatch)
    for decodings in (1, 1, 1):
        assert torch.equal(loaded(cache, plan), expected)
        assert len(seen) == decodings
    with WorkerPool(0, 60.0) as pool:
        patches = cache.submit(pool, plan, SPEC).result()
    assert type(patches) is Patches and patches.pixels_PD.is_contiguous()
    assert (patches.grid_thw, patches.seconds_per_grid) == (plan.grid_thw, plan.seconds_per_grid)


def test_other_limits_are_other_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also such as come to a file of the same size, or to the same frames of another file."""
    path = film(tmp_path / "clip.mp4")
    twin = tmp_path / "twin.mp4"
    film(twin, seed=1)
    for one in (path, twin):  # as archives unpack them, with one time for all and, it may be, one size
        one.write_bytes(one.read_bytes().ljust(20_000, b"\0"))
        os.utime(one, (0, 0))
    plans = [plan_for(path), plan_for(path, (56, 28)), plan_for(path, (28, 28)), plan_for(twin)]
    plans += [plan_for(path, indices=indices) for indices in ((0, 3, 5, 6), (0, 3, 5), (7,), tuple(range(8)))]
    cache, seen = cache_in(tmp_path), count_decoding(monkeypatch)
    for _ in range(2):
        for plan in plans:
            assert torch.equal(loaded(cache, plan), decoded(plan))
    assert len(files_in(cache)) == len(plans)
    assert len(seen) == 3 * len(plans)  # by each `decoded`, and once for the cache


@pytest.mark.parametrize("what", ["content", "time", "size", "picture"])
def test_a_changed_file_is_decoded_anew(plan: MediaPlan, tmp_path: Path, what: str) -> None:
    path = plan.ref.path
    assert isinstance(path, Path)
    if what == "picture":
        pictures = tuple(tmp_path / f"{i}.png" for i in range(4))
        for i, one in enumerate(pictures):
            Image.new("RGB", (80, 60), (i * 40, 0, 9)).save(one)
        ref = MediaRef("video", pictures)
        plan = plan_of(ref, scan(ref), (0, 1, 2, 3), 28, 56)
    cache = cache_in(tmp_path)
    before = loaded(cache, plan)
    if what == "picture":
        Image.new("RGB", (80, 60), (200, 0, 9)).save(pictures[2])
    else:
        stale, ns = path.read_bytes(), path.stat().st_mtime_ns
        film(path, seed=1)
        if what == "size":  # bytes behind the last box change nothing but the size
            path.write_bytes(stale + b"\0\0\0\x08free")
            os.utime(path, ns=(ns, ns))
        elif what == "time":
            path.write_bytes(stale)
            os.utime(path, ns=(ns, ns + 1))
    assert torch.equal(loaded(cache, plan), decoded(plan))
    assert torch.equal(before, decoded(plan)) == (what in ("size", "time"))
    assert len(files_in(cache)) == 2


def test_another_version_reads_none_of_it(plan: MediaPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, expected = cache_in(tmp_path), decoded(plan)
    loaded(cache, plan)
    seen = count_decoding(monkeypatch)
    for name, value in (("CACHE_VERSION", frame_cache.CACHE_VERSION + 1), ("DECODERS", (("torch", "0.1"),))):
        monkeypatch.setattr(frame_cache, name, value)
        assert torch.equal(loaded(cache, plan), expected)
    assert len(seen) == 2


def test_what_decoding_checks_is_part_of_the_key(plan: MediaPlan, tmp_path: Path) -> None:
    """A header that counts wrongly, say, is found out with the cache as without."""
    cache = cache_in(tmp_path)
    loaded(cache, plan)
    other = replace(plan, info=replace(plan.info, num_frames=9))
    with pytest.raises(MediaError, match="has 8 frames") as without:
        decoded(other)
    with pytest.raises(MediaError) as with_cache:
        loaded(cache, other)
    assert (with_cache.value.reason, str(with_cache.value)) == (without.value.reason, str(without.value))


def test_a_file_that_changes_meanwhile_is_not_kept(
    plan: MediaPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, decode = cache_in(tmp_path), decode_resized
    assert isinstance(plan.ref.path, Path)
    path = plan.ref.path

    def and_change(plan: MediaPlan) -> Tensor:
        frames_TCHW = decode(plan)
        os.utime(path, ns=(0, 0))
        return frames_TCHW

    monkeypatch.setattr(frame_cache, "decode_resized", and_change)
    loaded(cache, plan)
    assert not files_in(cache)
    loaded(cache, plan)
    assert len(files_in(cache)) == 1


# ------------------------------------------------------------------------------------------- broken and hanging clips


def test_errors_are_as_without_and_not_kept(tmp_path: Path) -> None:
    cache, good = cache_in(tmp_path), film(tmp_path / "good.mp4")
    plan = plan_for(good)
    clips = {"decode_error": damaged_clip(), "empty": b""}
    plans = {"missing": replace(plan, ref=MediaRef("video", tmp_path / "gone.mp4"))}
    plans["not_a_file"] = replace(plan, ref=MediaRef("video", tmp_path))
    for reason, content in clips.items():
        path = tmp_path / f"{reason}.mp4"
        path.write_bytes(content)
        plans[reason] = replace(plan_for(path) if content else plan, ref=MediaRef("video", path))
    for reason, one in plans.items():
        for _ in range(2):
            with pytest.raises(MediaError) as with_cache:
                loaded(cache, one)
            with pytest.raises(MediaError) as without:
                decoded(one)
            assert with_cache.value.reason == without.value.reason == reason
            assert str(with_cache.value) == str(without.value)
    assert not cache.folder or not cache.folder.exists()


def test_a_cached_file_that_is_gone_is_missing(plan: MediaPlan, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    loaded(cache, plan)
    assert isinstance(plan.ref.path, Path)
    plan.ref.path.unlink()
    with pytest.raises(MediaError) as caught:
        loaded(cache, plan)
    assert caught.value.reason == "missing"


def test_a_deadline_holds_with_the_cache(plan: MediaPlan, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    with WorkerPool(1, 5.0, import_all) as pool:
        hung = cache.submit(pool, plan, HANGING)
        with pytest.raises(MediaError, match=r"clip\.mp4: took longer than the deadline of 5 s") as caught:
            hung.result(60)
        assert caught.value.reason == "deadline"
        assert torch.equal(cache.submit(pool, plan, SPEC).result(60).pixels_PD, decoded(plan))
