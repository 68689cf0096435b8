"""Serves the page on this machine to whoever has its token, and keeps the browser from asking anyone else."""

from __future__ import annotations

import hmac
import logging
import signal
import socket
from urllib.parse import parse_qs, urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vft.common.errors import UserError, first_line

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-src 'self' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'; object-src 'none'"
)
"""Content-Security-Policy: with it a browser loads nothing from other machines, whatever the page says."""
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """Lets requests through that carry the token and were sent to this server by name.

    The token comes once as `?token=`, and from then on as a cookie. The check of the host keeps out other web sites,
    whose names can be made to lead to this machine (DNS rebinding); that of the origin, forms on them.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: tuple[str, ...], cookie: str) -> None:
        self.app, self.token, self.hosts, self.cookie = app, token, hosts, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = self._refusal(scope, headers)
        if answer is None:
            await self.app(scope, receive, _with_policy(send))
        elif scope["type"] == "http":
            await answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope, headers: Headers) -> PlainTextResponse | RedirectResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts and host.rpartition(":")[0] not in self.hosts and host not in self.hosts:
            return PlainTextResponse(f"{host} is not this page's address\n", 403)
        if origin not in (None, "null") and urlsplit(str(origin)).netloc != host:
            return PlainTextResponse(f"{origin} may not use this page\n", 403)
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        if scope["type"] == "http" and scope["path"] == "/" and self._is_token(query.get("token", [""])[0]):
            entry = RedirectResponse("/", 303)
            entry.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return entry
        # Not by http.cookies, which reads none behind a cookie of another server here that breaks the rules.
        if self._is_token(HTTPConnection(scope).cookies.get(self.cookie, "")):
            return None
        return PlainTextResponse("open the link that `vft app` printed: it has the token of this page\n", 403)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())


def _with_policy(send: Send) -> Send:
    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = POLICY
            headers["Referrer-Policy"] = "no-referrer"
            headers["X-Content-Type-Options"] = "nosniff"
        await send(message)

    return send_with_policy


def guarded(page: gr.Blocks, token: str, host: str, port: int, **look: str) -> FastAPI:
    """The page as a web application behind a `Guard`. `look` goes to Gradio: theme, css."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    hosts = LOCAL if host in ("127.0.0.1", "localhost", "::1") else ()
    app.add_middleware(Guard, token=token, hosts=hosts, cookie=f"vft_app_{port}")
    return gr.mount_gradio_app(
        app, page, "/", server_name=host, server_port=port, footer_links=[], ssr_mode=False, show_error=True, **look
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that browsers can connect to; port 0 is any that is free. UserError if it can't be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"--host = {host}, --port = {port}: {first_line(error)}; name another, or port 0 for any"
        ) from None


class Server(uvicorn.Server):
    """Ends without a word about browsers that are still connected: their events go on until they are cut off."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until Ctrl-C, or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what works for the page alone ends with it
    Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[listener])
