"""The coordinator's live page in a real browser."""

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from fedqc_server.live import live_page
from playwright.sync_api import Browser, expect

from tests.browsing import WAIT, browser

__all__ = ["browser"]
pytestmark = pytest.mark.browser


def write(folder: Path, done: list[str], *events: Mapping[str, object]) -> None:
    """What a run adds to its folder."""
    record = {
        "federation": "alps",
        "started": "2026-03-01T12:00:00+00:00",
        "outcome": "running",
        "done": done,
    }
    (folder / "run.json").write_text(json.dumps(record | {"sites": {"joined": ["north", "south"]}}))
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"time": "2026-03-01T12:00:10.000+00:00", **event}) + "\n" for event in events
        )


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    write(
        tmp_path,
        [],
        *({"event": "site-joined", "phase": "handshake", "site": name} for name in ("north", "<b>")),
    )
    told: list[str] = []
    is_there = threading.Event()

    def opened(address: str) -> None:
        told.append(address)
        is_there.set()

    with live_page(tmp_path, 0, opened):
        assert is_there.wait(10)
        yield told[0]


def test_the_run_is_seen_as_it_goes_on(browser: Browser, address: str, tmp_path: Path) -> None:
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.goto(address)
    expect(page.locator("#name")).to_have_text("alps", timeout=WAIT)
    expect(page.locator("#sites tr")).to_have_count(2)
    expect(page.locator("#sites")).to_contain_text("<b>")  # a name is text, never markup
    terms = {"phase": "train.qc", "stage": "qc", "rounds": 4}
    write(
        tmp_path,
        ["handshake"],
        {"event": "phase-started", "phase": "train.qc"},
        *(
            {"event": name, **terms, "round": number, "loss": 1 / number}
            for number in (1, 2)
            for name in ("round-started", "round-finished")
        ),
        {"event": "site-failed", "phase": "train.qc", "site": "north", "reason": "late"},
    )
    expect(page.locator("#training")).to_contain_text("QC model: 2 of 4 rounds are done", timeout=WAIT)
    expect(page.locator("#phases .now")).to_have_text("train.qc")
    expect(page.locator("#curves polyline")).to_have_count(1)
    expect(page.locator("#sites tr", has_text="north")).to_contain_text("no answer came before the deadline")
    report = page.frame_locator("#pages")
    expect(report.locator("h1")).to_have_text("fedqc: alps", timeout=WAIT)
    assert errors == []


def test_the_address_works_once(browser: Browser, address: str) -> None:
    first, second = (browser.new_context().new_page() for _ in range(2))
    first.goto(address)
    expect(first.locator("#name")).to_have_text("alps", timeout=WAIT)
    second.goto(address)
    expect(second.locator("#state")).to_contain_text(
        "open the address that the command printed", timeout=WAIT
    )
    expect(second.locator("#name")).to_have_text("fedqc")
