"""Uploading: what a server of the hub's kind gets, and a sentence for what is missing."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from support.command import run
from support.tiny import tiny_pipeline

from latentdiff.formats.hub_upload import push_folder


class Hub(BaseHTTPRequestHandler):
    """Takes what is uploaded as plain files, and keeps it."""

    requests: list[tuple[str, bytes, str]]

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        self.requests.append((self.path, body, self.headers["Authorization"]))
        address = f"http://127.0.0.1:{self.server.server_port}/me/cats"  # pyright: ignore[reportAttributeAccessIssue]
        answer: dict[str, Any] = {"url": address, "commitUrl": f"{address}/commit/{'a' * 40}"}
        answer |= {"commitOid": "a" * 40}
        if "preupload" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": name, **plain} for name in names]}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "requests", [], raising=False)
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_pipeline(tmp_path / "tokens").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("a card")
    (tmp_path / "model" / "notes.log").write_text("mine")
    return tmp_path / "model"


def test_a_server_gets_the_models_files_and_no_others(hub: str, model: Path) -> None:
    address = push_folder(model, "me/cats", private=True, token="hf_secret", endpoint=hub)
    assert address.endswith("me/cats")
    (path, body, authorization), *_ = Hub.requests
    assert (path, authorization) == ("/api/repos/create", "Bearer hf_secret")
    assert json.loads(body)["visibility"] == "private"
    commit = next(body for path, body, _ in Hub.requests if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}
    expected = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert set(files) == expected - {"notes.log"}
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    sent = files["unet/diffusion_pytorch_model.safetensors"]["content"]
    assert base64.b64decode(sent) == weights.read_bytes()


def test_a_pipeline_is_uploaded_with_a_card(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub)
    tiny_pipeline(tmp_path / "tokens").push_to_hub("me/cats", token="hf_secret")
    commit = next(body for path, body, _ in Hub.requests if "/commit/" in path)
    assert b'"README.md"' in commit
    assert b"model_index.json" in commit


def test_what_is_missing_is_said_in_a_sentence(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run("push", str(model), "me/cats") == 2
    assert "the hub asks who you are: `hf auth login`" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"nothing can be uploaded offline"):
        push_folder(model, "me/cats", token="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no model"):
        push_folder(tmp_path / "empty", "me/cats", token="x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"repo_id='a/b/c' must be OWNER/NAME"):
        push_folder(model, "a/b/c", token="x", endpoint="http://127.0.0.1:9")
