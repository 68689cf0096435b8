"""`eval.split`: which records are held out, that none moves, that no medium is on both sides."""

from __future__ import annotations

import json
import os
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.clips import make_clip
from tests.helpers.tiny import Tiny
from vft.common.errors import UserError
from vft.common.task import main_conversation
from vft.common.types import Conversation, MediaOptions, MediaRef, Sample, Turn
from vft.config import run as configs
from vft.config.run import Config
from vft.data.dataset import load_dataset
from vft.data.split import Split, also_trained_on, media_of, overlap_warning
from vft.preparation.documents import held_out_split, load_held_out
from vft.recipes.caption import Caption


def sample(name: str, *paths: Path | tuple[Path, ...], member: str = "") -> Sample:
    refs = tuple(MediaRef("video", path, member=member) for path in paths)
    return Sample(name, (Turn("user", (*refs, "?")), Turn("assistant", (name,))), name)


def sides(samples: list[Sample], root: Path, share: float = 0.3, seed: int = 0) -> tuple[set[str], set[str]]:
    """Ids to train on, and ids held out."""
    chosen = [Split(share, seed, held_out).select(samples, root)[0] for held_out in (False, True)]
    train, held = ({one.id for one, is_in in zip(samples, side, strict=True) if is_in} for side in chosen)
    assert not train & held
    return train, held


def test_the_share_is_held_out_and_another_seed_holds_out_others(tmp_path: Path) -> None:
    samples = [sample(str(i), tmp_path / f"{i}.mp4") for i in range(4000)]
    train, held = sides(samples, tmp_path, 0.05)
    assert train | held == {one.id for one in samples}
    assert abs(len(held) - 200) < 4 * (4000 * 0.05 * 0.95) ** 0.5  # four standard deviations
    other = sides(samples, tmp_path, 0.05, seed=1)[1]
    assert len(held & other) < 40


def test_new_records_and_another_order_move_none(tmp_path: Path) -> None:
    old = [sample(str(i), tmp_path / f"{i // 2}.mp4", tmp_path / f"b{i}.mp4") for i in range(300)]
    new = [sample(f"new{i}", tmp_path / f"n{i}.mp4") for i in range(300)]
    train, held = sides(old, tmp_path)
    mixed = [*old, *new]
    random.Random(0).shuffle(mixed)
    later = sides(mixed, tmp_path)
    assert train <= later[0] and held <= later[1]
    moved = [sample(one.id, tmp_path / "x" / one.turns[0].parts[0].path.name) for one in old]  # type: ignore[union-attr]
    assert sides(moved, tmp_path / "x")[1] == held  # the root may lie elsewhere


def test_no_medium_is_on_both_sides(tmp_path: Path) -> None:
    generator = random.Random(0)
    files = [tmp_path / f"{i}.jpg" for i in range(60)]
    samples = [sample(str(i), *generator.sample(files, generator.randint(1, 3))) for i in range(200)]
    train, held = sides(samples, tmp_path)
    shown = {one.id: set(media_of(one, str(tmp_path))) for one in samples}
    assert held and train
    assert set().union(*(shown[i] for i in train)).isdisjoint(set().union(*(shown[i] for i in held)))
    on_neither = Split(0.3, 0, held_out=False).select(samples, tmp_path)[1]
    assert on_neither == len(samples) - len(train) - len(held) > 0


def test_what_counts_as_one_medium(tmp_path: Path) -> None:
    def name(*paths: Any, **keys: Any) -> list[str]:
        return media_of(sample("x", *paths, **keys), str(tmp_path))

    assert name(tmp_path / "a/b.mp4") == ["a/b.mp4"]
    assert name(tmp_path / "cache/0001.mp4", member="shard-1.tar/sub/7.mp4") == ["sub/7.mp4"]
    frames = [(tmp_path / f"v/{i:03d}.jpg", tmp_path / "v/999.jpg") for i in (1, 2)]
    assert name(frames[0]) == name(frames[1]) == ["v/"]
    assert name((tmp_path / "v/clip1_001.jpg",)) == name((tmp_path / "v/clip1_015.jpg",)) == ["v/clip1_"]
    nfc, nfd = (unicodedata.normalize(form, "é.mp4") for form in ("NFC", "NFD"))
    for seed in range(20):
        split = Split(0.5, seed, held_out=True)
        assert split.is_held_out(nfc) == split.is_held_out(nfd)
    assert name() == ["?\nx"]


# --------------------------------------------------------------------------------------------------- in a configuration


def settings(root: Path, **eval: Any) -> Config:
    table = {
        "output_dir": str(root / "out"),
        "model": {"path": "x"},
        "data": {
            "root": str(root),
            "sources": [{"format": "messages", "path": f"{n}.jsonl"} for n in "ab"],
            "workers": 0,
            "cache_dir": str(root / "cache"),
        },
        "eval": eval,
    }
    return Config.model_validate(table)


