"""Answers as lines of JSON, and a file of them with which the same command goes on where it was."""

from __future__ import annotations

import fcntl
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from vft.common.errors import UserError
from vft.common.files import cannot_write, replace_text
from vft.config.run import flatten
from vft.inference.engine import Said
from vft.inference.requests import Failure, Item

Line = dict[str, Any]
NAMES = frozenset({"model", "adapter"})
"""Settings that only name what another one identifies: folders may be moved."""
KEY = ("id", "video", "prompt", "history", "start_s", "end_s")
"""What tells one question from another."""


def question_line(item: Item) -> Line:
    """What was asked: `id`, `video` (several: a list; none: null), `prompt`, the turns before it, the segment."""
    line: Line = {"id": item.id, "video": None, "prompt": None}
    if not isinstance(item.asked, Failure):
        prompt = item.asked.prompt
        names = [ref.name for ref in prompt.media]
        line["video"] = names if len(names) > 1 else next(iter(names), None)
        line["prompt"] = prompt.turns[-1].text
        if len(prompt.turns) > 1:
            line["history"] = [{"role": turn.role, "content": turn.text} for turn in prompt.turns[:-1]]
        videos = [ref.options for ref in prompt.media if ref.kind == "video"]
        if len(videos) == 1 and item.segment_s is None:  # what the record shows of it
            times_s = {"start_s": videos[0].video_start, "end_s": videos[0].video_end}
            line |= {name: time_s for name, time_s in times_s.items() if time_s is not None}
    if item.segment_s is not None:
        line |= {name: round(time_s, 3) for name, time_s in zip(("start_s", "end_s"), item.segment_s, strict=True)}
    return line


def answer_line(item: Item, answer: Said | Failure) -> Line:
    """`question_line` with the `prediction`, its `reasoning`, whether it was `cut_off` at the limit of tokens, and the
    `reference`, where there is one; or with the `error`."""
    line = question_line(item)
    if isinstance(answer, Failure):
        return {**line, "error": {"file": answer.file, "reason": answer.reason, "message": answer.message}}
    line["prediction"] = answer.text
    line |= {"reasoning": answer.reasoning} if answer.reasoning else {}
    line |= {"cut_off": True} if answer.is_cut_off else {}
    if not isinstance(item.asked, Failure) and item.asked.references:
        line["reference"] = item.asked.references[0]
    return line


class AnswersFile:
    """A line for each answer as soon as it is known, with the settings that it was given with.

    Lines of another run with the same settings stay, but for its errors, whose questions are asked again, and for a
    last line that was cut off.

    Raises:
        UserError: the file holds something else, or answers given with other settings; names the first that differs.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self._kept: list[str] = []
        self._stream: TextIO | None = None
        self.done: set[str] = set()
        """Keys of the questions that are answered."""
        if path.is_dir():
            raise UserError(f"--output = {str(path)!r}: is a folder; name a file, such as answers.jsonl")
        self._found = self._read()
        for number, text in enumerate(io.StringIO(self._found, newline="\n"), 1):  # an answer may hold other breaks
            line = self._parsed(text, number)
            if line is not None and "prediction" in line:
                self._kept.append(text if text.endswith("\n") else f"{text}\n")
                self.done.add(_key(line))

    def has(self, item: Item) -> bool:
        """Whether this question is answered."""
        return _key(question_line(item)) in self.done

    def begin(self) -> None:
        """Open it to add lines. One process does. UserError where another command writes, or has written meanwhile."""
        stream = self._own()
        if self._read() != self._found:
            raise UserError(
                f"--output = {str(self.path)!r}: another command has written to it since; start this one again"
            )
        text = "".join(self._kept)
        if text != self._found:
            replace_text(self.path, text)
            with stream:  # until the new file is held, too
                stream = self._own()
        self._stream = stream

    def _own(self) -> TextIO:
        """The file at its end, held as long as it is open."""
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

    def add(self, item: Item, answer: Said | Failure) -> None:
        """One more line, on its way to the disk when this returns."""
        assert self._stream is not None
        line = {**answer_line(item, answer), "settings": self.settings}
        try:
            self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._stream.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _read(self) -> str:
        """What is there, without what ends a file that was cut off within a character."""
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
        # As JSON has them: what was read compares with what is about to be written.
        before, now = (flatten(json.loads(json.dumps(one))) for one in (line["settings"], self.settings))
        for name in {**now, **before}:
            if name not in NAMES and before.get(name) != now.get(name):
                was, new = (f"{name} = {one.get(name)!r} ({_names(one)})" for one in (before, now))
                raise UserError(f"{self.path}:{number}: was answered with {was}, now {new}; name another --output")
        return line


def _key(line: Mapping[str, Any]) -> str:
    return json.dumps([line.get(name) for name in KEY])


def _names(settings: Mapping[str, Any]) -> str:
    return " with ".join(str(settings[name]) for name in sorted(NAMES, reverse=True) if settings.get(name))
