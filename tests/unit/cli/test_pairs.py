"""Which of a model's answers `vft pairs` chooses, and the records that it writes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.formats import read_messages, write
from vft.cli.pairs import PairsArguments, as_request, candidates_of, make_records, ranked_by, record_of
from vft.common.errors import UserError
from vft.common.task import Answer, Question, Task
from vft.common.types import Conversation, MediaRef, Turn
from vft.config.data import DataConfig, VideoConfig
from vft.data.media.timed_text import Subtitles, with_frame_times
from vft.inference.engine import Failure
from vft.metrics import cider_d_scores, rouge_l_scores
from vft.preparation.documents import questions
from vft.recipes.caption import Caption
from vft.recipes.classify import Classify
from vft.recipes.qa import QuestionAnswering

SETTINGS = {"model": "base", "adapter": None, "weights": "abc", "seed": 3, "temperature": 1.0}
COLOURS = "Which colour?\nA. red\nB. green"


def question(name: str, *references: str, text: str = "What?", options: tuple[str, ...] = ()) -> Question:
    video = MediaRef("video", Path(f"/data/{name}.mp4"))
    return Question(name, Conversation(name, (Turn("user", (video, text)),), name, options), references)


def answered(asked: Question, *texts: str | Answer) -> tuple[Question, Answer]:
    first, *others = (one if isinstance(one, Answer) else Answer(asked, one) for one in texts)
    return asked, Answer(asked, first.text, (), (), first.reasoning, first.is_cut_off, tuple(others))


def made(task: Task, *said: tuple[Question, Answer], **options: Any) -> tuple[list[Any], Counter[str], str]:
    """Chosen and rejected answer of each record by its id; what is left out; and the line of all."""
    arguments = PairsArguments.model_validate({"config": "x", "samples": 4, **options})
    by = ranked_by(task, [one for one, _ in said], arguments.by)
    records, left_out, about = make_records(task, said, by, arguments, SETTINGS, "/data")
    for one in records:
        assert {name: one["sampled"][name] for name in ("model", "weights", "seed")}.items() <= SETTINGS.items()
    pairs = [(one["id"], one["messages"][-1]["content"], one.get("rejected_response")) for one in records]
    return pairs, left_out, about


def test_a_right_option_and_a_wrong_one() -> None:
    """By letter or words, not by likelihood; an open question by the words that it shares with its answer."""
    options = ("A", "B")
    found, left_out, about = made(
        QuestionAnswering(),
        answered(question("a", "B", text=COLOURS, options=options), "A", "It is B.", "B", "A. red"),
        answered(question("b", "A", text=COLOURS, options=options), "A", "A.", "A", "A"),
        answered(question("c", "B", text=COLOURS, options=options), "A", "A", "A", "A"),
        answered(question("d", "a red bar"), "blue", "red", "red bar", "red bar, blue"),
    )
    assert found == [("a", "It is B.", "A"), ("d", "red bar", "blue")]
    assert left_out == {"with equal scores, or nearly": 2}
    # 1, 1, 0 and 1 at best, 0.5, 1, 0 and (0 + 2/3 + 1 + 4/5) / 4 on average; 4, 2, 1 and 4 different texts.
    assert "best 0.75, mean 0.529, worst 0.25; 2.75 of 4 differ" in about


def test_labels() -> None:
    options = ("walk", "run")
    found, _, about = made(Classify(), answered(question("a", "run", options=options), "Run.", "walk", "sit", "run"))
    assert found == [("a", "Run.", "walk")] and about.startswith("exact_match of ")


def test_scores_are_those_of_each_answer() -> None:
    """CIDEr-D and ROUGE-L of every answer, each kind of answer weighed by the words of the whole set."""
    references = [("a red bar walks away",), ("something green moves", "green goes"), ("the blue one",)]
    texts = [["a red bar", "a bar walks", "red"], ["green goes", "it", "something moves"], ["the blue", "one", "blue"]]
    said = [
        [Answer(question(str(i), *own), text) for text in row]
        for i, (own, row) in enumerate(zip(references, texts, strict=True))
    ]
    for name, of in (("cider_d", cider_d_scores), ("rouge_l", rouge_l_scores)):
        wanted = [of(column, references) for column in zip(*texts, strict=True)]
        found = candidates_of(Caption(), said, [name])
        assert [[one.text for one in row] for row in found] == texts
        assert [[one.score for one in row] for row in zip(*found, strict=True)] == [pytest.approx(w) for w in wanted]
    # A sentence's BLEU-4 alone: its own words, with sacrebleu's smoothing.
    perfect = candidates_of(Caption(), [[Answer(question("a", "a red bar walks"), "a red bar walks")]], ["bleu4"])
    assert perfect[0][0].score == pytest.approx(100)


def test_what_is_left_out() -> None:
    """Equal scores, small gaps, low scores, and what is no whole answer."""
    asked = question("a", "a red bar"), question("b", "a green bar"), question("c", "a blue bar")
    cut = [Answer(asked[2], "a blue bar", is_cut_off=True), Answer(asked[2], "", is_cut_off=True)]
    said = (
        answered(asked[0], "a red bar", "a bar", "red bar", "bar"),
        answered(asked[1], "green", "bar", "green", "bar"),
        answered(asked[2], *cut, Answer(asked[2], " "), cut[0]),
    )
    by = {"by": "rouge_l"}
    found, left_out, _ = made(Caption(), *said, **by)
    assert found == [("a", "a red bar", "bar")]
    assert left_out == {"with equal scores, or nearly": 1, "cut off, empty or without this score": 1}
    assert made(Caption(), *said, **by, min_gap=0.51)[0] == []  # ROUGE-L of 1 and of 0.5
    assert made(Caption(), *said, **by, min_gap=0.5)[0] == found
    # Best answers: ties are none the worse. "green" has a third of the words: 0.5.
    best, left_out, _ = made(Caption(), *said, **by, best_only=True)
    assert best == [("a", "a red bar", None), ("b", "green", None)] and len(left_out) == 1
    assert made(Caption(), *said, **by, best_only=True, min_score=0.6)[0] == best[:1]
    # The record's own answer, where no sampled one is as good; never where none can be rejected.
    own = made(Caption(), *said, **by, with_reference=True)[0]
    assert own == [*found, ("b", "a green bar", "green")]
    wrong = answered(asked[0], "x", "y", "x", "y")
    assert made(Caption(), wrong, *said[1:], **by, best_only=True)[0] == best[1:]


def test_reasoning_is_part_of_an_answer() -> None:
    asked = question("a", "red bar")
    said = answered(asked, Answer(asked, "bar", reasoning="Hm."), Answer(asked, "red bar", reasoning="I\nlook."))
    (pair,), _, _ = made(QuestionAnswering(), said, samples=2)
    assert pair[1:] == ("<think>\nI\nlook.\n</think>\n\nred bar", "<think>\nHm.\n</think>\n\nbar")


def test_unknown_scores_are_told() -> None:
    """Only those that what is generated can raise: not the likelihood of options."""
    asked = [question("a", "B", text=COLOURS, options=("A", "B")), question("b", "a red bar")]
    for name in ("bleu", "choice_accuracy_norm"):
        with pytest.raises(UserError, match=rf"^--by = {name}: scores by which qa ranks .* are accuracy, .*open_anls"):
            ranked_by(QuestionAnswering(), asked, name)
    with pytest.raises(UserError, match=r"^--by = cider_d: .* are bleu4, rouge_l$"):
        ranked_by(Caption(), [question("a", "a red bar walks away")], None)
    assert ranked_by(Caption(), asked, None) == ["cider_d"]


# ---------------------------------------------------------------------------------------------------------- records


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("frames/1.png", "frames/2.png", "a.png", "b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (28, 28)).save(tmp_path / name)
    return tmp_path


def user(text: Any, answer: str = "A bar.", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **more}


RECORDS = {
    "options": user("<video>Who?", videos=["x/a.mp4"], video_start=1.5, video_end=3, fps=2, max_pixels=3136),
    "several media": user(
        "<video> then <image> and <video>?",
        videos=[{"video": "a.mp4", "nframes": 4}, {"video": "b.mp4", "total_pixels": 99999}],
        images=[{"image": "a.png", "max_pixels": 784}],
    ),
    "listed frames": user("<video>?", videos=[["a.png", "b.png"]], timestamps=[0, 1.5]),
    "a folder of frames": user("<video>?", videos=["frames"], sample_fps=[4]),
    "turns": {
        "system": "Be brief.",
        "videos": ["a.mp4"],
        "messages": [
            *user("<video>What?", "<think>\nHm.\n</think>\n\nA bar.")["messages"],
            *user("And then?", "It stops.")["messages"],
        ],
    },
    "marks as text": user([{"type": "text", "text": "What does <video> mean?"}]),
    "LLaVA": {
        "video": "a.mp4",
        "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A."}],
    },
    "clip and label": {"video": "a.mp4", "label": "walk", "options": ["walk", "run"], "start": 2, "end": 4},
}


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_reads_as_its_source(root: Path, name: str, timestamps: bool) -> None:
    """The same turns, media and options, with the answers of the pair; no key is left unread."""
    (sample,), bad = read_messages(write(root / "a.json", [RECORDS[name]]), root)
    assert not bad
    (conversation,) = Classify().conversations(sample) if "label" in RECORDS[name] else Caption().conversations(sample)
    conversation = with_frame_times(conversation) if timestamps else conversation
    (asked,) = questions([conversation])
    data = DataConfig(root=root, video=VideoConfig(timestamps=timestamps))
    request = as_request(asked, data)
    assert isinstance(request.question, Question), request.question
    assert request.question.prompt.options == () and request.question.references == asked.references
    record = {**record_of(asked.prompt, str(root), "Good."), "rejected_response": "Bad.", "sampled": {"chosen": 1.0}}
    (again,), bad = read_messages(write(root / "pairs.json", [record]), root)
    assert not bad and again.unread == () and again.fields["rejected_response"] == "Bad."
    (written,) = Caption().conversations(again)
    written = with_frame_times(written) if timestamps else written
    assert written.content(str(root))[:-1] == conversation.content(str(root))[:-1]
    assert written.turns[-1].text == "Good." and written.id == conversation.id


def test_prompts_that_no_record_can_hold(root: Path) -> None:
    """Subtitles of the frames, and a folder that no longer has the same frames."""
    video = MediaRef("video", root / "a.mp4")
    for extra in (Subtitles(((0.0, 1.0, "Hello."),)), MediaRef("video", (root / "frames/1.png",), is_folder=True)):
        asked = Question("a", Conversation("a", (Turn("user", (video, extra, "Who?")),), "x.json:3"), ("A.",))
        failed = as_request(asked, DataConfig(root=root)).question
        assert isinstance(failed, Failure) and failed.message.startswith("x.json:3: messages: can't hold this prompt")
