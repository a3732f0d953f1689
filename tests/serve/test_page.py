"""The chat page in a real browser, before a real server: streams, breaks, keys, history, keyboard, screens."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import httpx
import pytest

from tests.browser import Driver, Tab, driven
from tests.serve.chat_server import chat_server
from tests.serve.foreign import PAGE, Relay, foreign_server
from tests.speculative.processes import Role

pytestmark = pytest.mark.real

KEY = "a key of the tests, long enough"
WORDS = ("model.dtype=float64", "project.context=1024")
"""Near ties fall the same way in float64, also behind a break."""
SETTINGS = {"temperature": "0", "max_tokens": "160"}
QUESTION = "To be, or not to be? To be, or not to be? To be"
TEXT = "[...document.querySelectorAll('.assistant .text')].at(-1).textContent"
IDLE = "document.querySelector('.assistant') && !document.querySelector('[aria-busy=true]')"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Role]:
    with patch.dict(os.environ, {"LAB_KEY": KEY}), chat_server(tmp_path_factory.mktemp("server"), *WORDS) as running:
        yield running


@pytest.fixture(scope="module")
def relay(server: Role) -> Iterator[Relay]:
    made = Relay(server.port)
    yield made
    made.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with driven(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(driver: Driver, relay: Relay) -> Iterator[Tab]:
    """The page, with the key and the settings, without history."""
    tab = driver.tab()
    tab.screen(1360)
    tab.open(f"http://127.0.0.1:{relay.port}/")
    tab.run(f"localStorage.clear(), sessionStorage.setItem('lab.key', {json.dumps(KEY)})")
    tab.run(f"localStorage.setItem('lab.settings', {json.dumps(json.dumps(SETTINGS))})")
    tab.reload()
    tab.console.clear()
    tab.until("document.querySelectorAll('#settings option').length === 1")
    yield tab
    relay.release()
    tab.ask("Page.close")


def headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


def answer(server: Role, *questions: str, **options: Any) -> dict[str, Any]:
    """The server's own answer to the last question, without the page."""
    messages: list[dict[str, str]] = []
    found: dict[str, Any] = {}
    for question in questions:
        messages.append({"role": "user", "content": question})
        body = {"messages": messages, "temperature": 0, "max_tokens": 160, **options}
        url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
        found = httpx.post(url, json=body, headers=headers(), timeout=60).json()
        messages.append(found["choices"][0]["message"])
    return found


def text_of(found: dict[str, Any]) -> str:
    return str(found["choices"][0]["message"]["content"])


def ask(tab: Tab, question: str = QUESTION) -> None:
    tab.click("#message")
    tab.type(question)
    tab.press("Enter")


def test_answers_are_those_of_the_server_and_say_what_was_drafted(page: Tab, server: Role) -> None:
    ask(page)
    page.until(IDLE)
    first = answer(server, QUESTION)
    assert page.run(TEXT) == text_of(first)
    meta = page.run("document.querySelector('.meta').textContent")
    assert "cut at its longest160 tokens" in meta
    assert "tokens/s" in meta
    accepted = int(meta.split(" drafts accepted")[0].rpartition("cached")[2])
    assert accepted > 0, "the random model repeats itself, and prompt lookup drafts that"
    assert page.run("document.querySelectorAll('.assistant .draft').length") > 0
    assert page.run("document.querySelectorAll('.assistant .own').length") > 0
    own, draft = (
        page.run(f"getComputedStyle(document.querySelector('.assistant .{one}')).color") for one in ("own", "draft")
    )
    assert own != draft
    assert own == page.run("getComputedStyle(document.querySelector('#legend .own')).color")
    page.click("#colours")
    plain = page.run("getComputedStyle(document.querySelector('.assistant .text')).color")
    assert page.run("getComputedStyle(document.querySelector('.assistant .draft')).color") == plain
    ask(page, "And then?")
    page.until(f"document.querySelectorAll('.assistant').length === 2 && {IDLE}")
    assert page.run(TEXT) == text_of(answer(server, QUESTION, "And then?")), "the history goes with it"
    assert page.run("document.getElementById('spoken').textContent") == f"Answer: {page.run(TEXT)}"
    assert page.console == []


def test_speculation_off_drafts_nothing_and_says_the_same(page: Tab, server: Role) -> None:
    page.click("#settings-part summary")
    page.click("[name=speculative]")
    page.until("!document.querySelector('[name=speculative]').checked")
    ask(page)
    page.until(IDLE)
    assert page.run(TEXT) == text_of(answer(server, QUESTION))
    assert page.run("document.querySelectorAll('.assistant .draft').length") == 0
    assert " 0 drafts accepted" in " " + page.run(
        "[...document.querySelectorAll('.meta span')].map((one) => one.textContent).join(' ')"
    )


