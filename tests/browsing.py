"""The system's Chromium, for tests of pages."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

WAIT = 30_000
"""Milliseconds; a machine without a GPU draws in software."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "these tests need Chromium; Debian: apt install chromium"
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    software = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=[*software, *quiet])
        yield chromium
        chromium.close()
