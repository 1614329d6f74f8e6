"""The table of deep quality estimation: figures by hand, rated labels of all stars, and all of it small."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from fedqc_simulations.experiments import base, dqe, figures, measures
from fedqc_simulations.experiments import reproduce as experiments
from fedqc_simulations.experiments.base import Row, Settings, open_workshop
from fedqc_simulations.experiments.dqe import (
    MEAN,
    KnownLabel,
    Measured,
    Rated,
    against,
    correlation,
    errors_of,
    rated_labels,
    rater_and_others,
    star_counts,
    with_mean,
)
from fedqc_simulations.experiments.reproduce import reproduce
from fedqc_simulations.raters import draw_raters, stars_of
from matplotlib.axes import Axes
from rich.console import Console

from fedqc.cases.volumes import read_volume
from fedqc.config import ComputeConfig, QCConfig
from fedqc.display import Display
from fedqc.errors import ConfigError, DataError
from fedqc.methods.base import get_method
from fedqc.ratings import MOST_STARS, Rating, View
from fedqc.seeding import generator
from fedqc.task import load_task
from fedqc.views import VIEWS

RNG = np.random.default_rng


def rated(patient: str, predicted: float, raters: float, truth: float) -> Rated:
    """A label with the same stars in all views, but one more predicted in the axial one."""
    stars = [dict.fromkeys((*VIEWS, MEAN), value) for value in (predicted, raters, truth)]
    return Rated(f"{patient}-1", patient, stars[0] | {"axial": predicted + 1}, stars[1], stars[2])


# ------------------------------------------------------------------------------------------------ figures


def test_errors_by_hand() -> None:
    found = errors_of([1, 2, 4, 6], [2, 2, 3, 4], ["a", "a", "b", "c"], RNG(0))
    assert found.mae.value == pytest.approx(1.0)
    assert found.mae_sd == pytest.approx(np.std([1, 0, 1, 2], ddof=1))
    assert found.rmse == pytest.approx(np.sqrt(6 / 4))
    assert found.r.value == pytest.approx(np.corrcoef([1, 2, 4, 6], [2, 2, 3, 4])[0, 1])
    # The means of the patients' errors are 0.5 (two labels), 1 and 2: no draw of patients is outside them.
    assert found.mae.low is not None
    assert found.mae.high is not None
    assert 0.5 <= found.mae.low < 1 < found.mae.high <= 2
    spread, error, root, r = found.cells()
    assert spread == "1.00 ± 0.82"
    assert error.startswith("1.000 (")
    assert root == found.rmse
    assert r.startswith(f"{found.r.value:.3f} (")


def test_raters_and_truth_and_views_are_told_apart() -> None:
    judged = [rated("a", 3, 4, 3.5), rated("b", 2, 5, 2.25), rated("c", 5, 5, 4)]
    for view, other, expected in (
        (MEAN, "rated", (1 + 3 + 0) / 3),
        (MEAN, "deserved", (0.5 + 0.25 + 1) / 3),
        ("axial", "rated", (0 + 2 + 1) / 3),
        ("coronal", "rated", (1 + 3 + 0) / 3),
    ):
        assert against(judged, view, other, RNG(0)).mae.value == pytest.approx(expected)


def test_correlation_is_that_of_the_view_and_of_the_overlap_that_is_asked_for() -> None:
    stars = [{"axial": 1.0, MEAN: 4.0}, {"axial": 2.0, MEAN: 3.0}, {"axial": 4.0, MEAN: 1.0}]
    measured = [
        Measured(str(index), str(index), one, dsc, nsd)
        for index, (one, dsc, nsd) in enumerate(zip(stars, (0.1, 0.2, 0.4), (0.7, 0.5, 0.1), strict=True))
    ]
    assert correlation(measured, "axial", "dsc", RNG(0)).value == pytest.approx(1)
    assert correlation(measured, MEAN, "dsc", RNG(0)).value == pytest.approx(-1)
    assert correlation(measured, MEAN, "nsd", RNG(0)).value == pytest.approx(1)


def test_a_rater_is_held_against_the_mean_of_the_others() -> None:
    def given(rater: str, *stars: float) -> list[Rating]:
        return [Rating("x", rater, view, value) for view, value in zip(VIEWS, stars, strict=True)]  # type: ignore[arg-type]

    alone = {"y": given("a", 1, 1, 1)}
    found = rater_and_others(
        {"x": [*given("a", 1, 2, 3), *given("b", 3, 3, 3), *given("c", 5, 5, 2)]} | alone
    )
    assert len(found) == 3 * 4
    by_view = {view: (own, others) for label, view, own, others in found[:4] if label == "x"}
    assert by_view == {"axial": (1, 4), "coronal": (2, 4), "sagittal": (3, 2.5), MEAN: (2, 3.5)}


def test_means_and_counts_of_stars() -> None:
    assert with_mean({"axial": 1, "coronal": 2, "sagittal": 6}) == {
        "axial": 1,
        "coronal": 2,
        "sagittal": 6,
        MEAN: 3,
    }
    qualities: dict[View, float] = {"axial": 0.0, "coronal": 0.6, "sagittal": 1.0}
    assert star_counts([KnownLabel("x", "x", "shift", qualities)]) == {1: 1, 2: 0, 3: 1, 4: 0, 5: 0, 6: 1}


def test_bland_altman_draws_and_names_mean_and_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[float] = []
    names: list[str] = []
    line, name = Axes.axhline, Axes.annotate

    def drawn(axes: Axes, y: float, **how: Any) -> Any:
        lines.append(y)
        return line(axes, y, **how)

    def named(axes: Axes, text: str, *where: Any, **how: Any) -> Any:
        names.append(text)
        return name(axes, text, *where, **how)

    monkeypatch.setattr(Axes, "axhline", drawn)
    monkeypatch.setattr(Axes, "annotate", named)
    # Differences 1, 2, 3: mean 2, SD 1.
    figures.draw_agreement(tmp_path / "a.png", "model", [2, 4, 6], [1, 2, 3])
    assert lines == pytest.approx([2, 3.96, 0.04])
    assert names == ["mean\n+2.00", "mean + 1.96 SD\n+3.96", "mean - 1.96 SD\n+0.04"]
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.05


# ---------------------------------------------------------------------------------------------- the variants


@pytest.mark.parametrize("quick", [False, True])
def test_the_variants_are_those_of_the_paper(quick: bool) -> None:
    task = load_task("phantom")
    rows = dqe.rows(quick)
    assert [row.title for row in rows] == [
        "DenseNet121, SGD, percentile, tissue",
        "DenseNet121, AdamW, percentile, tissue",
        "DenseNet121, Ranger21, percentile, tissue",
        "DenseNet201, Ranger21, percentile, tissue",
        "DenseNet121, Ranger21, min-max, regions",
        "DenseNet121, Ranger21, percentile, regions",
    ]
    chosen = {
        (one.qc.optimizer, *one.qc.dqe.model_dump(exclude={"targets", "side"}).values()) for one in rows
    }
    assert len(chosen) == 6
    assert len({(row.qc.rounds, row.qc.local_steps) for row in rows}) == 1
    for row in rows:
        assert get_method(row.qc.method)(task, row.qc).stages()[0].learns_from == "rated"


# --------------------------------------------------------------------------------------------- very small


@pytest.fixture
def display() -> Iterator[Display]:
    with Display(Console(quiet=True)) as display:
        yield display


@pytest.fixture
def settings() -> Settings:
    compute = ComputeConfig(device="cpu", precision="fp32")
    return Settings(None, None, "phantom", seed=0, quick=True, sites=0, compute=compute)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight phantoms, two variants of the six, two steps each."""
    rows, forests = dqe.rows, dqe.forests

    def small(row: Row) -> Row:
        chosen = row.qc.dqe.model_copy(update={"batch_size": 2, "side": 32})
        update = {"rounds": 1, "local_steps": 2, "dqe": chosen, "optimizer": "adamw"}  # imported in no time
        return replace(row, qc=row.qc.model_copy(update=update))

    monkeypatch.setattr(dqe, "rows", lambda quick: tuple(map(small, rows(quick)[-2:])))

    def few_trees(quick: bool) -> QCConfig:
        made = forests(quick)
        return made.model_copy(update={"sources": made.sources.model_copy(update={"trees": 2})})

    monkeypatch.setattr(dqe, "forests", few_trees)
    monkeypatch.setattr(dqe, "SEGGEN_A_CASE", 2)
    monkeypatch.setattr(measures, "RESAMPLES", 20)
    monkeypatch.setitem(
        experiments.EXPERIMENTS, "dqe", replace(experiments.EXPERIMENTS["dqe"], quick_cases=8)
    )