def test_escape_stops_and_continue_goes_on_to_the_same_end(page: Tab, server: Role, relay: Relay) -> None:
    relay.hold(6)
    ask(page)
    page.until("document.querySelector('.assistant .text').textContent.length > 3")
    page.press("Escape")
    page.until(IDLE)
    assert page.run("document.querySelector('.meta span').textContent") == "stopped"
    assert len(page.run(TEXT)) < len(text_of(answer(server, QUESTION)))
    relay.cut()
    url = f"http://127.0.0.1:{server.port}/status"
    page.until("document.activeElement.id === 'message'")
    page.click(".continue")
    page.until(f"{IDLE} && document.querySelector('.meta span').textContent !== 'stopped'")
    assert page.run(TEXT) == text_of(answer(server, QUESTION))
    assert "The answer was stopped after" in page.run("document.querySelector('.told').textContent")
    (model,) = httpx.get(url, headers=headers()).json()["models"].values()
    assert model["running"] == 0


def test_a_stream_whose_connection_breaks_goes_on_by_itself(page: Tab, server: Role, relay: Relay) -> None:
    before = relay.streams
    relay.hold(6)
    ask(page)
    page.until("document.querySelector('.assistant .text').textContent.length > 3")
    relay.cut()
    page.until(IDLE)
    assert page.run(TEXT) == text_of(answer(server, QUESTION))
    assert "The connection broke after" in page.run("document.querySelector('.told').textContent")
    assert relay.streams == before + 2


def test_a_reload_in_the_middle_of_an_answer_goes_on(page: Tab, server: Role, relay: Relay) -> None:
    relay.hold(6)
    ask(page)
    page.until("document.querySelector('.assistant .text').textContent.length > 3")
    seen = page.run(TEXT)
    page.reload()
    assert page.until("document.querySelector('.assistant')", 5) is not None
    relay.release()
    page.until(IDLE)
    assert page.run(TEXT) == text_of(answer(server, QUESTION))
    assert page.run(TEXT).startswith(seen)
    assert "The page was loaded again after" in page.run("document.querySelector('.told').textContent")


def test_a_second_tab_takes_the_answer_over_and_both_show_it(
    page: Tab, driver: Driver, server: Role, relay: Relay
) -> None:
    before = relay.streams
    relay.hold(6)
    ask(page)
    page.until("document.querySelector('.assistant .text').textContent.length > 3")
    other = driver.tab()
    page.run("window.dispatchEvent(new Event('pagehide'))")  # what is due to be saved, is
    other.open(f"http://127.0.0.1:{relay.port}/")
    other.until("document.activeElement.id === 'key'")
    kept = (
        "Object.keys(localStorage).filter((one) => one.startsWith('lab.chat.')).map((one) => localStorage.getItem(one))"
    )
    (chat,) = map(json.loads, other.run(kept))
    assert chat["messages"][-1]["state"] == "running", "a tab without a key has no say about the answer of another"
    assert not any("/v1/streams/" in one for one in other.requests)
    other.type(KEY)
    other.press("Enter")
    deadline = time.monotonic() + 60
    while relay.streams < before + 2:  # it has taken the answer over, before the first tab gets the rest of it
        assert time.monotonic() < deadline, other.console
        time.sleep(0.02)
    relay.release()
    expected = text_of(answer(server, QUESTION))
    for tab in (other, page):
        tab.until(f"{IDLE} && {TEXT} === {json.dumps(expected)}")
    other.ask("Page.close")


LATE = """
const refused = window.refused = [];
const fetchNow = window.fetch;
window.fetch = async (...asked) => {
    const response = await fetchNow(...asked);
    if (response.status === 401) await new Promise((go) => refused.push(go));
    return response;
};
"""
"""Refusals reach the page only when the test lets them."""


