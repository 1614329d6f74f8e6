"""The tables of the papers, on a dozen small cases: what is in them, what is kept, and figures by hand."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedqc_simulations.experiments import base, qcresunet, robinson, voxresnet
from fedqc_simulations.experiments.base import Judged, Row, Settings, evenly, n_parameters
from fedqc_simulations.experiments.measures import estimate, figures_of, p_value, paired
from fedqc_simulations.experiments.reproduce import EXPERIMENTS, reproduce
from rich.console import Console
from scipy.stats import ttest_rel

from fedqc.config import ComputeConfig, QCConfig, RCAConfig, SourcesConfig
from fedqc.display import Display
from fedqc.errors import ConfigError, DataError
from fedqc.methods.base import get_method
from fedqc.task import load_task
from tests.federation.runs import write_site, write_task

SOURCES = SourcesConfig(rounds=2, local_steps=1, width=4, trees=2, learning_rate=0.01)


def tiny(row: Row, **network: Any) -> Row:
    """The same model, much smaller, trained for two steps."""
    config = row.qc.model_dump() | {
        "rounds": 1,
        "local_steps": 2,
        "batch_size": 2,
        "network": row.qc.network.model_dump() | {"width": 4} | network,
        "sources": SOURCES.model_dump() | {"folds": row.qc.sources.folds},
    }
    return Row(row.name, row.title, QCConfig.model_validate(config))


@pytest.mark.parametrize("quick", [False, True])
def test_the_models_fit_the_task_that_the_tables_are_made_on(quick: bool) -> None:
    task = load_task("msd-hippocampus")
    rows = [*qcresunet.rows(quick), voxresnet.model(quick), robinson.model(quick), robinson.from_rca(quick)]
    methods = [get_method(row.qc.method)(task, row.qc) for row in rows]
    assert len({method.name for method in methods}) == len(rows) - 1  # QCResUNet in both forms


def test_test_labels_are_of_all_qualities_and_none_is_taken_twice() -> None:
    dsc = np.array([0.05] * 3 + [0.55] * 25 + [0.8] * 100 + [1.0] * 40)
    chosen = evenly(dsc, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen)
    values, counts = np.unique(dsc[chosen], return_counts=True)
    assert dict(zip(values, counts, strict=True)) == {0.05: 3, 0.55: 25, 0.8: 25, 1.0: 25}
    assert not np.array_equal(chosen, evenly(dsc, np.random.default_rng(1)))


def test_of_few_labels_all_are_taken() -> None:
    assert len(evenly(np.array([0.1, 0.1, 0.5, 0.9]), np.random.default_rng(0))) == 4


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model so small that a table takes seconds."""
    rows, of_voxresnet, of_robinson = qcresunet.rows, voxresnet.model, robinson.model
    of_rca = robinson.from_rca

    def small(row: Row) -> Row:
        if row.name == "qcresunet-published":
            return tiny(row, blocks=(1, 1, 1))
        return tiny(row) if row.name == "unet" else tiny(row, blocks=(1, 1))

    def small_rca(row: Row) -> Row:
        rca = RCAConfig(references=2, calibration=1, voxels=300)
        row = tiny(row, blocks=(1, 1))
        return replace(row, qc=row.qc.model_copy(update={"rca": rca}))

    monkeypatch.setattr(qcresunet, "rows", lambda quick: tuple(map(small, rows(quick))))
    monkeypatch.setattr(qcresunet, "sources", lambda quick: SOURCES)
    monkeypatch.setattr(voxresnet, "model", lambda quick: tiny(of_voxresnet(quick)))
    monkeypatch.setattr(robinson, "model", lambda quick: tiny(of_robinson(quick), blocks=(1, 1)))
    monkeypatch.setattr(robinson, "from_rca", lambda quick: small_rca(of_rca(quick)))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    task = write_task(tmp_path)  # at 16 voxels, the U-Net has nothing left at its deepest level
    task.write_text(task.read_text().replace("[16, 16, 16]", "[32, 32, 32]"))
    write_site(tmp_path, "a", task, references=12, good=0, spoiled=0)
    compute = ComputeConfig(device="cpu", precision="fp32")
    data = tmp_path / "sites" / "a" / "data"
    return Settings(data, None, str(task), seed=0, quick=True, sites=0, compute=compute)


@pytest.fixture
def display() -> Iterator[Display]:
    with Display(Console(quiet=True)) as display:
        yield display


