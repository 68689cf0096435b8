"""Streams of archives as rows of steps: every clip once an epoch, the same rows on any number of processes, and again
after a stop at any place.

Clips are captioned by their own names, so that it is known what has to come out.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import write
from tests.helpers.streaming import (
    LLAVA,
    PE,
    Step,
    clip,
    data_config,
    llava_record,
    one_epoch,
    pe_pair,
    pe_shards,
    running,
    slot_stream,
    spools,
    stream_context,
)
from tests.helpers.tars import write_tar
from tests.helpers.tiny import Tiny
from vft.common.errors import UserError
from vft.config.data import DataConfig
from vft.data.dataset import Dataset
from vft.data.streaming.archives import START, Member, Position
from vft.data.streaming.stream import make_spool

# ------------------------------------------------------------------------------------------------- shares of slots


@pytest.mark.parametrize(
    ("sizes", "slots", "suffix"),
    [
        ([7], 3, ".tar"),
        ([4, 6], 5, ".tar"),
        ([4, 6], 5, ".tar.gz"),
        ([2, 1, 3], 3, ".tar"),
        ([1, 2, 3, 1, 1, 2, 1], 3, ".tar"),
        ([0, 4, 0, 2], 1, ".tar.gz"),
    ],
)
def test_every_clip_once_an_epoch(tiny: Tiny, tmp_path: Path, sizes: list[int], slots: int, suffix: str) -> None:
    """With fewer, as many and more archives than slots, also where some hold nothing."""
    names = pe_shards(tmp_path / "data" / "pe", sizes, suffix)
    config = data_config(tmp_path / "data", PE)
    with stream_context(config, tiny.encoder, slots) as context:
        shares = [one_epoch(slot_stream(context, slot)) for slot in range(slots)]
    found = [[name for document in share for name in document.sample_ids] for share in shares]
    assert sorted(itertools.chain(*found)) == names
    assert all(found)
    if len(sizes) < slots:  # those that share an archive take turns, so that none waits for the others' end
        lengths = [len(share) for share in found]
        assert max(lengths) - min(lengths) <= max(sizes) - min(sizes) + 1


def test_archives_are_reordered_every_epoch(tiny: Tiny, tmp_path: Path) -> None:
    """A fixed order would show the model the same neighbours for ever; within an archive the order is its own."""
    names = pe_shards(tmp_path / "data" / "pe", [2] * 5)
    config = data_config(tmp_path / "data", PE, max_samples_per_pack=1)
    orders = {}
    for seed in (0, 0, 1):
        with stream_context(config, tiny.encoder, 1, seed) as context:
            stream = slot_stream(context, 0)
            seen = [stream.next_pack().documents[0] for _ in range(40)]
        assert [one.after.epoch for one in seen] == [epoch for epoch in range(4) for _ in range(10)]
        ids = [one.document.sample_ids[0] for one in seen]
        epochs = [tuple(ids[i : i + 10]) for i in range(0, 40, 10)]
        assert all(sorted(epoch) == names for epoch in epochs)
        assert all([name[:3] for name in epoch[::2]] == [name[:3] for name in epoch[1::2]] for epoch in epochs)
        assert len(set(epochs)) > 2
        assert orders.setdefault(seed, epochs) == epochs
    assert orders[0] != orders[1]


def test_too_few_clips_for_the_slots(tiny: Tiny, tmp_path: Path) -> None:
    """The slots that find none would wait for ever; those that do are not disturbed."""
    pe_shards(tmp_path / "data" / "pe", [2])
    config = data_config(tmp_path / "data", PE)
    with stream_context(config, tiny.encoder, 3) as context:
        assert slot_stream(context, 1).next_pack().documents[0].document.sample_ids == ("000-01",)
        for pack in (stream := slot_stream(context, 2)).next_pack(), stream.next_pack():
            assert pack.exhausted and not pack.documents
    with running(config, tiny.encoder, slots=3) as run:
        step = run.step()
        assert [set(step[slot][0]) for slot in range(3)] == [{"000-00"}, {"000-01"}, set()]
        error = run.nothing()
    assert "pe: too few clips with records in 1 archive(s) for the 3 streams of train.packs_per_step" in error


def test_few_archives_with_clips_among_many_without(tiny: Tiny, tmp_path: Path) -> None:
    """Slots that draw an empty archive twice running go on looking: there are clips for all of them."""
    names = pe_shards(tmp_path / "data" / "pe", [0, 1, 0, 0, 0, 1])
    config = data_config(tmp_path / "data", PE, max_samples_per_pack=1)
    taken: Counter[tuple[int, str]] = Counter()
    epochs = []
    with stream_context(config, tiny.encoder, 3) as context:
        for slot in range(3):
            stream = slot_stream(context, slot)
            seen = [stream.next_pack().documents[0] for _ in range(9)]
            taken.update((one.after.epoch, one.document.sample_ids[0]) for one in seen)
            epochs.append([one.after.epoch for one in seen])
    assert set(taken.values()) == {1}  # never twice in an epoch
    last = min(seen[-1] for seen in epochs)
    assert {one for one in taken if one[0] < last} == set(itertools.product(range(last), names))
    assert any(after - before > 2 for seen in epochs for before, after in itertools.pairwise(seen))


def test_archives_without_any_clip(tiny: Tiny, tmp_path: Path) -> None:
    """Each says why."""
    pe_shards(tmp_path / "data" / "pe", [0])
    write_tar(tmp_path / "data" / "pe" / "001.tar", {"a.nfo": b"1", "a.txt": b"2"})
    (tmp_path / "data" / "pe" / "002.tar").write_bytes(b"not an archive")
    (tmp_path / "data" / "pe" / "003.tar").touch()
    config = data_config(tmp_path / "data", PE)
    with running(config, tiny.encoder, slots=1) as run:
        run.step()
        error = run.nothing()
        told = {item.path.rpartition("/")[2]: (item.reason, item.samples, item.message) for item in run.bad}
    assert error.startswith("pe: no clip met in 4 archive(s) can be trained on: 4 archive(s): ")
    assert [told[f"00{i}.tar"][:2] for i in range(4)] == [("archive", 0)] * 4
    assert told["000.tar"][2].endswith("000.tar: holds no files")
    assert (
        "none of its 2 files is a video ID.mp4 (or .webm, ...) or its record ID.json; the first is 'a.nfo'"
        in told["001.tar"][2]
    )
    assert all("download it again" in told[name][2] for name in ("002.tar", "003.tar"))


# ---------------------------------------------------------------------------------------------------------- packs


def llava_set(root: Path, videos: int, questions: int, parts: int = 2) -> list[str]:
    """Videos with several questions each, in parts; their ids."""
    names = [f"v/{number}.mp4" for number in range(videos)]
    records = [llava_record(name, i * questions + j) for i, name in enumerate(names) for j in range(questions)]
    write(root / "llava" / "all.json", records)
    for part in range(parts):
        members = {name: clip() for name in reversed(names[part::parts])}
        write_tar(root / "llava" / f"videos_{part}.tar.gz", members)
    return [record["id"] for record in records]


@pytest.mark.parametrize(("tokens", "samples"), [(400, 0), (400, 2), (250, 0), (160, 0), (1000, 5), (400, 1)])
def test_packs_are_full_and_not_overfull(tiny: Tiny, tmp_path: Path, tokens: int, samples: int) -> None:
    """Within both limits, and the next document would not have fitted."""
    llava_set(tmp_path / "data", 4, 3)
    config = data_config(tmp_path / "data", LLAVA, pack_tokens=tokens, max_samples_per_pack=samples)
    with stream_context(config, tiny.encoder, 1) as context:
        stream = slot_stream(context, 0)
        packs = [[one.document for one in stream.next_pack().documents] for _ in range(12)]
    sizes = [(sum(d.num_tokens for d in pack), sum(len(d.sample_ids) for d in pack)) for pack in packs]
    assert all(packs) and all(size <= tokens and (not samples or count <= samples) for size, count in sizes)
    for (size, count), after in zip(sizes, packs[1:], strict=False):
        too_long = size + after[0].num_tokens > tokens
        assert too_long or 0 < samples < count + len(after[0].sample_ids)


# --------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("samples", [1, 0])
@pytest.mark.parametrize("source", [PE, LLAVA], ids=["pe", "llava"])
@pytest.mark.parametrize(("slots", "slot"), [(1, 0), (3, 2)])
def test_a_slot_goes_on_from_every_pack(
    tiny: Tiny, tmp_path: Path, source: dict[str, object], samples: int, slots: int, slot: int
) -> None:
    """Also in the middle of a clip's documents, of an archive that others take turns at, and in a later epoch."""
    root = tmp_path / "data"
    pe_shards(root / "pe", [5, 4]) if source is PE else llava_set(root, 4, 3)
    config = data_config(root, source, max_samples_per_pack=samples)
    with stream_context(config, tiny.encoder, slots) as context:

        def packs_from(start: Position, count: int) -> list[tuple[list[tuple[str, ...]], list[list[int]], Position]]:
            stream, found = slot_stream(context, slot, start), []
            for _ in range(count):
                pack = stream.next_pack()
                documents = [one.document for one in pack.documents]
                for one in pack.documents:
                    one.clip.release()
                found.append(([d.sample_ids for d in documents], [d.ids_T.tolist() for d in documents], pack.after))
            return found

        count = 14 if samples else 9
        undisturbed = packs_from(START, count)
        assert undisturbed[-1][2].epoch >= 1
        if samples and source is LLAVA:
            assert {position.document for _, _, position in undisturbed} == {1, 2, 3}
        for taken in range(1, count - 1):
            assert packs_from(undisturbed[taken - 1][2], min(4, count - taken)) == undisturbed[taken : taken + 4], taken