def test_a_refusal_of_an_earlier_key_changes_nothing(page: Tab, driver: Driver, server: Role, relay: Relay) -> None:
    """It may arrive after the next key was typed: then it neither asks again, nor lets the answer of another tab go."""
    relay.hold(6)
    ask(page)
    page.until("document.querySelector('.assistant .text').textContent.length > 3")
    other = driver.tab()
    page.run("window.dispatchEvent(new Event('pagehide'))")
    other.ask("Page.addScriptToEvaluateOnNewDocument", source=LATE)
    other.open(f"http://127.0.0.1:{relay.port}/")
    other.until("refused.length === 3")  # two looks at the status, and one at the models
    other.run("refused.shift()()")
    other.until("document.activeElement.id === 'key'")
    other.type("not the key")
    other.press("Enter")
    other.until("refused.length >= 4")
    other.run("refused.splice(0, 2).forEach((go) => go())")  # those of no key
    other.run("new Promise((go) => setTimeout(go, 100))")
    assert other.run("document.getElementById('key-form').hidden") is True
    assert not any("/v1/streams/" in one for one in other.requests)
    other.run("refused.shift()()")
    other.until("document.activeElement.id === 'key'")
    other.type(KEY)
    other.press("Enter")
    other.until("document.querySelectorAll('#settings option').length === 1")
    other.run("refused.splice(0).forEach((go) => go())")  # those of the wrong key
    other.run("new Promise((go) => setTimeout(go, 100))")
    assert other.run("document.getElementById('key-form').hidden") is True
    assert other.run("document.querySelector('#status .fault')") is None
    assert other.run("document.querySelectorAll('#status .place').length") == 1
    relay.release()
    expected = text_of(answer(server, QUESTION))
    other.until(f"{IDLE} && {TEXT} === {json.dumps(expected)}")
    other.ask("Page.close")


def test_a_key_is_asked_for_and_kept_for_the_tab(driver: Driver, relay: Relay) -> None:
    tab = driver.tab()
    tab.open(f"http://127.0.0.1:{relay.port}/")
    tab.run("sessionStorage.clear()")
    tab.reload()
    tab.until("document.activeElement.id === 'key'")
    tab.type("not the key")
    tab.press("Enter")
    tab.until("document.activeElement.id === 'key'")
    tab.until("document.getElementById('key-text').textContent === 'This server has another key.'")
    tab.type(KEY)
    tab.press("Enter")
    tab.until("document.querySelectorAll('#settings option').length === 1")
    tab.reload()
    tab.until("document.querySelectorAll('.place').length === 1")
    assert tab.run("document.getElementById('key-form').hidden") is True
    assert KEY not in tab.run("JSON.stringify(localStorage)")
    assert "$LAB_KEY" in tab.run("document.getElementById('integrations').textContent")
    assert KEY not in tab.run("document.documentElement.innerHTML")
    tab.ask("Page.close")


def test_chats_are_kept_deleted_and_brought_back(page: Tab) -> None:
    titles = "[...document.querySelectorAll('#chat-list .title')].map((one) => one.textContent).join('|')"
    ask(page, "first")
    page.until(IDLE)
    page.click("#new-chat")
    assert page.run("document.querySelector('.assistant')") is None
    ask(page, "second")
    page.until(IDLE)
    page.reload()
    assert page.run(titles) == "second|first"
    assert page.run("document.querySelector('.user .text').textContent") == "second"
    page.click("#chat-list li:last-child .title")
    assert page.run("document.querySelector('.user .text').textContent") == "first"
    page.click("#chat-list li:last-child .delete")
    assert page.run(titles) == "second"
    page.click("#note button")
    assert page.run(titles) == "first|second"
    page.click("#chat-list li:last-child .delete")
    page.reload()
    assert page.run(titles) == "first"


def test_regenerate_answers_anew(page: Tab) -> None:
    page.click("#settings-part summary")
    page.run("document.querySelector('[name=temperature]').select()")
    page.click("[name=temperature]")
    page.run("document.querySelector('[name=temperature]').select()")
    page.type("1")
    ask(page)
    page.until(IDLE)
    first = page.run(TEXT)
    page.click(".regenerate")
    page.until(f"{IDLE} && {TEXT} !== {json.dumps(first)}")
    assert page.run("document.querySelectorAll('.message').length") == 2


def test_a_wrong_setting_is_named_where_it_is_typed(page: Tab) -> None:
    page.run("settings.temperature = '9'")
    ask(page)
    page.until("document.querySelector('.fault')")
    assert page.run("document.querySelector('.fault').textContent").startswith(
        "temperature must be a number in [0, 2], got 9"
    )
    assert page.run("document.querySelector('[aria-invalid=true]').name") == "temperature"
    page.run("settings.temperature = '0'")
    page.click(".regenerate")
    page.until(f"{IDLE} && !document.querySelector('.fault')")


def test_it_works_without_a_mouse(page: Tab) -> None:
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    assert page.run("document.getElementById('message').value") == "one\ntwo"
    page.press("Enter")
    page.until(IDLE)
    assert page.run("document.querySelector('.user .text').textContent") == "one\ntwo"
    page.run("document.querySelector('.skip').focus()")
    found = []
    for _ in range(13):
        found.append(
            page.run("document.activeElement.id || document.activeElement.className || document.activeElement.tagName")
        )
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") != "none", found
        page.press("Tab")
    assert found[:10] == [
        "skip", "new-chat", "title", "delete", "log", "small", "small regenerate", "colours", "message", "send",
    ]  # fmt: skip
    assert found[10:] == ["SUMMARY"] * 3


