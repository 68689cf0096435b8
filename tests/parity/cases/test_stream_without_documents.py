"""A stream in which no clip becomes a document ends with its reasons."""

from __future__ import annotations

from collections.abc import Callable

from tests.parity.cases.conftest import Case


def test_a_stream_without_documents(case: Callable[[str], Case]) -> None:
    stream = case("29_stream_without_documents")
    reason = "8 of 8 clips: no caption; the record has the keys 'duration', read are human_caption, model_caption, "
    assert (
        reason in stream.run("vft.recipes.caption", "config.toml", "data.workers=0", f"model.path={stream.tiny}").error
    )