def assert_goes_on_anywhere(
    config: DataConfig, tiny: Tiny, slots: int, chain: Sequence[tuple[int, int]]
) -> tuple[list[Step], Dataset]:
    """The steps of one process are those of two, and of runs (processes, steps) that each go on where another stopped.

    Some follow directly on each other: stale positions would show.
    """
    total = sum(count for _, count in chain)
    with running(config, tiny.encoder, 1, slots) as run:
        undisturbed, dataset = run.steps(total), run.documents
        assert all(step.keys() == set(range(slots)) and all(ids for ids, _, _ in step.values()) for step in undisturbed)
    with running(config, tiny.encoder, 2, slots, prefetch=1) as run:
        assert run.steps(total) == undisturbed
    state, done = "", 0
    for ranks, count in chain:
        with running(config, tiny.encoder, ranks, slots, prefetch=2, state=state) as run:
            assert run.steps(count) == undisturbed[done : done + count], (ranks, done)
            state, done = run.state(), done + count
    return undisturbed, dataset


CHAIN = ((1, 2), (2, 1), (2, 2), (1, 1), (2, 1), (1, 2))


@pytest.mark.parametrize(("name", "slots"), [("pe", 2), ("pe", 4), ("llava", 4)])
def test_steps_go_on_on_any_number_of_processes(tiny: Tiny, tmp_path: Path, name: str, slots: int) -> None:
    root = tmp_path / "data"
    pe_shards(root / "pe", [3, 5, 2]) if name == "pe" else llava_set(root, 7, 3)
    config = data_config(root, PE if name == "pe" else LLAVA, max_samples_per_pack=1)
    assert_goes_on_anywhere(config, tiny, slots, CHAIN)


