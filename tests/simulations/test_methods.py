"""All methods over one set of spoiled annotations: what the table says of rows whose truth is known."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from fedqc_simulations.consortium import read_candidates
from fedqc_simulations.experiments import methods
from fedqc_simulations.experiments.base import Settings, Workshop, open_workshop
from fedqc_simulations.experiments.figures import draw_comparison
from fedqc_simulations.experiments.methods import Candidate, Effort, Entry, Row
from rich.console import Console

from fedqc.config import ComputeConfig, QCConfig
from fedqc.display import Display
from fedqc.files import write_json
from fedqc.metrics.filtering import aurc
from fedqc.task import load_task

EFFORT = Effort(seconds_per_round=12.0, bytes_per_round=3.25e6, seconds_to_fit=0.5, seconds_per_case=0.04)


def candidates(shift: float, *, rated: int = 0) -> tuple[Candidate, ...]:
    """Twelve candidates of six patients, each predicted too high by `shift`; the first ones are rated."""
    true = np.linspace(0.3, 0.85, 12)
    return tuple(
        Candidate("a", f"case-{i}", f"patient-{i // 2}", "shift", float(dsc), float(dsc + shift), i < rated)
        for i, dsc in enumerate(true)
    )


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    settings = Settings(
        None, None, "phantom", seed=0, quick=True, sites=0, compute=ComputeConfig(device="cpu")
    )
    with Display(Console(quiet=True)) as display:
        return open_workshop("methods", settings, tmp_path / "out", display, 4)


def entry(name: str, method: str) -> Entry:
    return Entry(name, name.upper(), QCConfig(method=method))


def test_a_table_of_kept_rows(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were made are read; nothing is built but the consortia, and nothing trained."""
    monkeypatch.setattr(methods, "_build", lambda *_: None)
    monkeypatch.setattr(methods, "_trained", lambda *_: pytest.fail("a kept row was made again"))
    (workshop.out / "rows").mkdir()
    for noise in methods.NOISES:
        for name, row in (
            ("good", Row(candidates(0.1), EFFORT)),
            ("rated", Row(candidates(0.1, rated=4), Effort(None, None, 0.0, 2.0))),
        ):
            write_json(workshop.out / "rows" / f"{noise}-{name}.json", asdict(row))
    tables, points = methods.compare(workshop, [entry("good", "qcresunet"), entry("rated", "rca")])
    assert [table.title.split(": ")[1][:9] for table in tables] == ["a third o", "half of t"]
    assert list(points) == list(methods.NOISES)
    for found in points.values():
        assert list(found) == ["GOOD", "RATED"]
        for pair in found.values():
            assert pair == pytest.approx((1.0, 0.1))
    good, rated = (dict(zip(tables[0].columns, row, strict=True)) for row in tables[0].rows)
    assert good["n"] == 12
    assert rated["n"] == 8  # what it learned from is not what it is tried on
    assert good["learns from"] == "references"
    assert rated["learns from"] == "references, also to judge"
    assert str(good["MAE (95 %)"]).startswith("0.100 (0.100 to 0.100)")
    assert str(good["AUROC (95 %)"]).startswith("1.000")
    assert good["rho"] == pytest.approx(1.0)
    true = np.linspace(0.3, 0.85, 12)
    assert good["AURC"] == pytest.approx(aurc(true, 1 - true))
    assert (good["s a round"], good["MB a round"], good["s to fit"]) == ("12", "3.2", "0.5")
    assert (rated["s a round"], rated["MB a round"], rated["s a case"]) == (None, None, "2")
    assert f"{(true < methods.FAILURE).sum()} of them failures" in tables[0].notes[0]

    picture = workshop.out / "methods.png"
    draw_comparison(picture, points)
    assert picture.stat().st_size > 10_000


def test_every_other_candidate_is_rated(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "SITES", 1)
    methods._build(workshop, "mixed")
    rated = json.loads((workshop.out / "mixed" / "rated.json").read_text())
    known = read_candidates(workshop.out / "mixed")
    (names,) = rated.values()
    assert len(names) == -(-len(known) // 2)
    assert set(names) <= {one.id for one in known}
    table = workshop.out / "mixed" / "sites" / "hospital-1" / "data" / "ratings.csv"
    lines = table.read_text().splitlines()
    assert len(lines) > 1 + methods.RATERS * len(names)
    before = table.stat().st_mtime_ns
    methods._build(workshop, "mixed")
    assert table.stat().st_mtime_ns == before


@pytest.mark.parametrize("quick", [True, False])
def test_all_methods_of_the_table_judge_the_label(quick: bool) -> None:
    task = load_task("msd-hippocampus")
    entries = methods.entries(quick)
    assert len({one.name for one in entries}) == len(entries)
    assert all(one.method(task).judges == "label" for one in entries)
    assert all(stage.rounds == 3 for stage in methods._over(entries[0], 3).method(task).stages())
