"""A record that names a medium where nobody looks is refused: it would be trained on as text."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.cases.conftest import Case


@pytest.mark.parametrize(
    ("records", "key", "nearest"),
    [
        ("message_level.jsonl", "messages[0].videos", "'videos', beside the messages"),
        ("video_path.jsonl", "video_path", "'video'"),
        ("typo.jsonl", "vidoes", "'videos'"),
        ("openai_file.jsonl", "messages[0].attachments", "beside the messages"),
    ],
)
def test_the_key_and_the_nearest_known_one(case: Callable[[str], Case], records: str, key: str, nearest: str) -> None:
    error = case("25_media_keys_unknown").look(records).result.error
    assert f"{records}:1: {key}: names 'c10.mp4'" in error and "the nearest known one is" in error and nearest in error
