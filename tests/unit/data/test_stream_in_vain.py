"""Streams with long stretches of what can't be used, or nothing else: they end, say why, and stop when told."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import write
from tests.helpers.streaming import (
    LLAVA,
    MAKE,
    PE,
    clip,
    damaged_clip,
    data_config,
    llava_record,
    pe_pair,
    pe_shards,
    running,
    write_pairs,
)
from tests.helpers.tars import cut, write_tar
from tests.helpers.tiny import Tiny
from vft.common.errors import UserError
from vft.data.dataset import load_dataset
from vft.data.quarantine import ArchivePass, BadItem, BadItemLog, Encountered, LoadReport, by_kind, check_bad
from vft.data.streaming import stream as streams
from vft.data.streaming.stream import MAX_MISSES, StreamSource


def without_caption(name: str) -> list[tuple[str, bytes]]:
    return [(f"{name}.mp4", clip()), (f"{name}.json", b'{"duration": 10.0}')]


# ------------------------------------------------------------------------------------------------- nothing at all


def nothing(tiny: Tiny, root: Path, ranks: int, slots: int, *more: dict[str, Any], **settings: Any) -> str:
    """The error of a stream that has nothing, after as many steps as it takes, and no more than some."""
    config = data_config(root, PE, *more, **settings)
    with running(config, tiny.encoder, ranks, slots) as run:
        for _ in range(6):
            run.step()
            if any(report.exhausted for report in run.reports):
                return run.nothing()
    raise AssertionError("still searching")


@pytest.mark.parametrize("slots", [2, 6])
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_clip_has_a_caption(tiny: Tiny, tmp_path: Path, ranks: int, slots: int) -> None:
    """Each clip is counted once, however often and by how many slots it was met; keys had and keys read are named."""
    for shard in range(2):
        pairs = [without_caption(f"{shard}{number}") for number in range(4)]
        write_pairs(tmp_path / "data" / "pe" / f"{shard}.tar", pairs)
    assert nothing(tiny, tmp_path / "data", ranks, slots).startswith(
        "pe: no clip met in 2 archive(s) can be trained on: 8 of 8 clips: no caption; the record has the keys "
        "'duration', read are human_caption, model_caption, description ("
    )


@pytest.mark.parametrize(
    ("pair", "settings", "message"),
    [
        (lambda name: pe_pair(name, b"<html>404</html>"), {}, "6 of 6 clips: "),
        (lambda name: pe_pair(name), {"pack_tokens": 12}, "6 of 6 clips: "),
        (lambda name: pe_pair(name)[:1], {}, "6 of 6 clips: json: the clip has no .json beside its video"),
        (lambda name: [(f"{name}.mp4", clip()), (f"{name}.json", b"{")], {}, "6 of 6 clips: is not JSON"),
        (lambda name: [(f"{name}.dat", clip()), (f"{name}.txt", b"A cat.")], {}, "2 archive(s): "),
    ],
    ids=["broken", "too long", "half", "no JSON", "other names"],
)
def test_no_clip_can_be_used(tiny: Tiny, tmp_path: Path, pair: Any, settings: dict[str, Any], message: str) -> None:
    for shard in range(2):
        write_pairs(tmp_path / "data" / "pe" / f"{shard}.tar", [pair(f"{shard}{number}") for number in range(3)])
    error = nothing(tiny, tmp_path / "data", 1, 2, **settings)
    assert error.startswith(f"pe: no clip met in 2 archive(s) can be trained on: {message}") and "\n" not in error
    assert "/stream/" not in error


def test_a_source_beside_it(tiny: Tiny, tmp_path: Path) -> None:
    """It is the source without a document that is named, though the other one has some."""
    root = tmp_path / "data"
    write_pairs(root / "pe" / "0.tar", [without_caption(f"{number}") for number in range(4)])
    pe_shards(root / "good", [3])
    error = nothing(tiny, root, 1, 2, {**PE, "path": "good"})
    assert error.startswith("pe: no clip met in 1 archive(s) can be trained on: 4 of 4 clips: no caption;")


def test_kinds_of_trouble_are_counted() -> None:
    """By samples, the most frequent first; of records by what they lack."""
    items = [BadItem(f"a{i}", "", "record", f"a{i}: no caption; it has {i}", 1) for i in range(3)]
    items += [BadItem(f"b{i}", f"b{i}", "not_a_video", f"b{i} is none", 4) for i in range(2)]
    items += [BadItem("c", "c", "archive", "c: empty", 0)]
    assert by_kind(items) == (
        "8 of 11 samples: b0 is none; and 3 of 11 samples: no caption; it has 0 (a0); and 1 archive(s): empty (c)"
    )


# ----------------------------------------------------------------------------------------------- a long bad stretch


def test_a_long_bad_stretch(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stay empty and it is said; then all goes on, alike on one and two processes and from every step."""
    monkeypatch.setattr("vft.data.quarantine.MAX_KNOWN", 10)
    root, bad = tmp_path / "data", 2 * MAX_MISSES + 3
    pairs = [pe_pair("a"), *[without_caption(f"b{number:02d}") for number in range(bad)], pe_pair("c"), pe_pair("d")]
    write_pairs(root / "pe" / "0.tar", pairs)
    pe_shards(root / "good", [3, 2])
    config = data_config(root, PE, {**PE, "path": "good"}, max_samples_per_pack=1)
    states, undisturbed = [], []
    with running(config, tiny.encoder, 1, slots=2) as run:
        for _ in range(16):
            undisturbed.append(run.step())
            states.append(run.state())
            notes = [text for report in run.reports for text in report.notes]
            for text in notes:
                assert text.startswith("pe: no document in many clips") and "no caption" in text
            told = len(notes)
            assert told == sum(not ids for ids, _, _ in undisturbed[-1].values())
        seen, kept = run.loaders[0].bad.encountered, run.bad
    empty = [number for number, step in enumerate(undisturbed) for ids, _, _ in step.values() if not ids]
    names = {name for step in undisturbed for ids, _, _ in step.values() for name in ids}
    assert len(empty) >= 2 and {"a", "c", "d"} <= names
    assert len(kept) == 10 and seen.samples["record"] >= bad  # counted, and not kept
    with running(config, tiny.encoder, 2, slots=2) as run:
        assert run.steps(16) == undisturbed
    for done in sorted({1, empty[0], empty[0] + 1, empty[-1], empty[-1] + 1, 12} - {0}):
        with running(config, tiny.encoder, 1 + done % 2, 2, state=states[done - 1]) as run:
            assert run.steps(16 - done) == undisturbed[done:], done
            assert run.loaders[0].bad.encountered.samples == seen.samples  # nothing was counted twice