def tables(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "table.json").read_text())["tables"]
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("quickly")
def test_qcresunet_has_a_table_for_each_kind_of_label(
    settings: Settings, tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert reproduce("qcresunet", settings, out, display).read_text().startswith("Made with --quick")
    inside, outside, made = tables(out)
    assert [row[:2] for row in made["rows"]] == [
        ["snapshots", "all-modalities"],
        ["voxresnet", "3d"],
        ["seggen", "-"],
    ]
    assert all(row[3] <= row[4] <= row[5] for row in made["rows"])
    assert "in-sample" in inside["title"]
    assert "out-of-sample" in outside["title"]
    for table in (inside, outside):
        assert [row[0] for row in table["rows"]] == [row.title for row in qcresunet.rows(True)]
        by_name = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
        unet, ours = by_name["UNet"], by_name["QCResUNet, corrective network"]
        assert unet["DSC_err (95 %)"] == "—"  # it has no error map
        assert ours["DSC_err (95 %)"] != "—"
        assert ours["p, predictions"] is None  # it is not compared with itself
        assert 0 <= float(unet["p, predictions"].removeprefix("< ")) <= 1
        assert unet["width"] == 4
        assert int(unet["parameters"].replace(",", "")) > 10_000
    figures = {path.name for path in out.glob("*.png")}
    assert {"balance-in-sample.png", "balance-out-of-sample.png", "qcresunet-in-sample.png"} <= figures
    judged = [json.loads(line) for line in (out / "rows" / "unet-in-sample.jsonl").read_text().splitlines()]
    assert {one["source"] for one in judged} <= {"snapshots", "seggen"}
    judged = [
        json.loads(line) for line in (out / "rows" / "unet-out-of-sample.jsonl").read_text().splitlines()
    ]
    assert {one["source"] for one in judged} == {"voxresnet"}

    before = (out / "table.md").read_text()
    monkeypatch.setattr(base, "train_and_fit", lambda *_, **__: pytest.fail("a kept row was trained again"))
    reproduce("qcresunet", settings, out, display)
    assert (out / "table.md").read_text() == before


@pytest.mark.usefixtures("quickly")
def test_voxresnet_judges_every_label_once_in_five_folds(
    settings: Settings, tmp_path: Path, display: Display
) -> None:
    out = tmp_path / "out"
    reproduce("voxresnet", settings, out, display)
    table, indicator = tables(out)
    counts = {row[0]: row[1] for row in table["rows"]}
    assert counts == {
        **dict.fromkeys(("3D final", "3D-2", "3D-3", "3D-4", "3D-5", "GT"), 12),
        **dict.fromkeys(("3D average", "2D average"), 60),
        "overall-auto": 120,
        "overall-GT": 132,
    }
    truth = {row[0]: row for row in table["rows"]}["GT"]
    assert truth[6:] == [1.0, 1.0]  # the references' own DSC and accuracy
    assert [row[:2] for row in indicator["rows"]] == [["overall-auto", 120]] * 3 + [["overall-GT", 132]] * 3
    pairs = [row[2] for row in indicator["rows"]]
    assert pairs == ["QI and accuracy", "QI and DSC", "implied quality and DSC"] * 2
    folds = [lines(path) for path in sorted((out / "rows").iterdir())]
    assert sum(map(len, folds)) == 132
    assert sum(len({one["patient"] for one in fold}) for fold in folds) == 12  # a patient in each is in one


@pytest.mark.usefixtures("quickly")
def test_robinson_has_a_row_for_each_class_and_sites_a_table_of_their_own(
    settings: Settings, tmp_path: Path, display: Display
) -> None:
    out = tmp_path / "out"
    reproduce("robinson", Settings(**(vars(settings) | {"sites": 2, "rounds": 2})), out, display)
    errors, good, second, _, by_rca, good_by_rca, federated = tables(out)
    assert [row[0] for row in errors["rows"]] == ["background", "ball", "all-classes"]
    for table in (good, good_by_rca):
        assert [row[0] for row in table["rows"]][:3] == [
            "true positive rate",
            "false positive rate",
            "accuracy",
        ]
    for table in (second, by_rca):
        assert [row[0] for row in table["rows"]] == ["ball", "all-classes"]  # RCA knows no background
        assert "of which 3 have labels that are known to be right" in table["notes"][1]
        assert "experiment 2" in table["title"]
    rows = [lines(out / "rows" / f"{name}.jsonl") for name in ("robinson", "rca-labels", "rca")]
    truth = [[(one["case"], one["regions"]["ball"][0]) for one in row] for row in rows]
    assert truth[0] == truth[1] == truth[2]  # all are tried on the same labels, against the truth
    assert len({round(one["predicted"], 6) for one in rows[2]}) > 1
    assert [row[0] for row in federated["rows"]] == ["ResNet-50, pooled data", "ResNet-50, 2 sites"]
    assert "2 rounds of 2" in federated["notes"][0]
    assert "2 rounds of 2" in errors["notes"][1]
    assert "MB" in federated["notes"][1]
    rounds = json.loads((out / "federated-robinson" / "run" / "run.json").read_text())["rounds"]
    assert set(rounds) == {"qc"}  # forests are grown at the sites


def test_robinson_is_judged_by_all_classes_together() -> None:
    """As the paper does; the quality is the mean over the task's regions."""
    regions = {"ball": (0.1, 0.2), "all-classes": (0.3, 0.4)}
    one = base.Judged("a", "p", "forest", {}, 0.5, 0.6, regions, 1.0)
    (whole,) = robinson._whole([one])
    assert (whole.true, whole.predicted, whole.regions) == (0.3, 0.4, regions)


def test_wrong_names_and_folders(settings: Settings, tmp_path: Path, display: Display) -> None:
    with pytest.raises(ConfigError, match="did you mean 'robinson'"):
        reproduce("robinsen", settings, tmp_path / "out", display)
    elsewhere = Settings(**(vars(settings) | {"data": tmp_path / "elsewhere"}))
    with pytest.raises(DataError, match="elsewhere: there is no such folder"):
        reproduce("robinson", elsewhere, tmp_path / "out", display)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="holds no reproduction"):
        reproduce("robinson", settings, tmp_path, display)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text('{"reproduces": "voxresnet"}')
    with pytest.raises(ConfigError, match="holds a reproduction with other data, fedqc"):
        reproduce("robinson", settings, tmp_path / "out", display)
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match=r"settings.json: cannot be read"):
        reproduce("robinson", settings, tmp_path / "out", display)
    assert set(EXPERIMENTS) == {"qcresunet", "voxresnet", "robinson", "dqe", "williams", "methods"}


