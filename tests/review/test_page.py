"""The review page in a real browser."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from fedqc.config import load_site
from fedqc.curation.manifest import Overruled, read_manifest
from tests.browsing import WAIT, browser

pytestmark = pytest.mark.browser
__all__ = ["browser"]


class Server:
    """`fedqc review` as a process of its own."""

    def __init__(self, site: Path) -> None:
        command = [sys.executable, "-c", "from fedqc.cli import main; main()", "review", str(site)]
        self._process = subprocess.Popen(
            [*command, "--no-browser", "--by", "Dr. Doe"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdout is not None
        found = re.search(r"open (http://127\.0\.0\.1:\d+/#\S+)", self._process.stdout.readline())
        assert found
        self.address = found.group(1)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        self._process.send_signal(how)
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def server(site: Path) -> Iterator[Server]:
    started = Server(site)
    yield started
    if started._process.poll() is None:
        started.stop()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page with its first case drawn."""
    opened = opened_page(browser, server)
    yield opened
    assert errors_of[opened] == []
    opened.context.close()


TRY = """([address, method]) => {
    const body = method === "POST" ? JSON.stringify({ choice: "drop", reason: "", seen: "" }) : undefined;
    const asked = fetch(address, { method, body, mode: "no-cors", credentials: "include" });
    return asked.then(() => "answered", () => "refused");
}"""


