"""The six tasks on samples made by hand: what is asked, which options it has, and scores worked out on paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.helpers import coco
from tests.helpers.formats import read_folders
from vft.common.errors import UserError
from vft.common.event_times import EventForm
from vft.common.task import Answer, Question, Task, main_conversation, samples_of, with_prompt
from vft.common.types import Conversation, MediaOptions, MediaRef, Role, Sample, Turn
from vft.config.data import DataConfig
from vft.config.run import Config, ModelConfig
from vft.data.media.timed_text import FrameTimes, Subtitles
from vft.metrics import scale_of
from vft.preparation.documents import questions
from vft.recipes import task_of
from vft.recipes.caption import Caption
from vft.recipes.classify import Classify
from vft.recipes.ground import EVENTS_PROMPT, Ground
from vft.recipes.qa import QuestionAnswering, written_options
from vft.recipes.story import Story
from vft.recipes.summarize import Summarize

VIDEO = MediaRef("video", Path("a.mp4"))
PICTURES = (MediaRef("image", Path("1.png")), MediaRef("image", Path("2.png")))
TASKS: tuple[Task, ...] = (Caption(), QuestionAnswering(), Classify(), Summarize(), Story(), Ground())


def sample(*turns: tuple[Role, Any], **fields: Any) -> Sample:
    """A record of (role, text or parts)."""
    made = tuple(Turn(role, (parts,) if isinstance(parts, str) else tuple(parts)) for role, parts in turns)
    return Sample("s", made, "train.json:12", fields)


def labelled(answer: str, /, **fields: Any) -> Sample:
    """A video alone with its answer, as readers of labels, captions and stories give it."""
    return sample(("user", [VIDEO]), ("assistant", answer), **fields)


def answered(
    text: str, *references: str, options: Sequence[str] = (), scores: Sequence[float] = (), **facts: Any
) -> Answer:
    """An answer to some question with these right ones."""
    prompt = Conversation("q", (Turn("user", (VIDEO, "?")),), "q", tuple(options), facts)
    return Answer(Question("q", prompt, references), text, tuple(scores))


def values(task: Task, *answers: Answer) -> dict[str, float]:
    """Scores without their intervals, which hold them. Each is within its scale."""
    found = task.score(answers)
    for name, one in found.items():
        scale = re.match(r"(\d+) to (\d+), \w", scale_of(name))
        assert scale and int(scale[1]) <= one.low <= one.value <= one.high <= int(scale[2]) + 1e-9, (name, one)
    return {name: one.value for name, one in found.items()}


# --------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_media_alone_are_asked_about_in_the_tasks_words(task: Task) -> None:
    """Behind the media, as the only text; the answer is the record's."""
    (made,) = task.conversations(labelled("It ends."))
    assert made.turns == (Turn("user", (VIDEO, task.prompt)), Turn("assistant", ("It ends.",)))
    assert (made.id, made.origin, made.options) == ("s", "train.json:12", ())
    pictures = sample(("system", "Be brief."), ("user", PICTURES), ("assistant", "It ends."))
    (made,) = task.conversations(pictures)
    assert made.turns[0] == pictures.turns[0] and made.turns[1].parts == (*PICTURES, task.prompt)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_records_own_question_stays(task: Task) -> None:
    asked = sample(("user", ["Who is in ", VIDEO, "?"]), ("assistant", "A cook."))
    later = sample(
        ("user", [VIDEO, "Look."]), ("assistant", "I do."), ("user", PICTURES), ("assistant", "Two pictures.")
    )
    for one in (asked, later):
        (made,) = task.conversations(one)
        assert made.turns == one.turns


def test_prompt_goes_where_media_stand_alone() -> None:
    """To the first user's turn and to no other; text that frames will settle is no question."""
    media = [Turn("user", (VIDEO,)), Turn("assistant", ("x",)), Turn("user", PICTURES)]
    assert with_prompt(media, "What?") == (Turn("user", (VIDEO, "What?")), *media[1:])
    text = [Turn("system", ("s",)), Turn("user", ("Hi",)), Turn("user", (VIDEO,))]
    assert with_prompt(text, "What?") == tuple(text)
    planned = (FrameTimes(0), VIDEO, Subtitles(((0.0, 1.0, "Hello."),)))
    assert with_prompt([Turn("user", planned)], "What?") == (Turn("user", (*planned, "What?")),)
    assert with_prompt([Turn("user", (*planned, "Who?"))], "What?") == (Turn("user", (*planned, "Who?")),)
    assert with_prompt([Turn("assistant", ("x",))], "What?") == (Turn("assistant", ("x",)),)


