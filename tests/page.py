#!/usr/bin/env python3
"""The page at / in a real browser: Debian's chromium, headless, driven by playwright.

    pip install playwright
    python tests/page.py target/debug/strata [--browser /usr/bin/chromium] [--screenshots DIR] [--only NAME]

Starts `strata serve` with the demonstration model on a free port, and checks: a chat is answered and says what was
cached, an answer can be stopped, a conversation forked, a document dropped, watched and asked; all of it by keyboard
alone; no horizontal scrolling at 360 pixels; the dark colours; a server with a key; that what a model or a user says
is never markup; no error in the console and no request to another host.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import time

from playwright.sync_api import expect, sync_playwright

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 120_000  # milliseconds: machines that test are busy


class Server:
    """A server of its own for a test."""

    def __init__(self, strata, *options):
        sizes = ["--memory", "256MiB", "--context", "16384", "--max-sequences", "4"]
        command = [strata, "serve", "--port", "0", "--json", *sizes, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit("the server did not start")
        self.url = json.loads(line)["url"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Watched:
    """A page whose console and requests are noted."""

    def __init__(self, browser, url, **options):
        self.url = url
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.faults = []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.faults.append(m.text))
        self.page.on("pageerror", lambda e: self.faults.append(str(e)))
        self.page.on("request", self.requested)

    def requested(self, request):
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.faults.append(f"a request to {request.url}")

    def done(self):
        assert not self.faults, self.faults
        self.context.close()


def answered(page, number):
    """Waits for the end of the answer that is message `number`, from 0; its element."""
    item = page.locator("#messages > li").nth(number)
    expect(item).to_have_class(re.compile("assistant"), timeout=PATIENCE)
    expect(page.locator("#send")).to_be_visible(timeout=PATIENCE)
    assert item.locator(".error").count() == 0, item.inner_text()
    return item


def limit(page, tokens):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_role("button", name="Done").click()


def chats(w, shoot):
    page = w.page
    page.goto(w.url)
    expect(page.locator("#pulse")).to_have_text(re.compile("ready|tokens"))
    shoot(page, "welcome")
    limit(page, 24)
    field = page.get_by_role("textbox", name="Message")
    # What looks like markup is text.
    field.fill("Where does Mara live? <img src=x onerror=alert(1)><script>alert(2)</script>")
    field.press("Enter")
    first = answered(page, 1)
    assert page.locator("#messages img, #messages script").count() == 0
    assert first.locator(".words").inner_text().strip()
    expect(first.locator(".cost summary")).to_contain_text("tokens")
    field.fill("And what does she do?")
    field.press("Enter")
    second = answered(page, 3)
    summary = second.locator(".cost summary")
    expect(summary).to_contain_text("from memory")
    summary.click()
    expect(second.locator(".cost p")).to_contain_text("came from memory")
    expect(page.locator("#decisions li").nth(1)).to_be_visible()
    shoot(page, "chat")
    # Regenerated, it takes the place of the last.
    second.get_by_role("button", name="Answer again").click()
    answered(page, 3)
    expect(page.locator("#messages > li")).to_have_count(4)
    # A fork holds what was said up to there.
    first = page.locator("#messages > li").nth(1)
    first.get_by_role("button", name="Fork at message 2").click()
    expect(page.locator("#talks > li")).to_have_count(2)
    expect(page.locator("#messages > li")).to_have_count(2)
    field.fill("Who is her neighbour?")
    field.press("Enter")
    answered(page, 3)
    shoot(page, "fork")
    # An answer that is long is stopped.
    limit(page, 4000)
    page.get_by_role("button", name="New", exact=True).click()
    field.fill("Tell me a long story.")
    field.press("Enter")
    stop = page.locator("#stop")
    if stop.is_visible():
        page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    # Kept over a reload.
    page.reload()
    expect(page.locator("#talks > li")).to_have_count(3)
    # JSON by a schema, if the server holds to it.
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("The answer is").select_option("json_schema")
    page.get_by_label("JSON schema", exact=True).fill('{"enum": [{"city": "Oslo"}]}')
    page.get_by_label("Most tokens").fill("60")
    shoot(page, "settings")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="New", exact=True).click()
    field.fill("Which city?")
    field.press("Enter")
    said = answered(page, 1).locator(".words").inner_text()
    assert re.sub(r"\s", "", said) == '{"city":"Oslo"}', said


def document():
    text = (ROOT / "model-cards/demo/sample.md").read_text()
    return {"name": "sample.md", "mimeType": "text/markdown", "buffer": text.encode()}


def reads(w, shoot):
    page = w.page
    page.goto(w.url)
    page.locator("#file").set_input_files(document())
    item = page.locator("#shelf > li").first
    expect(item.locator("h3")).to_have_text("sample.md")
    for _ in range(100):
        if item.locator("progress").is_visible():
            shoot(page, "reading")
            break
        time.sleep(0.02)
    expect(item.locator("p").first).to_contain_text("Read:", timeout=PATIENCE)
    limit(page, 24)
    item.get_by_role("button", name="Ask about sample.md").click()
    expect(page.locator("#about")).to_contain_text("sample.md")
    page.keyboard.type("Where does Mara live?")
    page.keyboard.press("Enter")
    first = answered(page, 1)
    expect(first.locator(".cost summary")).to_contain_text("from memory")
    # A file that is dropped anywhere is read; here it is the same and known.
    data = page.evaluate_handle(
        "text => { const t = new DataTransfer(); t.items.add(new File([text], 'notes.txt', {type: 'text/plain'})); return t; }",
        "Mara lives in Oslo. " * 40,
    )
    page.dispatch_event("#layout", "drop", {"dataTransfer": data})
    expect(page.locator("#shelf > li")).to_have_count(2)
    expect(page.locator("#shelf > li").nth(1).locator("p").first).to_contain_text("Read:")
    time.sleep(2)
    shoot(page, "documents")
    page.get_by_role("button", name="Delete notes.txt").click()
    expect(page.locator("#shelf > li")).to_have_count(1)


def by_keyboard(w, shoot):
    """No mouse: what is focused is what is typed at and pressed."""
    page = w.page
    page.goto(w.url)
    focused = lambda: page.evaluate("document.activeElement.id || document.activeElement.textContent")
    assert focused() == "message", focused()
    page.keyboard.type("Where does Mara live?")
    page.keyboard.press("Enter")
    page.wait_for_timeout(100)
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    # Everything can be reached, in the order of the page, and shows that it is.
    page.evaluate("document.activeElement.blur(); document.body.focus()")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = focused()
        if name in reached and name == reached[0]:
            break
        reached.append(name)
        if page.evaluate("document.activeElement !== document.body && document.activeElement.id !== 'message'"):
            seen = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert seen != "none", f"{name} does not show its focus"
    for wanted in ["open-settings", "open-help", "new-talk", "message", "choose"]:
        assert wanted in reached, (wanted, reached)
    # Shortcuts, outside of fields.
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    shoot(page, "keyboard")
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    page.keyboard.press("s")
    expect(page.locator("#settings")).to_be_visible()
    page.get_by_label("Temperature").focus()
    page.keyboard.type("0")
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("n")
    assert focused() == "message"
    page.keyboard.type("n/s?")  # no shortcuts within a text
    expect(page.locator("#message")).to_have_value("n/s?")
    # A document: the button opens the browser's own dialog.
    page.locator("#choose").focus()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(document())
    ask = page.get_by_role("button", name="Ask about sample.md").first
    expect(ask).to_be_enabled()
    ask.focus()
    page.keyboard.press("Enter")
    assert focused() == "message"
    expect(page.locator("#about")).to_be_visible()


def narrow(w, shoot):
    page = w.page
    page.goto(w.url)
    expect(page.locator("#pulse")).to_have_text(re.compile("ready|tokens"))
    limit(page, 24)
    page.get_by_role("textbox", name="Message").fill("Where does Mara live? " + "x" * 300)
    page.locator("#send").click()
    answered(page, 1)
    for view in ["chat", "documents", "memory"]:
        page.locator(f".views button[data-view={view}]").click()
        page.wait_for_timeout(1200)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, f"{view}: {wide} pixels wide"
        out = page.evaluate(
            "[...document.querySelectorAll('button, input, textarea, canvas, p, h2, h3')]"
            ".filter(e => e.checkVisibility() && !e.closest('.unseen, .talks, dialog, .skip') && !e.matches('.unseen')"
            " && e.getBoundingClientRect().right > 361).map(e => e.outerHTML.slice(0, 80))"
        )
        assert not out, out
        small = page.evaluate(
            "[...document.querySelectorAll('button')].filter(e => e.checkVisibility()"
            " && e.getBoundingClientRect().height < 24).map(e => e.textContent)"
        )
        assert not small, small
        shoot(page, f"phone-{view}")


def with_key(w, shoot):
    page = w.page
    page.goto(w.url)
    expect(page.locator("#key")).to_be_visible()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_visible()
    shoot(page, "key")
    page.get_by_label("Key", exact=True).fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_hidden()
    expect(page.locator("#pulse")).to_have_text("ready")
    # What the browser says of a 401 is no fault of the page's.
    w.faults = [fault for fault in w.faults if "401" not in fault]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strata")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--screenshots", type=pathlib.Path)
    parser.add_argument("--only")
    options = parser.parse_args()

    def shoot(page, name):
        if options.screenshots:
            options.screenshots.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=options.screenshots / f"{name}.png")

    wide = {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"}
    dark = {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"}
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "device_scale_factor": 2}
    runs = [
        (chats, wide, []),
        (reads, dark, []),
        (by_keyboard, wide, []),
        (narrow, phone, []),
        (with_key, wide, ["--api-key", "secret"]),
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        for run, size, more in runs:
            if options.only and run.__name__ != options.only:
                continue
            with Server(options.strata, *more) as server:
                watched = Watched(browser, server.url, **size)
                try:
                    run(watched, shoot)
                except Exception:
                    shoot(watched.page, f"failed-{run.__name__}")
                    print(run.__name__, "failed; the page said", watched.faults, file=sys.stderr)
                    raise
                watched.done()
                print(run.__name__, "holds")
        browser.close()


if __name__ == "__main__":
    main()
