"""Answers as lines of JSON, and the file of `vft predict --output`, with which the same command resumes."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vft.adapters.peft_format import WEIGHTS_FILE
from vft.common.errors import UserError
from vft.common.files import cannot_write, replace_text
from vft.common.rules import VERSION
from vft.common.task import Answer, Question, likeliest
from vft.config.data import DataConfig
from vft.config.run import ModelConfig, flatten
from vft.inference.engine import Failure
from vft.inference.generate import Sampling
from vft.inference.requests import Request
from vft.models.pretrained import Pretrained

Line = dict[str, Any]
NAMES = frozenset({"model", "adapter"})
"""Settings that only name what another one identifies: folders may be moved."""
KEY = ("id", "video", "prompt", "history", "start_s", "end_s")
"""Fields that tell one question from another."""
COLUMNS = ("id", "video", "start_s", "end_s", "prompt", "prediction", "probability", "reference", "error")
"""Of a table of answers."""
SCORED_BY = "sum of log-probabilities, closing token included"
"""What `option_scores` of a line are."""
MAX_OPTIONS = 5
"""Options of a question, the likeliest, whose scores a line holds, beside those of the right ones."""


def as_text(line: Line) -> str:
    """A line as it stands in a file."""
    return json.dumps(line, ensure_ascii=False) + "\n"


def evaluation_line(answer: Answer) -> Line:
    """A line of an evaluation's predictions. `source` and `media` tell questions with equal ids apart."""
    question = answer.question
    line: Line = {
        "id": question.id,
        "prompt": question.prompt.turns[-1].text,
        "prediction": answer.text,
        "reference": question.references[0] if question.references else None,
        "source": question.prompt.origin,
        "media": [ref.name for ref in question.prompt.media],
    }
    if len(question.references) > 1:
        line["references"] = question.references
    return line | _details(answer)


def prediction_line(request: Request, answer: Answer | Failure) -> Line:
    """A line of `vft predict`: the question, the answer and a reference if there is one, or the `error`. The answer to
    a question with options is the likeliest one, and `probabilities` has those of all."""
    line = question_line(request)
    if isinstance(answer, Failure):
        return {**line, "error": {"file": answer.file, "reason": answer.reason, "message": answer.message}}
    if answer.choice is None:
        line |= {"prediction": answer.text, **_details(answer)}
    else:
        options, shares = answer.question.prompt.options, answer.option_probabilities
        ranked = sorted(range(len(options)), key=lambda i: -shares[i])
        probabilities = {options[i]: round(shares[i], 4) for i in ranked}
        line |= {"prediction": options[ranked[0]], "probabilities": probabilities}
    if answer.question.references:
        line["reference"] = answer.question.references[0]
    return line


def question_line(request: Request) -> Line:
    """What is asked: `id`, `video` (a list if there are several, null if there is none), `prompt`, the turns before it,
    the segment."""
    line: Line = {"id": request.id, "video": None, "prompt": None}
    if not isinstance(request.question, Failure):
        prompt = request.question.prompt
        names = [ref.name for ref in prompt.media]
        line["video"] = names if len(names) > 1 else next(iter(names), None)
        line["prompt"] = prompt.turns[-1].text
        if len(prompt.turns) > 1:
            line["history"] = [{"role": turn.role, "content": turn.text} for turn in prompt.turns[:-1]]
        videos = [ref.options for ref in prompt.media if ref.kind == "video"]
        if len(videos) == 1 and request.segment_s is None:  # the part that the record names
            times_s = {"start_s": videos[0].video_start, "end_s": videos[0].video_end}
            line |= {name: time_s for name, time_s in times_s.items() if time_s is not None}
    if request.segment_s is not None:
        line |= {name: round(time_s, 3) for name, time_s in zip(("start_s", "end_s"), request.segment_s, strict=True)}
    return line


def table_text(lines: Sequence[Line]) -> str:
    """Lines of `prediction_line` as a CSV table: those of `COLUMNS` that any line fills, then the probability of each
    label."""
    labels = sorted({label for line in lines for label in line.get("probabilities", ())})
    rows = []
    for line in lines:
        video, shares = line["video"], line.get("probabilities", {})
        cells = {**line, "id": None if line["id"] == video else line["id"]}
        cells["video"] = "; ".join(video) if isinstance(video, list) else video
        cells |= {"probability": max(shares.values(), default=None), "error": line.get("error", {}).get("message")}
        rows.append([cells.get(name) for name in COLUMNS] + [shares.get(label) for label in labels])
    filled = [i for i in range(len(COLUMNS) + len(labels)) if any(row[i] is not None for row in rows)]
    text = io.StringIO()
    text.write("\ufeff")  # by which spreadsheets know UTF-8
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([row[i] for i in filled] for row in [[*COLUMNS, *labels], *rows])
    return text.getvalue()


def _details(answer: Answer) -> Line:
    """Fields that only some answers have: `reasoning`, `cut_off`, `others` (further samples, with such fields of their
    own), and for a question with options the likeliest ones.

    `choice` is chosen by `option_scores`, whose rule is `scored_by`; `..._norm` are log-probabilities per character.
    """
    line: Line = {"reasoning": answer.reasoning} if answer.reasoning else {}
    line |= {"cut_off": True} if answer.is_cut_off else {}
    line |= {"others": [{"prediction": one.text, **_details(one)} for one in answer.others]} if answer.others else {}
    if answer.choice is not None:
        options, scores = answer.question.prompt.options, answer.option_scores
        shown = sorted(range(len(options)), key=lambda i: -scores[i])[:MAX_OPTIONS]
        shown += sorted(answer.right_options - {*shown})
        line |= {"choice": options[answer.choice], "option_scores": {options[i]: round(scores[i], 4) for i in shown}}
        line["scored_by"] = SCORED_BY
        norms = answer.option_scores_norm
        if (by_length := likeliest(norms)) is not None:
            line["choice_norm"] = options[by_length]
            line["option_scores_norm"] = {options[i]: round(norms[i], 4) for i in dict.fromkeys([*shown, by_length])}
    return line


