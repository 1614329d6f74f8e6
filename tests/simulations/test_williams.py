"""The table of Williams et al.: its figures by hand, its folds, and all of it on a dozen small cases."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from fedqc_simulations.experiments import base, methods, predictions, williams
from fedqc_simulations.experiments.base import Judged, Settings, Workshop, open_workshop
from fedqc_simulations.experiments.predictions import MAPS, FoldNetworks, FoldSegmenter
from fedqc_simulations.experiments.reproduce import reproduce
from fedqc_simulations.experiments.williams import PredictionRegression, by_sum, cells, failure_bound
from rich.console import Console
from sklearn.metrics import precision_score, recall_score
from torch import nn

import fedqc
from fedqc.alone import Job, train_and_fit
from fedqc.cases.cached import CachedCases
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import ComputeConfig, QCConfig, SegmenterConfig
from fedqc.degradation.annotator import ANNOTATOR_KINDS
from fedqc.display import Display
from fedqc.errors import ConfigError, DataError
from fedqc.methods.base import Known, RoundPlan, RoundResult, get_method
from fedqc.metrics.overlap import overlap
from fedqc.task import load_task
from tests.federation.runs import write_site, write_task

COLUMNS = ("r", "r in folds", "mae", "mse", "before", "after", "precision", "recall", "found", "review")


def judged(patient: str, true: float, predicted: float) -> Judged:
    return Judged(f"case of {patient}", patient, "predictions", {}, true, predicted, {}, 1.0)


def figures(rows: Sequence[Judged]) -> dict[str, Any]:
    fold_of = {one.case: index % 2 for index, one in enumerate(rows)}
    title, *values = cells("a row", rows, fold_of, np.random.default_rng(0))
    assert title == "a row"
    return dict(zip(COLUMNS, values, strict=True))


@pytest.fixture
def display() -> Iterator[Display]:
    with Display(Console(quiet=True)) as display:
        yield display


# ---------------------------------------------------------------------------------------- figures by hand


def test_figures_by_hand() -> None:
    # Three failures, of which two are found; one good prediction is sorted out with them.
    true = [0.2, 0.5, 0.7, 0.8, 0.9, 0.9, 0.8, 0.85, 0.95]
    predicted = [0.3, 0.4, 0.8, 0.7, 0.9, 0.9, 0.9, 0.85, 0.95]
    rows = [judged(f"p{index}", *pair) for index, pair in enumerate(zip(true, predicted, strict=True))]
    found = figures(rows)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["found"] == "2 of 3"
    assert found["review"] == "33.3%"
    assert found["before"] == pytest.approx(np.mean(true))
    assert found["after"] == pytest.approx(np.mean([0.7, 0.9, 0.9, 0.8, 0.85, 0.95]))
    assert found["mse"] == f"{0.05 / 9:.4f}"
    assert found["mae"].startswith(f"{0.5 / 9:.3f} (")
    assert found["r"].startswith(f"{np.corrcoef(true, predicted)[0, 1]:.3f} (")
    in_folds = [np.corrcoef(true[fold::2], predicted[fold::2])[0, 1] for fold in (0, 1)]
    assert found["r in folds"] == pytest.approx(np.mean(in_folds))


def test_precision_and_recall_are_of_failures_and_not_what_the_paper_printed() -> None:
    rng = np.random.default_rng(1)
    true = rng.uniform(0.6, 1, 60)
    predicted = np.clip(true + rng.normal(0, 0.1, 60), 0, 1)
    found = figures(
        [judged(f"p{index}", *pair) for index, pair in enumerate(zip(true, predicted, strict=True))]
    )
    failure, said = true < 0.75, predicted < 0.75
    assert found["precision"] == pytest.approx(precision_score(failure, said))
    assert found["recall"] == pytest.approx(recall_score(failure, said))
    specificity = (~failure & ~said).sum() / (~failure).sum()
    negative_predictive_value = (~failure & ~said).sum() / (~said).sum()
    assert abs(found["precision"] - specificity) > 0.05
    assert abs(found["recall"] - negative_predictive_value) > 0.05


def test_where_hardly_any_prediction_fails_the_worst_tenth_does() -> None:
    assert failure_bound(np.array([0.5] + [0.9] * 19)) == 0.75
    even = np.linspace(0.8, 0.9, 101)
    assert failure_bound(even) == pytest.approx(0.81)
    rows = [judged(f"p{index}", value, value) for index, value in enumerate(even)]
    assert figures(rows)["found"] == "10 of 10"
    assert figures(rows)["review"] == f"{10 / 101:.1%}"


def test_where_nothing_is_sorted_out_there_is_no_precision() -> None:
    found = figures([judged("a", 0.8, 0.9), judged("b", 0.9, 0.8), judged("c", 0.7, 0.8)])
    assert found["precision"] is None
    assert found["recall"] == 0
    assert found["found"] == "0 of 1"
    assert found["review"] == "0.0%"


def test_the_interval_draws_patients() -> None:
    rows = [judged("a", 0.5, 0.5)] * 20 + [judged("b", 0.5, 0.7)] * 20
    assert figures(rows)["mae"] == "0.100 (0.000 to 0.200)"


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_is_brought_to_dsc_by_the_other_folds_alone(sign: int) -> None:
    facts = [judged(f"p{index}", index / 20, 0.0) for index in range(20)]
    values = {one.case: sign * 1000 * one.true for one in facts}
    fold_of = {one.case: index % 5 for index, one in enumerate(facts)}
    rows = by_sum(facts, values, fold_of)
    assert [row.case for row in rows] == [one.case for one in facts]
    assert all(
        row.predicted == pytest.approx(one.true, abs=0.051) for row, one in zip(rows, facts, strict=True)
    )
    # Whatever is true of a fold, its own predictions do not change, and others do.
    wrong = [replace(one, true=0.99) if fold_of[one.case] == 2 else one for one in facts]
    after = by_sum(wrong, values, fold_of)
    same = {
        row.predicted == new.predicted for row, new in zip(rows, after, strict=True) if fold_of[row.case] == 2
    }
    assert same == {True}
    assert any(row.predicted != new.predicted for row, new in zip(rows, after, strict=True))


# ------------------------------------------------------------------------------------------- on small cases


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network so small that a table takes seconds."""
    usual, entries = williams.config, williams.entries
    segmenter = SegmenterConfig(rounds=1, local_steps=4, channels=(4, 8), passes=2)
    small = {"local_steps": 2, "rounds": 1, "batch_size": 2, "segmenter": segmenter}

    def config(*settings: Any) -> QCConfig:
        qc = usual(*settings).model_copy(update=small)
        return qc.model_copy(update={"network": qc.network.model_copy(update={"width": 4})})

    def few(*settings: Any) -> tuple[methods.Entry, ...]:
        chosen = [one for one in entries(*settings) if one.name == "dice-regression-error"]
        return tuple(methods.Entry(one.name, one.title, one.qc.model_copy(update=small)) for one in chosen)

    monkeypatch.setattr(williams, "config", config)
    monkeypatch.setattr(williams, "entries", few)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    task = write_task(tmp_path)
    write_site(tmp_path, "a", task, references=16, good=0, spoiled=0)
    compute = ComputeConfig(device="cpu", precision="fp32")
    data = tmp_path / "sites" / "a" / "data"
    return Settings(data, None, str(task), seed=0, quick=True, sites=0, compute=compute)


