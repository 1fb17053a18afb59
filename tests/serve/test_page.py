"""The page in a browser (headless Chromium): send, stream, stop, error, injection, keyboard, narrow screens.

With NANOCHAT_JAX_RUN=<workdir> of a run that has learned to answer, the page talks to that run, too, and with
NANOCHAT_JAX_SCREENSHOT=<file> a picture of this talk is saved.
"""
# ruff: noqa: E402 (without a browser the file is skipped before it imports more)

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
sync_api = pytest.importorskip("playwright.sync_api")

from serving import TOKENIZER, make_engine, served

from nanochat_jax.inference.schedule import Token

pytestmark = pytest.mark.interop
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
EVIL = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
ANSWERS = {
    "hello": "Hello! \u00e9\U0001f600 I am a small model.",
    "evil": EVIL,
    "code": "Reverse a string:\n```rust\nfn reverse(s: &str) -> String {\n    s.chars().rev().collect()\n}\n```\nIt works on characters.",
    "long": "word " * 400,
}  # fmt: skip


def scripted(made):
    """A model's thread that says what ANSWERS holds for the last message."""
    made.ready.set()
    while not made.closing.is_set():
        made.beat[0] = time.monotonic()
        if made.inbox.empty():
            time.sleep(0.01)
            continue
        job = made.inbox.get()
        text = TOKENIZER.decode(job.request.prompt).split("<|user_start|>")[-1].split("<|user_end|>")[0]
        ids, ended = TOKENIZER.encode(ANSWERS.get(text, text)), False
        for index in ids[: job.request.max_tokens]:
            time.sleep(0.004)
            if job.cancelled() or not job.emit(Token(index, -1.0, ())):
                ended = True
                break
        job.finish("cancelled" if ended else "stop", "")


@pytest.fixture(scope="module")
def browser():
    path = next((p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).exists()), None)
    if path is None:
        pytest.skip("no Chromium")
    with sync_api.sync_playwright() as play:
        launched = play.chromium.launch(executable_path=path, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def server():
    with served(make_engine(capacity=2600), work=scripted) as (made, port):
        yield made, port


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 360, "height": 640})
    made, problems = context.new_page(), []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    made.on("request", lambda r: problems.append(r.url) if "127.0.0.1" not in r.url else None)
    made.goto(f"http://127.0.0.1:{server[1]}/")
    made.set_default_timeout(30_000)
    sync_api.expect(made.locator("#model")).to_have_text("tiny", timeout=30_000)
    yield made
    context.close()
    assert [p for p in problems if "400" not in p] == []


def say(page, text, wait=True):
    page.fill("#input", text)
    page.keyboard.press("Enter")
    if wait:
        sync_api.expect(page.locator("#send")).to_be_enabled(timeout=30_000)


def grown(page, length, turn=0):
    """Wait until an answer has so many characters."""
    end = time.monotonic() + 30  # a loop here: the page's policy forbids scripts from elsewhere
    box = page.locator(".turn.assistant .text").nth(turn)
    while len(box.text_content()) <= length:
        assert time.monotonic() < end, "no text came"


def last(page):
    return page.locator(".turn.assistant .text").last


def test_send_and_stream(page):
    page.keyboard.type("hel")  # the message has the focus
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#input") == "hel\n"
    say(page, "hello")
    sync_api.expect(last(page)).to_have_text(ANSWERS["hello"])
    sync_api.expect(page.locator(".turn.user .text")).to_have_text("hello")
    say(page, "long", wait=False)
    grown(page, 20, turn=1)
    early = len(last(page).text_content())
    assert early < len(ANSWERS["long"]) and page.locator("#send").is_disabled()
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#send")).to_be_enabled()