# ------------------------------------------------------------------------------------------------ measures


def judged(patient: str, true: float, predicted: float, error_dsc: float | None = None) -> Judged:
    error = {} if error_dsc is None else {"dsc": error_dsc}
    return Judged("case", patient, "seggen", {}, true, predicted, {}, 1.0, None, error)


def test_figures_by_hand() -> None:
    rows = [
        judged("a", 0.2, 0.3, 0.5),
        judged("a", 0.4, 0.4, 0.9),
        judged("b", 0.6, 0.5, 0.7),
        judged("c", 0.8, 0.9),
    ]
    found = figures_of(rows, np.random.default_rng(0))
    assert found.mae.value == pytest.approx(0.075)
    assert found.mae_sd == pytest.approx(0.05)
    assert found.error_dsc.value == pytest.approx(0.7)
    assert found.r.value == pytest.approx(np.corrcoef([0.2, 0.4, 0.6, 0.8], [0.3, 0.4, 0.5, 0.9])[0, 1])
    assert found.mae.low is not None
    assert found.mae.high is not None
    assert found.mae.low <= 0.075 <= found.mae.high


def test_an_interval_draws_patients_and_not_labels() -> None:
    """Two patients, one always right and one always wrong: only three means are possible."""
    patients = ["a"] * 50 + ["b"] * 50
    values = np.array([0.0] * 50 + [1.0] * 50)
    found = estimate(lambda chosen: float(values[chosen].mean()), patients, np.random.default_rng(0))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    assert str(found) == "0.500 (0.000 to 1.000)"


def test_paired_tests_are_those_of_scipy() -> None:
    first = [judged("a", 0.5, 0.6), judged("a", 0.5, 0.9), judged("b", 0.5, 0.4), judged("c", 0.5, 0.8)]
    second = [judged("a", 0.5, 0.5), judged("a", 0.5, 0.6), judged("b", 0.5, 0.5), judged("c", 0.5, 0.7)]
    found = paired(first, second)
    assert found.predictions == pytest.approx(ttest_rel([0.6, 0.9, 0.4, 0.8], [0.5, 0.6, 0.5, 0.7]).pvalue)
    assert found.errors == pytest.approx(ttest_rel([0.25, 0.1, 0.3], [0.05, 0.0, 0.2]).pvalue)
    assert paired(first, first).errors is None
    assert [p_value(p) for p in (None, 0.0009, 0.001, 1.0)] == [None, "< 0.001", "0.001", "1.000"]


def test_networks_of_the_full_tables_have_the_sizes_that_are_said() -> None:
    for quick, small in ((True, 16), (False, 32)):
        widths = {row.name: row.qc.network.width for row in qcresunet.rows(quick)}
        assert widths.pop(qcresunet.OURS) == 16
        assert widths.pop("unet") == small // 4
        assert set(widths.values()) == {small}
        for row in qcresunet.rows(quick):
            assert row.qc.samples.seggen == row.qc.samples.snapshots == 0.5
    task = load_task("msd-hippocampus")
    ours = qcresunet.rows(False)[-1]
    default = replace(ours, qc=QCConfig())  # the corrective network's own width is the table's
    assert n_parameters(task, ours) == n_parameters(task, default) == 840_134
