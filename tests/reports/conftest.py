import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedqc.reports import figures

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What a browser would see of a report; fails on tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            elif key in {"href", "src"}:
                self.links.append(value or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in {"style", "script"}:
            self.text += data


@pytest.fixture
def read_page() -> Callable[[Path], Page]:
    """Read a report."""
    return lambda path: Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is an empty drawing."""
    drawings = (
        "quality_histograms",
        "decision_bars",
        "agreement_panels",
        "count_map",
        "dot_panels",
        "intensity_bands",
        "label_histograms",
        "loss_curves",
        "quality_map",
        "risk_coverage",
        "strips",
        "time_bars",
    )
    for name in drawings:
        monkeypatch.setattr(figures, name, lambda *_args, **_kwargs: "<svg></svg>")


def rounds(n: int, sites: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "round": number,
            "loss": 1 / number,
            "sites": {site: {"samples": 8, "losses": {"loss": 1 / number}} for site in sites},
            "failed": {},
        }
        for number in range(1, n + 1)
    ]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A completed run of three sites with everything a coordinator can learn, and a fourth left out."""
    folder = tmp_path / "run"
    folder.mkdir()
    sites = ["north", "south", "west"]
    run = {
        "federation": "alps",
        "config": {
            "name": "alps",
            "task": "phantom",
            "sites": {"expected": [*sites, "east"], "minimum": 2},
            "qc": {
                "method": "qcresunet",
                "rounds": 3,
                "local_steps": 5,
                "batch_size": 4,
                "network": {"architecture": "corrective"},
                "samples": {"seggen": 0.4, "annotator": 0.6},
                "leave_out": ["left-right-flip"],
            },
            "averaging": {"strategy": "fedavg"},
            "curation": {"rule": "threshold", "threshold": 0.75, "review": 0.05},
            "segmentation": {"rounds": 2, "local_steps": 5, "batch_size": 4},
            "privacy": {"min_count": 4},
        },
        "versions": {"fedqc": "0.1.0", "torch": "2.13.0"},
        "seed": 7,
        "started": "2026-03-01T10:00:00.000+00:00",
        "finished": "2026-03-01T10:05:00.000+00:00",
        "outcome": "completed",
        "reason": None,
        "done": ["handshake", "summarise", "train.qc"],
        "seconds": {"handshake": 0.2, "summarise": 3.0, "train.qc": 240.0},
        "sites": {"joined": sites, "left_out": {"east": "task-differs"}},
        "models": {"qc": {"rounds": 3, "samples": 60, "sha256": "ab" * 32}},
    }
    score = {
        "candidates": 20,
        "decisions.keep": 12,
        "decisions.drop": 8,
        "quality": [8, 0, 0, 0, 0, 0, 0, 0, 4, 8],
        "quality_mean": 0.61,
        "quality_sd": 0.2,
        "regions_mean.core": 0.6,
    }
    data = {
        "cases": 30,
        "patients": 30,
        "references": 10,
        "volume_ml.core.mean": 2.5,
        "volume_ml.core.sd": 0.4,
    }
    failures, others = [0] * 100, [0] * 100
    failures[20], failures[74], others[70], others[95] = 5000, 4000, 4000, 6000
    calibration = {
        "samples": 30,
        "r": 0.97,
        "mae": 0.04,
        "rmse": 0.05,
        "auroc": 0.99,
        "bias": -0.02,
        "difference_sd": 0.06,
        "profile.labels": [-1, 8, -1, 12, 8],
        "profile.predicted": [-1.0, 0.25, -1.0, 0.7, 0.95],
        "profile.true": [-1.0, 0.31, -1.0, 0.72, 0.96],
        "profile.sd": [-1.0, 0.08, -1.0, 0.06, -1.0],
        "failures": failures,
        "others": others,
    }
    statistics = {
        "sites": {
            site: {
                "summarise": data,
                "cross-check": {"references": 10, "quality_mean": 0.9, "quality_sd": 0.05},
                "calibrate": calibration,
                "score": score,
                "evaluate.segmentation": {
                    "cases": 5,
                    "dice_mean": 0.8,
                    "dice_sd": 0.1,
                    "dice.core": 0.8,
                },
            }
            for site in sites
        },
        "calibration": {
            "failures": [len(sites) * mass for mass in failures],
            "others": [len(sites) * mass for mass in others],
        },
        "train": {"qc": rounds(3, sites), "segmentation": rounds(2, sites)},
        "failed": {"summarise": {}},
        "suspected": {},
    }
    events = [
        {"event": "run-started"},
        {"event": "phase-started", "phase": "handshake"},
        {"event": "site-left-out", "phase": "handshake", "site": "east", "reason": "task-differs"},
        {"event": "phase-started", "phase": "train.qc"},
        {"event": "round-started", "phase": "train.qc", "round": 2, "rounds": 3},
    ]
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "statistics.json").write_text(json.dumps(statistics))
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return folder


@pytest.fixture
def change(run_folder: Path) -> Callable[..., None]:
    """Change a file of the run: `change("run.json", ("sites", "joined"), [])`; None as value removes."""

    def changed(name: str, keys: tuple[str, ...], value: Any) -> None:
        path = run_folder / name
        content = json.loads(path.read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        if value is None:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        path.write_text(json.dumps(content))

    return changed


@pytest.fixture
def add_event(run_folder: Path) -> Callable[..., None]:
    """Append an event."""

    def added(event: str, **details: Any) -> None:
        with (run_folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, **details}) + "\n")

    return added
