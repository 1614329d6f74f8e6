"""How fast the review page is in a browser, at a site with many candidates.

    python -m fedqc_simulations.benchmarks.review_speed [--cases 1000] [--grids small glioma] [--steps 20]

The site's volumes are phantoms with labels and error maps, written as hospitals have them: gzipped NIfTI,
images in int16. A few are made, and all cases are links to them. `fedqc review` runs as a process of its own,
and the page in the Chromium of this machine, without a window; without a GPU it draws in software.

Times are taken in the page:

- page: from the navigation until the list of all cases, and what is known of the first one, can be seen;
- first image: from the navigation until that one is drawn, and its pixels can be read back;
- next case: from the key `N` until the next one is drawn, while somebody looks at each for a few seconds;
- next case at once: the same, with `N` pressed again as soon as a case is drawn.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import tomli_w
from playwright.sync_api import Page, sync_playwright
from scipy import ndimage

from fedqc.cases.volumes import sha256_file, write_volume
from fedqc.config import CurationConfig
from fedqc.curation.manifest import MANIFEST, Entry, InputFile, Manifest, UsedModel, UsedRule, write_manifest
from fedqc.curation.rules import ThresholdRule
from fedqc.scoring import ERROR_MAPS
from fedqc.seeding import generator
from fedqc_simulations.levels import Grid
from fedqc_simulations.pathology import TUMOUR
from fedqc_simulations.phantoms import draw_scanner, make_phantom

GRIDS = {"small": Grid((64, 76, 64), 2.5), "glioma": Grid((240, 240, 155), 1.0)}
GOALS = {"page": 1.0, "next case": 0.3}
"""Seconds."""
N_PHANTOMS = 4
WAIT = 120_000  # milliseconds

LISTED = """
const look = () => {
  if (document.querySelector("#cases li") && document.querySelector("#name")?.textContent) {
    requestAnimationFrame(() => { window.listed = performance.now(); });  // the frame after it
  } else requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""
"""Runs before the page does."""
DRAWN = """
const drawn = (number) => new Promise((done) => {
  const look = () => {
    if (document.body.dataset.ready !== String(number)) return requestAnimationFrame(look);
    // Reading a pixel waits until everything is drawn.
    const gl = document.getElementById("viewer").getContext("webgl2");
    gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4));
    requestAnimationFrame(() => done(performance.now()));
  };
  look();
});
"""
FIRST = f"() => {{ {DRAWN} return drawn(0).then((end) => [window.listed, end]); }}"
"""Milliseconds since the navigation began."""
NEXT = f"""(number) => {{
  {DRAWN}
  const begin = performance.now();
  window.dispatchEvent(new KeyboardEvent("keydown", {{ key: "n" }}));
  return drawn(number).then((end) => end - begin);
}}"""


def main() -> None:
    """Print the figures of each grid as a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--visits", type=int, default=5, help="how often the page is opened")
    parser.add_argument("--steps", type=int, default=20, help="how many cases are looked at")
    parser.add_argument("--looking", type=float, default=3.0, help="seconds that somebody looks at a case")
    options = parser.parse_args()
    print("| grid | what | median | worst | goal |\n|---|---|---|---|---|")
    for name in options.grids:
        with tempfile.TemporaryDirectory() as folder:
            site = write_site(Path(folder), GRIDS[name], options.cases)
            shape = "x".join(map(str, GRIDS[name].shape))
            for what, seconds in measure(site, options.visits, options.steps, options.looking).items():
                goal = f"{GOALS[what]:g} s" if what in GOALS else ""
                print(
                    f"| {shape} | {what} | {median(seconds):.2f} s | {max(seconds):.2f} s | {goal} |",
                    flush=True,
                )


def write_site(folder: Path, grid: Grid, cases: int) -> Path:
    """Write a site with scored candidates, and return its `site.toml`."""
    data, maps = folder / "data", folder / "results" / ERROR_MAPS
    data.mkdir()
    maps.mkdir(parents=True)
    files = []
    for number in range(N_PHANTOMS):
        rng = generator(0, "review-speed", number)
        kind = replace(TUMOUR, grid=grid)
        phantom = make_phantom(rng, draw_scanner(rng, kind), kind)
        volumes = dict(zip(kind.modalities, np.rint(phantom.image).astype(np.int16), strict=True))
        paths = {}
        for role, volume in [*volumes.items(), ("label", phantom.label)]:
            path = f"{number}-{role}.nii.gz"
            write_volume(data / path, volume, phantom.affine)
            paths[role] = InputFile(path=path, sha256=sha256_file(data / path))
        # Surest at the label's rim, and fading away from it.
        rim = ndimage.gaussian_gradient_magnitude((phantom.label > 0).astype(np.float32), 3 / grid.spacing)
        write_volume(
            maps / f"of-{number}.nii.gz", np.rint(95 * rim / rim.max()).astype(np.uint8), phantom.affine
        )
        files.append(paths)
    qualities = {f"case-{number:04d}": 0.1 + 0.85 * number / cases for number in range(cases)}
    decisions = ThresholdRule(0.75, 0.05).decide(qualities)
    for number, case in enumerate(qualities):
        os.link(maps / f"of-{number % N_PHANTOMS}.nii.gz", maps / f"{case}.nii.gz")
    manifest = Manifest(
        site="speed",
        federation="speed",
        task=TUMOUR.task,
        created="2026-01-01T00:00:00+00:00",
        model=UsedModel(method="qcresunet", sha256="0" * 64, fedqc="0.1.0"),
        rule=UsedRule(config=CurationConfig(review=0.05)),
        entries=tuple(
            Entry(
                id=case,
                patient=case,
                quality=quality,
                regions={"whole-tumour": quality},
                decision=decisions[case].outcome,
                reason=decisions[case].reason,
                files=files[number % N_PHANTOMS],
            )
            for number, (case, quality) in enumerate(qualities.items())
        ),
    )
    write_manifest(folder / "results" / MANIFEST, manifest)
    site = folder / "site.toml"
    settings = {"name": "speed", "task": TUMOUR.task, "data": {"path": "data"}}
    site.write_text(tomli_w.dumps(settings), encoding="utf-8")
    return site


def measure(site: Path, visits: int, steps: int, looking: float) -> dict[str, list[float]]:
    """Seconds of each measurement, by what was measured."""
    found: dict[str, list[float]] = {"page": [], "first image": [], "next case": [], "next case at once": []}
    with _served(site) as address, _browser_page() as page:
        page.add_init_script(LISTED)
        for visit in range(visits):
            if visit == 0:
                page.goto(address)
            else:
                page.reload()  # the address works once
            listed, drawn = page.evaluate(FIRST)
            found["page"].append(listed / 1000)
            found["first image"].append(drawn / 1000)
        number = 0
        for what, pause in (("next case", looking), ("next case at once", 0.0)):
            for _ in range(steps):
                number += 1
                time.sleep(pause)
                found[what].append(page.evaluate(NEXT, number) / 1000)
    return found


@contextmanager
def _served(site: Path) -> Iterator[str]:
    """The address of `fedqc review` in a process of its own."""
    command = [sys.executable, "-c", "from fedqc.cli import main; main()", "review", str(site)]
    process = subprocess.Popen(  # noqa: S603 - our own command
        [*command, "--no-browser", "--by", "benchmark"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        match = re.search(r"open (\S+)", process.stdout.readline())
        if match is None:
            raise SystemExit("fedqc review did not start")
        yield match[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


@contextmanager
def _browser_page() -> Iterator[Page]:
    """A page of the system's Chromium, which draws in software."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("this benchmark needs Chromium; Debian: apt install chromium")
    options = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options)
        page = browser.new_page(viewport={"width": 1920, "height": 1080})
        page.set_default_timeout(WAIT)
        yield page
        browser.close()


if __name__ == "__main__":
    main()
