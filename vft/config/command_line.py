"""Reads a command line. Only the standard library is imported here."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vft.common.errors import UserError, did_you_mean

SYNONYMS = {
    **dict.fromkeys(("lora", "adapters", "lora-path", "peft", "adapter-path"), "adapter"),
    **dict.fromkeys(("question", "query", "instruction", "text"), "prompt"),
    **dict.fromkeys(("base", "base-model", "model-path", "model-name-or-path"), "model"),
    **{"model": "base", "max-length": "max-new-tokens"},
}
"""What options are called elsewhere."""


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, a UserError."""

    def __init__(self, prog: str | None, text: str | None) -> None:
        self._options: list[str] = []
        self._places: dict[str, str] = {}
        super().__init__(prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(self, *names: str, **about: Any) -> argparse.Action:
        """As its parent's."""
        self._options += [name for name in names if name.startswith("--")]
        self._places |= {name: about.get("metavar") or name for name in names if not name.startswith("-")}
        return super().add_argument(*names, **about)

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments, with options between them. An unknown option is told before what is missing."""
        words = list(sys.argv[1:] if argv is None else argv)
        for word, following in zip(words, [*words[1:], ""], strict=False):
            if word == "--":
                break
            if word.startswith("--") and not any(o.startswith(word.partition("=")[0]) for o in self._options):
                raise UserError(f"{self.prog} has no option {word.partition('=')[0]}{self._meant(word, following)}")
        return self.parse_intermixed_args(argv)

    def _meant(self, word: str, following: str) -> str:
        """What an unknown option may mean: another one, a setting, or an argument that has no option."""
        name, _, value = word.lstrip("-").partition("=")
        plain = name.replace("_", "-")
        if (option := f"--{SYNONYMS.get(plain)}") in self._options:
            return f"; did you mean {option}?"
        if near := did_you_mean(plain, [option.lstrip("-") for option in self._options]):
            return f"; {near.strip().replace(chr(39), '--', 1).replace(chr(39), '')}"
        for place, shown in self._places.items():
            if place.rstrip("s") == plain.rstrip("s"):
                return f"; {shown} is given without one"
        fix = f"it has {', '.join(self._options)}"
        if "overrides" in self._places:
            from vft.config.run import named  # late: it has all settings

            key, why = (name, "") if "." in name else named(name)
            value = value or ("VALUE" if not following or following.startswith("-") else following)
            without = f"settings are given without dashes, with =: {key or 'section.key'}={value}"
            fix = why or (without if key else f"{fix}; {without}")
        return f"; {fix}"

    def error(self, message: str) -> NoReturn:
        """argparse's message in our words."""
        if required := re.match(r"the following arguments are required: (.*)", message):
            names = [name for name in required[1].split(", ") if name != self._places.get("overrides")]
            message = f"{' and '.join(names)} missing; `{self.prog} --help` says what each is"
        elif choice := re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = did_you_mean(choice[2], re.findall(r"[^', ]+", choice[3]))
            message = f"{choice[1]} = {choice[2]}: {near}must be one of {choice[3]}"
        raise UserError(message.removeprefix("argument ").replace("expected one argument", "needs a value"))
