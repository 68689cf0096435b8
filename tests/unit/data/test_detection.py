"""What files are, told from their first records, and the media folder that records don't name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vft.config.data import DataConfig
from vft.data.detection import LOOKED_AT, detect, keys_of
from vft.data.records.files import at_most, read_records

CHAT = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]


def write(root: Path, name: str, records: list[dict[str, object]], *media: str) -> DataConfig:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(records))
    for file in media:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return DataConfig(root=root)


def test_the_format_that_finds_the_media_is_taken(tmp_path: Path) -> None:
    """LLaVA-Video's records name files from their own folder, those of `messages` from the root."""
    records: list[dict[str, object]] = [{"id": "1", "video": "set/a.mp4", "conversations": CHAT}]
    data = write(tmp_path, "0_30_s_set/caption.json", records, "0_30_s_set/set/a.mp4")
    assert detect("0_30_s_set/caption.json", data).format == "llava_video"
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.mp4").touch()
    assert detect("0_30_s_set/caption.json", data).format == "messages"


def test_a_media_folder_is_found(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"video": "a.mp4", "question": "What?", "answer": "This."}]
    data = write(tmp_path, "train.json", records, "clips/day/a.mp4")
    found = detect("train.json", data)
    assert (found.format, found.media) == ("messages", "clips/day")
    assert detect("train.json", data, "elsewhere").media == "elsewhere"


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for name in ("run/1.mp4", "run/2.mp4", "walk/1.mp4"):
        (tmp_path / "clips" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / name).touch()
    assert detect("clips", DataConfig(root=tmp_path)).format == "folders"


def test_what_nothing_reads_is_messages_with_its_keys(tmp_path: Path) -> None:
    (tmp_path / "odd.csv").write_text("clip_name,q,a\n1.mp4,What?,This.\n")
    data = DataConfig(root=tmp_path)
    assert detect("odd.csv", data).format == "messages" and keys_of("odd.csv", data) == ["clip_name", "q", "a"]
    assert keys_of("gone.json", data) == []


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_only_the_first_records_are_read(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"many.{suffix}"
    lines = [f'{{"answer": {i}}}' for i in range(50)] if suffix == "jsonl" else ["answer", *map(str, range(50))]
    file.write_text("\n".join([*lines, '{"broken']))
    with at_most(LOOKED_AT):
        assert len(list(read_records(file))) == LOOKED_AT
