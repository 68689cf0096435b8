"""What the tabs share: the settings that are being made, how a mistake is told, and small pieces of pages."""

from __future__ import annotations

import functools
import html
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import gradio as gr

from vft.app.workspace import Workspace
from vft.common.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Shared:
    """What a tab is built from."""

    space: Workspace
    draft: gr.Code
    """The settings of the run that is being made, as TOML. The tab Train shows it; Data writes to it, Plan reads it."""
    shown: tuple[Any, ...]
    """The events, for `gr.on`, of a browser that opens the page, and of the tab when it is chosen: what lies in the
    folders may have changed."""


def told(handler: F) -> F:
    """The handler of an event, with a UserError or OSError in it shown as a message in the page, in one line."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def wrapped(*values: Any) -> Iterator[Any]:
            try:
                yield from handler(*values)
            except (UserError, OSError) as error:
                raise _message(error) from None
    else:

        @functools.wraps(handler)
        def wrapped(*values: Any) -> Any:
            try:
                return handler(*values)
            except (UserError, OSError) as error:  # a folder without permissions, a name that is too long
                raise _message(error) from None

    return wrapped  # type: ignore[return-value]


def as_text(text: str) -> str:
    """`text` without what is no UTF-8, of names of files and of JSON: the page couldn't be sent with it."""
    return text.encode(errors="replace").decode()


def _message(error: Exception) -> gr.Error:
    # Gradio takes the text for HTML. The page of a model or a file name must not be able to write it.
    return gr.Error(html.escape(as_text(str(error))), duration=20, title="", print_exception=False)