def test_another_prefetch_and_workers_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    pe_shards(tmp_path / "data" / "pe", [3, 5, 2])
    config = data_config(tmp_path / "data", PE)
    with running(config, tiny.encoder, prefetch=1) as run:
        expected = run.steps(6)
    with running(config.model_copy(update={"workers": 1}), tiny.encoder, prefetch=8) as run:
        assert run.steps(6) == expected


# --------------------------------------------------------------------------------------------------------- mixtures


def mixture(root: Path, *weights: float) -> DataConfig:
    """An index of text records beside two streams, by weight."""
    pe_shards(root / "pe", [4, 3])
    llava_set(root, 4, 2)
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] for i in range(10)]
    (root / "texts.json").write_text(json.dumps([{"id": f"t{i}", "messages": turns[i]} for i in range(10)]))
    texts = {"format": "messages", "path": "texts.json"}
    sources = [{**one, "weight": weight} for one, weight in zip((texts, PE, LLAVA), weights, strict=True)]
    return data_config(root, *sources, max_samples_per_pack=1)


def test_shares_of_a_mixture(tiny: Tiny, tmp_path: Path) -> None:
    """Of 400 steps of 3 rows, within three standard deviations of the weights; drawn anew for each row of each step."""
    config = mixture(tmp_path / "data", 2.0, 1.0, 3.0)
    with running(config, tiny.encoder, slots=3) as run:
        streams = run.streams[0]
        assert streams is not None
        drawn = [[streams.feed_of(step, slot) for slot in range(3)] for step in range(400)]
        rows = run.steps(8)
    counts = Counter(itertools.chain(*drawn))
    for feed, share in ((-1, 2 / 6), (0, 1 / 6), (1, 3 / 6)):
        assert abs(counts[feed] / 1200 - share) < 3 * (share * (1 - share) / 1200) ** 0.5
    assert len({tuple(feeds) for feeds in drawn}) > 20
    kinds = {"t": -1, "0": 0, "q": 1}
    assert [[kinds[step[slot][0][0][0]] for slot in range(3)] for step in rows] == drawn[:8]


