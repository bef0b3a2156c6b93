"""`latentdiff web`: who may ask, what is refused, and that its images are the pipeline's."""

import asyncio
import base64
import gc
import io
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from support.tiny import tiny_pipeline
from support.web import drawings_of, made_app, served, slowed

from latentdiff.cli import main
from latentdiff.formats.png import read_png
from latentdiff.pipeline import Pipeline
from latentdiff.web.choices import Choices, chosen
from latentdiff.web.drawings import Drawings, QueueFullError
from latentdiff.web.settings import fill_fields, read_fields

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
GENERATIONS = "/v1/images/generations"
TOKEN = "a-token-that-is-long"
ORDER = {"prompt": "a cat", "steps": 3, "seed": 7}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def drawings(pipeline: Pipeline) -> Iterator[Drawings]:
    with drawings_of(pipeline) as drawings:
        yield drawings


@pytest.fixture(scope="module")
def app(drawings: Drawings, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made_app(drawings, tmp_path_factory.mktemp("web"))


@pytest.fixture(scope="module")
def guarded(drawings: Drawings, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made_app(drawings, tmp_path_factory.mktemp("web"), token=TOKEN, listen=True)


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    """One request, as from this machine unless `base_url` says another Host."""
    base = options.pop("base_url", "http://127.0.0.1:7860")

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def draw(app: Any, **options: Any) -> httpx.Response:
    return ask(app, "POST", GENERATIONS, json=ORDER | options)


def image_of(entry: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def test_a_seed_draws_through_the_api_what_it_draws_with_the_pipeline(
    app: Any, pipeline: Pipeline, tmp_path: Path
) -> None:
    answer = draw(app, n=2, size="16x16", response_format="b64_json", user="me", stream=None)
    assert answer.status_code == 200
    data = answer.json()["data"]
    wanted = pipeline("a cat", steps=3, seed=7, num_images=2, height=16, width=16, progress=False)
    assert [entry["seed"] for entry in data] == [7, 8]
    for entry, image in zip(data, wanted.images, strict=True):
        assert np.array_equal(np.asarray(image_of(entry)), np.asarray(image))
    path = tmp_path / "drawn.png"
    path.write_bytes(base64.b64decode(data[1]["b64_json"]))
    record = read_png(path).record
    assert record is not None
    again = pipeline(**record["request"], progress=False).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(wanted.images[1]))
    assert record["model"] == "models/tiny"


def test_a_random_seed_is_told(app: Any, pipeline: Pipeline) -> None:
    entry = draw(app, seed=None).json()["data"][0]
    wanted = pipeline("a cat", steps=3, seed=entry["seed"], progress=False).images[0]
    assert np.array_equal(np.asarray(image_of(entry)), np.asarray(wanted))


def test_models_are_listed_by_name(app: Any) -> None:
    assert [m["id"] for m in ask(app, "GET", "/v1/models").json()["data"]] == ["tiny"]
    assert draw(app, model="tiny").status_code == 200
    assert ask(app, "GET", "/v1/models/other").status_code == 404


def test_features_are_cached_where_a_client_asks(app: Any, pipeline: Pipeline) -> None:
    drawn = image_of(draw(app, seed=7, cache_interval=3).json()["data"][0])
    wanted = pipeline("a cat", steps=3, seed=7, cache_interval=3, progress=False).images[0]
    assert drawn.tobytes() == wanted.tobytes()


def test_what_cannot_be_drawn_is_refused_as_by_openai(app: Any) -> None:
    cases: dict[str, tuple[dict[str, Any], int]] = {
        "n=5 is more than": ({"n": 5}, 400),
        "n=0 must be": ({"n": 0}, 400),
        "must be a whole number": ({"n": True}, 400),
        "steps=41 is more than 40": ({"steps": 41}, 400),
        "width=2048 is more than 64 pixels": ({"size": "2048x16"}, 400),
        "height=15 must be divisible": ({"size": "16x15"}, 400),
        'must be "auto" or as': ({"size": "16 by 16"}, 400),
        'only "b64_json"': ({"response_format": "url"}, 400),
        "prompt=1 must be a text": ({"prompt": 1}, 400),
        "is more than 4000 characters": ({"prompt": "a" * 4001}, 400),
        "'path' is unknown": ({"path": "/etc/passwd"}, 400),
        "'image' is unknown": ({"image": "http://example.com/a.png"}, 400),
        "sampler=nothing is unknown": ({"sampler": "nothing"}, 400),
        "did you mean euler": ({"sampler": "eular"}, 400),
        "model='../secret' is unknown": ({"model": "../secret"}, 404),
        "seed=-1 must be": ({"seed": -1}, 400),
    }
    for said, (options, status) in cases.items():
        answer = draw(app, **options)
        error = answer.json()["error"]
        assert (answer.status_code, said in error["message"]) == (status, True), (said, error)
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
    for field, value in (("n", 0), ("size", "16x15")):
        assert draw(app, **{field: value}).json()["error"]["param"] == field
    for body in (b"", b"[]", b"{", b"[" * 100_000, b'"a cat"', b"{}"):
        assert ask(app, "POST", GENERATIONS, content=body).status_code == 400
    assert ask(app, "GET", "/v1/images/edits").status_code == 404


def test_a_body_that_is_too_large_is_413(app: Any) -> None:
    answer = ask(app, "POST", GENERATIONS, content=b" " * (2**21 + 1))
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")

    async def chunks() -> Any:  # without a Content-Length
        for _ in range(40):
            yield b" " * 2**16

    assert ask(app, "POST", GENERATIONS, content=chunks()).status_code == 413


@pytest.mark.parametrize(
    "prompt", ["<script>alert(1)</script>", "猫 🐈 \x00 \u202e", "(" * 300, " "]
)
def test_a_hostile_prompt_is_only_a_prompt(app: Any, pipeline: Pipeline, prompt: str) -> None:
    entry = draw(app, prompt=prompt).json()["data"][0]
    wanted = pipeline(prompt, steps=3, seed=7, progress=False).images[0]
    assert np.array_equal(np.asarray(image_of(entry)), np.asarray(wanted))


def test_half_a_character_is_refused(app: Any) -> None:
    answer = ask(app, "POST", GENERATIONS, content=b'{"prompt": "\\ud800"}')
    assert (answer.status_code, "not valid Unicode" in answer.text) == (400, True)


def test_a_page_of_another_site_gets_nothing(app: Any) -> None:
    """DNS rebinding has another Host, a form or script of another site another Origin."""
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", ""):
        assert ask(app, "GET", "/v1/models", headers={"Host": host}).status_code == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:3000", "http://localhost:7860"):
        headers = {"Origin": origin}
        assert ask(app, "POST", GENERATIONS, json=ORDER, headers=headers).status_code == 403
        assert (
            ask(app, "POST", "/gradio_api/queue/join", json={}, headers=headers).status_code == 403
        )
    headers = {"Sec-Fetch-Site": "cross-site"}
    assert ask(app, "POST", GENERATIONS, json=ORDER, headers=headers).status_code == 403
    for base in ("http://localhost:8080", "http://[::1]:7860", "http://127.0.0.1:7860"):
        headers = {"Origin": base}
        assert ask(app, "GET", "/v1/models", base_url=base, headers=headers).status_code == 200
    other = ask(app, "GET", "/v1/models", base_url="http://192.168.0.5:7860")
    assert other.status_code == 403  # it does not listen there


def test_who_listens_asks_for_the_token(guarded: Any) -> None:
    base = "http://192.168.0.5:7860"

    def get(path: str, **headers: str) -> httpx.Response:
        return ask(guarded, "GET", path, base_url=base, headers=headers)

    for path in ("/v1/models", "/config", "/gradio_api/info", "/assets/x.js"):
        assert get(path).status_code == 401
    assert get("/v1/models").json()["error"]["type"] == "authentication_error"
    assert get("/v1/models", Authorization=f"Bearer {TOKEN}x").status_code == 401
    assert get("/v1/models", Authorization="Bearer ").status_code == 401
    assert get("/v1/models", Authorization=f"Bearer {TOKEN}").status_code == 200
    assert get("/?token=wrong").status_code == 401
    assert "<form" in get("/").text
    assert ask(guarded, "GET", "/", base_url="http://evil.example").status_code == 403
    entered = [
        get(f"/?token={TOKEN}"),
        ask(guarded, "POST", "/login", base_url=base, data={"token": TOKEN}),
    ]
    for answer in entered:
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert TOKEN not in cookie
        assert get("/config", Cookie=cookie.split(";")[0]).status_code == 200
    assert get("/config", Cookie="latentdiff-7860=wrong").status_code == 401


def test_no_path_leads_out_and_no_address_is_fetched(app: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret", encoding="utf-8")
    for path in (
        *(f"/gradio_api/file={secret}", "/gradio_api/file=/etc/passwd", "/gradio_api/file=../a"),
        *("/assets/../../secret.txt", "/assets/%2e%2e/%2e%2e/__init__.py", "/static/..%2f..%2fx"),
        *("/gradio_api/file=http://example.com/a.png", "/file=/etc/passwd"),
    ):
        answer = ask(app, "GET", path, follow_redirects=False)
        assert answer.status_code in (403, 404), path
        assert "example.com" not in answer.headers.get("location", "")
    for path in ("/docs", "/openapi.json", "/monitoring", "/gradio_api/proxy=http://example.com/"):
        assert ask(app, "GET", path).status_code == 404
    assert ask(app, "POST", "/gradio_api/vibe-edit", json={}).status_code == 404
    for url in ("http://example.com/a.png", "HTTPS://example.com", "file:///etc/passwd"):
        event = {"session_hash": "x", "fn_index": 0, "data": [{"background": {"path": url}}]}
        answer = ask(app, "POST", "/gradio_api/queue/join", json=event)
        assert (answer.status_code, "not named by an address" in answer.text) == (400, True)


def test_the_page_asks_no_host_but_its_own(app: Any) -> None:
    page = ask(app, "GET", "/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "fonts.googleapis" not in page.text
    assert "fonts.googleapis" not in ask(app, "GET", "/theme.css").text


def test_models_and_loras_are_chosen_by_name_only(tmp_path: Path) -> None:
    (tmp_path / "models" / "good").mkdir(parents=True)
    (tmp_path / "models" / "good" / "model_index.json").touch()
    (tmp_path / "models" / "notes").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "model_index.json").touch()
    offered = Choices("x/first.safetensors", tmp_path / "models").models()
    assert offered.keys() == {"first.safetensors", "good"}
    for name in ("../outside", str(tmp_path / "outside"), "notes", "", ".", "good/", "GOOD"):
        with pytest.raises(ValueError, match=r"known are first\.safetensors, good"):
            chosen("model", name, offered)


def test_the_queue_has_a_limit_and_stop_takes_out_of_it(tmp_path: Path) -> None:
    slow = slowed(tiny_pipeline(tmp_path), 0.05)
    with drawings_of(slow, queue=2) as drawings:
        first = drawings.submit(ORDER | {"steps": 40})
        while not first.step:
            time.sleep(0.01)
        second, third = (drawings.submit(ORDER) for _ in range(2))
        assert [drawings.ahead(one) for one in (first, second, third)] == [0, 1, 2]
        with pytest.raises(QueueFullError):
            drawings.submit(ORDER)
        app = made_app(drawings, tmp_path)
        answer = draw(app)
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        drawings.stop(second)
        assert second.done
        drawings.stop(first)
        stopped_at = first.step
        while not third.done:
            time.sleep(0.01)
        assert first.step <= stopped_at + 1  # within a step
        assert not first.images
        assert not second.images
        assert len(third.images) == 1


def test_the_thread_outlives_an_error(app: Any, drawings: Drawings) -> None:
    failed = drawings.submit(ORDER | {"sampler": "pndm"})  # which cannot draw with a flow
    while not failed.done:
        time.sleep(0.01)
    assert "sampler=pndm is for beta schedules" in failed.error
    assert not failed.broken
    assert draw(app).status_code == 200


@pytest.mark.processes
def test_a_client_that_leaves_takes_its_order_along(tmp_path: Path) -> None:
    slow = slowed(tiny_pipeline(tmp_path), 0.1)
    with drawings_of(slow) as drawings, served(made_app(drawings, tmp_path)) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}{GENERATIONS}", json=ORDER | {"steps": 40}, timeout=0.5)
        begun = time.monotonic()
        while drawings._current is not None:
            time.sleep(0.02)
            assert time.monotonic() < begun + 2.5  # 40 steps take 4 s


@pytest.mark.processes
def test_of_20_clients_at_once_none_is_lost_and_memory_stays(app: Any, pipeline: Pipeline) -> None:
    async def all_at_once() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=120
        ) as client:
            orders = [ORDER | {"seed": seed} for seed in range(20)]
            return await asyncio.gather(*(client.post(GENERATIONS, json=one) for one in orders))

    def round_() -> list[httpx.Response]:
        answers = asyncio.run(all_at_once())
        gc.collect()
        return answers

    for _ in range(2):
        answers = round_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        answers = round_()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 8 * 1024
    for seed, answer in enumerate(answers):
        assert answer.status_code == 200
        wanted = pipeline("a cat", steps=3, seed=seed, progress=False).images[0]
        drawn = image_of(answer.json()["data"][0])
        assert np.array_equal(np.asarray(drawn), np.asarray(wanted))


def test_fields_that_are_read_are_those_that_were_filled(
    drawings: Drawings, pipeline: Pipeline
) -> None:
    fields = {
        "prompt": "a cat", "negative_prompt": "dog", "steps": 3.0, "guidance_scale": 2.0,
        "sampler": "euler", "level_spacing": "karras", "seed": "18446744073709551615",
        "num_images": 1, "width": 16, "height": 16, "prompt_weighting": True,
        "model": "tiny", "loras": [], "lora_scale": 1.0,
    }  # fmt: skip
    order = read_fields(fields, None, 0.8)
    options = order.pop("options")
    drawing = drawings.submit(options, **order)
    while not drawing.done:
        time.sleep(0.01)
    assert not drawing.error
    info = Image.open(io.BytesIO(drawing.images[0])).info["latentdiff"]
    record = json.loads(info)
    filled, lost = fill_fields(record["request"], record, drawings.choices.models())
    assert not lost
    again = fields | filled
    assert read_fields(again, None, 0.8)["options"] == options
    assert again["model"] == "tiny"


def test_what_is_painted_is_the_mask() -> None:
    background = Image.new("RGB", (16, 16), "red")
    layer = Image.new("RGBA", (16, 16))
    layer.paste("magenta", (0, 0, 8, 16))
    fields = dict.fromkeys(
        ("prompt", "negative_prompt", "steps", "guidance_scale", "sampler", "level_spacing", "seed",
         "num_images", "width", "height", "prompt_weighting", "model", "loras")
    ) | {"lora_scale": 1}  # fmt: skip
    order = read_fields(fields, {"background": background, "layers": [layer]}, 0.5)
    mask = np.asarray(order["options"]["mask_image"])
    assert mask[:, :8].min() == 255
    assert mask[:, 8:].max() == 0
    assert order["files"].keys() == {"image", "mask_image"}
    plain = read_fields(
        fields, {"background": background, "layers": [Image.new("RGBA", (16, 16))]}, 0.5
    )
    assert "mask_image" not in plain["options"]
    with pytest.raises(ValueError, match="the mask has no image below it"):
        read_fields(fields, {"background": None, "layers": [layer]}, 0.5)
    with pytest.raises(ValueError, match=r"seed='1\.5' must be a whole number"):
        read_fields(fields | {"seed": "1.5"}, None, 0.5)


def test_the_command_line_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments, said in (
        (["--token", "x"], "--token needs --listen"),
        (["--listen", "--token", "short"], "--token has 5 characters; it must have 16 or more"),
        (["--runs", str(tmp_path / "no")], "is not a folder"),
        (["--port", "99999"], "must be from 0 to 65535"),
        (["--max_steps", "0"], "--max_steps 0 must be at least 1"),
        (["--dtype", "int8"], "--dtype int8 must be one of"),
    ):
        assert main(["web", *arguments]) == 2
        assert said in capsys.readouterr().err