def lay_out(root: Path, clips: int) -> None:
    clip = make_clip(root / "0.mp4", range(8)).read_bytes()
    for i in range(clips):
        (root / f"{i}.mp4").write_bytes(clip)
    for name in "ab":
        rows = [{"id": f"{name}{i}", "video": f"{i}.mp4", "question": name, "answer": "x"} for i in range(clips)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_training_and_evaluation_read_the_two_sides(tiny: Tiny, tmp_path: Path) -> None:
    lay_out(tmp_path, 12)
    config = settings(tmp_path, split=0.3)
    task = Caption()
    train = load_dataset(
        config.data,
        config.data.sources,
        main_conversation(task),
        tiny.encoder,
        config.seed,
        held_out_split(config, held_out=False),
    )
    held = load_held_out(task, config, tiny.encoder)
    ids = [{one.id for one in documents.conversations} for documents in (train, held)]
    assert ids[0] | ids[1] == {f"{name}{i}" for name in "ab" for i in range(12)} and not ids[0] & ids[1]
    assert len(ids[0]) + len(ids[1]) == 24 and 0 < len(ids[1]) < 16
    for side in ids:  # both questions about a clip
        assert {name[1:] for name in side if name[0] == "a"} == {name[1:] for name in side if name[0] == "b"}


def test_a_side_without_records_is_a_line(tiny: Tiny, tmp_path: Path) -> None:
    lay_out(tmp_path, 1)
    config = settings(tmp_path, split=0.5)
    empty = not Split(0.5, config.seed, held_out=True).is_held_out("0.mp4")
    for held_out in (True, False):
        split = Split(0.5, config.seed, held_out)
        if held_out == empty:
            way = "raise" if held_out else "lower"
            with pytest.raises(UserError, match=rf"eval\.split = 0\.5: none of 2 samples of a\.jsonl, b.*; {way} it,"):
                load_dataset(config.data, config.data.sources, Caption().conversations, tiny.encoder, 0, split)


def test_what_contradicts_a_split(tmp_path: Path) -> None:
    source = {"format": "messages", "path": "c.jsonl"}
    for share, words in ((0, "greater than 0"), (1, "less than 1"), ("x", "number")):
        with pytest.raises(ValueError, match=words):
            settings(tmp_path, split=share)
    with pytest.raises(ValueError, match=r"split = 0\.1 and sources = .*c\.jsonl.* contradict"):
        settings(tmp_path, split=0.1, sources=[source])
    table = settings(tmp_path, split=0.1).model_dump()
    table["data"]["sources"] = [{"format": "pe_video", "path": "t", "stream": True}]
    table["train"] = {"max_steps": 1}
    with pytest.raises(ValueError, match=r"split = 0\.1 .*\"t\".*stream.*eval\.sources"):
        Config.model_validate(table)


def test_a_run_goes_on_with_its_split_alone(tmp_path: Path) -> None:
    first, second = settings(tmp_path, split=0.1), settings(tmp_path, split=0.2, every_steps=3)
    assert [key for key, _, _ in configs.differences(first, second)] == ["eval.split"]


# ------------------------------------------------------------------------------------- held out, and trained on too


def about(name: str, *paths: Path | tuple[Path, ...], text: str = "What?", **options: float) -> Conversation:
    media = tuple(MediaRef("video", path, MediaOptions(**options)) for path in paths)
    return Conversation(name, (Turn("user", (*media, text)), Turn("assistant", ("This.",))), f"held.json:{name}")


def test_the_same_file_or_a_copy_of_it(tmp_path: Path) -> None:
    clips = {name: tmp_path / f"{name}.mp4" for name in ("trained", "other", "large", "large_other", "new")}
    clips["trained"].write_bytes(b"a" * 1000)
    clips["other"].write_bytes(b"a" * 999 + b"b")  # of the same size
    clips["large"].write_bytes(bytes(4 << 20))
    clips["large_other"].write_bytes(bytes((4 << 20) - 1) + b"c")
    clips["new"].write_bytes(b"n")
    (tmp_path / "held").mkdir()
    copy, hard, soft = (tmp_path / "held" / name for name in ("copy.mp4", "hard.mp4", "soft.mp4"))
    shutil.copyfile(clips["large"], copy)
    os.link(clips["trained"], hard)
    soft.symlink_to(clips["trained"])
    training = [about("t", clips["trained"]), about("l", clips["large"]), about("f", (clips["new"], clips["trained"]))]
    held_out = [
        about("same", clips["trained"], text="Another question?", video_start=3.0),
        about("copy", copy),
        about("hard link", hard),
        about("link", soft),
        about("other", clips["other"]),
        about("large other", clips["large_other"]),
        about("a picture of a list", clips["new"]),
        about("list", (clips["new"], hard)),
        about("second", clips["other"], soft),
        about("gone", tmp_path / "gone.mp4"),
    ]
    found = [one.id for one in also_trained_on(held_out, training)]
    assert found == ["same", "copy", "hard link", "link", "list", "second"]
    line = overlap_warning(held_out, training)
    assert line.startswith("6 of 10 held-out samples are also in training") and "copy (copy.mp4)" in line
    assert overlap_warning(held_out[4:7], training) == "" and "\n" not in line
    assert also_trained_on([about("gone", tmp_path / "gone.mp4")], [about("gone too", tmp_path / "gone2.mp4")]) == []


def test_texts_alone_are_compared_word_for_word() -> None:
    training = [about("t", text="What is two and two?")]
    held_out = [about("a", text="What is two and two?"), about("b", text="What is two and three?")]
    assert [one.id for one in also_trained_on(held_out, training)] == ["a"]


def test_many_are_named_in_part(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a")
    held_out = [about(f"q{i}", tmp_path / "a.mp4") for i in range(25)]
    line = overlap_warning(held_out, held_out[:1])
    assert "25 of 25" in line and "q9 (a.mp4) and 15 more" in line and "q10" not in line