def answer_settings(
    base: ModelConfig,
    adapter: Path | None,
    pretrained: Pretrained,
    precision: str,
    sampling: Sampling,
    data: DataConfig,
) -> dict[str, Any]:
    """All that an answer depends on beside the question. Answers of other settings are not resumed."""
    weights = hashlib.sha256(pretrained.fingerprint.encode())
    if adapter is not None and (adapter / WEIGHTS_FILE).is_file():
        with (adapter / WEIGHTS_FILE).open("rb") as stream:
            weights.update(hashlib.file_digest(stream, "sha256").digest())
    sampled: Line = {"top_p": sampling.top_p, "seed": sampling.seed} if sampling.temperature else {}
    sampled |= {"samples": sampling.samples} if sampling.samples > 1 else {}
    return {
        "model": base.path,
        "adapter": None if adapter is None else str(adapter),
        "weights": weights.hexdigest()[:16],
        "rules": VERSION,
        "precision": precision,
        "quantize": base.quantize,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        **sampled,
        "pack_tokens": data.pack_tokens,
        "video": data.video.model_dump(mode="json", exclude_none=True),
        "image": data.image.model_dump(mode="json", exclude_none=True),
        **({"template_options": data.template_options} if data.template_options else {}),
    }


class AnswersFile:
    """A line for each answer as soon as it is known, with the settings that it was given with.

    Lines of an earlier run with the same settings stay, except its errors, whose questions are asked again, and a last
    line that was cut off.

    Raises:
        UserError: the file holds something else, or answers given with other settings (names the first that differs).
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self._stream: TextIO | None = None
        self._lines: dict[str, str] = {}
        """Answers of an earlier run, by their questions."""
        if path.is_dir():
            raise UserError(f"--output = {str(path)!r}: is a folder; name a file, such as answers.jsonl")
        self._content = self._read()
        for number, text in enumerate(io.StringIO(self._content, newline="\n"), 1):  # an answer may hold other breaks
            line = self._parsed(text, number)
            if line is not None and "prediction" in line:
                self._lines[_key(line)] = text if text.endswith("\n") else f"{text}\n"

    def has(self, request: Request) -> bool:
        """Whether this question is answered."""
        return _key(question_line(request)) in self._lines

    def answer(self, request: Request) -> Answer:
        """The answer to a question that the file `has`, without scores of options."""
        assert not isinstance(request.question, Failure)
        return _answer(request.question, self.line(request))

    def line(self, request: Request) -> Line:
        """The line of a question that the file `has`."""
        return dict(json.loads(self._lines[_key(question_line(request))]))

    def begin(self) -> None:
        """Open the file to add lines; one process does. UserError if another command writes, or has written since."""
        stream = self._lock()
        if self._read() != self._content:
            raise UserError(
                f"--output = {str(self.path)!r}: another command has written to it since; start this one again"
            )
        text = "".join(self._lines.values())
        if text != self._content:
            replace_text(self.path, text)
            with stream:  # until the new file is locked too
                stream = self._lock()
        self._stream = stream

    def _lock(self) -> TextIO:
        """The file, open at its end, and locked until it is closed."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stream = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise UserError(
                f"--output = {str(self.path)!r}: another command writes to it; wait for it, or name another file"
            ) from None
        except OSError:
            pass  # a file system without locks
        return stream

    def add(self, request: Request, answer: Answer | Failure) -> None:
        """Add a line; it is in the operating system's hands when this returns."""
        assert self._stream is not None
        line = {**prediction_line(request, answer), "settings": self.settings}
        try:
            self._stream.write(as_text(line))
            self._stream.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _read(self) -> str:
        """The file's text; empty if there is none. A file may have been cut off within a character."""
        try:
            return self.path.read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _parsed(self, text: str, number: int) -> Line | None:
        """A line; None for one that a killed process left unfinished."""
        try:
            line = json.loads(text)
        except ValueError:
            start = '{"id": '
            if not text.endswith("\n") and (text.startswith(start) or start.startswith(text)):
                return None
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("settings"), dict) or "id" not in line:
            raise UserError(f"{self.path}:{number}: isn't an answer of this command; name another --output")
        # Both as JSON gives them back, so that they compare.
        before, now = (flatten(json.loads(json.dumps(settings))) for settings in (line["settings"], self.settings))
        for name in {**now, **before}:
            if name not in NAMES and before.get(name) != now.get(name):
                was, new = (f"{name} = {one.get(name)!r} ({_names(one)})" for one in (before, now))
                raise UserError(f"{self.path}:{number}: was answered with {was}, now {new}; name another --output")
        return line


def _key(line: Mapping[str, Any]) -> str:
    return json.dumps([line.get(name) for name in KEY])


def _answer(question: Question, line: Line) -> Answer:
    others = tuple(_answer(question, one) for one in line.get("others", ()))
    thought, is_cut_off = line.get("reasoning", ""), "cut_off" in line
    return Answer(question, line["prediction"], reasoning=thought, is_cut_off=is_cut_off, others=others)


def _names(settings: Mapping[str, Any]) -> str:
    return " with ".join(str(settings[name]) for name in sorted(NAMES, reverse=True) if settings.get(name))
