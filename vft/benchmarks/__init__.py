"""Public benchmarks: a module of this folder for each, `vft benchmark NAME`, with one subclass of Benchmark.

A benchmark says how its records are read, in the layout in which they are published, how they are asked and how answers
are scored, each by the rules of its authors or, where it says so, of lmms-eval. docs/develop/new_benchmark.md adds one.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from vft.common.errors import UserError, did_you_mean
from vft.common.plugins import load_class
from vft.common.scores import Interval
from vft.common.task import Answer, samples_of
from vft.common.types import Conversation, MediaOptions, MediaRef, Sample, Turn
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format, check_path
from vft.data.records.files import read_records
from vft.data.records.paths import find_path, first_present, media_folders, resolve_frames
from vft.data.records.record import Record, RecordError, Records, as_object, check_text, make_samples, short_repr
from vft.metrics import (
    bleu4_interval,
    breakdown,
    cider_d_interval,
    class_mean_interval,
    coco_scores,
    mean_interval,
    rouge_l_interval,
    top_k,
)

logger = logging.getLogger(__name__)
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Place:
    """Where a record stands, and where its media are looked for."""

    file: Path
    number: int
    """Of the record in its file, from 1."""
    origin: str
    root: Path
    folders: Sequence[str]
    """Folders that may hold the media."""

    def video(
        self, names: str | Sequence[str], field: str, start_s: float | None = None, end_s: float | None = None
    ) -> MediaRef:
        """The first of the files `names` in one of the folders, from `start_s` to `end_s` (seconds). A folder of that
        name is a video stored as pictures. RecordError as `first_present`."""
        names = [names] if isinstance(names, str) else names
        paths = [f"{folder}/{name}" for name in names for folder in self.folders]
        options = MediaOptions(video_start=start_s, video_end=end_s)
        if frames := next((path for path in paths if os.path.isdir(os.path.join(self.root, path))), None):
            return MediaRef("video", resolve_frames(self.root, frames, field), options, field, is_folder=True)
        return MediaRef("video", first_present(self.root, paths, field), options, field)


class Benchmark(Format):
    """How a benchmark's records are read (a `Format`), asked and scored (a `Task`)."""

    settings = frozenset({"media"})
    notes_inputs = True

    title: ClassVar[str]
    """Its name in tables."""
    page: ClassVar[str]
    """Where its questions and videos are to be had."""
    path: ClassVar[str]
    """Its questions, a file, pattern or folder below the root of all data."""
    media: ClassVar[tuple[str, ...]] = ("videos", "video")
    """Folders of the videos, beside the questions or above them."""
    frames: ClassVar[int] = 32
    """Frames of a video that its authors' or lmms-eval's figures are commonly given for."""
    max_new_tokens: ClassVar[int] = 16
    """Most tokens of an answer."""
    main_metric: ClassVar[str] = "accuracy"
    """The score that stands for all."""
    fallback_metric: ClassVar[str] = ""
    """The score in its place where that one can't be computed here."""
    scale: ClassVar[float] = 100.0
    """What scores are multiplied by in the table, as the field gives them."""
    prompt: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """The module's name."""
        return type(self).__module__.rpartition(".")[2]

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`."""
        path = find_path(data.root, source.path)
        check_path(
            source.path, data.root, "`vft download` says how to get the set, and --root names the folder that has it"
        )
        folders = media_folders(path, data.root, source.media, *self.media, "")
        rows = (
            (f"{name}:{line}", (file, number, record))
            for file, name in self.files(path)
            for number, (line, record) in enumerate(self.records(file), 1)
        )

        def parse(row: tuple[Path, int, Any], origin: str) -> Sequence[Sample]:
            file, number, record = row
            return self.ask(as_object(record), Place(file, number, origin, data.root, folders))

        return make_samples(rows, parse)

    def records(self, file: Path) -> Iterator[tuple[int, Any]]:
        """The records of a file of questions, each with its line."""
        return read_records(file)

    def ask(self, record: Record, place: Place) -> Sequence[Sample]:
        """The questions of a record. RecordError names the field that is wrong."""
        raise NotImplementedError

    def conversations(self, sample: Sample) -> list[Conversation]:
        """The record as it was read, with its `options`, and its fields as facts. One that comes twice counts twice."""
        facts = {**sample.fields, "apart": sample.id}
        return [Conversation(sample.id, sample.turns, sample.origin, tuple(sample.fields.get("options", ())), facts)]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """Scores by name, `main_metric` first, each with its 95 % interval; `NAME/KEY/VALUE` are those of groups."""
        raise NotImplementedError

    def submission(self, answers: Sequence[Answer]) -> Mapping[str, str]:
        """Contents, by file name, of what is uploaded where the right answers are withheld, or given to a judge."""
        return {}


class MultipleChoice(Benchmark):
    """Questions with options that are answered by a letter. Likelihoods of the letters are scored beside."""

    per_class: ClassVar[str] = ""
    """The group over whose values the accuracy is averaged; empty: over the questions."""

    def letter_of(self, text: str, options: int) -> str | None:
        """The letter that a generated text names, by the benchmark's rule."""
        raise NotImplementedError

    def letter(self, answer: Answer) -> str | None:
        """As `letter_of`; a rule that needs more than the text, such as the texts of the options, overrides it."""
        return self.letter_of(answer.text, len(answer.question.prompt.options))

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """`accuracy` by what is generated and `likelihood_accuracy` by the likeliest letter, 0 to 1; `no_letter` is the
        fraction of texts that name none. Questions without options, and those whose answer is withheld, are left
        out."""
        known = [one for one in answers if one.question.prompt.options and "withheld" not in one.question.prompt.facts]
        if not known:
            return {}
        letters = [self.letter(one) for one in known]
        right = [float(letter in one.question.references) for letter, one in zip(letters, known, strict=True)]
        likeliest = [float(bool(one.right_options) and top_k(one.option_scores, one.right_options, 1)) for one in known]
        return {
            **grouped("accuracy", right, known, self.per_class),
            **grouped("likelihood_accuracy", likeliest, known, self.per_class),
            "no_letter": mean_interval([float(letter is None) for letter in letters], samples_of(known)),
        }


class Captioning(Benchmark):
    """Videos that are described in a sentence; all references of a video count."""

    max_new_tokens, main_metric, fallback_metric = 64, "cider_coco", "cider_d"
    per_group: ClassVar[str] = ""
    """The group within whose values `cider_coco_grouped` is computed; empty: none."""

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """`metrics.coco_scores`, as papers give them; without pycocoevalcap or Java a message instead. Beside them the
        scores of the captioning task: `cider_d`, `bleu4` and `rouge_l`."""
        said, right = [one.text for one in answers], [one.question.references for one in answers]
        samples, scores = samples_of(answers), {}
        groups = [one.question.prompt.facts["groups"][self.per_group] for one in answers] if self.per_group else None
        try:
            scores = coco_scores(said, right, samples, groups)
        except UserError as error:
            _warn(f"{error}; without it {self.main_metric} is left out, and {self.fallback_metric} is another figure")
        if len(answers) > 1:
            scores["cider_d"] = cider_d_interval(said, right, samples)
        return {
            **scores,
            "bleu4": bleu4_interval(said, right, samples),
            "rouge_l": rouge_l_interval(said, right, samples),
        }


@cache
def _warn(message: str) -> None:
    """Once, however often something is scored."""
    logger.warning("%s", message)


def grouped(name: str, scores: Sequence[float], answers: Sequence[Answer], per_class: str = "") -> dict[str, Interval]:
    """The mean of `scores`, or the mean over the values of the group `per_class` of the mean in each, and the mean of
    each group as `NAME/KEY/VALUE`."""
    groups = [one.question.prompt.facts.get("groups", {}) for one in answers]
    samples = samples_of(answers)
    if per_class:
        overall = class_mean_interval(scores, [own[per_class] for own in groups], samples)
    else:
        overall = mean_interval(scores, samples)
    return {name: overall, **{f"{name}/{group}": score for group, score in breakdown(scores, groups).items()}}


def choice(
    sample_id: str,
    asked: Sequence[MediaRef | str],
    options: int,
    right: int | None,
    place: Place,
    groups: Mapping[str, str] | None = None,
    **facts: Any,
) -> Sample:
    """A question that is answered by the letter of one of so many options; `right` is its index, None if withheld."""
    letters = tuple(LETTERS[:options])
    turns = Turn("user", tuple(asked)), Turn("assistant", (letters[right or 0],))
    fields = {"options": letters, "groups": groups or {}, **facts, **({"withheld": True} if right is None else {})}
    return Sample(sample_id, turns, place.origin, fields)


def written(
    sample_id: str,
    asked: Sequence[MediaRef | str],
    answers: Sequence[str],
    place: Place,
    groups: Mapping[str, str] | None = None,
    **facts: Any,
) -> Sample:
    """A question that is answered in words; all of `answers` are right."""
    turns = Turn("user", tuple(asked)), Turn("assistant", tuple(answers[:1]))
    return Sample(sample_id, turns, place.origin, {"answers": tuple(answers), "groups": groups or {}, **facts})


def texts_of(value: object, field: str, least: int = 2) -> tuple[str, ...]:
    """A list of texts of a record. RecordError if it is something else, or has fewer than `least`."""
    if not isinstance(value, list) or len(value) < least:
        raise RecordError(field, f"{short_repr(value)} must be a list of at least {least} texts")
    return tuple(check_text(one, f"{field}[{i}]") for i, one in enumerate(value))


def captions_of(value: object, field: str) -> tuple[str, ...]:
    """The references of a video that say something. RecordError as `texts_of`, or if none does."""
    said = tuple(text for text in texts_of(value, field, 1) if text.strip())
    if not said:
        raise RecordError(field, "all of its texts are empty; give one")
    return said


def index_of(answer: object, options: Sequence[str], field: str) -> int:
    """The place of the right answer among the options. RecordError if it is none of them."""
    if answer not in options:
        raise RecordError(field, f"{short_repr(answer)} is none of the options {', '.join(options):.80}; correct it")
    return options.index(str(answer))


def number_of(answer: object, options: int, field: str) -> int | None:
    """The place of the right answer, which a record gives from 0, as a number or its digits; None if it is withheld
    (None or -1). RecordError if there is no such option."""
    if answer is None or answer == -1:
        return None
    number = int(answer) if isinstance(answer, int | str) and str(answer).isdecimal() else options
    if number >= options:
        raise RecordError(field, f"{short_repr(answer)} is none of the options 0 to {options - 1}; correct it")
    return number


def as_id(value: object, field: str) -> str:
    """An id, a text or a whole number, as text. RecordError if it is something else or empty."""
    text = str(value) if type(value) is int else check_text(value, field)
    if not text.strip():
        raise RecordError(field, "is empty; give a text")
    return text


def lettered(options: Sequence[str], form: Callable[[str, str], str]) -> str:
    """The options line by line, each as `form(letter, text)`."""
    return "\n".join(form(LETTERS[i], text) for i, text in enumerate(options))


def names() -> list[str]:
    """All benchmarks of this package, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@cache
def find(name: str) -> Benchmark:
    """The benchmark called `name`: one of `names`, or `module:Class` from elsewhere. UserError if there is none."""
    if ":" in name:
        found = load_class(name)
    elif name in names():
        module = importlib.import_module(f"{__name__}.{name}")
        own = (one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__)
        (found,) = (one for one in own if issubclass(one, Benchmark))
    else:
        known = f"there are {', '.join(names())}, or module:Class of your own"
        raise UserError(f"no benchmark {name!r}: {did_you_mean(name, names())}{known}")
    if not issubclass(found, Benchmark):
        raise UserError(f"{found.__name__} is not a subclass of vft.benchmarks.Benchmark")
    return found()