def config(**settings: Any) -> Config:
    return Config(output_dir=Path("runs/x"), model=ModelConfig(path="base"), **settings)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prompt_of_the_configuration(task: Task) -> None:
    """`data.prompt` takes the place of the task's words, and of those alone."""
    found = task_of(config(task=task.name, data=DataConfig(prompt="Was ist zu sehen?")))
    assert type(found) is type(task) and (found.name, found.main_metric) == (task.name, task.main_metric)
    assert found.conversations(labelled("x"))[0].turns[0].parts == (VIDEO, "Was ist zu sehen?")
    own = sample(("user", [VIDEO, "Who?"]), ("assistant", "x"))
    assert found.conversations(own)[0].turns == own.turns
    assert task_of(config(task=task.name)) == task
    assert task_of(config()) == Caption()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_main_metric_is_among_the_scores(task: Task) -> None:
    """And it rises from what is wrong to what is right."""
    texts = ("one thing", "other things here now")
    if isinstance(task, Ground):
        texts = ("0.0 - 1.0 seconds", "3.0 - 9.0 seconds")
    classes: dict[str, Any] = {"options": texts} if isinstance(task, Classify) else {}
    right, wrong = [], []
    for number, text in enumerate(texts):
        likeliest = [-1.0, -2.0] if number == 0 else [-2.0, -1.0]
        right.append(answered(text, text, **classes, scores=likeliest if classes else ()))
        wrong.append(answered("zzz", text, **classes, scores=likeliest[::-1] if classes else ()))
    assert values(task, *right)[task.main_metric] > values(task, *wrong)[task.main_metric]


# ------------------------------------------------------------------------------------------ qa: options in the text

LLAVA = (
    "What is the man doing?\nA. playing.\nB. eating.\nC. walking.\nD. sleeping.\nE. training.\n"
    "Please provide your answer by stating the letter followed by the full option."
)
NEXT_QA = (
    "how do the two men play the instrument\nA. roll the handle.\nB. tap their feet.\nC. strum the string.\n"
    "D. hit with sticks.\nE. pat with hand.\nAnswer with the option's letter from the given choices directly."
)
ROUND = "Which colour?\n(A) red\n(B) light green\n(C) blue"
FULL_STOPS = [
    f"{a}. {b}." for a, b in zip("ABCDE", ("playing", "eating", "walking", "sleeping", "training"), strict=True)
]


@pytest.mark.parametrize(
    ("question", "answer", "options"),
    [
        (LLAVA, "E. training.", FULL_STOPS),
        (LLAVA, " E. training.\n", FULL_STOPS),
        (LLAVA, "E", list("ABCDE")),
        (LLAVA, "E.", ["A.", "B.", "C.", "D.", "E."]),
        (LLAVA, "training.", ["playing.", "eating.", "walking.", "sleeping.", "training."]),
        (LLAVA.replace("ing.", "ing"), "E. training.", FULL_STOPS),  # the answer alone has the full stop
        (NEXT_QA, "C", list("ABCDE")),
        (NEXT_QA, "C. strum the string.", NEXT_QA.splitlines()[1:6]),
        (ROUND, "(B) light green", ["(A) red", "(B) light green", "(C) blue"]),
        (ROUND, "(C)", ["(A)", "(B)", "(C)"]),
        (ROUND, "B", ["A", "B", "C"]),
        (ROUND, "light green", ["red", "light green", "blue"]),
        (ROUND, "light green.", ["red.", "light green.", "blue."]),
        ("Is it?\r\nA. yes\r\nB. no\r\n", "A. yes", ["A. yes", "B. no"]),
        ("Is it?\nA) yes\nB) no", "B) no", ["A) yes", "B) no"]),
        ("Is it?\nA: yes\nB: no", "B: no", ["A: yes", "B: no"]),
        ("A.yes\nB.   no  ", "B. no", ["A. yes", "B. no"]),
        (
            "Where?\nA. In St. Ives, U.S.\nB. At 10 (a.m.)",
            "B. At 10 (a.m.)",
            ["A. In St. Ives, U.S.", "B. At 10 (a.m.)"],
        ),
        ("Is it?\nA. yes\nB. yes", "B", ["A", "B"]),  # told apart by their letters
        ("是吗？\nA、是\nB、不是", "B", ["A", "B"]),
        ("是吗？\nA、是\nB、不是", "B、不是", ["A、是", "B、不是"]),
        ("是吗？\n（A）是\n（B）不是", "（A）是", ["（A）是", "（B）不是"]),
        ("是吗？\nＡ．是\nＢ．不是", "Ａ", ["Ａ", "Ｂ"]),
        ("Is it?\na) yes\nb) no", "b", ["a", "b"]),
        ("Is it?\n  (a) yes\n  (b) no", "(b) no", ["(a) yes", "(b) no"]),
        ("Is it?\nA. yes\nb. no", "A", []),
        # None of these is a choice.
        ("Is it?\nA. yes\nB. yes", "yes", []),
        *(("Is it?\nA. yes\nB. no", answer, []) for answer in ("maybe", "C", "a", "")),
        *(
            (f"Is it?\n{lines}", lines[0], [])
            for lines in ("A. yes", "A. yes\nC. no", "B. yes\nC. no", "1. yes\n2. no")
        ),
        *((question, "A", []) for question in ("Who is Dr. A. Smith to B. Jones?", "What happens?", "")),
    ],
)
def test_options_written_in_a_question(question: str, answer: str, options: list[str]) -> None:
    """In the form of the answer, so that the right one is among them, word for word."""
    assert written_options(question, answer) == tuple(options)


