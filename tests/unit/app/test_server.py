"""The page answers whoever has its token, under its own name, and lets a browser ask nobody else."""

from __future__ import annotations

import gradio as gr
import pytest
from starlette.testclient import TestClient

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