@pytest.mark.usefixtures("quickly")
def test_the_table_is_made_and_kept(
    settings: Settings, tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert reproduce("dqe", settings, out, display).read_text().startswith("Made with --quick")
    tables = json.loads((out / "table.json").read_text())["tables"]
    variants, views, raters, limits, external, made, stars = tables
    assert [row[:4] for row in variants["rows"]] == [
        ["DenseNet121", "Ranger21", "min-max", "regions"],
        ["DenseNet121", "Ranger21", "percentile", "regions"],
    ]
    assert variants["rows"][0][4] == "6,967,425"
    assert "20 labels of 4 other patients" in variants["notes"][0]
    assert [row[1] for row in views["rows"]] == [*VIEWS, MEAN] * 2
    assert all(len(row) == len(views["columns"]) for row in views["rows"])
    assert views["rows"][3][3] == variants["rows"][0][6]  # the mean of the views, in both tables
    assert raters["rows"][1][1] == 10 * 3 * 10  # ten labels in three views, five raters in ten pairs
    constant = raters["rows"][-1]
    assert constant[1] == 10  # who always says the same is not nearer than it has to be
    assert 0.5 < float(constant[2].split()[0]) < 3
    assert len(limits["rows"]) == 8
    assert len(external["rows"]) == 2
    assert [row[0] for row in made["rows"]] == ["forest", "seggen"]
    assert [row[1] for row in made["rows"]] == [20, 4]
    assert sum(row[1] for row in stars["rows"]) == 20 * 3
    assert {path.name for path in out.glob("*.png")} == {"bland-altman.png", "external.png", "stars.png"}

    rows = [json.loads(line) for line in (out / "rows" / _name(0)).read_text().splitlines()]
    assert len(rows) == 10
    best = min(range(2), key=lambda index: float(variants["rows"][index][6].split()[0]))
    assert dqe.rows(True)[best].title in limits["title"]
    # Nobody is in two parts.
    patients = [
        {json.loads(line)["patient"] for line in (out / "rows" / name).read_text().splitlines()}
        for name in (_name(0), _name(0).replace(".jsonl", "-external.jsonl"))
    ]
    learned = {one["case"] for one in json.loads((out / "rated" / "training" / "labels.json").read_text())}
    assert len(patients[0] | patients[1] | learned) == 8

    before = (out / "table.md").read_text()
    monkeypatch.setattr(base, "train_and_fit", lambda *_, **__: pytest.fail("a kept row was trained again"))
    monkeypatch.setattr(dqe, "surface_dsc", lambda *_: pytest.fail("surfaces were compared again"))
    monkeypatch.setattr(dqe, "rate", lambda *_, **__: pytest.fail("labels were rated again"))
    monkeypatch.setattr(base, "write_phantoms", lambda *_, **__: pytest.fail("phantoms were drawn again"))
    reproduce("dqe", settings, out, display)
    assert (out / "table.md").read_text() == before


def _name(index: int) -> str:
    return f"{dqe.rows(True)[index].name}.jsonl"


def test_rated_labels_are_of_all_stars_and_so_are_the_ratings(
    settings: Settings, tmp_path: Path, display: Display
) -> None:
    workshop = open_workshop("dqe", settings, tmp_path / "out", display, 8)
    labels = rated_labels(workshop, "training", workshop.cases)
    assert len(labels.files) == len(labels.ratings) == 8 * 5
    assert all(count >= 3 for count in star_counts(labels.known).values())
    untouched = [one for one in labels.known if one.kind == "untouched"]
    assert len(untouched) == 8
    assert all(set(one.qualities.values()) == {1.0} for one in untouched)
    assert len({one.kind for one in labels.known}) > 4

    # The files hold what is said of them: the untouched label is the case's own, value by value.
    by_id = {files.id: files for files in workshop.cases}
    label_of = {files.id: files.label for files in labels.files}
    for known in labels.known:
        own, written = by_id[known.case].label, label_of[known.id]
        assert own is not None
        assert written is not None
        same = np.array_equal(read_volume(own).data, read_volume(written).data)
        assert same == (known.kind == "untouched")
    assert all(
        files.images == by_id[known.case].images
        for files, known in zip(labels.files, labels.known, strict=True)
    )

    # Raters err by their known bias, which together with rounding is all that the mean rater is off by.
    raters = draw_raters(generator(0, "raters"), dqe.RATERS)
    given = [rating for one in untouched for rating in labels.ratings[one.id]]
    assert {rating.view for rating in given} == set(VIEWS)
    assert {rating.rater for rating in given} == {rater.name for rater in raters}
    assert all(rating.stars == round(rating.stars) <= MOST_STARS for rating in given)
    ratings = {one.id: np.mean([rating.stars for rating in labels.ratings[one.id]]) for one in labels.known}
    deserved = {one.id: np.mean([stars_of(q) for q in one.qualities.values()]) for one in labels.known}
    difference = np.array([ratings[name] - deserved[name] for name in ratings])
    bias = np.mean([rater.bias + np.mean([rater.view_bias[view] for view in VIEWS]) for rater in raters])  # type: ignore[index]
    assert abs(difference.mean() - bias) < 0.25
    assert np.corrcoef(list(ratings.values()), list(deserved.values()))[0, 1] > 0.95

    again = rated_labels(workshop, "training", workshop.cases)
    assert again == labels


def test_what_cannot_be_is_refused(settings: Settings, tmp_path: Path, display: Display) -> None:
    with pytest.raises(ConfigError, match="--data is missing"):
        reproduce("dqe", replace(settings, task="msd-hippocampus"), tmp_path / "out", display)
    with pytest.raises(ConfigError, match="--sites: dqe has no federated rows"):
        reproduce("dqe", replace(settings, sites=2), tmp_path / "out", display)
    assert not (tmp_path / "out").exists()


def test_few_patients_are_refused_in_a_sentence(settings: Settings, tmp_path: Path, display: Display) -> None:
    workshop = open_workshop("dqe", settings, tmp_path / "out", display, 6)
    with pytest.raises(DataError, match="use a larger data set"):
        dqe.reproduce(replace(workshop, cases=workshop.cases[:6]))
