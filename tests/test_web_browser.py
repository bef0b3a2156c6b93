"""The page of `latentdiff web` in a real browser: what a visitor sees, does and can hear."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_pipeline
from support.web import drawings_of, made_app, make_run, served, slowed

CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip(f"{CHROMIUM} is not installed", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
OWN = ("http://127.0.0.1:", "data:", "blob:")
# Controls that are seen and have no name that a screen reader could say.
NAMELESS = """() => [...document.querySelectorAll(
    'input, textarea, select, button, [role=slider], [role=listbox], [role=tab]')]
  .filter(e => e.offsetParent && !e.labels?.length && !e.getAttribute('aria-label')
    && !e.getAttribute('aria-labelledby') && !e.innerText?.trim() && !e.title)
  .map(e => e.outerHTML.slice(0, 200))"""
WIDTH = "() => document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """Address and queue of a server that takes a tenth of a second for a step."""
    folder = tmp_path_factory.mktemp("web")
    make_run(folder / "runs" / "emoji" / "unet")
    pipeline = slowed(tiny_pipeline(folder / "tokenizer"), 0.1)
    with drawings_of(pipeline) as drawings:
        app = made_app(drawings, folder, runs=folder / "runs")
        with served(app) as address:
            yield address, drawings


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Without Chromium's sandbox, which root cannot have.
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(server: tuple[str, Any], browser: Any) -> Iterator[Any]:
    """Opens the page as a new visitor; in the end no page asked another host, or met an error."""
    contexts, asked, errors = [], [], []

    def open_page(size: dict[str, int] = DESKTOP) -> Any:
        context = browser.new_context(viewport=size)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server[0])
        page.get_by_label("Prompt", exact=True).wait_for(timeout=20_000)
        page.wait_for_timeout(500)  # until its events are bound
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked
    assert [url for url in asked if not url.startswith(OWN)] == []
    assert errors == []


def order(page: Any, prompt: str = "a cat", *, steps: int = 4) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label(re.compile("^number input for Steps")).fill(str(steps))
    page.get_by_label(re.compile("^number input for Steps")).press("Tab")
    page.get_by_role("button", name="Draw", exact=True).click()


def wait_for(page: Any, said: str | re.Pattern[str]) -> None:
    page.locator("#status", has_text=said).wait_for(timeout=20_000)


def test_an_image_is_drawn_and_its_settings_are_used_again(opened: Any) -> None:
    page = opened()
    order(page, "a red cat")
    wait_for(page, "Done. Seed ")
    seed = re.findall(r"\d+", page.locator("#status").inner_text())[0]
    assert page.locator("#gallery img").count() >= 1
    assert page.locator("#view img").get_attribute("alt") == "The finished image"
    page.get_by_label("Prompt", exact=True).fill("another")
    page.get_by_role("button", name="Use these settings").click()
    wait_for(page, "The settings are filled in.")
    assert page.get_by_label("Prompt", exact=True).input_value() == "a red cat"
    assert page.get_by_label("Seed").input_value() == seed
    page.get_by_role("button", name="Draw", exact=True).click()
    wait_for(page, f"Done. Seed {seed}.")


def test_stop_in_the_middle_ends_within_a_step_and_shows_the_preview(
    opened: Any, server: tuple[str, Any]
) -> None:
    page, drawings = opened(), server[1]
    order(page, steps=40)
    wait_for(page, re.compile(r"Step (5|6|7|8|9) of 40"))
    page.get_by_role("button", name="Stop").click()
    wait_for(page, "Stopped at step ")
    step = int(re.findall(r"\d+", page.locator("#status").inner_text())[0])
    assert 5 <= step < 20
    assert page.locator("#view img").get_attribute("alt").startswith("Preview at step ")
    assert drawings._current is None
    order(page, steps=2)
    wait_for(page, "Done.")


def test_two_visitors_draw_at_once_and_each_sees_their_own(opened: Any) -> None:
    one, other = opened(), opened()
    for page, seed in ((one, "11"), (other, "22")):
        page.get_by_label("Seed").fill(seed)
    order(one, steps=15)
    order(other, steps=5)
    wait_for(other, "Waiting: 1 before this one.")
    wait_for(one, "Done. Seed 11.")
    wait_for(other, "Done. Seed 22.")


def test_a_visitor_who_leaves_takes_the_order_along(opened: Any, server: tuple[str, Any]) -> None:
    page, drawings = opened(), server[1]
    order(page, steps=40)
    wait_for(page, re.compile(r"Step \d of 40"))
    page.close()
    begun = time.monotonic()
    while drawings._current is not None:
        time.sleep(0.05)
        assert time.monotonic() < begun + 2.5  # the other steps take longer


def test_a_hostile_prompt_is_text_wherever_it_is_shown(opened: Any) -> None:
    page = opened()
    page.get_by_label("Seed").fill(HOSTILE[:20])
    order(page, HOSTILE)
    wait_for(page, "must be a whole number")  # which quotes it
    page.get_by_label("Seed").fill("")
    order(page, HOSTILE)
    wait_for(page, "Done.")
    page.get_by_role("button", name="Use these settings").click()
    wait_for(page, "The settings are filled in.")
    assert page.get_by_label("Prompt", exact=True).input_value() == HOSTILE
    assert page.title() == "latentdiff"
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_control_has_a_name_and_nothing_scrolls_sideways(
    opened: Any, size: dict[str, int], tmp_path: Path
) -> None:
    page = opened(size)
    order(page, steps=2)
    wait_for(page, "Done.")
    for part in ("Model and LoRAs", "Start from an image"):
        page.get_by_role("button", name=part).click()
    page.wait_for_timeout(1000)
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(WIDTH) == size["width"]
    page.get_by_role("tab", name="Training").click()
    page.get_by_text("Step 30").wait_for(timeout=30_000)
    assert page.get_by_alt_text("Loss of unet over the steps").count() == 1
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(WIDTH) == size["width"]


def test_the_keyboard_is_enough_to_draw(opened: Any) -> None:
    page = opened()
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type("a cat")
    page.keyboard.press("Enter")
    wait_for(page, re.compile(r"Step \d+ of"))
    for _ in range(10):  # on to Stop
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id") == "stop":
            break
    page.keyboard.press("Enter")
    wait_for(page, "Stopped at step ")
