"""The command `vft`: finds the command that is named, runs it, and says what is missing instead of a traceback.

Only the standard library is imported here, and nothing newer than Python 3.7: `vft --help` is quick, and a Python
without vft's packages gets a message.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from vft.common.interpreter import fail, prefer_venv, quiet_interrupts, report_missing, run_in_venv
from vft.common.version import __version__

COMMANDS = {
    "train": ("vft.recipes.main", "fine-tune a model: vft train TASK CONFIG.toml [section.key=value ...]"),
    "predict": ("vft.cli.predict", "answer a prompt about videos, pictures or files of records"),
    "chat": ("vft.cli.chat", "talk with a model about videos and pictures"),
    "evaluate": ("vft.cli.evaluate", "score a model on held-out samples, with 95 % intervals"),
    "benchmark": ("vft.cli.benchmark", "score a model on public benchmarks by name"),
    "pairs": ("vft.cli.pairs", "make preference pairs of a model's own answers, or keep the best of them"),
    "merge": ("vft.cli.merge_lora", "merge an adapter into its base model"),
    "export": ("vft.cli.export", "write the adapter or model of a run's checkpoint, such as after a stop"),
    "plan": ("vft.cli.plan", "memory and time of a run, before any GPU is rented"),
    "inspect": ("vft.cli.inspect_batch", "show what the model gets from the data: frames, text, what it learns"),
    "compare": ("vft.cli.compare", "lay runs side by side: settings, course, scores"),
    "app": ("vft.app.command", "a page in the browser: data, plans, runs, questions, export"),
    "live": ("vft.cli.live", "follow a run from another terminal"),
    "doctor": ("vft.cli.doctor", "check this machine's set-up and say how to fix it"),
    "download": ("vft.cli.download", "fetch a public data set, or say how to get it"),
    "settings": ("vft.cli.settings", "list all settings of a run with values, defaults and meaning"),
    "config": ("vft.cli.config", "import a configuration of LLaMA-Factory or ms-swift"),
    "new": ("vft.cli.new", "write a skeleton of your own task or data format"),
}
"""Module with `main`, and a line of help, by the name of the command."""
SYNONYMS = {
    **dict.fromkeys(("fit", "finetune", "fine-tune", "sft", "rlhf", "resume"), "train"),
    **dict.fromkeys(("infer", "inference", "generate", "run"), "predict"),
    **dict.fromkeys(("eval", "test", "score"), "evaluate"),
    **dict.fromkeys(("ui", "web", "web-ui", "webui", "gradio", "gui"), "app"),
    **{"import": "config", "convert": "config", "check": "doctor", "tensorboard": "live"},
}
"""What commands are called elsewhere."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line `vft COMMAND ...`; `argv` is without the program's own name."""
    words = list(own_arguments() if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(f"vft {__version__}")
    elif words[0] in COMMANDS:
        run(words[0], words[1:], f"vft {words[0]}")
    else:
        close = difflib.get_close_matches(SYNONYMS.get(words[0].lower(), words[0].lower()), COMMANDS, n=1)
        hint = f"did you mean `vft {close[0]}`? " if close else ""
        fail(f"vft has no command {words[0]!r}: {hint}`vft --help` lists all of them")


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    head = ["usage: vft COMMAND ...", "", "Fine-tuning of video language models.", "", "commands:"]
    return "\n".join(
        [*head, *lines, "", "`vft COMMAND --help` describes a command; `vft --version` shows the version."]
    )


def own_arguments() -> list[str]:
    """The arguments of this process. If it is to show help, it ends in silence when its reader does (`| head -1`)."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & {*words}:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    return words


def run_tool(command: str) -> None:
    """The command line of `python tools/NAME.py`, which is the same as `vft COMMAND`."""
    run(command, own_arguments(), f"python tools/{Path(sys.argv[0]).name}")


def run(command: str, argv: Sequence[str], prog: str) -> None:
    """Run a command with the arguments `argv`; `prog` is its name in usage lines.

    If this Python lacks vft's packages, the checkout's .venv runs the command. Without a .venv the process ends with
    one line and exit status 2.
    """
    prefer_venv()
    quiet_interrupts(True)
    gc.disable()  # imports make a million objects and no garbage: looking for it takes a second
    try:
        module = importlib.import_module(COMMANDS[command][0])
    except ModuleNotFoundError as error:
        run_in_venv()
        report_missing(error)
    gc.enable()
    quiet_interrupts(False)
    try:
        module.main(argv=argv, prog=prog)
    except ModuleNotFoundError as error:  # a package that is imported only where it is used
        report_missing(error)


if __name__ == "__main__":
    main()
