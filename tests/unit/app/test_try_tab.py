"""The tab Try: its answers are those of `vft predict`, for each page by itself, of one model in memory."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vft.app import models
from vft.app.models import Held, Session
from vft.app.try_tab import Try, base_of, choices
from vft.app.workspace import Workspace
from vft.cli import predict
from vft.common.errors import UserError

ADAPTER, HOW = "runs/mine/adapter", ("", 0.0, 12, 0)
"""No system text, greedy, at most 12 tokens, seed 0."""


@pytest.fixture
def tab(space: Workspace) -> Try:
    """The tab, decoding in this process."""
    return Try(space, Held(workers=0))


def said(tab: Try, session: Session, text: str, both: bool = True, how: Any = HOW) -> list[str]:
    """The last answers of both sides, by their messages."""
    *_, last = tab.ask(session, text, both, *how)
    return [
        messages[-1]["content"].removesuffix(" [cut off at the limit of tokens]").strip()
        for messages in last[1:]
        if messages
    ]


def predicted(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What `vft predict` answers."""
    with pytest.raises(SystemExit):
        predict.main(["--model", "base", *more, "--prompt", "Describe it.", "--max-new-tokens", "12", "clip.mp4"])
    return capsys.readouterr().out.strip()


def test_both_sides_answer_as_predict_does_and_go_on(tab: Try, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session()
    status, system, *_ = tab.load(session, "base", ADAPTER, False)
    assert f"vft chat --model base --adapter {ADAPTER}" in status and system == ""
    frames = tab.take(session, None, "clip.mp4")[0]
    assert frames.count("<img src='data:image/jpeg") == 4 and "1.90 s" in frames and "tokens" in frames
    answers = said(tab, session, "Describe it.")
    assert answers == [predicted(capsys, "--adapter", ADAPTER), predicted(capsys)] and answers[0] != answers[1]
    said(tab, session, "")
    turns = {name: [(turn.role, turn.text) for turn in side.turns] for name, side in session.sides.items()}
    for name, answer in zip(models.SIDES, answers, strict=True):
        assert [role for role, _ in turns[name]] == ["user", "assistant"] * 2
        assert turns[name][1][1].strip() == answer and turns[name][2][1] == "What moves?"  # that of training


def test_pages_share_one_model_and_keep_their_talks_apart(tab: Try) -> None:
    first, second = Session(), Session()
    tab.load(first, "base", ADAPTER, False)
    answerer = tab.held._answerer
    assert answerer is not None
    model = weakref.ref(answerer.model)
    del answerer
    assert "place" not in tab.load(second, "base", ADAPTER, False)[0]  # the same: nothing is read again
    assert tab.held._answerer is not None and tab.held._answerer.model is model()
    said(tab, first, "Hello?", both=False)
    assert not second.shown[0]
    assert f"takes the place of {ADAPTER} on base, which" in tab.load(second, "base", "", False)[0]
    gc.collect()
    assert model() is None
    assert said(tab, first, "And?", both=False)[0].startswith(f"[no answer: {ADAPTER} on base made place for base")
    assert len(first.sides["tuned"].turns) == 2
    assert "takes the place of base, which" in tab.load(first, "base", ADAPTER, False)[0]
    said(tab, first, "And?", both=False)
    assert len(first.sides["tuned"].turns) == 4  # the talk goes on


def test_questions_asked_at_once_are_answered_as_alone(tab: Try) -> None:
    def asked(both: bool) -> list[str]:
        session = Session()
        tab.load(session, "base", ADAPTER, False)
        return said(tab, session, "Describe it.", both)

    alone = asked(True)
    with ThreadPoolExecutor(4) as pool:  # while one answers without the adapter, others want it
        together = list(pool.map(asked, [True, False] * 4))
    assert together == [alone, alone[:1]] * 4


def test_an_answer_can_be_stopped(tab: Try) -> None:
    session = Session()
    tab.load(session, "base", "", False)
    answers = tab.ask(session, "Go on and on.", False, "", 50.0, 400, 0)
    next(answers)
    next(answers)
    tab.stop(session)
    *_, last = answers
    assert "[stopped" in last[1][-1]["content"] and not session.sides["tuned"].turns
    assert "[stopped" not in said(tab, session, "Hello?")[0]


def test_likelihoods_of_the_base_are_those_without_an_adapter(tab: Try) -> None:
    session, alone = Session(), Session()
    tab.load(session, "base", ADAPTER, False)
    tab.take(session, ["clip.mp4"], "")
    options = "<script>\ncolor: red\n\ncolor: red\n"
    tuned, base = tab.weigh(session, "Which?", options, True, "").split("<table>")[1:]
    assert tuned.count("<tr>") == 3 and "&lt;script&gt;" in tuned and "<script>" not in tuned
    tab.load(alone, "base", "", False)
    tab.take(alone, None, "clip.mp4")
    (without,) = tab.weigh(alone, "Which?", options, True, "").split("<table>")[1:]
    assert base.split("</caption>")[1] == without.split("</caption>")[1] != tuned.split("</caption>")[1]


def test_mistakes_are_one_line_each(tab: Try, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, space = Session(), tab.space
    upload = space.own / "uploads" / "0a1b" / "bad.mp4"
    upload.parent.mkdir(parents=True)
    upload.write_bytes(b"no video")
    assert said(tab, session, "Hello?") == ["[no answer: no model is loaded: choose one, then Load]"]
    tab.load(session, "base", "", False)
    for name, says in (
        (str(upload), r"^bad\.mp4: "),
        (str(tmp_path), "lies outside"),
        ("runs", "no video or picture"),
        ("gone.mp4", "there is no"),
    ):
        with pytest.raises(UserError, match=says):
            tab.take(session, [name], "")
        with pytest.raises(UserError, match=f"{says}.*; choose another clip"):
            said(tab, session, "What happens?")  # not answered as if the clip had been seen
    tab.take(session, None, "")
    assert "--temperature = -1" in said(tab, session, "Hello?", how=("", -1, 12, 0))[0]
    monkeypatch.setattr(models, "available_memory", lambda: 1e6)
    with pytest.raises(UserError, match=r"base: its weights take .* GiB free on cpu"):
        tab.load(session, "base", ADAPTER, False)


def test_what_can_be_chosen(space: Workspace) -> None:
    adapters, bases = choices(space)
    assert ADAPTER in dict(adapters.choices).values() and [name for _, name in bases.choices] == ["base"]
    assert base_of(space, ADAPTER) == base_of(space, "runs/mine") == "base"
