"""A stored plan gives what planning anew gives, and is not used once anything that it depends on has changed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.tiny import Tiny
from vft.common.errors import UserError
from vft.common.task import main_conversation
from vft.common.types import Conversation, MediaOptions, MediaRef, Sample, Turn, VisionLimits
from vft.config.data import DataConfig, SourceConfig
from vft.data import stored
from vft.data.chat import ChatEncoder
from vft.data.dataset import Dataset, load_dataset
from vft.data.media.errors import MediaError
from vft.data.media.index import SCHEMA
from vft.data.media.timed_text import FrameTimes, Subtitles
from vft.data.quarantine import BadItem
from vft.data.split import Split, overlap_warning
from vft.recipes.qa import QuestionAnswering

TASK = QuestionAnswering()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Records of videos in LLaVA-Video's layout, of pictures and of texts; a few of them bad. The index knows the
    videos, which are no real ones."""
    folder = tmp_path / "data" / "videos" / "0_30_s"
    rows, records = [], []
    for number in range(5):
        file = folder / f"academic/{number}.mp4"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"0")
        status, frames = file.stat(), 40 + 100 * number
        row = {"kind": "video", "path": str(file.resolve()), "size_bytes": 1, "mtime_ns": status.st_mtime_ns}
        row |= {"deadline_s": 60.0, "height": 140, "width": 280, "num_frames": frames, "fps": 10.0, "stream_index": 0}
        rows.append(
            {**row, "duration_s": frames / 10, "times_s": [i / 9 for i in range(frames)] if number == 1 else None}
        )
        for kind in ("cap", "oe", "mc"):
            asked = {"cap": "Describe.", "oe": f"Who is {number}?", "mc": "Which?\nA. red\nB. blue"}[kind]
            answer = "A." if kind == "mc" else "word " * (3 + 30 * number)
            turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
            record = {"id": f"{kind}{number}", "conversations": turns, "video": f"academic/{number}.mp4"}
            records.append({**record, "data_source": "0_30_s", "unknown": 1})
    records.append({**records[0], "id": "gone", "video": "academic/gone.mp4"})
    records.append({**records[0], "id": "trimmed", "video_start": 0.5, "video_end": 2})
    records.append({"id": "broken", "video": "academic/0.mp4"})
    (folder / "all.json").write_text(json.dumps(records))
    cache = tmp_path / "cache"
    cache.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), cache / "media.parquet")

    pictures = []
    for number in range(3):
        Image.new("RGB", (60 + 30 * number, 60)).save(tmp_path / "data" / f"{number}.png")
        turns = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"<image>\nWhat? \ud83d\ude00 <|im_end|> {number}"},
            {"role": "assistant", "content": "A picture."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
        own = {"images": [f"{number}.png"], "answers": ["Yes.", "Of course."], "groups": {"size": "s"}}
        pair = {"id": f"t{number}", "messages": turns[3:], "rejected_response": "No."}
        pictures += [{"id": "p", "messages": turns, **own}, pair]
    (tmp_path / "data" / "pictures.jsonl").write_text("\n".join(map(json.dumps, pictures)))
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def small_sets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MIN_BYTES", 1)


def config_of(root: Path, **settings: Any) -> DataConfig:
    sources = [
        {"format": "llava_video", "path": "videos", "repeats": 2.0},
        {"format": "messages", "path": "pictures.jsonl"},
    ]
    own = {"root": root, "sources": sources, "cache_dir": str(root.parent / "cache"), "workers": 0}
    return DataConfig.model_validate({**own, "pack_tokens": 400, "max_bad_fraction": 0.99, **settings})


class Loaded:
    """A start with the cache, and how often it planned anew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoder: ChatEncoder) -> None:
        self.encoder, self.planned = encoder, 0
        monkeypatch.setattr(stored, "load_dataset", self._count)

    def _count(self, *arguments: Any) -> Dataset:
        self.planned += 1
        return load_dataset(*arguments)

    def __call__(self, config: DataConfig, encoder: ChatEncoder | None = None, **own: Any) -> Dataset:
        task, split = own.get("task", TASK), own.get("split")
        chosen = config, config.indexed, main_conversation(task)
        return stored.load_stored(*chosen, task, "all", encoder or self.encoder, own.get("seed", 0), split)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> Loaded:
    return Loaded(monkeypatch, tiny.encoder)


def planned_anew(config: DataConfig, encoder: ChatEncoder, task: Any = TASK, split: Split | None = None) -> Dataset:
    return load_dataset(config, config.sources, main_conversation(task), encoder, 0, split)


def assert_same(found: Dataset, expected: Dataset) -> None:
    """All that a run uses of its data."""
    assert list(found.documents) == list(expected.documents) and found.documents
    assert found.bad == expected.bad and found.notes == expected.notes
    assert found.num_paired == expected.num_paired
    assert (found.digest, found.num_shortened) == (expected.digest, expected.num_shortened)
    assert (found.num_samples, found.lengths, found.work) == (expected.num_samples, expected.lengths, expected.work)
    assert found.conversations == expected.conversations and found.prompts == expected.prompts
    assert [one.media for one in found.distinct] == [one.media for one in expected.distinct]
    assert found.samples_by_medium == expected.samples_by_medium and found.samples_by_medium["?"] == 0
    plans = found.pack_plan(3), expected.pack_plan(3)
    assert [plans[0].packs(epoch) for epoch in range(3)] == [plans[1].packs(epoch) for epoch in range(3)]
    for number in range(len(expected.documents)):
        built, again = found.build(number), expected.build(number)
        assert (built.sample_ids, built.media, built.suffix_lengths) == (
            again.sample_ids,
            again.media,
            again.suffix_lengths,
        )
        assert built.ids_T.equal(again.ids_T) and built.labels_T.equal(again.labels_T)
        assert built.positions_3T.equal(again.positions_3T)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers": {"workers": 2},
    "shortened": {"pack_tokens": 250, "max_samples_per_pack": 2},
    "times": {"video": {"timestamps": True, "max_frames": 8}},
    "alone": {"share_videos": False},
    "frames for sharing": {"frames_for_sharing": 0.5, "pack_tokens": 300},
    "shares": {
        "sources": [
            {"format": "llava_video", "path": "videos", "share": 0.3},
            {"format": "messages", "path": "pictures.jsonl", "share": 0.7, "take": "random:5"},
        ]
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_stored_plan_is_the_plan(root: Path, loaded: Loaded, settings: dict[str, Any]) -> None:
    config = config_of(root, **settings)
    expected = planned_anew(config.model_copy(update={"workers": 0}), loaded.encoder)
    assert {item.reason for item in expected.bad} >= {"missing", "record"}
    assert expected.num_paired == {"videos": 0, "pictures.jsonl": 3}
    for _ in range(2):
        assert_same(loaded(config), expected)
    assert loaded.planned == 1


def test_both_sides_of_a_split(root: Path, loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(root)
    for held_out in (True, False, True, False):
        split = Split(0.4, 0, held_out)
        assert_same(loaded(config, split=split), planned_anew(config, loaded.encoder, split=split))
    assert loaded.planned == 2


def test_an_overlap_is_found_without_reading_all(root: Path, loaded: Loaded) -> None:
    config = config_of(root)
    loaded(config)
    found, held_out = loaded(config), planned_anew(config, loaded.encoder).conversations
    line = overlap_warning(held_out, found.distinct)
    assert line and line == overlap_warning(held_out, held_out)


# ------------------------------------------------------------------------------------------------- what has changed


def add_record(root: Path) -> None:
    with (root / "pictures.jsonl").open("a") as file:
        file.write('\n{"id": "new", "question": "?", "answer": "x"}')


def add_file(root: Path) -> None:
    (root / "videos" / "more.json").write_text((root / "videos" / "0_30_s" / "all.json").read_text())


def change_picture(root: Path) -> None:
    Image.new("RGB", (200, 100)).save(root / "1.png")


def remove_picture(root: Path) -> None:
    (root / "1.png").unlink()


def find_missing_video(root: Path) -> None:
    shutil.copy(root / "2.png", root / "videos" / "0_30_s" / "academic" / "gone.mp4")


def find_video_in_another_place(root: Path) -> None:
    """`data.root` itself is looked at before the folder that `data_source` names."""
    (root / "academic").mkdir()
    shutil.copy(root / "2.png", root / "academic" / "0.mp4")


def add_classes(root: Path) -> None:
    (root / "classes.txt").write_text("a\nb\n")


def turn_folder_into_link(root: Path) -> None:
    (root / "videos" / "0_30_s" / "academic").rename(root / "elsewhere")
    (root / "videos" / "0_30_s" / "academic").symlink_to(root / "elsewhere")


CHANGES = (
    add_record,
    add_file,
    change_picture,
    remove_picture,
    find_missing_video,
    find_video_in_another_place,
    add_classes,
    turn_folder_into_link,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_on_the_disk_is_seen(root: Path, loaded: Loaded, change: Callable[[Path], None]) -> None:
    config = config_of(root)
    loaded(config)
    change(root)
    found = loaded(config)
    stored.look_up.cache_clear()
    assert_same(found, planned_anew(config, loaded.encoder))
    assert loaded.planned == 2
    loaded(config)
    assert loaded.planned == 2


def test_a_turned_link_is_seen(root: Path, loaded: Loaded) -> None:
    (root / "0.png").rename(root / "old.png")
    (root / "0.png").symlink_to(root / "old.png")
    config = config_of(root)
    assert_same(loaded(config), planned_anew(config, loaded.encoder))
    (root / "0.png").unlink()
    (root / "0.png").symlink_to(root / "2.png")
    found = loaded(config)
    stored.look_up.cache_clear()
    assert_same(found, planned_anew(config, loaded.encoder))
    assert loaded.planned == 2


def test_another_plan_is_another_key(root: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    config, encoder = config_of(root), loaded.encoder
    template = ChatEncoder(encoder.tokenizer, encoder.processor, encoder.end_ids)
    processor = replace(encoder.processor, context_tokens=300)
    same_stem = SourceConfig(format="llava_video", path="old/pictures", stream=True)
    runs: list[tuple[DataConfig, dict[str, Any]]] = [
        (config, {}),
        (config_of(root, pack_tokens=401), {}),
        (config_of(root, index="header"), {}),
        (config_of(root, video={"fps": 1.0}), {}),
        (config_of(root, sources=config.sources[1:]), {}),
        (config_of(root, sources=[*config.sources, same_stem]), {}),  # then another name tells a source apart
        (config, {"seed": 1}),
        (config, {"task": QuestionAnswering(prompt="Well?")}),
        (config, {"encoder": ChatEncoder(encoder.tokenizer, processor, encoder.end_ids)}),
        (config, {"encoder": ChatEncoder(encoder.tokenizer, encoder.processor, encoder.end_ids, False)}),
    ]
    for number, (one, own) in enumerate(runs, 1):
        for _ in range(2):
            loaded(one, **own)
            assert loaded.planned == number
        if number == 1:  # the same plan
            loaded(config_of(root, prefetch_packs=3, workers=1), template)
            assert loaded.planned == 1
    monkeypatch.setattr(encoder.tokenizer, "chat_template", encoder.tokenizer.chat_template + " ")
    loaded(config, ChatEncoder(encoder.tokenizer, encoder.processor, encoder.end_ids))
    assert loaded.planned == len(runs) + 1
    monkeypatch.setattr(stored, "code_digest", lambda: "another version")
    loaded(config, template)
    assert loaded.planned == len(runs) + 2
    assert len(list((root.parent / "cache" / "plans").glob("*/"))) == stored.KEPT


def test_what_others_wrote_is_planned_anew(root: Path, loaded: Loaded) -> None:
    class Own(QuestionAnswering):
        pass

    Own.__module__ = "own"
    for _ in range(2):
        loaded(config_of(root), task=Own())
    assert loaded.planned == 2 and not (root.parent / "cache" / "plans").exists()


# ------------------------------------------------------------------------------------------------ damage and accidents


def plan_folder(root: Path) -> Path:
    (folder,) = (root.parent / "cache" / "plans").glob("*/")
    return folder


@pytest.mark.parametrize("name", [*stored.SCHEMAS, stored.ABOUT])
@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "removed"])
def test_a_damaged_plan_is_made_again(root: Path, loaded: Loaded, name: str, damage: str) -> None:
    config = config_of(root)
    loaded(config)
    file = plan_folder(root) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes({"changed": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    for _ in range(2):
        assert_same(loaded(config), planned_anew(config, loaded.encoder))
    assert loaded.planned == 2


def in_child(work: Callable[[], object]) -> multiprocessing.Process:
    child: Any = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child  # type: ignore[no-any-return]


def test_a_killed_process_leaves_nothing_that_is_used(
    root: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = config_of(root), stored._write_table

    def killed(path: Path, tables: Any) -> None:
        write(path, tables)
        if path.name == "conversations":
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(stored, "_write_table", killed)
        child = in_child(lambda: loaded(config))
        child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert plan_folder(root).name.startswith(".partial-")
    assert_same(loaded(config), planned_anew(config, loaded.encoder))
    assert loaded.planned == 1 and not plan_folder(root).name.startswith(".")


def test_several_processes_plan_once(root: Path, loaded: Loaded) -> None:
    config, out = config_of(root), root.parent / "out"

    def start() -> None:
        found = loaded(config)
        with out.open("a") as file:
            file.write(json.dumps([loaded.planned, found.digest]) + "\n")

    children = [in_child(start) for _ in range(4)]
    for child in children:
        child.join(120)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(planned for planned, _ in found) == [0, 0, 0, 1]
    assert {digest for _, digest in found} == {planned_anew(config, loaded.encoder).digest}


def test_a_folder_that_cannot_be_written(
    root: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(root)
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)  # root may write everywhere
        assert_same(loaded(config), planned_anew(config, loaded.encoder))
        assert "plans: can't be written" in caplog.text and loaded.planned == 1
        patched.setattr(os, "access", lambda *_: True)
        loaded(config)
        patched.setattr(stored, "locked", None)  # who only reads needs no lock
        assert_same(loaded(config), planned_anew(config, loaded.encoder))
        assert loaded.planned == 2


def test_a_full_disk(
    root: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, tables: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "_write_table", full)
    config = config_of(root)
    assert_same(loaded(config), planned_anew(config, loaded.encoder))
    assert "No space left on device" in caplog.text and "planned" not in caplog.text.partition("No space")[0]
    assert not list((root.parent / "cache" / "plans").glob("*/"))


def test_a_file_whose_scan_crashed_is_tried_again(root: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start may find it good, so this plan holds for one start only."""
    from vft.data.media import index

    def crash(kind: str, path: Path, headers: bool) -> None:
        raise MediaError("crashed", f"{path}: crashed")

    change_picture(root)
    config = config_of(root)
    with monkeypatch.context() as patched:
        patched.setattr(index, "scan_file", crash)
        assert [item.reason for item in loaded(config).bad].count("crashed") > 0
    assert_same(loaded(config), planned_anew(config, loaded.encoder))
    assert loaded.planned == 2


def test_notes_are_shown_at_every_start(root: Path, loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(root, pack_tokens=250)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        stored.log_once.cache_clear()
        caplog.clear()
        loaded(config)
        assert "keys that are not read" in caplog.text and "fewer frames or pixels" in caplog.text
        assert caplog.text.count("keys that are not read") == 1


# ------------------------------------------------------------------------------------------------------------- values

REF = MediaRef("video", (Path("/a/1.png"), Path("/b/\udc80")), MediaOptions(fps=2, timestamps=(0.1, 1e-9)), "videos[0]")
VALUES = (
    Conversation(
        "é\ud800\n",
        (Turn("user", (REF, FrameTimes(0), Subtitles(((0.5, 1.0, "a"),)), "?")), Turn("assistant", ("x",))),
        "a.json:1",
        ("a", "b"),
        {"answers": ("a", "b"), "list": [1, 2.0, None, True], "map": {"k": {}}, "Path": Path("x")},
        ((0.0, 1.5),),
        True,
    ),
    Conversation("", (), ""),
    VisionLimits(None, 3, 1, 2**62, 1, 5, None, start_s=0.0),
    BadItem("a", "", "record", "m", 0),
    (),
    None,
)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back_as_they_were(value: Any) -> None:
    again = stored.unpack(json.loads(json.dumps(stored.pack(value))))
    assert again == value and repr(again) == repr(value)  # types too: 2 and 2.0 are different in a digest


def test_other_classes_are_not_stored() -> None:
    class Turn(str):
        pass

    for value in (Sample("", (), ""), {1, 2}, Turn("x"), (object(),)):
        with pytest.raises(TypeError, match="can't be stored"):
            stored.pack(value)


def test_an_error_of_reading_is_the_same(root: Path, loaded: Loaded) -> None:
    for settings in ({"max_bad_fraction": 0.0}, {"sources": [{"format": "messages", "path": "no.jsonl"}]}):
        config = config_of(root, **settings)
        with pytest.raises(UserError) as expected:
            planned_anew(config, loaded.encoder)
        with pytest.raises(UserError) as found:
            loaded(config)
        assert str(found.value) == str(expected.value)
    assert not list((root.parent / "cache").glob("plans/*/"))
