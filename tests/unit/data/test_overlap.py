"""Which held-out samples are trained on too: under whatever name their files have."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vft.common.types import Conversation, MediaOptions, MediaRef, Turn
from vft.data.overlap import also_trained_on, overlap_warning


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