def packs_of_index(dataset: Dataset, epochs: int) -> list[tuple[str, ...]]:
    """The ids of each pack of the index, as without streams."""
    plan, documents = dataset.pack_plan(0), dataset.documents
    packs = [pack for epoch in range(epochs) for pack in plan.packs(epoch)]
    return [tuple(one.id for number in pack for one in documents[number].conversations) for pack in packs]


def test_a_mixture_on_one_and_two_processes_and_resumed(tiny: Tiny, tmp_path: Path) -> None:
    """The index comes in its own order, as without streams; a stop after any step changes nothing."""
    config = mixture(tmp_path / "data", 2.0, 1.0, 1.0)
    undisturbed, dataset = assert_goes_on_anywhere(config, tiny, 4, CHAIN)
    texts = [ids for step in undisturbed for _, (ids, _, _) in sorted(step.items()) if ids[0].startswith("t")]
    assert len(texts) > 11 and texts == packs_of_index(dataset, 3)[: len(texts)]


def shared_out(root: Path, *shares: float) -> DataConfig:
    """The same by shares of the samples, with rows of many texts and of few clips."""
    config = mixture(root, 1.0, 1.0, 1.0).model_dump()
    for source, share in zip(config["sources"], shares, strict=True):
        source |= {"weight": None, "share": share}
    return DataConfig.model_validate({**config, "max_samples_per_pack": 0, "pack_tokens": 250})


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.1, 0.1, 0.8)])
def test_shares_are_of_the_samples_beside_an_index(tiny: Tiny, tmp_path: Path, shares: tuple[float, ...]) -> None:
    """Whatever the rows hold, no slot is off by more than two rows; slots differ in when they take what."""
    config = shared_out(tmp_path / "data", *shares)
    kinds = {"t": 0, "0": 1, "q": 2}
    counts, most, order = [Counter[int]() for _ in range(3)], Counter[int](), []
    with running(config, tiny.encoder, slots=3) as run:
        for step in run.steps(30):
            for slot, (ids, _, _) in step.items():
                (kind,) = {kinds[name[0]] for name in ids}
                counts[slot][kind] += len(ids)
                most[kind] = max(most[kind], len(ids))
            order.append(tuple(kinds[step[slot][0][0][0]] for slot in range(3)))
    assert most[0] > 2 * most[1]  # shares of the rows would be far off
    for count in counts:
        for kind, share in enumerate(shares):
            assert abs(count[kind] - share * count.total()) <= 2 * max(most.values()), (kind, count)
    assert len(set(order)) > 3 and any(len(set(kinds)) > 1 for kinds in order)


def test_shares_on_one_and_two_processes_and_resumed(tiny: Tiny, tmp_path: Path) -> None:
    """The first slot's rows of the index are every fourth of the sequence that they have without streams."""
    config = shared_out(tmp_path / "data", 0.5, 0.3, 0.2)
    undisturbed, dataset = assert_goes_on_anywhere(config, tiny, 4, ((1, 1), (2, 2), (2, 1), (1, 2)))
    texts = [step[0][0] for step in undisturbed if step[0][0][0].startswith("t")]
    assert len(texts) > 1 and texts == packs_of_index(dataset, 20)[::4][: len(texts)]


