"""The page at `/`: what it may load, what is open, and, where a browser is there, what a person sees and can do."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from snello.models import load
from snello.models.adapter import write_adapter
from snello.serve.caches.proof import SimilarSettings
from snello.serve.keys import Keys
from snello.serve.options import ServeOptions
from snello.serve.pages import FILES
from tests.engine.test_adapters import made
from tests.report import samples
from tests.serve.caches.test_proof import write_pairs
from tests.serve.world import Running, make_chat, serving

LONG = "def f(x):"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    chat = samples.write(make_chat(tmp_path_factory.mktemp("page") / "chat"))
    with serving(ServeOptions(models=(f"chat={chat}", "plain=demo"), threads=1)) as here:
        yield here


def test_the_page_loads_from_here_alone(here: Running) -> None:
    policy = here.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    for name in FILES:
        response = here.get(f"/page/{name}")
        assert response.status_code == 200 and response.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", response.text), (
            name
        )
    assert sum(len(here.get(f"/page/{name}").content) for name in FILES) < 100_000
    assert here.get("/page/..%2fpages.py").status_code == 404 and here.get("/page/other.js").status_code == 404


def test_files_are_open_and_what_they_ask_for_is_not(here: Running) -> None:
    keys = Keys({hashlib.sha256(b"secret").digest(): "me"})
    with serving(ServeOptions(models=("demo",), threads=1), keys) as closed:
        assert closed.get("/").status_code == closed.get("/page/main.js").status_code == 200
        for path in ("/status", "/proof/demo", "/page/other.js", "/page"):
            assert closed.get(path).status_code == 401, path
    assert here.get("/", headers={"host": "evil.example"}).status_code == 403


def test_a_proof_is_that_of_the_receipts(here: Running) -> None:
    told = here.get("/proof/chat").json()
    assert told["sentence"] == samples.proof().sentence
    assert [section["key"] for section in told["sections"]][:3] == ["claim", "worst", "ladder"]
    assert here.get("/proof/plain").json()["sections"] == []
    assert here.get("/proof/nobody").status_code == 404


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, address: str, **more: Any) -> tuple[Any, list[str]]:
    """A tab, and what it complains of (a refused policy is such a complaint)."""
    complaints: list[str] = []
    tab = browser.new_page(**more)
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(address)
    return tab, complaints


def until(tab: Any, expression: str, seconds: float = 10.0) -> None:
    """Asked from here: the page's policy forbids a browser's driver to wait inside it."""
    end = time.monotonic() + seconds
    while not tab.evaluate(expression):
        assert time.monotonic() < end, f"never: {expression}"
        time.sleep(0.02)


def shot(tab: Any, name: str) -> None:
    """Kept only where somebody wants to look."""
    if folder := os.environ.get("SNELLO_SCREENSHOTS"):
        tab.screenshot(path=Path(folder) / f"{name}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "width", "height"), [("desktop", 1200, 800), ("phone", 375, 700)])
def test_a_person_asks_and_looks_around(
    here: Running, browser: Any, scheme: str, device: str, width: int, height: int
) -> None:
    size = {"width": width, "height": height}
    tab, complaints = opened(browser, here.address, viewport=size, color_scheme=scheme)
    until(tab, "document.querySelector('#model').value === 'chat'")
    until(tab, "document.querySelector('#claim').textContent !== ''")
    assert tab.text_content("#claim") == samples.proof().sentence
    tab.click("summary")
    tab.fill("#max_tokens", "60")
    tab.click("summary")
    tab.fill("#ask", "<img src=x onerror=alert(1)> def area(r):")
    tab.press("#ask", "Enter")
    tab.wait_for_selector(".message.assistant .note")
    assert "tokens in" in tab.text_content(".message.assistant .note")
    assert tab.text_content("#said").startswith("answer finished")
    assert "<img src=x" in tab.text_content(".message.user") and tab.query_selector("#log img") is None
    shot(tab, f"{device}-{scheme}-chat")
    for view in ("meter", "proof"):
        tab.focus("[role=tab][aria-selected=true]")
        tab.keyboard.press("ArrowRight")
        assert tab.is_visible(f"#{view}") and not tab.is_visible("#chat")
        if view == "meter":
            until(tab, "document.querySelectorAll('#facts dd').length > 5")
        shot(tab, f"{device}-{scheme}-{view}")
    assert tab.query_selector("#proof .pair i, #proof .pair mark") is not None and tab.query_selector("#proof table")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
    assert complaints == []
    tab.close()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_frees_the_slot(here: Running, browser: Any, how: str) -> None:
    tab, complaints = opened(browser, here.address)
    until(tab, "document.querySelector('#model').options.length === 2")
    tab.select_option("#model", "plain")
    tab.click("summary")
    tab.fill("#max_tokens", "900")
    from playwright.sync_api import TimeoutError

    said = ""
    for _ in range(5):  # an answer may have ended by itself
        tab.fill("#ask", LONG)
        tab.press("#ask", "Enter")
        with suppress(TimeoutError):
            tab.wait_for_selector("#stop:not([hidden])", timeout=2_000)
            if how == "button":
                tab.click("#stop", timeout=2_000)
            else:
                tab.keyboard.press("Escape")
        tab.wait_for_selector("#send:not([hidden])")
        said = tab.locator(".message.assistant .note").last.text_content()
        if said == "stopped":
            break
    assert said == "stopped"
    assert here.idle("plain") and complaints == []
    tab.close()


def test_a_key_is_asked_for_and_kept_in_this_tab_alone(browser: Any) -> None:
    keys = Keys({hashlib.sha256(b"secret").digest(): "me"})
    with serving(ServeOptions(models=("demo",), threads=1), keys) as closed:
        tab, _ = opened(browser, closed.address)
        tab.wait_for_selector("#key-form:not([hidden])")
        tab.fill("#key", "wrong")
        tab.press("#key", "Enter")
        until(tab, "document.querySelector('#said').textContent.includes('not known')")
        tab.fill("#key", "secret")
        tab.press("#key", "Enter")
        until(tab, "document.querySelector('#model').value === 'demo'")
        assert not tab.is_visible("#key-form")
        assert tab.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
        tab.close()


PHONE, DESKTOP = {"width": 375, "height": 700}, {"width": 1200, "height": 800}
LONG_NAME = "answers-of-the-municipal-waterworks-to-their-customers-2026"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model with two adapters, one of a long name, that also answers similar questions."""
    place = tmp_path_factory.mktemp("adapted")
    model = load(make_chat(place / "chat"))
    for number, name in enumerate(("labels", LONG_NAME)):
        write_adapter(place / name, made(model, rank=4, targets="q,v,gate,down", seed=number), model)
    similar = SimilarSettings(
        encoder="words", bound=0.05, audit=1e-9, pairs=write_pairs(place / "pairs.json", count=300)
    )
    options = ServeOptions(
        models=(f"chat={place / 'chat'}",),
        adapters=tuple(f"{name}={place / name}" for name in ("labels", LONG_NAME)),
        cache=place / "cache",
        similar=similar,
        threads=1,
        context=512,
    )
    with serving(options) as here:
        yield here


