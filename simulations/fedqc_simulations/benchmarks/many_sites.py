"""What a federation of very many sites costs: time per site and round, and memory that must not grow.

    python -m fedqc_simulations.benchmarks.many_sites [--sites 1000] [--rounds 3] [--out FOLDER]

Every site has two phantoms, one of them a reference, and everything runs in this process: sites, coordinator,
QC and segmentation training with networks of about 10,000 parameters. Memory is that of this process, read
after every round; sites and rounds leave nothing behind in it where the last figure is that of the first.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import tomli_w
import torch
from rich.console import Console

from fedqc.config import (
    CurationConfig,
    FederationConfig,
    NetworkConfig,
    QCConfig,
    SegmentationConfig,
    SitesConfig,
)
from fedqc.display import Display
from fedqc.methods.base import get_method
from fedqc.segmentation import Segmentation
from fedqc.task import load_task
from fedqc_simulations.consortium import site_files, write_federation
from fedqc_simulations.engine import run_local
from fedqc_simulations.phantoms import write_phantoms

MEGABYTE = 2**20


class Watch:
    """Takes the time of every answer and the memory after every round."""

    def __init__(self) -> None:
        self.answers: dict[str, list[float]] = {}
        """Seconds of each answer, by phase."""
        self.memory: list[tuple[str, int, float]] = []
        """Stage, round and resident memory in MiB."""
        self._last = time.perf_counter()

    def listen(self, event: dict[str, Any]) -> None:
        """Take note of an event of the run."""
        now = time.perf_counter()
        if event["event"] in {"update-received", "statistics-received", "site-excused"}:
            self.answers.setdefault(event["phase"], []).append(now - self._last)
        if event["event"] == "round-finished":
            self.memory.append((event["stage"], event["round"], resident()))
        self._last = now


def main() -> None:
    """Build the sites, run the federation, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a new folder; a temporary one where left out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="fedqc-many-") as temporary:
        run(options.out or Path(temporary), options.sites, options.rounds)


def run(out: Path, n_sites: int, rounds: int) -> None:
    """One federation of `n_sites` in the folder `out`."""
    names = tuple(f"site-{number:04d}" for number in range(n_sites))
    config = FederationConfig(
        name="many-sites",
        task="phantom",
        sites=SitesConfig(expected=names),
        qc=QCConfig(
            rounds=rounds,
            local_steps=1,
            batch_size=2,
            cross_check_rounds=1,
            network=NetworkConfig(width=4, blocks=(1, 1)),
        ),
        # No QC model is any good after so few steps; everything is kept, so that segmentation has work to do.
        curation=CurationConfig(threshold=0.0),
        segmentation=SegmentationConfig(rounds=rounds, local_steps=1, batch_size=2, channels=(4, 8, 16)),
    )
    write_sites(out, names, n_cases=2)
    write_federation(out, config, task="phantom")
    watch = Watch()
    before = resident()
    begin = time.perf_counter()
    with Display(Console()) as display:

        def listen(event: dict[str, Any]) -> None:
            watch.listen(event)
            display.listen(event)

        run_local(out / "federation.toml", site_files(out, names), out, seed=0, listener=listen)
    seconds = time.perf_counter() - begin
    task = load_task("phantom")
    qc = get_method("qcresunet")(task, config.qc).build(0)
    segmentation = Segmentation(task, config.segmentation).build(0)
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (qc, segmentation)]
    print(f"\n{n_sites} sites of 2 cases, {sizes[0]:,} and {sizes[1]:,} parameters, {seconds:.0f} s in all")
    print(f"\n{'phase':24}{'answers':>9}{'median ms':>11}{'slowest ms':>12}")
    for phase, answers in watch.answers.items():
        print(f"{phase:24}{len(answers):9}{1000 * median(answers):11.1f}{1000 * max(answers):12.1f}")
    print(f"\n{'memory after':24}{'MiB':>9}{'of the first round':>20}\n{'start':24}{before:9.0f}")
    for stage, number, size in watch.memory:
        print(f"{stage + ', round ' + str(number):24}{size:9.0f}{size / watch.memory[0][2]:20.2f}")


def write_sites(out: Path, names: tuple[str, ...], n_cases: int, task: str = "phantom") -> None:
    """Write every site's phantoms, the first half of them references, and its `site.toml`."""
    with Display(Console()) as display:
        for number, name in enumerate(names, start=1):
            folder = out / "sites" / name
            write_phantoms(folder / "data", [name], n_cases, seed=0, progress=lambda *_: None)
            references = "".join(f"{name}_{index:03d}\n" for index in range(n_cases // 2))
            (folder / "reference.csv").write_text(f"id\n{references}", encoding="utf-8")
            settings = {
                "name": name,
                "task": task,
                "results": ".",
                "data": {"path": "data", "layout": "msd", "reference": "reference.csv"},
                "compute": {"device": "cpu", "workers": 1},
                "policy": {"min_count": 1, "sheet": False},
            }
            (folder / "site.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
            display.progress("building the sites", number, len(names))


def resident() -> float:
    """Resident memory of this process in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / MEGABYTE


if __name__ == "__main__":
    main()