def test_questions_with_written_options() -> None:
    """Of the last question, whose options are not mixed up with those of an earlier one."""
    one = sample(("user", [VIDEO, LLAVA]), ("assistant", "E. training."))
    (made,) = QuestionAnswering().conversations(one)
    assert made.options == tuple(FULL_STOPS) and made.turns == one.turns
    two = sample(
        ("system", "A. x\nB. y"),
        ("user", [VIDEO, LLAVA]),
        ("assistant", "E. training."),
        ("user", ROUND),
        ("assistant", "(B) light green"),
    )
    assert QuestionAnswering().conversations(two)[0].options == ("(A) red", "(B) light green", "(C) blue")
    open_last = sample(("user", [VIDEO, LLAVA]), ("assistant", "E. training."), ("user", "Why?"), ("assistant", "E"))
    assert QuestionAnswering().conversations(open_last)[0].options == ()


def test_a_sample_of_video_mme() -> None:
    """Letters as options, and the groups that its tables are broken down by, as the reader gives them."""
    groups = {"duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History", "task_type": "Counting"}
    question = "How many?\nA. 1.\nB. 4.\nC. 2.\nD. 3.\nThe best answer is:"
    fields = {"options": ("A", "B", "C", "D"), "groups": groups, "question_id": "001-1"}
    parts = [VIDEO, Subtitles(((0.0, 1.0, "Hello."),)), question]
    (made,) = QuestionAnswering().conversations(sample(("user", parts), ("assistant", "C"), **fields))
    assert made.options == ("A", "B", "C", "D") and made.facts["groups"] == groups
    assert made.turns[0].parts == tuple(parts) and made.turns[0].text == question


@pytest.mark.parametrize("task", [QuestionAnswering(), Classify()], ids=lambda task: task.name)
@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("options", ["red", "green"]),
        ("options", ["Blue", "red"]),
        ("options", ["blue.", "red"]),
        ("options", ["blue", "red", "blue"]),
        ("options", ["blue", ""]),
        ("options", ["blue", " \n"]),
        ("options", ["blue", "blue "]),
        ("options", ["blue", "é", "e\u0301"]),
        ("options", ["blue", 3]),
        ("options", "blue"),
        ("labels", ("red", "green")),
    ],
)
def test_options_that_lack_the_answer_are_refused(task: Task, field: str, options: Any) -> None:
    """In one line that says where the record stands."""
    with pytest.raises(UserError) as caught:
        task.conversations(labelled("blue", **{field: options}))
    message = str(caught.value)
    assert message.startswith("train.json:12: options: ") and len(message.splitlines()) == 1 and len(message) < 300


@pytest.mark.parametrize("task", [QuestionAnswering(), Classify()], ids=lambda task: task.name)
def test_options_of_a_record(task: Task) -> None:
    """Before those in the text; `labels` are the same where there are no `options`."""
    asked = sample(("user", [VIDEO, LLAVA]), ("assistant", "C"), options=["A", "C"])
    assert task.conversations(asked)[0].options == ("A", "C")
    assert task.conversations(labelled("run", labels=("jump", "run"), label="run"))[0].options == ("jump", "run")
    assert task.conversations(labelled("run", options=[]))[0].options == ()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("field", ["answers", "references", "label", "answer"])
def test_right_answers_that_a_record_lists(task: Task, field: str) -> None:
    """Beside the one that it says, which is learnt; each once, in whatever order."""
    (made,) = task.conversations(labelled("run", **{field: ["jump", "run", "walk"]}))[:1]
    (question,) = questions([made])
    assert question.references == ("run", "jump", "walk") and made.turns[-1].text == "run"
    for alone in ("run", ["run"], None, 3, {"run": 1}):
        (made,) = task.conversations(labelled("run", **{field: alone}))[:1]
        assert questions([made])[0].references == ("run",)


def test_numbers_among_right_answers_are_texts() -> None:
    (made,) = QuestionAnswering().conversations(labelled("10", answers=[10, 12, 2.5, "ten", None, True]))
    assert questions([made])[0].references == ("10", "12", "2.5", "ten")


def test_options_that_only_look_like_the_answer() -> None:
    """Trained is one form and scored would be the other: the line says what can't be seen."""
    for answer, option in (("e\u0301te\u0301", "été"), ("blue", " blue")):
        with pytest.raises(UserError, match=r"form of Unicode, NFC or NFD, or in space around it: write both alike"):
            Classify().conversations(labelled(answer, options=[option, "red"]))


def test_labels_beside_options_are_the_right_ones() -> None:
    """By themselves they are the closed set."""
    (made,) = Classify().conversations(labelled("run", labels=["run", "jump"], options=["jump", "run", "walk"]))
    assert made.options == ("jump", "run", "walk") and questions([made])[0].references == ("run", "jump")
    (made,) = Classify().conversations(labelled("run", labels=["run", "jump"]))
    assert made.options == ("run", "jump") and questions([made])[0].references == ("run",)
    (made,) = Classify().conversations(labelled("run", labels=["person", "dog"], options=["run", "walk"]))
    assert questions([made])[0].references == ("run",)  # of something else


def test_listed_answers_that_can_not_be_right_are_refused() -> None:
    for answers, message in ((["run", "fly"], "the answer 'fly' must be among"), (["run", "walk"], "all 2 options")):
        with pytest.raises(UserError, match=message):
            Classify().conversations(labelled("run", answers=answers, options=["run", "walk"]))