def test_a_signal_while_a_slot_searches(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is left at once, and the state is that before it: going on gives what would have come."""
    root = tmp_path / "data"
    write_pairs(root / "pe" / "0.tar", [pe_pair("a"), *[without_caption(f"b{i}") for i in range(9)], pe_pair("c")])
    config = data_config(root, PE, max_samples_per_pack=1)
    with running(config, tiny.encoder, slots=1, prefetch=1) as run:
        undisturbed = run.steps(4)
    assert [step[0][0] for step in undisturbed] == [("a",), ("c",), ("a",), ("c",)]
    with running(config, tiny.encoder, slots=1, prefetch=1) as run:
        assert run.steps(1) == undisturbed[:1]
        state, loader = run.state(), run.loaders[0]
        monkeypatch.setattr(streams, "stop_requested", lambda: 1)
        (pack,) = loader.step()
        assert pack.is_missing and not pack.batch.documents
        loader.abandon_step()
        assert run.state() == state
    monkeypatch.setattr(streams, "stop_requested", lambda: 0)
    with running(config, tiny.encoder, slots=1, state=state) as run:
        assert run.steps(3) == undisturbed[1:]


# ---------------------------------------------------------------------------------------------------- the bad share


def test_the_same_share_streamed_and_indexed(tiny: Tiny, tmp_path: Path) -> None:
    """Of samples, not of media: five questions about a broken video are five. After one epoch and after three."""
    root = tmp_path / "data"
    contents = {f"v/{i}.mp4": clip() for i in range(6)} | {"v/6.mp4": b"<html>", "v/7.mp4": damaged_clip()}
    records = [llava_record(name, 5 * i + j) for i, name in enumerate(contents) for j in range(5)]
    records[3]["conversations"] = []
    write(root / "llava" / "qa.json", records)
    write_tar(root / "llava" / "v.tar", contents)
    for name, content in contents.items():
        write(root / name, content)

    config = data_config(root, {**LLAVA, "stream": False}, max_samples_per_pack=1)
    with running(config, tiny.encoder, slots=2) as run:
        run.steps(60)
        documents, known = run.documents, run.bad
    with pytest.raises(UserError) as indexed:
        check_bad([*documents.bad, *known], documents.num_samples + len(documents.bad), 0.01)
    assert "[11 of 40 samples can't be used (5 decode_error, 5 not_a_video, 1 record)" in str(indexed.value)

    config = data_config(root, LLAVA, max_samples_per_pack=1)
    with running(config, tiny.encoder, slots=1) as run:
        trained = 0
        for epoch in (1, 2, 3):
            while (lost := sum(run.loaders[0].bad.encountered.lost().values())) + trained < 40 * epoch:
                trained += sum(len(ids) for ids, _, _ in run.step().values())
            assert (lost, trained) == (11 * epoch, 29 * epoch)
        with pytest.raises(UserError) as streamed:
            run.loaders[0].bad.check_streams(trained, 3, 0.27)
        run.loaders[0].bad.check_streams(trained, 3, 0.28)  # 11 / 40 = 0.275
    assert "[33 of 120 samples can't be used (15 decode_error, 15 not_a_video, 3 record)" in str(streamed.value)


def test_few_bad_clips_are_judged_after_an_epoch() -> None:
    """Before, ten are needed: the first few say little of the rest."""
    item = BadItem("a", "a", "not_a_video", "a is none")
    log = BadItemLog()
    log.merge([LoadReport([item] * 3, [ArchivePass(5, False)] * 3)])
    log.check_streams(12, 4, 0.02)
    log.merge([LoadReport([], [ArchivePass(5, False)])])
    with pytest.raises(UserError, match=r"a is none \[3 of 20 samples can't be used \(3 not_a_video\), more than"):
        log.check_streams(17, 4, 0.02)
    log.check_streams(17, 4, 0.15)


@pytest.mark.parametrize(
    ("archives", "lost"),
    [
        ([(10, False), (10, False), (3, True)], 7),
        ([(10, False), (20, False), (0, True), (5, True)], 25),
        ([(10, False), (0, False), (0, True)], 5),  # an empty one holds what it holds
        ([(0, True), (3, True)], 2),  # nobody knows what they held
        ([(10, False), (12, True)], 1),
    ],
)
def test_a_damaged_archive_weighs_what_it_lost(archives: list[tuple[int, bool]], lost: int) -> None:
    """As many samples as it is short of the usual, and at least one."""
    seen = Encountered()
    seen.add([BadItem("s", "s", "archive", "s: cut off", 0)], [ArchivePass(*one) for one in archives])
    assert seen.lost() == {"archive": lost}


def test_archives_that_are_cut_off_are_told_and_weighed(tiny: Tiny, tmp_path: Path) -> None:
    """The second part of 1.tar is lost, of 2.tar all."""
    root = tmp_path / "data"
    for shard in range(3):
        archive = write_pairs(root / "pe" / f"{shard}.tar", [pe_pair(f"{shard}-{number}") for number in range(4)])
    cut(root / "pe" / "1.tar", archive.stat().st_size // 2 - 2048)
    (root / "pe" / "2.tar").write_bytes(b"<html>404</html>")
    config = data_config(root, PE, max_samples_per_pack=1)
    with running(config, tiny.encoder, slots=1) as run:
        trained = 0
        while run.loaders[0].bad.encountered.whole + run.loaders[0].bad.encountered.damaged < 3:
            trained += sum(len(ids) for ids, _, _ in run.step().values())
        good = 4 + run.loaders[0].bad.encountered.damaged_samples
        assert (
            0 < run.loaders[0].bad.encountered.damaged_samples < 4 and trained <= good + 1
        )  # the next one may be in the same row
        assert run.loaders[0].bad.encountered.lost() == {"archive": 12 - good}
        assert {(item.path.rpartition("/")[2], item.reason) for item in run.bad} == {
            ("1.tar", "archive"),
            ("2.tar", "archive"),
        }


# ---------------------------------------------------------------------------------------------------- names of members


def llava_set(root: Path, names: dict[str, str], *more: str) -> Path:
    """Records about `names`' keys, in an archive under their values; `more` members that nobody asks for."""
    write(root / "llava" / "x_cap.json", [llava_record(name, i) for i, name in enumerate(names)])
    members = {name: clip() for name in more} | {member: clip() for member in names.values()}
    return write_tar(root / "llava" / "v.tar", members)


def ids_of(tiny: Tiny, root: Path, steps: int = 3, **source: Any) -> set[str]:
    with running(data_config(root, {**LLAVA, **source}), tiny.encoder, slots=1) as run:
        return {name for step in run.steps(steps) for ids, _, _ in step.values() for name in ids}


NFC, NFD = (unicodedata.normalize(form, "caf\N{LATIN SMALL LETTER E WITH ACUTE}.mp4") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "names",
    [
        {"a/1.mp4": "./a/1.mp4", "a/2.mp4": "./a/2.mp4"},
        {"./a/1.mp4": "a/1.mp4", "a//2.mp4": "a/2.mp4"},
        {"a/1.mp4": "videos/x/a/1.mp4", "b/1.mp4": "videos/x/b/1.mp4"},
        {"videos/a/1.mp4": "a/1.mp4", "videos/b/1.mp4": "b/1.mp4"},
        {"1.mp4": "cats/1.mp4", "2.mp4": "dogs/2.mp4"},
        {"a/1.mp4": "a/1.MP4", "a/2.MP4": "a/2.mp4"},
        {"a\\1.mp4": "a/1.mp4", "2.mp4": "2.mp4"},
        {NFC: NFD, f"a/{NFD}": f"a/{NFC}"},
        {"v/1.mp4": "V/v/1.mp4", "v/2.mp4": "./V/v/2.MP4"},
    ],
)
def test_members_named_a_little_unlike_the_records(tiny: Tiny, tmp_path: Path, names: dict[str, str]) -> None:
    llava_set(tmp_path / "data", names)
    config = data_config(tmp_path / "data", LLAVA)
    assert not StreamSource(config.sources[0], config).warning
    assert ids_of(tiny, tmp_path / "data") == {"q0", "q1"}


def test_exact_names_go_before_likely_ones(tiny: Tiny, tmp_path: Path) -> None:
    """Where an archive names members as the records do, one with a longer name is another video."""
    archive = llava_set(tmp_path / "data", {"a/1.mp4": "a/1.mp4"}, "z/a/1.mp4", "1.mp4")
    with running(data_config(tmp_path / "data", LLAVA), tiny.encoder, slots=1) as run:
        run.steps(2)
        media = {item.path for item in run.bad}
    assert not media and archive.exists()
    config = data_config(tmp_path / "data", LLAVA)
    opened = StreamSource(config.sources[0], config)
    spool = tmp_path / "spool"
    spool.mkdir()
    groups = list(opened.clips(opened.shards[0], 0, spool, lambda number: True))
    assert [[sample.id for sample in group.samples] for group in groups] == [["q0"]]


def test_two_members_for_one_record(tiny: Tiny, tmp_path: Path) -> None:
    llava_set(tmp_path / "data", {"1.mp4": "cats/1.mp4"}, "dogs/1.mp4")
    with pytest.raises(UserError, match=r"'dogs/1\.mp4' and 'cats/1\.mp4', and both may be the video '1\.mp4'"):
        ids_of(tiny, tmp_path / "data")


def test_names_that_no_record_has(tiny: Tiny, tmp_path: Path) -> None:
    """It is said before a step is made, with an example of each name, and is the reason in the end."""
    write_tar(tmp_path / "data" / "llava" / "v.tar", {f"clip{i}.mp4": clip() for i in range(3)})
    (tmp_path / "data" / "llava" / "x.json").write_text(json.dumps([llava_record("a/1.mp4", 0)]))
    config = data_config(tmp_path / "data", LLAVA)
    warning = StreamSource(config.sources[0], config).warning
    assert "v.tar has 'clip0.mp4', the records have 'a/1.mp4'" in warning
    with running(config, tiny.encoder, slots=2) as run:
        run.step()
        error = run.nothing()
    assert error.startswith(
        "llava: no clip met in 1 archive(s) can be trained on: 1 archive(s): none of its 3 files is the "
    )
    assert "a record, such as 'a/1.mp4'; the first is 'clip0.mp4'" in error


def test_one_kind_of_records_alone(tiny: Tiny, tmp_path: Path) -> None:
    """A JSON file as the path: its records, and the archives beside it."""
    root = tmp_path / "data"
    llava_set(root, {"a/1.mp4": "a/1.mp4"}, "a/2.mp4", "a/3.mp4")
    (root / "llava" / "x_oe_qa.json").write_text(json.dumps([llava_record(f"a/{n}.mp4", n + 10) for n in (1, 2)]))
    (root / "llava" / "x_mc_qa.json").write_text(json.dumps([llava_record("a/3.mp4", 20)]))
    assert ids_of(tiny, root) == {"q0", "q11", "q12", "q20"}
    for name, ids in (("x_cap", {"q0"}), ("x_oe_qa", {"q11", "q12"}), ("x_mc_qa", {"q20"})):
        assert ids_of(tiny, root, path=f"llava/{name}.json") == ids
    one, all_of_them = (
        StreamSource(config.sources[0], config).digest
        for config in (data_config(root, {**LLAVA, "path": path}) for path in ("llava/x_cap.json", "llava"))
    )
    assert one != all_of_them  # a run does not go on with other records


def test_pairs_named_a_little_unlike(tiny: Tiny, tmp_path: Path) -> None:
    """Endings in capitals, accents in two spellings, two sources with the same names."""
    stem = NFC.removesuffix(".mp4")
    (_, video), (_, about) = pe_pair("x")
    pairs = [[("./a.MP4", video), ("./a.JSON", about)], [(NFC, video), (NFD.replace(".mp4", ".json"), about)]]
    write_pairs(tmp_path / "data" / "pe" / "0.tar", pairs)
    with running(data_config(tmp_path / "data", PE), tiny.encoder, slots=1) as run:
        ids = {name for step in run.steps(2) for got, _, _ in step.values() for name in got}
        assert not run.bad
    assert ids == {"a", stem}


def test_a_bad_clip_of_one_source_is_not_another_ones(tiny: Tiny, tmp_path: Path) -> None:
    """Though archive and clip have the same names there."""
    root = tmp_path / "data"
    for name, content in (("pe", damaged_clip()), ("other", None)):
        write_pairs(root / name / "0.tar", [pe_pair("a", content), pe_pair(name)])
    config = data_config(root, PE, {**PE, "path": "other"}, max_samples_per_pack=1)
    with running(config, tiny.encoder, slots=2) as run:
        steps = run.steps(12)
        drawn = run.streams[0]
        assert drawn is not None and [item.path for item in run.bad] == ["0.tar/a.mp4"]
        feeds = [[drawn.feed_of(step, slot) for slot in range(2)] for step in range(12)]
    rows = [(feeds[number][slot], ids) for number, step in enumerate(steps) for slot, (ids, _, _) in step.items()]
    assert {ids for feed, ids in rows if feed == 0} == {(), ("pe",)}
    assert {ids for feed, ids in rows if feed == 1} == {("a",), ("other",)}


def test_indexed_share_of_a_video_that_fails_late(tiny: Tiny, tmp_path: Path) -> None:
    """A video that can't be decoded costs all its questions, though it is told once."""
    write(tmp_path / "data" / "good.mp4", clip())
    write(tmp_path / "data" / "bad.mp4", damaged_clip())
    records = [llava_record(name, i) for i, name in enumerate(["good.mp4"] * 6 + ["bad.mp4"] * 4)]
    (tmp_path / "data" / "x.json").write_text(json.dumps(records))
    config = data_config(tmp_path / "data", {**LLAVA, "stream": False, "path": "x.json"}, max_samples_per_pack=2)
    documents = load_dataset(config, config.sources, MAKE, tiny.encoder, seed=0)
    assert (documents.num_samples, documents.bad) == (10, [])
    with running(config, tiny.encoder, slots=1) as run:
        run.steps(8)
        assert [(item.reason, item.samples) for item in run.bad] == [("decode_error", 4)]


def test_a_missing_file_with_a_similar_name(tmp_path: Path) -> None:
    (tmp_path / "red.mp4").touch()
    for name, hint in (("Red.mp4", f"did you mean '{tmp_path}/red.mp4'?"), ("other.avi", "no such file [")):
        bad = BadItem("a", str(tmp_path / name), "missing", "no such file")
        with pytest.raises(UserError, match=re.escape(hint)):
            check_bad([bad], 1, 0.1)