CONTRAST = """
(() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => numbers(colour).slice(0, 3).map((one) => one / 255)
        .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
        .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
    const ground = (element) => {
        const own = getComputedStyle(element).backgroundColor;
        return numbers(own)[3] === 0 ? ground(element.parentElement) : own;
    };
    const names = ["body", ".own", ".draft", ".assistant h2", ".meta", "#send", "#summary", "dt", ".assistant .draft"];
    return names.map((name) => {
        const element = document.querySelector(name);
        const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => x - y);
        return [name, (b + 0.05) / (a + 0.05)];
    });
})()
"""


def test_every_screen_has_room_and_every_colour_contrast(page: Tab) -> None:
    """Contrast of text: at least 4.5, as WCAG 2.2 asks (AA)."""
    ask(page, "x" * 200)
    page.until(IDLE)
    for scheme in ("light", "dark"):
        page.screen(1360, prefers_color_scheme=scheme)
        low = [(name, ratio) for name, ratio in page.run(CONTRAST) if ratio < 4.5]
        assert low == [], scheme
    dark = page.run("getComputedStyle(document.body).backgroundColor")
    page.screen(1360, prefers_color_scheme="light")
    assert page.run("getComputedStyle(document.body).backgroundColor") != dark
    for width in (390, 820, 1360, 2400):
        page.screen(width)
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("document.getElementById('send').getBoundingClientRect().right") <= width
    page.screen(390, prefers_reduced_motion="reduce")
    page.click("#open-panel")
    assert page.run("document.getElementById('panel').contains(document.activeElement)") is True
    page.press("Escape")
    assert page.run("document.activeElement.id") == "open-panel"
    page.run("document.querySelector('.assistant .text').classList.add('cursor')")
    moving = "getComputedStyle(document.querySelector('.cursor'), '::after').animationName"
    assert page.run(moving) == "none"
    page.screen(390, prefers_reduced_motion="no-preference")
    assert page.run(moving) == "blink"


def test_nothing_is_fetched_from_elsewhere_and_the_status_is_shown(page: Tab, relay: Relay, server: Role) -> None:
    page.until("document.querySelectorAll('.place').length === 1")
    shown = page.run("document.getElementById('status').innerText")
    assert "model this server, cpu" in shown
    assert "0–3" in shown
    here = (f"http://127.0.0.1:{relay.port}/", "data:")
    assert [url for url in page.requests if not url.startswith(here)] == []
    assert page.requests
    policy = httpx.get(f"http://127.0.0.1:{server.port}/").headers["content-security-policy"]
    assert "unsafe" not in policy
    page.run(INJECT)
    assert page.run("window.ran") is None
    assert any("Content Security Policy" in line for line in page.console), "the negative control: the browser says so"


INJECT = """
(() => {
    const script = document.createElement("script");
    script.textContent = "window.ran = 1";
    document.body.append(script);
})()
"""
HOSTILE = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'><b>bold</b>"


def test_what_a_model_writes_is_text(driver: Driver) -> None:
    """From a server that is not ours, without a policy of its own: nothing but the page's own care protects here."""
    fenced = ["Look:\n```html\n", "<i>code</i> & `more`\n", "```\nafter ", *HOSTILE]
    with foreign_server() as foreign:
        foreign.pieces = fenced
        tab = driver.tab()
        tab.open(foreign.url)
        tab.until("document.querySelectorAll('#settings option').length === 1")
        ask(tab, HOSTILE)
        tab.until(IDLE)
        tab.reload()
        assert tab.run("document.querySelector('.user .text').textContent") == HOSTILE
        assert tab.run("document.querySelector('.assistant pre').textContent") == "<i>code</i> & `more`\n"
        assert tab.run("[...document.querySelectorAll('.assistant .prose')].at(-1).textContent") == "after " + HOSTILE
        assert tab.run("document.querySelectorAll('main img, main b, main i, main script').length") == 0
        assert tab.run("window.ran") is None
        assert tab.run("document.querySelector('.meta span').textContent") == "finished"
        assert foreign.asked[0]["messages"] == [{"role": "user", "content": HOSTILE}]
        tab.ask("Page.close")


def test_the_page_is_one_file() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert ".innerHTML" not in text
    assert "eval(" not in text
    assert text.count("<script>") == text.count("<style>") == 1
    assert "https://" not in text
