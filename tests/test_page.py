"""The page at `/`: what it is made of, and what it does in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from chat_models import chat_file, user
from servers import client_of, metric, running, until
from squat.engine import Engine
from squat.serving.app import Limits
from squat.serving.server import service_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
HTML = "<img src=x onerror=\"document.title='gone'\"><b>bold</b>"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_file(tmp_path_factory.mktemp("page") / "tiny.gguf", activations="4:8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab, in which nothing may go wrong unseen."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if "Security" in m.text else None)
    page.set_default_timeout(60_000)
    yield page
    context.close()
    assert problems == []


def ask(page: Any, text: str) -> Any:
    """The answer to a message, once it is there."""
    count = page.locator(".assistant").count()
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    answer = page.locator(".assistant").nth(count)
    answer.locator(".note").first.wait_for()
    return answer


def test_it_is_one_file_that_reaches_for_nothing(file: Path) -> None:
    http = TestClient(service_of(str(file), "k", Limits()).app())
    answer = http.get("/")  # without a key, for which it asks
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://|//cdn|innerHTML|src=|@import|url\(", answer.text)
    assert http.get("/info").status_code == 401
    told = http.get("/info", headers={"Authorization": "Bearer k"}).json()
    info = Engine(file).info
    assert (told["model"], told["chat"], told["token_widths"]) == ("tiny", True, True)
    assert (told["kernels"], told["context"]) == (info.kernels, info.context)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_tells_the_widths_of_its_tokens(file: Path, stream: bool) -> None:
    engine, messages = Engine(file, threads=1), [user("Hi")]
    with running(file) as url:
        answer: Any = client_of(url).chat.completions.create(
            model="tiny", messages=messages, max_tokens=6, temperature=0, stream=stream,
            extra_body={"token_widths": True},
        )  # fmt: skip
        choice = list(answer)[-1].choices[0] if stream else answer.choices[0]
    engine.chat(messages, 6)
    widths = engine.widths()
    assert widths is not None
    told = choice.token_widths
    assert told["layers"] == engine.info.layers
    assert [token["wide"] for token in told["tokens"]] == (widths == 8).sum(axis=0).tolist()
    texts = [
        engine.token_bytes(token).decode(errors="replace") or engine.tokenizer.id_to_token(token)
        for token in engine.tokens  # the answer's last one was not read
    ]
    assert [token["text"] for token in told["tokens"]] == texts
    assert "".join(texts).startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_of_one_width_there_is_nothing_to_tell(tmp_path: Path) -> None:
    file = chat_file(tmp_path / "one.gguf", activations="8")
    http = TestClient(service_of(str(file), None, Limits()).app())
    assert http.get("/info").json()["token_widths"] is False
    body = {"prompt": "a", "max_tokens": 3, "token_widths": True}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["token_widths"] is None
    del body["token_widths"]
    assert "token_widths" not in http.post("/v1/completions", json=body).json()["choices"][0]


@in_browser
def test_one_can_talk_with_the_model(page: Any, file: Path) -> None:
    engine = Engine(file, threads=1)
    with running(file) as url:
        page.goto(url)
        page.get_by_role("heading", name="tiny").wait_for()
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("12")
        page.get_by_label("Seed").fill("7")
        messages = [{"role": "system", "content": "Be brief."}]
        for text in ("Hello!", HTML):
            messages.append(user(text))
            answer = ask(page, text)
            said = engine.chat(messages, 12)
            assert answer.locator(".text").text_content() == said
            messages.append({"role": "assistant", "content": said})
            note = answer.locator(".note").first.text_content()
            assert re.search(r"[\d.]+ tokens/s · 12 tokens · prompt \d+", note)
        assert "reused" in note
        assert page.locator(".user .text").nth(1).text_content() == HTML  # text stays text
        assert page.locator("#log img, #log b").count() == 0
        assert page.title() == "tiny · Squat"
        for kernel in engine.info.kernels.values():
            assert kernel.split(":")[0] in page.locator("#engine").text_content()

        answer.get_by_text("Which tokens had 8 bits").click()
        widths = engine.widths()
        assert widths is not None
        wide = (widths == 8).sum(axis=0).tolist()
        shown = answer.get_by_role("listitem").evaluate_all("all => all.map(one => one.title)")
        assert shown == [f"8 bits in {n} of {len(widths)} layers" for n in wide]

        page.get_by_role("button", name="New").click()
        assert page.locator(".message").count() == 0
        assert ask(page, "Hello!").locator(".text").text_content() == engine.chat(
            [messages[0], user("Hello!")], 12
        )


@in_browser
def test_it_asks_for_the_key_and_says_what_is_wrong(page: Any, file: Path) -> None:
    with running(file, "k") as url:
        page.goto(url)
        for key in ("wrong", "k"):
            page.get_by_label("Key", exact=True).fill(key)
            page.get_by_role("button", name="Enter").click()
        page.get_by_role("heading", name="tiny").wait_for()
        page.get_by_label("Max tokens").fill("3")
        ask(page, "Hello!")
        page.get_by_label("Message").fill("word " * 600)
        page.keyboard.press("Enter")
        page.get_by_role("alert").wait_for()
        assert "context is 512; shorten it" in page.get_by_role("alert").text_content()
        assert page.locator(".message").count() == 2  # what was not answered can be changed
        assert page.get_by_label("Message").input_value().startswith("word word")
        ask(page, "Hi")
        page.get_by_label("Temperature").fill("9")
        page.get_by_label("Message").fill("Hi")
        page.keyboard.press("Enter")
        assert page.locator(".message").count() == 4


@in_browser
def test_an_answer_can_be_stopped(page: Any, tmp_path: Path) -> None:
    file = chat_file(tmp_path / "long.gguf", ends=False, context=60_000)
    with running(file) as url:
        page.goto(url)
        page.get_by_role("heading", name="long").wait_for()
        page.get_by_label("Message").fill("Hello!")
        page.keyboard.press("Enter")
        until(lambda: len(page.locator(".assistant .text").text_content()) > 20)
        page.keyboard.press("Escape")
        page.locator(".assistant .note", has_text="stopped").wait_for()
        until(lambda: metric(url, "squat_clients") == 0)
        assert page.get_by_text("All tokens have one width in this model.").count() == 1


@pytest.mark.slow
@in_browser
def test_a_model_without_a_template_goes_on_with_a_text(page: Any, tmp_path: Path) -> None:
    file = chat_file(tmp_path / "base.gguf", template=None)
    with running(file) as url:
        page.goto(url)
        page.get_by_text("it goes on with what you write").wait_for()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("9")
        answer = ask(page, "Once upon")
        assert answer.locator(".text").text_content() == Engine(file).generate("Once upon", 9)


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1200])
def test_it_fits_the_window(
    browser: Any, file: Path, tmp_path: Path, width: int, scheme: Any
) -> None:
    name = "A-model-with-a-rather-long-name-135M-Instruct"
    file = Path(shutil.copy(file, tmp_path / f"{name}.gguf"))
    context = browser.new_context(
        viewport={"width": width, "height": 740}, color_scheme=scheme, has_touch=width < 500
    )
    page = context.new_page()
    with running(file) as url:
        page.goto(url)
        page.get_by_role("heading", name=name).wait_for()
        if width <= 768:
            page.get_by_role("button", name="Settings").click()
        page.get_by_label("Max tokens").fill("20")
        if width <= 768:
            page.get_by_role("button", name="Settings").click()
            assert not page.get_by_label("Max tokens").is_visible()
        ask(page, "W" * 300).get_by_text("Which tokens had 8 bits").click()
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.evaluate("document.documentElement.scrollHeight - innerHeight") <= 0
        assert page.get_by_role("button", name="Send").is_visible()
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 26, 32)"
        assert dark == (scheme == "dark")
    context.close()