class Blank(BaseHTTPRequestHandler):
    """An empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


errors_of: dict[Page, list[str]] = {}


def opened_page(browser: Browser, server: Server) -> Page:
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    errors_of[page] = []
    page.on("pageerror", lambda error: errors_of[page].append(str(error)))
    page.on("console", lambda said: errors_of[page].append(said.text) if said.type == "error" else None)
    page.goto(server.address)
    page.wait_for_selector("body[data-ready='0']", timeout=WAIT)
    return page


def overruled(site: Path) -> dict[str, Overruled]:
    manifest = read_manifest(load_site(site).results / "manifest.json")
    return {entry.id: entry.overruled for entry in manifest.entries if entry.overruled}


def test_the_first_case_is_drawn_with_its_label_and_errors(page: Page) -> None:
    expect(page.locator("#name")).to_have_text("near")
    expect(page.locator("#verdict")).to_contain_text("to decide: predicted DSC 0.780 is in the review band")
    expect(page.locator("#diagnosis")).to_be_empty()
    expect(page.locator("#warnings")).to_contain_text("scanner 'old'")
    assert "#" not in page.url
    with_all = page.locator("#viewer").screenshot()
    page.keyboard.press("e")
    without_errors = page.locator("#viewer").screenshot()
    page.keyboard.press("l")
    image_alone = page.locator("#viewer").screenshot()
    assert len({with_all, without_errors, image_alone}) == 3
    page.keyboard.press("l")
    page.keyboard.press("e")
    assert page.locator("#viewer").screenshot() == with_all
    page.keyboard.press("o")
    assert page.locator("#viewer").screenshot() != with_all


def test_what_is_probably_wrong_is_said_beside_the_case(page: Page) -> None:
    page.locator("#cases").get_by_text("bad").click()
    expect(page.locator("#diagnosis")).to_contain_text("Probably: moved by 2.0 mm to the left; to mend it")
    page.locator("#cases").get_by_text("good").click()
    expect(page.locator("#diagnosis")).to_be_empty()


def test_scrolling_goes_through_the_volume(page: Page) -> None:
    before = page.locator("#viewer").screenshot()
    box = page.locator("#viewer").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.wheel(0, 240)
    page.wait_for_timeout(300)
    assert page.locator("#viewer").screenshot() != before


def test_a_case_is_overruled_and_survives_a_kill(
    page: Page, server: Server, site: Path, browser: Browser
) -> None:
    page.locator("#cases button", has_text="bad").click()
    page.wait_for_selector("body[data-ready='3']", timeout=WAIT)
    page.locator("#reason").fill("k is typed here, not pressed")
    assert overruled(site) == {}
    page.locator("#name").click()
    page.keyboard.press("k")
    expect(page.locator("#saved")).to_have_text("saved: kept")
    assert overruled(site)["bad"].reason == "k is typed here, not pressed"
    server.stop(signal.SIGKILL)
    errors_of[page].clear()
    page.keyboard.press("d")
    expect(page.locator("#saved")).to_contain_text("not saved")
    errors_of[page].clear()  # the server is gone, and the browser says so
    again = Server(site)
    try:
        reopened = opened_page(browser, again)
        line = reopened.locator("#cases button", has_text="bad")
        expect(line).to_contain_text("kept")
        expect(line).to_contain_text("by Dr. Doe")
        expect(reopened.locator("#progress")).to_have_text("1 of 4 decided by a person")
        line.click()
        expect(reopened.locator("#reason")).to_have_value("k is typed here, not pressed")
        reopened.locator("#rule").click()
        expect(reopened.locator("#saved")).to_have_text("saved: as the rule says")
        assert overruled(site) == {}
        reopened.context.close()
    finally:
        again.stop()


def test_keys_go_from_case_to_case(page: Page) -> None:
    page.keyboard.press("n")
    page.wait_for_selector("body[data-ready='1']", timeout=WAIT)
    expect(page.locator("#name")).to_have_text("<b>odd</b> & 'case'")  # a name is text, never markup
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("body[data-ready='0']", timeout=WAIT)
    page.locator("#filters button", has_text="dropped").click()
    expect(page.locator("#cases li")).to_have_count(2)
    page.keyboard.press("n")
    page.wait_for_selector("body[data-ready='1']", timeout=WAIT)


def test_another_modality_is_shown(page: Page) -> None:
    with page.expect_request(re.compile(r"/volumes/t2\.nii\.gz")):
        page.locator("#modality").select_option("t2")


def test_the_error_map_of_a_class_is_chosen(page: Page) -> None:
    choice = page.locator("#error-map")
    expect(choice).to_be_hidden()  # there is one map
    page.locator("#cases button", has_text="good").click()
    page.wait_for_selector("body[data-ready='2']", timeout=WAIT)
    expect(choice.locator("option")).to_have_text(["all classes", "rim"])
    of_all = page.locator("#viewer").screenshot()
    with page.expect_response(re.compile(r"/volumes/errors-rim\.nii\.gz")):
        page.keyboard.press("c")
    expect(choice).to_have_value("errors-rim")
    expect(page.locator("#loading")).to_be_hidden()
    assert page.locator("#viewer").screenshot() != of_all
    choice.select_option("errors")
    expect(page.locator("#loading")).to_be_hidden()
    page.wait_for_timeout(300)
    assert page.locator("#viewer").screenshot() == of_all


def test_planes_are_enlarged_around_the_cross(page: Page) -> None:
    viewer = page.locator("#viewer")
    whole = viewer.screenshot()
    page.keyboard.press("+")
    page.wait_for_timeout(300)
    enlarged = viewer.screenshot()
    assert enlarged != whole
    page.keyboard.press("0")
    page.wait_for_timeout(300)
    assert viewer.screenshot() == whole
    box = viewer.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -120)
    page.keyboard.up("Control")
    page.wait_for_timeout(300)
    assert viewer.screenshot() not in {whole, enlarged}
    page.keyboard.press("n")
    page.wait_for_selector("body[data-ready='1']", timeout=WAIT)
    page.keyboard.press("p")
    page.wait_for_selector("body[data-ready='0']", timeout=WAIT)
    assert viewer.screenshot() == whole  # a case is seen whole first


def test_fast_steps_never_mix_two_cases(page: Page) -> None:
    for key in "nnpnnppn":
        page.keyboard.press(key)
    page.wait_for_selector("body[data-ready='2']", timeout=WAIT)
    expect(page.locator("#name")).to_have_text("good")
    expect(page.locator("#keep")).to_be_enabled()
    once = page.locator("#viewer").screenshot()
    page.reload()
    page.wait_for_selector("body[data-ready='0']", timeout=WAIT)
    page.locator("#cases button", has_text="good").click()
    page.wait_for_selector("body[data-ready='2']", timeout=WAIT)
    assert page.locator("#viewer").screenshot() == once


def test_a_reason_waits_with_its_case_and_typing_decides_nothing(page: Page, site: Path) -> None:
    box = page.locator("#viewer").bounding_box()
    assert box is not None
    page.locator("#reason").click()
    page.keyboard.type("d")
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.wheel(0, 240)
    page.keyboard.type("ropped, looks odd")
    expect(page.locator("#reason")).to_have_value("dropped, looks odd")
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    page.wait_for_selector("body[data-ready='1']", timeout=WAIT)
    expect(page.locator("#reason")).to_have_value("")
    page.keyboard.press("p")
    page.wait_for_selector("body[data-ready='0']", timeout=WAIT)
    expect(page.locator("#reason")).to_have_value("dropped, looks odd")
    assert overruled(site) == {}


def test_a_file_that_is_gone_leaves_the_rest(page: Page, site: Path) -> None:
    (site.parent / "data" / "0-label.nii.gz").unlink()
    page.locator("#cases button", has_text="good").click()
    page.wait_for_selector("body[data-ready='2']", timeout=WAIT)
    expect(page.locator("#loading")).to_contain_text("not shown: label (")
    expect(page.locator("#loading")).to_contain_text("0-label.nii.gz: No such file")
    expect(page.locator("#viewer")).to_be_visible()
    errors_of[page].clear()  # the browser says that a file was not found


def test_a_decision_about_what_was_scored_anew_is_not_saved(page: Page, site: Path) -> None:
    path = load_site(site).results / "manifest.json"
    path.write_text(path.read_text().replace("2026-03-01T12:30", "2026-03-05T12:30"))
    page.keyboard.press("k")
    expect(page.locator("#saved")).to_contain_text("not saved: near: the site has scored its cases anew")
    expect(page.locator("#cases button", has_text="near")).to_contain_text("not saved")
    assert overruled(site) == {}
    errors_of[page].clear()


def test_another_page_gets_nothing(page: Page, server: Server, site: Path, browser: Browser) -> None:
    """A page of another port: to the browser the same site, so that the cookie goes with its requests."""
    home = server.address.partition("/#")[0]
    elsewhere = HTTPServer(("127.0.0.1", 0), Blank)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    try:
        other = page.context.new_page()
        other.goto(f"http://127.0.0.1:{elsewhere.server_port}/")
        for path, method in (("/api/worklist", "GET"), ("/api/cases/0/decision", "POST")):
            assert other.evaluate(TRY, [home + path, method]) == "refused"
    finally:
        elsewhere.shutdown()
        elsewhere.server_close()
    assert overruled(site) == {}


def test_the_address_works_once(page: Page, server: Server, browser: Browser) -> None:
    stranger = browser.new_context().new_page()
    stranger.goto(server.address)
    expect(stranger.locator("#saved")).to_contain_text("this address was used already")
    stranger.goto(server.address.partition("#")[0])
    expect(stranger.locator("#saved")).to_contain_text("open the address that the command printed")
    expect(stranger.locator("#cases li")).to_have_count(0)
    stranger.context.close()
