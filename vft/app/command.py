"""A page in the browser: look at data, plan, train, compare, ask, export: vft app [--folder DIR]

Opens on this machine alone, for whoever has the link that is printed. It reads and writes in the folders that --folder
names, runs what the commands run, and sends nothing anywhere. Runs that it starts are ordinary runs, and go on if the
page is closed or killed.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from vft.cli.arguments import Arguments, ExistingFolder, command
from vft.common import plugins

logger = logging.getLogger(__name__)


def _check_token(token: str | None) -> str | None:
    if token is not None and not re.fullmatch(r"[A-Za-z0-9_-]{16,}", token):
        raise ValueError("needs at least 16 letters, digits, - or _; without it, one is made")
    return token


class AppArguments(Arguments):
    """Arguments of `vft app`."""

    folder: Annotated[list[ExistingFolder], Field(default_factory=lambda: [Path(".")])]
    """what the page may read and write, can be repeated; runs go to the first (default: the current folder)"""
    host: str = "127.0.0.1"
    """address to serve on (default 127.0.0.1: this machine alone; from elsewhere, better ssh -L 7860:localhost:7860)"""
    port: Annotated[int, Field(ge=0, lt=65536)] = 7860
    """port to serve on (default 7860; 0: any that is free)"""
    token: Annotated[str | None, AfterValidator(_check_token)] = None
    """what the link has to hold, at least 16 letters, digits, - or _ (default: a new one at every start)"""
    online: bool = False
    """models may be downloaded, archives streamed from servers, and figures sent to wandb"""


@command(AppArguments, __doc__)
def main(options: AppArguments) -> None:
    """Command line."""
    folders = tuple(dict.fromkeys(folder.resolve() for folder in options.folder))
    os.chdir(folders[0])  # settings name paths from here, in this process and in those that it starts
    # Before the libraries are imported, which look at it then.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ["GRADIO_TEMP_DIR"] = str(folders[0] / ".vft-app" / "uploads")
    if not options.online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    plugins.only_own = True
    logger.info("starting the page (a few seconds)")
    from vft.app import page, server
    from vft.app.workspace import Workspace

    space = Workspace(folders, options.online)
    space.path(space.own)  # a link there would lead uploads out of the folders
    listener = server.listen(options.host, options.port)
    port = listener.getsockname()[1]
    token = options.token or secrets.token_urlsafe(24)
    app = server.guarded(page.build(space), token, options.host, port, **page.look())
    name = "localhost" if options.host in ("127.0.0.1", "localhost", "0.0.0.0", "::") else options.host
    name = f"[{name}]" if ":" in name else name
    print(f"open http://{name}:{port}/?token={token}", flush=True)
    logger.info("Ctrl-C ends the page; runs that it started go on")
    server.serve(app, listener)
