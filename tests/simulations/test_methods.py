"""All methods over one set of spoiled annotations: what the table says of rows whose truth is known."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from fedqc_simulations.consortium import FEWEST_PATIENTS, read_candidates
from fedqc_simulations.experiments import methods, which_method
from fedqc_simulations.experiments.base import Settings, Workshop, open_workshop, write_tables
from fedqc_simulations.experiments.figures import draw_comparison
from fedqc_simulations.experiments.methods import Candidate, Effort, Entry, Row
from rich.console import Console

from fedqc.config import CombineConfig, ComputeConfig, NetworkConfig, QCConfig, SegmenterConfig
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


def test_networks_that_learn_from_every_case_are_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method comes to the same weights, whether it trains its networks or takes over another's."""
    settings = Settings(
        None, None, "phantom", seed=0, quick=True, sites=0, compute=ComputeConfig(device="cpu")
    )
    with Display(Console(quiet=True)) as display:
        workshop = open_workshop("methods", settings, tmp_path / "out", display, 8 * FEWEST_PATIENTS)
    monkeypatch.setattr(methods, "SITES", 2)
    for noise in methods.NOISES:
        methods._build(workshop, noise)
    segmenter = SegmenterConfig(rounds=1, local_steps=1, batch_size=1, channels=(4, 8), passes=2)
    alone = QCConfig(method="expected-dice", segmenter=segmenter, cross_check_rounds=0)
    joined = alone.model_copy(
        update={
            "method": "combine",
            "combine": CombineConfig(methods=("expected-dice", "unet")),
            "network": NetworkConfig(width=4),
            **{"rounds": 1, "local_steps": 1, "batch_size": 1},
        }
    )

    def run(name: str, qc: QCConfig, noise: methods.SpoiledBy = "mixed") -> tuple[Path, int]:
        folder = methods._trained(workshop, noise, Entry(name, name, qc))
        return folder, (folder / "events.jsonl").read_text().count('"round-started"')

    _, asked = run("first", alone)
    assert asked == 2  # one round of each fold
    taken, asked = run("taken", joined)
    assert asked == 1  # the U-Net learns from references alone
    other, asked = run("taken", joined, "systematic")
    assert asked == 2  # and has done so; what learns from every case sees other labels here
    monkeypatch.setattr(methods, "_take_over", lambda *_: None)
    own, asked = run("own", joined, "systematic")
    assert asked == 3
    weights = Path("models", "qc", "weights.safetensors")
    assert (other / weights).read_bytes() == (own / weights).read_bytes()
    assert (other / weights).read_bytes() != (taken / weights).read_bytes()
    rounds = [json.loads((folder / "run.json").read_text())["rounds"] for folder in (other, own)]
    assert sorted(rounds[0]) == sorted(rounds[1])


@pytest.mark.parametrize("quick", [True, False])
def test_all_methods_of_the_table_judge_the_label(quick: bool) -> None:
    task = load_task("msd-hippocampus")
    entries = methods.entries(quick)
    assert len({one.name for one in entries}) == len(entries)
    assert all(one.method(task).judges == "label" for one in entries)
    assert all(stage.rounds == 3 for stage in methods._over(entries[0], 3).method(task).stages())


def test_the_page_on_which_method_to_choose(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "_build", lambda *_: None)
    (workshop.out / "rows").mkdir()
    blind = [replace(one, predicted=1 - one.true) for one in candidates(0.0)]  # the wrong way round
    for noise in methods.NOISES:
        for name, row in (
            ("blind", Row(tuple(blind), EFFORT)),
            ("good", Row(candidates(0.1), Effort(None, None, 0.0, 2.0))),
        ):
            write_json(workshop.out / "rows" / f"{noise}-{name}.json", asdict(row))
    tables, _ = methods.compare(workshop, [entry("blind", "qcresunet"), entry("good", "rca")])
    write_tables(workshop, tables)

    page = tmp_path / "choose.md"
    page.write_text(f"before\n{which_method.BEGIN}\nold\n{which_method.END}\nafter\n")
    which_method.main([str(workshop.out / "table.json"), str(page)])
    lines = page.read_text().splitlines()
    assert (lines[0], lines[1], lines[-2:]) == ("before", which_method.BEGIN, [which_method.END, "after"])
    assert "old" not in lines
    good, bad = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:6])
    assert (good[0], good[1], good[-2], good[-1]) == ("GOOD", "references, also to judge", "0", "2")
    assert good[2].startswith("1.000")
    assert good[4].startswith("0.100")
    assert (bad[0], bad[-2]) == ("BLIND", f"{3.2 * 20:.0f}")  # rounds of the default
    assert bad[3].startswith("0.000")
    assert lines[7].startswith(
        "Scattered errors: 12 candidates of 4 sites, 9 of them failures (true DSC below 0.75)"
    )

    before = page.read_text()
    which_method.main([str(workshop.out / "table.json"), str(page)])
    assert page.read_text() == before

    page.write_text("no place for it")
    with pytest.raises(SystemExit):
        which_method.main([str(workshop.out / "table.json"), str(page)])
    assert page.read_text() == "no place for it"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("{}", "name the table.json"),
        ('{"tables": []}', "not the tables of all methods"),
        (None, "No such file"),
    ],
)
def test_what_is_no_table_leaves_the_page_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str | None, reason: str
) -> None:
    file = tmp_path / "choose.md"
    file.write_text(which_method.BEGIN + which_method.END)
    before = file.read_text()
    if table is not None:
        (tmp_path / "table.json").write_text(table)
    with pytest.raises(SystemExit):
        which_method.main([str(tmp_path / "table.json"), str(file)])
    assert reason in capsys.readouterr().err
    assert file.read_text() == before