def test_stop_takes_the_request_back(page, server):
    before = server[0].metrics.get("cancelled_total")
    say(page, "long", wait=False)
    grown(page, 20)
    page.click("#stop")
    sync_api.expect(page.locator("#stop")).to_be_disabled()
    assert 20 < len(last(page).text_content()) < len(ANSWERS["long"])
    assert page.locator(".turn.error").count() == 0
    end = time.monotonic() + 20
    while server[0].metrics.get("cancelled_total") == before:
        assert time.monotonic() < end
        time.sleep(0.02)
    page.click("#again")
    grown(page, 40)
    page.click("#clear")
    assert page.locator(".turn").count() == 0 and page.locator("#again").is_disabled()


def test_text_is_never_markup(page):
    say(page, "evil")
    assert last(page).text_content() == EVIL
    say(page, EVIL)
    assert page.locator("main img, main script").count() == 0 and page.title() == "nanochat_jax"


def test_an_error_is_shown_as_one(page):
    say(page, "x" * 3000)
    sync_api.expect(page.locator(".turn.error .text")).to_contain_text("the context has 2600")
    say(page, "hello")
    assert page.locator(".turn.error").count() == 2  # the long message still is in the conversation
    page.click("#clear")
    say(page, "hello")
    sync_api.expect(last(page)).to_have_text(ANSWERS["hello"])


def test_code_and_narrow_screens(page):
    say(page, "code")
    sync_api.expect(page.locator("pre")).to_contain_text("fn reverse(s: &str) -> String {")
    assert page.locator("pre").text_content().endswith("}\n")
    assert page.locator(".code button").text_content() == "Copy"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.get_attribute("#list", "aria-live") == "polite"


@pytest.mark.skipif("NANOCHAT_JAX_RUN" not in os.environ, reason="NANOCHAT_JAX_RUN names no run")
def test_a_trained_run_answers(browser, child_env):
    """The command of the README, a browser, two questions; the likeliest answers are the same each time."""
    words = ["serve", f"--workdir={os.environ['NANOCHAT_JAX_RUN']}", "--port=0"]
    command = [sys.executable, "-m", f"nanochat_jax.{words[0]}", *words[1:]]
    with subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0]
            context = browser.new_context(viewport={"width": 720, "height": 560})
            page = context.new_page()
            page.set_default_timeout(120_000)
            page.goto(address)
            page.click("summary")
            page.fill("#temperature", "0")
            page.click("summary")
            for question in ("Who are you?", "What is ownership?"):
                page.fill("#input", question)
                page.keyboard.press("Enter")
                sync_api.expect(page.locator("#send")).to_be_enabled(timeout=120_000)
                assert len(last(page).text_content()) > 10
            assert page.locator(".turn.error").count() == 0
            if path := os.environ.get("NANOCHAT_JAX_SCREENSHOT"):
                page.screenshot(path=path)
            context.close()
        finally:
            server.terminate()
        assert server.wait(60) == 0


def test_settings_are_sent(page):
    page.click("summary")
    page.fill("#temperature", "0.25")
    page.fill("#seed", "7")
    page.fill("#max_tokens", "5")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "hello")
    body = sent.value.post_data_json
    assert body["temperature"] == 0.25 and body["seed"] == 7 and body["max_tokens"] == 5 and body["stream"]
    sync_api.expect(last(page)).to_have_text("Hello")
    sync_api.expect(page.locator("#temperature-out")).to_have_text("0.25")


def test_the_conversation_is_kept_only_if_asked(page):
    say(page, "hello")
    page.reload()
    assert page.locator(".turn").count() == 0
    page.click("summary")
    page.check("#keep")
    say(page, "hello")
    page.reload()
    sync_api.expect(page.locator(".turn")).to_have_count(2)


def test_the_key_is_asked_for(browser):
    with served(make_engine(), work=scripted, api_key="right") as (_, port):
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        for key in ("wrong", "right"):
            page.locator("#key").wait_for(state="visible")
            page.fill("#key", key)
            page.keyboard.press("Enter")
        sync_api.expect(page.locator("#model")).to_have_text("tiny", timeout=30_000)
        page.close()
