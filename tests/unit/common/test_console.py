"""Messages on a terminal: their form, and which process shows them."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vft.common.console import progress_bar, setup_logging, user_errors
from vft.common.errors import UserError

logger = logging.getLogger("vft.somewhere")


@pytest.fixture(autouse=True)
def messages() -> Iterator[None]:
    """A command's messages, for the length of a test."""
    vft = logging.getLogger("vft")
    setup_logging()
    setup_logging()
    yield
    vft.handlers.clear()


def test_messages_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("wrote %s", "[bold]/x[/bold] :smile: " + "long " * 100)
    logger.warning("doubtful")
    logger.error("wrong")
    long = "long " * 100
    assert capsys.readouterr().err == f"wrote [bold]/x[/bold] :smile: {long}\nwarning: doubtful\nerror: wrong\n"


def test_other_processes_are_silent_but_for_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    logger.info("of all processes alike")
    logger.warning("of all processes alike")
    logger.warning("of this one", extra={"all_ranks": True})
    logger.error("of this one")
    assert capsys.readouterr().err == "warning: of this one\nerror: of this one\n"


@pytest.mark.parametrize(
    ("rank", "local_rank", "on_one_rank", "line"),
    [
        ("0", "0", False, "error: a.toml: wrong\n"),
        ("1", "1", False, ""),
        ("2", "0", False, "error: rank 2: a.toml: wrong\n"),
        ("1", "1", True, "error: rank 1: a.toml: wrong\n"),
    ],
)
def test_a_mistake_of_the_user_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    local_rank: str,
    on_one_rank: bool,
    line: str,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    error = UserError("a.toml: wrong")
    error.on_one_rank = on_one_rank
    with pytest.raises(SystemExit) as ended, user_errors():
        raise error
    assert ended.value.code == 2 and capsys.readouterr().err == line


def test_a_progress_bar_makes_room_for_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(10, "answering", "question") as bar:
        bar.delay = bar.start_t = 0
        bar.update(4)
        bar.refresh()
        logger.info("a message")
        text = sys.stderr.getvalue()  # type: ignore[attr-defined]
        before, _, after = text.partition("a message\n")
        assert "4/10" in before and before.endswith("\r") and "4/10" in after


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    lines = ["from vft.common.console import user_errors", "with user_errors():", " while True:", "  print('x' * 9999)"]
    code = "\n".join(lines)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1) == b"x"
    process.stdout.close()
    assert process.wait(60) == 128 + 13 and process.stderr is not None and process.stderr.read() == b""