# ------------------------------------------------------------------------------------------------------ qa: scores

LETTERS = ("A", "B", "C")


def test_scores_of_choices() -> None:
    """Likelihood decides; what is generated is scored beside it, by its letter or its words."""
    answers = [
        answered("The answer is B.", "B", options=LETTERS, scores=(-2.0, -1.0, -3.0)),  # both right
        answered("A", "B", options=LETTERS, scores=(-2.0, -1.0, -3.0)),  # likelihood alone
        answered("It is (C)", "C", options=LETTERS, scores=(-1.0, -2.0, -3.0)),  # generated alone
        answered("", "C", options=LETTERS, scores=(-1.0, -2.0, -3.0)),  # neither
    ]
    assert values(QuestionAnswering(), *answers) == {
        "accuracy": 0.5,
        "choice_accuracy": 0.5,
        "choice_accuracy_generated": 0.5,
        "choice_accuracy_official": 2 / 3,  # over those that hold a letter
        "choice_with_letter": 0.75,
    }


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ((-1.0, -2.0, -3.0), True),
        ((-2.0, -1.0, -3.0), False),
        ((-1.0, -1.0, -3.0), False),  # the first of the likeliest would be right by its place alone
        ((-1.0, -1.0, -1.0), False),
        ((-1.0, -2.0, -2.0), True),  # a tie of wrong ones is none
        ((float("nan"), -2.0, -3.0), False),
        ((-1.0, float("nan"), -3.0), False),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_tie_is_wrong(scores: tuple[float, ...], right: bool, order: tuple[int, ...]) -> None:
    """A model that finds all options alike knows nothing, wherever the right one stands."""
    options, found = tuple(LETTERS[i] for i in order), tuple(scores[i] for i in order)
    answer = answered("", "A", options=options, scores=found)
    assert values(QuestionAnswering(), answer)["choice_accuracy"] == float(right)
    assert values(QuestionAnswering(), answer)["accuracy"] == float(right)
    assert values(Classify(), answer)["top1"] == float(right)


def test_white_space_around_an_answer_is_none_of_its_own() -> None:
    """A record's " E. training.\\n" is its question's option `E. training.`, by likelihood too."""
    (made,) = QuestionAnswering().conversations(sample(("user", [VIDEO, LLAVA]), ("assistant", " E. training.\n")))
    (asked,) = questions([made])
    found = values(QuestionAnswering(), Answer(asked, "E. training.", (-5.0, -4.0, -3.0, -2.0, -1.0)))
    assert (found["choice_accuracy"], found["choice_accuracy_generated"]) == (1.0, 1.0)


def test_any_of_several_references_is_right() -> None:
    """Equal prompts with several answers; options that are all right are no tie."""
    answer = answered("B", "A", "B", options=LETTERS, scores=(-2.0, -1.0, -3.0))
    assert set(values(QuestionAnswering(), answer).values()) == {1.0}
    both = answered("B", "A", "B", options=LETTERS, scores=(-1.0, -1.0, -3.0))
    assert values(QuestionAnswering(), both)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("options", "reference", "right", "wrong"),
    [
        (
            FULL_STOPS,
            "B. eating.",
            ["B. eating.", "B", "b. EATING", "The best answer is B", "(B)"],
            ["C. walking.", ""],
        ),
        (FULL_STOPS, "B. eating.", [], ["eating"]),  # neither a letter nor the whole option
        # `Apple` and `Banana` are no options A and B: `Both` says neither.
        (["Apple", "Banana"], "Banana", ["Banana", "banana."], ["Apple", "Both", "B", "Not Apple, Banana"]),
        (list("ABCDEFGHIJ"), "C", ["C", "C. maple", "It is C.", "I think it is C", "Judging by the leaves, C"], []),
        (list("ABCDEFGHIJ"), "C", ["(c)", "**C**"], []),
        (list("ABCDEFGHIJ"), "I", [], ["It is C.", "I think it is C"]),  # a pronoun is no option
    ],
)
def test_generated_options(options: list[str], reference: str, right: list[str], wrong: list[str]) -> None:
    for text in (*right, *wrong):
        answer = answered(text, reference, options=options, scores=(0.0,) * len(options))
        assert values(QuestionAnswering(), answer)["choice_accuracy_generated"] == float(text in right), text


def test_scores_of_open_questions() -> None:
    """Exact in its words; F1 of `red park` and `green park in town` is 2 * 1 / (2 + 4); ANLS where edits are few."""
    answers = [
        answered("A dog.", "a dog"),
        answered("red park", "a house", "the green park in town"),
        answered("four", "seven"),
        answered("colour", "color"),
    ]
    # One edit in six characters for two of them; the others need more edits than half their letters.
    f1, anls = (1 + 1 / 3 + 0 + 0) / 4, (5 / 6 + 0 + 0 + 5 / 6) / 4
    expected = {"accuracy": 0.25, "open_exact_match": 0.25, "open_token_f1": f1, "open_anls": anls}
    assert values(QuestionAnswering(), *answers) == pytest.approx(expected)