# ---------------------------------------------------------------------------------------------------- passing copies


def test_copies_are_removed_as_they_are_used_up(tiny: Tiny, tmp_path: Path) -> None:
    """However long the stream, few lie about at a time; none at the end, and none of a process that was killed."""
    root = tmp_path / "data"
    pe_shards(root / "pe", [6, 6])
    config = data_config(root, PE, max_samples_per_pack=1)
    left = config.cache_path / "stream" / "tmpkilled"
    write(left / ".lock", b"")
    write(left / "00000001.mp4", b"of a process that was killed")
    most = 0
    with running(config, tiny.encoder, slots=3, prefetch=2) as run, running(config, tiny.encoder) as other:
        assert not left.exists()
        other.step()  # works beside it: its copies are not taken for leftovers
        for _ in range(20):
            run.step()
            most = max(most, len(spools(config)))
        other.step()
    # A clip and its record, for each slot: those read ahead, the one in use and the one being read; and of `other`.
    assert 0 < most <= 2 * (3 * 5 + 2 * 5)
    assert not list((config.cache_path / "stream").glob("*/"))


def test_slots_copy_their_own_clips_alone(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several that share an archive all go through it; copying all of it each time would be work for nothing."""
    pe_shards(tmp_path / "data" / "pe", [12])
    names: list[str] = []
    real = Member.save
    monkeypatch.setattr(Member, "save", lambda member, folder: names.append(member.name) or real(member, folder))
    config = data_config(tmp_path / "data", PE)
    with stream_context(config, tiny.encoder, 4) as context:
        stream = slot_stream(context, 3)
        assert {name for document in one_epoch(stream) for name in document.sample_ids} == {
            "000-03",
            "000-07",
            "000-11",
        }
    assert {name.partition(".")[0] for name in names} == {"000-03", "000-07", "000-11"}


def make_and_remove(folder: Path, problems: Any) -> None:
    for _ in range(25):
        try:
            spool, lock = make_spool(folder)
            (spool / "00000000.mp4").write_bytes(b"x")
            lock.release()
            shutil.rmtree(spool, ignore_errors=True)  # as a run does: others may be at it too
        except Exception as error:
            problems.put(repr(error))
    problems.put(None)


def test_processes_that_start_together(tmp_path: Path) -> None:
    """None takes the folder that another has just made, and not yet locked, for one left behind."""
    forked = multiprocessing.get_context("fork")
    problems = forked.Queue()
    processes = [forked.Process(target=make_and_remove, args=(tmp_path, problems)) for _ in range(4)]
    for process in processes:
        process.start()
    told = [problems.get(timeout=60)]
    while told.count(None) < len(processes):
        told.append(problems.get(timeout=60))
    for process in processes:
        process.join(60)
    assert told == [None] * 4


def test_a_cache_that_can_not_be_written(tiny: Tiny, tmp_path: Path) -> None:
    pe_shards(tmp_path / "data" / "pe", [1])
    (tmp_path / "file").touch()
    config = data_config(tmp_path / "data", PE, cache_dir=str(tmp_path / "file"))
    with (
        pytest.raises(UserError, match=r"file/stream: can't be written .* data\.cache_dir"),
        stream_context(config, tiny.encoder, 1),
    ):
        pass


def test_keys_that_a_stream_does_not_read_are_told_once(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of PE-Video as they come; of LLaVA-Video, whose records are read at the start, then."""
    caplog.set_level(logging.INFO)
    clips = [pe_pair("a"), pe_pair("b", start=1), pe_pair("c", start=2, end=3)]
    write_tar(tmp_path / "data" / "pe" / "0.tar", [member for pair in clips for member in pair])
    config = data_config(tmp_path / "data", PE)
    with stream_context(config, tiny.encoder, 1) as context:
        one_epoch(slot_stream(context, 0))
    assert [line.partition(": keys that are not read, ")[2] for line in caplog.messages] == [
        "from 0.tar/b.json on: start [no medium there takes it]",
        "from 0.tar/c.json on: end [no medium there takes it]",
    ]
