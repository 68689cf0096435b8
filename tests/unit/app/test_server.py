"""The page answers whoever has its token, under its own name, and lets a browser ask nobody else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import gradio as gr
import pytest
from starlette.testclient import TestClient

from vft.app.page import Page
from vft.app.server import guarded

TOKEN = "a-token-of-some-length"
ENTRY = f"/?token={TOKEN}"


@pytest.fixture(scope="module")
def client() -> TestClient:
    with gr.Blocks(analytics_enabled=False) as page:
        gr.Textbox()
    return TestClient(guarded(page, TOKEN, "127.0.0.1", 7860), base_url="http://localhost:7860")


def test_without_the_token_there_is_nothing(client: TestClient) -> None:
    client.cookies.clear()
    for path in ("/", "/?token=wrong", "/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd", "/docs"):
        assert client.get(path).status_code == 403, path
    assert client.post("/gradio_api/queue/join", json={}).status_code == 403
    assert client.get(f"/config?token={TOKEN}").status_code == 403  # it opens the page alone


def test_with_it(client: TestClient) -> None:
    client.cookies.clear()
    entry = client.get(ENTRY, follow_redirects=False)
    assert entry.status_code == 303 and entry.headers["location"] == "/"  # the token does not stay in the address
    assert (
        "httponly" in entry.headers["set-cookie"].lower() and "samesite=strict" in entry.headers["set-cookie"].lower()
    )
    answer = client.get("/")
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
    assert client.get("/gradio_api/file=/etc/passwd").status_code in (403, 404)
    assert client.get("/gradio_api/file=pyproject.toml").status_code in (403, 404)


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"host": "localhost.evil.example:7860"}, {"origin": "http://evil.example"}]
)
def test_other_sites_are_kept_out(client: TestClient, headers: dict[str, str]) -> None:
    client.get(ENTRY)
    assert client.get("/").status_code == 200
    assert client.get("/", headers=headers).status_code == 403


def test_cookies_of_other_servers_do_not_matter(client: TestClient) -> None:
    client.cookies.clear()
    cookie = f'theirs={{"a": [1]}}; vft_app_7860={TOKEN}'  # cookies are shared by all ports of a host
    assert client.get("/", headers={"cookie": cookie}).status_code == 200
    assert client.get("/", headers={"cookie": f"vft_app_7861={TOKEN}"}).status_code == 403


@pytest.mark.parametrize("path", ["secret.txt", "http://localhost:1/x"])
def test_an_event_names_no_file_but_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A value that is given back as it came would be copied to where the browser fetches it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "secret.txt").write_text("secret")
    with Page(analytics_enabled=False) as page:
        text = gr.Code()
        text.change(lambda text: text, text, text)
    guarded(page, TOKEN, "127.0.0.1", 7860)
    named = path if "://" in path else str(tmp_path / path)
    forged = [{"x": {"path": named, "meta": {"_type": "gradio.FileData"}}}]
    with pytest.raises(gr.Error, match="not uploaded"):
        asyncio.run(page.process_api(page.fns[0], forged))
    assert not list(tmp_path.rglob("uploads/**/secret.txt"))