def test_open_questions_and_choices_together() -> None:
    """`accuracy` is over all of them, its parts over their own."""
    answers = [
        answered("A", "A", options=LETTERS, scores=(-1.0, -2.0, -3.0)),
        answered("no dog", "a dog"),
        answered("B", "A", options=LETTERS, scores=(-1.0, -2.0, -3.0)),
        answered("two", "two"),
        answered("two", "two"),
    ]
    found = values(QuestionAnswering(), *answers)
    assert found["accuracy"] == pytest.approx(4 / 5)
    assert found["choice_accuracy"] == 1.0 and found["choice_accuracy_generated"] == 0.5
    assert found["open_exact_match"] == pytest.approx(2 / 3)


def test_scores_by_group() -> None:
    """Each answer in its own groups, whatever kind it is, in the order in which answers come."""
    groups = [{"duration": "short", "domain": "Art"}, {"duration": "long", "domain": "Art"}, {"duration": "short"}, {}]
    answers = [
        answered("two", "two", groups=groups[0]),
        answered("", "A", options=LETTERS, scores=(-2.0, -1.0, -3.0), groups=groups[1]),
        answered("three", "two", groups=groups[2]),
        answered("", "B", options=LETTERS, scores=(-2.0, -1.0, -3.0), groups=groups[3]),
    ]
    found = values(QuestionAnswering(), *answers)
    assert {name: value for name, value in found.items() if "/" in name} == {
        "accuracy/duration/short": 0.5,
        "accuracy/duration/long": 0.0,
        "accuracy/domain/Art": 0.5,
        "choice_accuracy_generated/duration/long": 0.0,
        "choice_accuracy_generated/domain/Art": 0.0,
    }
    assert found["accuracy"] == 0.5 and found["choice_accuracy_official"] == 0.0


def test_video_mmes_official_accuracy() -> None:
    """As its script counts: over answers with a letter, within a word too, in total and in each group."""
    told = {
        "C. a cup": ("C", {"duration": "short"}),
        "Definitely the last": ("A", {"duration": "short"}),  # the script takes it for D
        "it is the cup": ("A", {"duration": "long"}),  # no letter
        "Best answer: C": ("C", {"duration": "long"}),  # the script takes it for B
        "I see. The answer is D": ("D", {"duration": "long"}),
    }
    answers = [
        answered(text, right, options=("A", "B", "C", "D"), scores=(0.0,) * 4, groups=groups)
        for text, (right, groups) in told.items()
    ]
    correct: dict[str, list[bool]] = {}
    for text, (right, groups) in told.items():
        cleaned = text.replace("The answer is", "")
        found = re.search("[ABCD]", cleaned)
        if found:
            for key in ("", f"/duration/{groups['duration']}"):
                correct.setdefault(key, []).append(found[0] == right)
    scores = values(QuestionAnswering(), *answers)
    for key, values_of in correct.items():
        assert scores[f"choice_accuracy_official{key}"] == pytest.approx(sum(values_of) / len(values_of))
    assert scores["choice_accuracy_official"] == 0.5 and scores["choice_with_letter"] == 0.8
    assert scores["choice_accuracy_generated"] == pytest.approx(3 / 5)
    assert scores["choice_accuracy_generated/duration/long"] == pytest.approx(2 / 3)


def test_groups_that_are_no_texts_become_some() -> None:
    one = sample(("user", [VIDEO, "?"]), ("assistant", "x"), groups={"year": 1999, 7: True})
    assert QuestionAnswering().conversations(one)[0].facts["groups"] == {"year": "1999", "7": "True"}
    for odd in (None, "short", ["short"], 3):
        one = sample(("user", [VIDEO, "?"]), ("assistant", "x"), groups=odd)
        assert QuestionAnswering().conversations(one)[0].facts["groups"] == {}


# -------------------------------------------------------------------------------------------------------- classify

LABELS = ("climb", "dance", "jump", "run", "sit", "walk", "wave")


def ranked(label: str, place: int, text: str = "") -> Answer:
    """An answer whose right label is likeliest but for `place` others."""
    others = [one for one in LABELS if one != label]
    order = [*others[:place], label, *others[place:]]
    return answered(text, label, options=LABELS, scores=[-float(order.index(one)) for one in LABELS])


def test_scores_of_classes() -> None:
    answers = [
        ranked("run", 0, "Run."),
        ranked("run", 4, "runs"),
        ranked("sit", 5),
        ranked("run", 0),
        ranked("wave", 0),
    ]
    expected = {"top1": 3 / 5, "top5": 4 / 5, "mean_per_class": (2 / 3 + 0 + 1) / 3, "exact_match": 1 / 5}
    expected |= {"top1/run": 2 / 3, "top1/sit": 0.0, "top1/wave": 1.0}
    assert values(Classify(), *answers) == pytest.approx(expected)