def settled(tab: Any, most: str) -> None:
    """Settings whose answers may be kept."""
    tab.click("summary")
    tab.fill("#temperature", "0")
    tab.fill("#max_tokens", most)
    tab.click("summary")


def anew(tab: Any) -> None:
    """Another conversation."""
    tab.click("summary")
    tab.click("#clear")
    tab.click("summary")


def asked(tab: Any, text: str) -> str:
    """What stands below the answer once it has ended."""
    before = len(tab.query_selector_all(".message.assistant .note"))
    tab.fill("#ask", text)
    tab.press("#ask", "Enter")
    until(tab, f"document.querySelectorAll('.message.assistant .note').length > {before}")
    return str(tab.query_selector_all(".message.assistant .note")[-1].text_content())


@pytest.mark.parametrize(("device", "size"), [("desktop", DESKTOP), ("phone", PHONE)])
def test_an_adapter_is_chosen_by_name_and_answers(adapted: Running, browser: Any, device: str, size: Any) -> None:
    tab, complaints = opened(browser, adapted.address, viewport=size)
    until(tab, "document.querySelector('#model').options.length === 3")
    labels = tab.evaluate("[...document.querySelector('#model').options].map((option) => option.label)")
    assert labels == ["chat", "labels (adapter of chat)", f"{LONG_NAME} (adapter of chat)"]
    settled(tab, "12")
    said = []
    for name in ("chat", "labels", LONG_NAME):
        tab.select_option("#model", name)
        until(tab, "document.querySelector('#claim').textContent !== ''")
        anew(tab)
        asked(tab, "def area(r):")
        assert tab.text_content(".message.assistant .who") == name
        said.append(tab.evaluate("document.querySelector('.message.assistant').childNodes[1].data"))
    wanted = [
        adapted.post(
            "/v1/chat/completions",
            {
                "model": name,
                "messages": [{"role": "user", "content": "def area(r):"}],
                "max_tokens": 12,
                "temperature": 0,
            },
        ).json()["choices"][0]["message"]["content"]
        for name in ("chat", "labels", LONG_NAME)
    ]
    assert said == wanted and len(set(said)) == 3
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
    shot(tab, f"{device}-adapter")
    assert complaints == []
    tab.close()


def test_the_page_says_where_an_answer_came_from(adapted: Running, browser: Any) -> None:
    tab, complaints = opened(browser, adapted.address, viewport=PHONE)
    until(tab, "document.querySelector('#model').options.length === 3")
    first = {"messages": [{"role": "user", "content": "What is the horse river stone?"}], "stop": ["e"]}
    adapted.post("/v1/chat/completions", {"model": "chat", **first, "max_tokens": 60, "temperature": 0})
    settled(tab, "30")
    assert "computed" in asked(tab, "def volume(r):")
    anew(tab)
    assert "exact" in asked(tab, "def volume(r):")
    tab.click("#tab-meter")
    kept = adapted.get("/status").json()["answers_on_disk"]
    known = f"{kept['hits']} of {kept['hits'] + kept['misses']}"
    until(tab, f"[...document.querySelectorAll('#facts dd')].some((told) => told.textContent === '{known}')")
    terms, values = (
        tab.evaluate(f"[...document.querySelectorAll('#facts {kind}')].map((told) => told.textContent)")
        for kind in ("dt", "dd")
    )
    rows = dict(zip(terms, values, strict=True))
    assert rows["answers known from disk"] == known and kept["hits"]
    assert rows["answers of similar questions"] == "0; audited 0, wrong 0"
    shot(tab, "phone-kept")
    assert complaints == []
    tab.close()