@pytest.fixture
def workshop(settings: Settings, tmp_path: Path, display: Display) -> Workshop:
    return open_workshop("williams", settings, tmp_path / "out", display, None)


@pytest.mark.usefixtures("quickly")
def test_all_of_it_and_once_more(
    settings: Settings, tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    text = reproduce("williams", settings, out, display).read_text()
    own, mixed = json.loads((out / "table.json").read_text())["tables"]
    assert [row[0] for row in own["rows"]] == [
        "Sum of uncertainty",
        "Sum of error",
        "Regression on image",
        "Regression on uncertainty",
        "Regression on error",
    ]
    assert "16 predictions for 16 patients in 5 folds" in own["notes"][0]
    assert "specificity" in own["notes"][1]
    before = {row[5] for row in own["rows"]}
    assert len(before) == 1  # the same predictions in every row
    assert [row[0] for row in mixed["rows"]] == ["Regression on error"]
    assert mixed["title"].startswith(williams.ON_ANNOTATIONS)
    assert {path.name for path in out.glob("*.png")} == {"predictions.png", "maps.png", "annotations.png"}
    rows = [
        [json.loads(line)["case"] for line in path.read_text().splitlines()]
        for path in sorted((out / "rows").glob("image-fold-*.jsonl"))
    ]
    assert [len(row) for row in rows] == [4, 3, 3, 3, 3]
    assert len({case for row in rows for case in row}) == 16

    for module in (FoldNetworks, PredictionRegression):
        monkeypatch.setattr(module, "train_round", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(FoldSegmenter, "predict", lambda *_, **__: pytest.fail("predicted again"))
    monkeypatch.setattr(methods, "_trained", lambda *_, **__: pytest.fail("trained again"))
    assert reproduce("williams", settings, out, display).read_text() == text


@pytest.mark.usefixtures("quickly")
def test_nobody_is_judged_by_a_network_that_learned_from_the_patient(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: dict[int, set[str]] = {}
    seen: list[set[str]] = []
    alive: list[nn.Module] = []  # or two networks could have the same id
    train, predict = FoldNetworks.train_round, FoldSegmenter.predict

    def training(self: Any, network: nn.Module, cases: CachedCases, *rest: Any, **more: Any) -> RoundResult:
        alive.append(network)
        learned.setdefault(id(network), set()).update(case.patient for case in cases)
        return train(self, network, cases, *rest, **more)

    def predicting(self: Any, network: nn.Module, case: Case, compute: Compute) -> Any:
        assert case.patient not in learned[id(network)]
        seen.append(learned[id(network)] | {case.patient})
        return predict(self, network, case, compute)

    monkeypatch.setattr(FoldNetworks, "train_round", training)
    monkeypatch.setattr(FoldSegmenter, "predict", predicting)
    qc = williams.config(workshop.task, True)
    made = predictions.make_predictions(workshop, qc)
    everyone = {files.patient for files in workshop.cases}
    assert len(seen) == 16
    assert len(learned) == 5
    assert all(len(everyone - patients) <= 3 for patients in seen)  # the other patients of the fold

    tried_on: list[tuple[set[str], set[str]]] = []
    regress = PredictionRegression.train_round

    def regressing(self: Any, network: nn.Module, cases: CachedCases, *rest: Any, **more: Any) -> RoundResult:
        tried_on.append((set(cases.patients), set()))
        result = regress(self, network, cases, *rest, **more)
        assert result.drawn is not None
        assert {kind for _, kind, _ in result.drawn.made} == {"snapshots"}  # predictions and nothing else
        return result

    monkeypatch.setattr(PredictionRegression, "train_round", regressing)
    rows = williams.judged_predictions(workshop, qc, made)
    folds = [{files.patient for files in workshop.cases if made.fold_of(files) == fold} for fold in range(5)]
    assert [patients for patients, _ in tried_on] == [everyone - fold for fold in folds] * 3
    assert all({one.patient for one in judged} == everyone for judged in rows.values())


@pytest.mark.usefixtures("quickly")
def test_what_is_kept_of_a_prediction_is_true(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segmenter that is half sure of half of the volume, and a reconstruction that gives back 1/4."""

    class HalfSure(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(1, 2, *x.shape[2:])
            logits[:, 1, :8] = 1e-3
            logits[:, 0, 8:] = 50
            return logits

    class Quarter(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x == 0, 0.25, x)

    networks = nn.ModuleDict({"segmenter": HalfSure(), "reconstruction": Quarter()})
    monkeypatch.setattr(predictions, "_trained", lambda *_: networks)
    made = predictions.make_predictions(workshop, williams.config(workshop.task, True))
    for case in workshop.opened(workshop.cases):
        label = made.labels.read(case, 0)
        assert label[:8].all()
        assert not label[8:].any()
        reference = torch.from_numpy(np.array(case.label))[None]
        truth = overlap(torch.from_numpy(label)[None], reference, workshop.task.region_indices())
        (known,) = made.labels.of(case)
        assert known.mean == pytest.approx(truth.mean.item())
        assert known.recipe == {"fold": made.fold_of(case) + 1}
        uncertainty, error = (made.map_of(case.id, name) for name in MAPS)
        assert np.allclose(uncertainty[:8], 1, atol=1e-3)
        assert not uncertainty[8:].any()
        assert made.sum_of(case.id, "uncertainty") == pytest.approx(8 * 16 * 16, rel=1e-3)
        image = np.array(case.image[0])
        scaled = (image - image.min()) / (image.max() - image.min())
        expected = np.where(label > 0, 0.25 - scaled, np.where(scaled == 0, 0.25, 0))
        np.testing.assert_allclose(error, expected, atol=2e-3)
        assert made.sum_of(case.id, "error") == pytest.approx(expected.sum(), rel=1e-3)


@pytest.mark.usefixtures("quickly")
def test_a_training_that_was_cut_off_goes_on_with_the_next_network(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    train = FoldNetworks.train_round

    def training(self: Any, network: nn.Module, cases: Any, plan: RoundPlan, *rest: Any, **more: Any) -> Any:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(plan.site)
        return train(self, network, cases, plan, *rest, **more)

    qc = williams.config(workshop.task, True)
    monkeypatch.setattr(FoldNetworks, "train_round", training)
    with pytest.raises(KeyboardInterrupt):
        predictions.make_predictions(workshop, qc)
    assert trained == ["segmenter, fold-1", "reconstruction, fold-1", "segmenter, fold-2"]
    trained[:] = [""] * 4  # no further interruption
    again = predictions.make_predictions(workshop, qc)
    assert trained[4] == "reconstruction, fold-2"
    assert len(trained) - 4 == 7

    whole = open_workshop(
        "williams", workshop.settings, workshop.out.with_name("whole"), workshop.display, None
    )
    at_once = predictions.make_predictions(whole, qc)
    for files in workshop.cases:
        assert again.sum_of(files.id, "error") == at_once.sum_of(files.id, "error")


def test_too_few_patients(workshop: Workshop) -> None:
    with pytest.raises(DataError, match="15 patients can be used; five folds and 4 sites take 16 at least"):
        williams.reproduce(replace(workshop, cases=workshop.cases[:15]))


@pytest.mark.parametrize("quick", [False, True])
def test_the_configurations_fit_their_tasks(quick: bool) -> None:
    for name, rebuilt in (("msd-hippocampus", ("T1",)), ("phantom-lesions", ("FLAIR",)), ("wmh", ("FLAIR",))):
        task = load_task(name)
        qc = williams.config(task, quick)
        networks = FoldNetworks(task, qc)
        assert tuple(task.modalities[index] for index in networks.reconstructors.channels) == rebuilt
        entries = williams.entries(task, quick)
        assert [entry.name for entry in entries] == [
            "expected-dice",
            "dice-regression-image",
            "dice-regression-uncertainty",
            "dice-regression-error",
            "ensemble",
            "rca",
            "qcresunet",
            "combine",
        ]
        assert len({entry.title for entry in entries}) == len(entries)
        for entry in entries:
            assert entry.method(task).judges == "label"
            if entry.name.startswith("dice-regression"):
                assert entry.name.endswith(entry.qc.regression.input)
    assert williams.config(load_task("wmh"), quick, 3).segmenter.rounds == 3


# --------------------------------------------------------------------------------------------- phantoms


def test_without_data_phantoms_are_drawn_once(
    tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = ComputeConfig(device="cpu", precision="fp32")
    settings = Settings(None, None, "phantom-lesions", seed=3, quick=True, sites=0, compute=compute)
    workshop = open_workshop("williams", settings, tmp_path / "out", display, 5)
    assert len(workshop.cases) == 5
    assert len(list((tmp_path / "out" / "phantoms" / "imagesTr").iterdir())) == 8  # two for each scanner
    assert workshop.opened(workshop.cases)[0].image.shape == (2, 48, 64, 48)
    monkeypatch.setattr(base, "write_phantoms", lambda *_, **__: pytest.fail("drawn again"))
    again = open_workshop("williams", settings, tmp_path / "out", display, 5)
    assert [files.id for files in again.cases] == [files.id for files in workshop.cases]
    with pytest.raises(ConfigError, match="other data"):
        open_workshop("williams", replace(settings, data=tmp_path), tmp_path / "out", display, 5)
    with pytest.raises(ConfigError, match="task 'wmh' needs a data set"):
        open_workshop("williams", replace(settings, task="wmh"), tmp_path / "new", display, 5)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------- two real MS cases


@pytest.mark.real_data
def test_real_lesions_from_end_to_end(real_data: Path, tmp_path: Path, display: Display) -> None:
    """Trained on eight phantoms for a few steps, tried on two cases: that it runs, and nothing else.

    No folds are made of two cases, and no figure of them means anything.
    """
    compute = ComputeConfig(device="cpu", precision="fp32")
    settings = Settings(None, None, "phantom-lesions", seed=0, quick=True, sites=0, compute=compute)
    workshop = open_workshop("williams", settings, tmp_path / "out", display, 8)
    qc = QCConfig(
        rounds=1,
        local_steps=4,
        batch_size=2,
        segmenter=SegmenterConfig(rounds=1, local_steps=4, channels=(4, 8), passes=2),
        reconstruction=williams.config(workshop.task, True).reconstruction,
        leave_out=ANNOTATOR_KINDS,  # fewer labels to fit to
    )
    for name in ("expected-dice", "dice-regression", "uncertainty-sum", "error-sum"):
        of_method = qc.model_copy(update={"method": name})
        method, folder = get_method(name)(workshop.task, of_method), tmp_path / name
        cases, job = workshop.opened(workshop.cases), Job(workshop.task, of_method, seed=0)
        train_and_fit(job, method, cases, Known(), folder, compute=workshop.compute, display=display)
        model = fedqc.load_model(folder, device="cpu", precision="fp32")
        for patient in ("patient07", "patient19"):
            place = real_data / "open_ms_data" / patient
            image = {"T1": place / "t1.nii.gz", "FLAIR": place / "flair.nii.gz"}
            found = model.score(image, place / "lesions.nii.gz")
            lesions = nibabel.load(place / "lesions.nii.gz")
            assert isinstance(lesions, nibabel.Nifti1Image)
            shifted = np.roll(np.asarray(lesions.dataobj), 30, axis=1)
            nibabel.save(nibabel.Nifti1Image(shifted, lesions.affine), tmp_path / "shifted.nii.gz")
            moved = model.score(image, tmp_path / "shifted.nii.gz")
            sys.stdout.write(f"{name}, {patient}: {found.quality:.4f}; moved by 30 mm: {moved.quality:.4f}\n")
            for score in (found, moved):
                assert 0 <= score.quality <= 1
                assert set(score.regions) == {"lesion"}
            if method.judges == "prediction":  # blind for any label, which is why curation refuses it
                assert found.quality == moved.quality
            elif found.error_map is not None and moved.error_map is not None:
                assert found.error_map.shape == lesions.shape
                assert not np.array_equal(found.error_map, moved.error_map)