@pytest.mark.parametrize("right", [("run", "sit"), ("sit", "run"), ("sit", "run", "sit")])
def test_any_of_several_labels_is_right(right: tuple[str, ...]) -> None:
    """In whatever order; the clip counts under each of its labels, and for top5 too."""
    scores = {"climb": -9.0, "dance": -8.0, "jump": -7.0, "run": -1.0, "sit": -99.0, "walk": -2.0, "wave": -3.0}
    first = answered("Run.", *right, options=LABELS, scores=[scores[one] for one in LABELS])
    found = values(Classify(), first, ranked("sit", 5), ranked("wave", 0))
    assert found == pytest.approx(
        {
            **{"top1": 2 / 3, "top5": 2 / 3, "mean_per_class": (1 + 1 / 2 + 1) / 3, "exact_match": 1 / 3},
            **{"top1/run": 1.0, "top1/sit": 1 / 2, "top1/wave": 1.0},
        }
    )
    asked = replace(first, option_scores_norm=tuple(-scores[one] for one in LABELS))
    found = values(Classify(), asked)
    assert (found["top1"], found["top1_norm"], found["top5_norm"]) == (1.0, 1.0, 1.0)
    found = values(QuestionAnswering(), replace(asked, option_scores=(0.0,) * 7))
    assert (found["choice_accuracy"], found["choice_accuracy_norm"], found["accuracy_norm"]) == (0.0, 1.0, 1.0)


def test_labels_with_and_without_a_set() -> None:
    """Without one there is nothing to rank; with both kinds, likelihoods of the one, texts of both."""
    (made,) = Classify().conversations(labelled("run"))
    assert made.options == ()
    assert values(Classify(), answered("Run!", "run"), answered("sit", "run")) == {"exact_match": 0.5}
    found = values(Classify(), ranked("run", 1, "run"), answered("sit", "run"), ranked("sit", 0, "run"))
    assert (found["top1"], found["exact_match"]) == (0.5, pytest.approx(1 / 3))
    assert {name for name in found if "/" in name} == {"top1/run", "top1/sit"}


# --------------------------------------------------------------------------------------------- summarize and story

SEGMENTS = ((0.0, 4.26, "A man enters."), (4.26, 10.0, "He sits down."))


@pytest.mark.parametrize("task", [Summarize(), Story()], ids=lambda task: task.name)
def test_segments_are_further_questions(task: Task) -> None:
    """About the same media, so that they share them; in evaluation the main text alone is asked for."""
    one = labelled("A man enters and sits down.", segments=SEGMENTS, speech="")
    main, first, second = task.conversations(one)
    assert main.turns == (Turn("user", (VIDEO, task.prompt)), one.turns[1])
    assert main.facts == {"segments": ("A man enters.", "He sits down.")}
    assert [made.id for made in (main, first, second)] == ["s", "s/1", "s/2"]
    assert first.turns == (
        Turn("user", (VIDEO, "What happens between 0.0 s and 4.3 s?")),
        Turn("assistant", ("A man enters.",)),
    )
    assert second.turns[0].text == "What happens between 4.3 s and 10.0 s?" and second.origin == "train.json:12"
    assert main.media_key == first.media_key == second.media_key
    assert main_conversation(task)(one) == [main]


@pytest.mark.parametrize("task", [Summarize(), Story()], ids=lambda task: task.name)
def test_speech_stands_beside_the_question(task: Task) -> None:
    """In the main question, a record's own too; of the segments nobody knows which part of it belongs to them."""
    main, first, _ = task.conversations(labelled("x", segments=SEGMENTS, speech="Good evening."))
    assert main.turns[0].text == f"{task.prompt}\nWhat is said: Good evening."
    assert "Good evening" not in first.turns[0].text
    (plain,) = task.conversations(labelled("x"))
    assert plain.turns[0].text == task.prompt and plain.facts == {"segments": ()}
    own = sample(("user", ["Who speaks?", VIDEO]), ("assistant", "x"), speech="Good evening.")
    assert task.conversations(own)[0].turns[0].parts == ("Who speaks?", VIDEO, "What is said: Good evening.")


def test_scores_of_summaries() -> None:
    """ROUGE-L: 3 words in common of 3 and 6 give F = 2 * 1 * 0.5 / 1.5; coverage over records with segments alone."""
    segments = ("A man enters.", "He sits down.", "Rain falls on the old roof.")
    answers = [
        answered("A man enters.", "A man enters and sits down.", segments=segments),
        answered("He sits down. Rain falls on the roof.", "Something else entirely", segments=segments[1:]),
        answered("No", "yes", segments=()),
    ]
    found = values(Summarize(), *answers)
    assert found["rouge_l"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert found["coverage"] == pytest.approx((1 / 3 + 1) / 2)
    assert set(found) == {"rouge_l", "bleu4", "cider_d", "coverage"}
    assert set(values(Summarize(), answered("No", "yes"))) == {"rouge_l", "bleu4"}


def test_scores_of_stories() -> None:
    """Two stories that are one: half of all word pairs are there twice."""
    found = values(
        Story(), answered("He ran home fast.", "He ran home fast."), answered("He ran home fast.", "It rains.")
    )
    assert found["distinct_2"] == 0.5 and found["rouge_l"] == 0.5
    assert set(found) == {"rouge_l", "bleu4", "distinct_2"}
    one = values(Story(), answered("He ran home fast.", "He ran home fast."))
    assert one == pytest.approx({"rouge_l": 1.0, "bleu4": 100.0, "distinct_2": 1.0})


def test_scores_of_captions() -> None:
    """Word for word right is the top of every scale; a single caption has no CIDEr-D."""
    right = [answered(text, text) for text in ("a red dog runs home", "two men play a grey guitar")]
    assert values(Caption(), *right) == pytest.approx({"cider_d": 10.0, "bleu4": 100.0, "rouge_l": 1.0})
    assert set(values(Caption(), right[0])) == {"bleu4", "rouge_l"}
    assert values(Caption(), right[0], answered("zzz", "two men play"))["rouge_l"] == 0.5


@pytest.mark.parametrize("task", ["caption", "summarize", "story"])
def test_scores_that_papers_report(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `eval.coco`, beside the others; a task without them takes no notice of it."""
    coco.install(monkeypatch)
    config = {"task": task, "output_dir": "run", "model": {"path": "m"}, "eval": {"coco": True}}
    answers = [answered("a red dog runs home", "a red dog"), answered("two men play", "two men play a guitar")]
    found = task_of(Config.model_validate(config)).score(answers)
    named = {name for name, score in found.items() if score.tokenization == "PTB"}
    assert named == (set() if task == "story" else {"cider_coco", "bleu4_coco", "rouge_l_coco", "meteor"})
    assert {"rouge_l", "bleu4"} < found.keys()


# ------------------------------------------------------------------------------------------------------- intervals


def test_questions_about_one_video_are_one_cluster() -> None:
    """Whatever part of it they ask about, and pictures that several share; in every score with an interval."""

    def about(*media: MediaRef, text: str = "?") -> Answer:
        return Answer(Question("q", Conversation("q", (Turn("user", (*media, text)),), "q"), ("x",)), "x")

    segment = replace(VIDEO, options=MediaOptions(video_start=3.0, video_end=5.0))
    frames = [MediaRef("video", tuple(Path(f"{name}.jpg") for name in names)) for names in ("abc", "cd", "ef")]
    other = MediaRef("video", Path("b.mp4"))
    answers = [about(VIDEO), about(segment), about(other), about(VIDEO, text="Why?"), about(), about(text="Why?")]
    found = samples_of([*answers, *map(about, frames)])
    assert found.clusters[0] == found.clusters[1] == found.clusters[3] and found.clusters[6] == found.clusters[7]
    assert len(set(found.clusters)) == 6 and len(set(found.names)) == 9
    again = samples_of(answers[::-1])
    assert dict(zip(again.names, answers[::-1], strict=True)) == dict(zip(found.names, answers, strict=False))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_interval_is_over_videos(task: Task) -> None:
    """Eight questions about each of six videos give the interval of six, not of forty-eight."""
    options: dict[str, Any] = {"options": LETTERS, "segments": ("a b c",)}
    scores = {"A": (-1.0, -2.0, -3.0), "B": (-2.0, -1.0, -3.0)}
    answers = []
    for video in range(6):
        text = "A" if video % 2 else "B"
        answer = answered(text, "A", scores=scores[text], **options)
        if isinstance(task, Ground):
            answer = answered(f"1.0 - {3.0 + video % 3} seconds", "1.0 - 3.0 seconds")
        elif not isinstance(task, Classify | QuestionAnswering):
            answer = answered(
                f"a dog runs to the {'park' if video % 3 else 'mill'}", "a dog runs to the mill", **options
            )
        prompt = replace(answer.question.prompt, turns=(Turn("user", (MediaRef("video", Path(f"{video}.mp4")), "?")),))
        for number in range(8):
            asked = replace(prompt, turns=(replace(prompt.turns[0], parts=(*prompt.turns[0].parts, str(number))),))
            one = replace(answer, question=replace(answer.question, prompt=asked))
            answers.append(one)
    found, alone = task.score(answers), task.score(answers[::8])
    widths = {name: (one.high - one.low, alone[name].high - alone[name].low) for name, one in found.items()}
    assert any(one > 0 for one, _ in widths.values())
    for name, (all_of_them, one_each) in widths.items():
        assert all_of_them == pytest.approx(one_each, abs=1e-9) or name == "cider_d", name


def test_a_clip_that_two_class_folders_link_to_has_both_labels(tmp_path: Path) -> None:
    for name in ("eating", "sitting_on_a_sofa", "reading"):
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / f"{name}.mp4").write_bytes(b"x")
    (tmp_path / "test" / "reading" / "again.mp4").symlink_to(tmp_path / "test" / "eating" / "eating.mp4")
    samples, bad = read_folders(tmp_path / "test", tmp_path)
    found = questions([one for each in samples for one in Classify().conversations(each)])
    assert not bad and sorted(question.references for question in found) == [
        ("eating", "reading"),
        ("reading",),
        ("sitting on a sofa",),
    ]


# ---------------------------------------------------------------------------------------------------------- ground

MOMENT = {"query": "A man's dog runs", "spans": (((1.0, 3.0),), ((0.0, 2.5),), ((0.0, 2.5),))}
EVENTS = ((0.0, 2.0, "He sits on a chair."), (2.0, 61.25, "He runs to a car."))
FORMS = get_args(EventForm)
COOKBOOK = "Give the query: 'A man's dog runs', when does the described content occur in the video?"


def test_moments_are_asked_for_in_the_cookbooks_words() -> None:
    """The spans that most annotators gave are learnt; a question that comes twice counts twice."""
    record = sample(("system", "Be brief."), ("user", [VIDEO, "A man's dog runs"]), ("assistant", "x"), **MOMENT)
    (made,) = Ground().conversations(record)
    answer = "The given query happens in 0.0 - 2.5 seconds."
    assert made.turns == (record.turns[0], Turn("user", (VIDEO, COOKBOOK)), Turn("assistant", (answer,)))
    assert [start for start, _ in made.spans_s] == [1.0, 0.0, 0.0] and max(end for _, end in made.spans_s) < 1.1
    asked = questions([made, replace(made, facts={**made.facts, "apart": "other"})])
    assert len(asked) == 2 and asked[0].prompt.facts["spans"] == MOMENT["spans"]
    own = Ground(prompt="When does {query}?", event_form="seconds").conversations(record)[0]
    assert own.turns[1].parts == (VIDEO, "When does A man's dog runs?") and own.turns[2].text == "0.0 to 2.5 s"


@pytest.mark.parametrize(
    ("path", "setting", "answer"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", None, '```json\n[\n    {\n        "start_time": "00:00.00"'),
        (
            "Qwen/Qwen3-VL-8B-Instruct",
            None,
            '{\n    "00:00.00 - 00:02.00": "He sits on a chair.",\n    "00:02.00 - 01:01.25"',
        ),
        ("Qwen/Qwen3.5-9B", None, '{\n    "00:00.00 - 00:02.00"'),
        ("Qwen/Qwen3-VL-8B-Instruct", "qwen2_5_vl", "```json\n"),
        (
            "llava-hf/LLaVA-NeXT-Video-7B-hf",
            "seconds",
            "0.0 to 2.0 s: He sits on a chair.\n2.0 to 61.25 s: He runs to a car.",
        ),
    ],
)
def test_events_are_written_as_the_family_writes_them(path: str, setting: Any, answer: str) -> None:
    """A moment for each comes behind, about the same video."""
    settings: dict[str, Any] = {"task": "ground", "data": DataConfig(event_form=setting)}
    task = task_of(Config(output_dir=Path("runs/x"), model=ModelConfig(path=path), **settings))
    events, *moments = task.conversations(labelled("A summary.", segments=EVENTS))
    assert events.turns[1].text.startswith(answer) and events.turns[0].text.startswith(EVENTS_PROMPT)
    assert ("mm:ss.ff" in events.turns[0].text) == (setting != "seconds")
    assert [one.id for one in moments] == ["s/1", "s/2"] and "'He runs to a car.'" in moments[1].turns[0].text
    assert {one.media_key for one in moments} == {events.media_key}


def test_the_family_of_a_folder_is_that_of_its_configuration(tmp_path: Path) -> None:
    for kind, form in (("qwen3_vl", "qwen3_vl"), ("qwen2_5_vl", "qwen2_5_vl"), ("llava_next_video", "qwen2_5_vl")):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        settings: dict[str, Any] = {"task": "ground", "model": ModelConfig(path=str(tmp_path))}
        assert task_of(Config(output_dir=Path("runs/x"), **settings)) == Ground(event_form=form)  # type: ignore[arg-type]


def test_scores_of_moments() -> None:
    """Of the first span, against the nearest right one; an answer without a time counts as 0, and is counted."""
    two = {"spans": (((0.0, 10.0), (20.0, 30.0)),)}
    answers = [
        answered("20.0 - 24.0 seconds, 0.0 - 10.0 seconds", "0.0 - 10.0, 20.0 - 30.0 seconds", **two),
        answered("No idea.", "0.0 - 10.0 seconds"),
        answered("0:05 - 0:10", "The given query happens in 5.0 - 10.0 seconds."),
        answered("0:05 - 0:10", "It rains."),  # of another task: left out
    ]
    found = values(Ground(), *answers)
    expected = {"miou": 1.4 / 3, "r1@0.3": 2 / 3, "r1@0.5": 1 / 3, "r1@0.7": 1 / 3, "no_time": 1 / 3}
    # One of the first question's two spans is found, as the second: half of it at a precision of a half.
    assert found == pytest.approx({**expected, "map": (0.25 + 0 + 1) / 3})
    assert "map" not in values(Ground(), answers[2])
    with pytest.raises(UserError, match="names a time"):
        Ground().score(answers[3:])


def test_scores_of_dense_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of two annotators are one question. Word for word right is the top of both scales."""
    texts = [Ground(event_form=form).conversations(labelled("x", segments=EVENTS))[0].turns[1].text for form in FORMS]
    found = [values(Ground(), answered(text, texts[0])) for text in texts]
    assert found[0] == found[1] == found[2] == pytest.approx({"soda_d": 1.0, "dense_cider_d": 10.0, "no_time": 0.0})
    monkeypatch.setattr("vft.recipes.ground.soda_c_scores", lambda said, right: [0.5])
    assert values(Ground(coco=True), answered(texts[1], texts[0])) == {**found[0], "soda_c": 0.5}
    half = values(Ground(), answered(texts[2].splitlines()[0], "9.0 - 10.0 seconds, It rains.", *texts))
    assert half["soda_d"] == pytest.approx(2 / 3) and half["dense_cider_d"] == 0.0
