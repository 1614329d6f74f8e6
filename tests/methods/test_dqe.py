from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import fedqc
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.preprocessing import preprocess
from fedqc.cases.volumes import Case, read_volume
from fedqc.compute import Compute
from fedqc.config import DQEConfig, QCConfig, SamplesConfig
from fedqc.errors import ConfigError, DataError, TrainingError
from fedqc.importing import DQE_PACKAGE, import_dqe
from fedqc.methods import dqe as module
from fedqc.methods.base import Known, RoundPlan, begin_stage, check_start
from fedqc.methods.dqe import DQEMethod, _Discount, stars_by_view
from fedqc.model import ModelCard, load_weights, save_model
from fedqc.ratings import Rating
from fedqc.task import Task
from fedqc.views import VIEWS, views_of_case

CPU = Compute(torch.device("cpu"), torch.float32)


def method_of(task: Task, **dqe: Any) -> DQEMethod:
    return DQEMethod(task, QCConfig(method="dqe", dqe=DQEConfig(**({"batch_size": 6} | dqe))))


def plan(**changes: Any) -> RoundPlan:
    return replace(RoundPlan(seed=3, site="a", round=1, rounds=1, steps=1, batch_size=6), **changes)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices as they are, for tests of what is learned."""
    monkeypatch.setattr(module, "augment_slice", lambda rng, views, n_modalities: views)


def test_parts_and_stage(task: Task) -> None:
    method = method_of(task)
    network = method.build(1)
    assert [name for name, _ in network.named_children()] == ["rater"]
    # The published network's size is 6,967,425 with 7 channels in the first of 64 filters of 7x7 voxels.
    n_weights = sum(weight.numel() for weight in network.parameters())
    assert n_weights == 6_967_425 - (7 - 5) * 64 * 49
    assert not [name for name in network.state_dict() if "num_batches" in name]
    (stage,) = method.stages()
    assert (stage.part, stage.needs, stage.learns_from, stage.batch_size) == ("rater", (), "rated", 6)
    same = method.build(1).state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in network.state_dict().items())
    large = method_of(task, architecture="densenet201", encoding="tissue").build(0)
    assert sum(weight.numel() for weight in large.parameters()) > 2 * n_weights
    assert large.state_dict()["rater.features.conv0.weight"].shape[1] == 4


def test_scores(task: Task, cases: list[Case]) -> None:
    method = method_of(task)
    network = method.build(0)
    found = list(method.score(network, cases, CPU))
    assert [score.case_id for score in found] == [case.id for case in cases]
    with torch.inference_mode():
        expected = network["rater"].eval()(views_of_case(cases[1], task, method.look))[:, 0]
    score = found[1]
    assert list(score.views.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert list(score.views) == list(VIEWS)
    assert score.stars == pytest.approx(expected.mean().item(), abs=1e-5)
    assert score.stars is not None
    assert score.quality == pytest.approx((score.stars - 1) / 5)
    assert score.regions == {} == method.scored_regions()
    assert {score.figures[name] for name in method.figures} == {score.stars, *score.views.values()}


def test_an_empty_label_has_one_star(task: Task, cases: list[Case]) -> None:
    method = method_of(task)
    empty = replace(cases[0], label=np.zeros_like(cases[0].label))
    (score,) = method.score(method.build(0), [empty], CPU)
    assert (score.quality, score.stars) == (0, 1)
    allowed = method_of(task.model_copy(update={"empty_label": "allowed"}))
    (judged,) = allowed.score(allowed.build(0), [empty], CPU)
    assert judged.stars is not None
    assert judged.stars > 1


def test_ratings_of_a_view() -> None:
    ratings = [
        Rating("a", "x", "axial", 2),
        Rating("a", "y", "axial", 5),
        Rating("a", "y", "all", 5),
    ]
    assert stars_by_view(ratings) == {"axial": 4, "coronal": 5, "sagittal": 5}
    assert stars_by_view(ratings[:1]) == {"axial": 2}
    assert stars_by_view([]) == {}


def rated(cases: Sequence[Case], stars: Sequence[float]) -> Known:
    return Known(
        ratings={
            case.id: (Rating(case.id, "x", "all", value),) for case, value in zip(cases, stars, strict=True)
        }
    )


@pytest.mark.usefixtures("plain")
def test_learns_what_people_thought(task: Task, cases: list[Case]) -> None:
    spoilt = [replace(case, label=np.where(case.label == 1, 2, case.label)) for case in cases[:2]]
    shown = [*cases[:2], *(replace(case, id=f"{case.id}-bad") for case in spoilt)]
    known = rated(shown, [5.5, 5.5, 1.5, 1.5])
    method = method_of(task)
    network = method.build(0)
    result = method.train_round(network, shown, plan(steps=10), CPU, known=known)
    assert result.samples == 60
    assert result.drawn is None
    good, _, bad, _ = (score.stars for score in method.score(network, shown, CPU))
    assert good is not None
    assert bad is not None
    assert good - bad > 0.25, (good, bad)


def test_a_round_is_the_same_for_the_same_seed(task: Task, cases: list[Case]) -> None:
    method, known = method_of(task), rated(cases, [1, 2, 3, 4, 5])
    networks = [method.build(0), method.build(0)]
    for network in networks:
        method.train_round(network, cases, plan(), CPU, known=known)
    first, second = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert not torch.equal(
        first["rater.features.conv0.weight"], method.build(0).state_dict()["rater.features.conv0.weight"]
    )


def test_nothing_is_rated(task: Task, cases: list[Case]) -> None:
    method = method_of(task)
    with pytest.raises(TrainingError, match="none of the cases that are there for training has a rating"):
        method.train_round(method.build(0), cases, plan(), CPU)


def test_what_a_degraded_label_keeps_of_its_stars() -> None:
    dsc = np.array([0.2, 0.5, 0.5, 0.9])
    blind = _Discount(dsc, np.array([1.0, 1.0, 0.98, 1.0]))  # hardly takes notice: in proportion
    assert [blind.of(at) for at in (0, 0.2, 0.5, 0.7, 1)] == pytest.approx([0, 0.2, 0.5, 0.7, 1])
    strict = _Discount(dsc, np.array([0.1, 0.4, 0.2, 0.85]))
    assert [strict.of(at) for at in (0, 0.2, 0.5, 0.9, 1)] == pytest.approx([0, 0.1, 0.3, 0.85, 1])
    unsteady = _Discount(dsc, np.array([0.2, 0.1, 0.1, 0.9]))
    assert unsteady.of(0.2) == pytest.approx(unsteady.of(0.5)) == pytest.approx(0.4 / 3)


@pytest.mark.usefixtures("plain")
def test_distilled_from_a_teacher(task: Task, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISCOUNT_LABELS", 4)
    config = QCConfig(
        method="dqe",
        dqe=DQEConfig(targets="distilled", batch_size=6),
        samples=SamplesConfig(seggen=0, annotator=1, untouched=1),
    )
    method = DQEMethod(task, config)
    (stage,) = method.stages()
    assert (stage.part, stage.needs, stage.learns_from) == ("rater", ("teacher",), "references")
    taught = method_of(task).build(5)  # another model, which rates
    network = method.build(0)
    load_weights(network, method.initial_state(taught.state_dict()), source="test")
    begin_stage(network, stage)
    before = {name: tensor.clone() for name, tensor in network["teacher"].state_dict().items()}
    seen = []

    def losses(rater: nn.Module, batch: module.RatedSlices) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return DQEMethod.losses(rater, batch)

    monkeypatch.setattr(method, "losses", losses)
    result = method.train_round(network, cases, plan(steps=4), CPU)
    assert result.drawn is not None
    assert {kind for _, kind, _ in result.drawn.chosen} > {"untouched"}
    assert torch.equal(
        network.state_dict()["rater.features.norm0.running_mean"], before["features.norm0.running_mean"]
    )
    assert not torch.equal(
        network.state_dict()["rater.features.norm0.weight"], before["features.norm0.weight"]
    )
    after = network["teacher"].state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    own = torch.stack([network["teacher"](views_of_case(case, task, method.look))[:, 0] for case in cases])
    untouched = torch.stack([views_of_case(case, task, method.look) for case in cases])
    n_untouched = 0
    for batch in seen:
        for slice_, stars in zip(batch.inputs, batch.stars, strict=True):
            same = (untouched == slice_).all(dim=(2, 3, 4))
            if same.any():
                n_untouched += 1
                assert (own[same] - stars).abs().min() < 1e-4
            assert 1 <= stars <= own.max() + 1e-4
    assert 0 < n_untouched < 24


def test_distilling_needs_a_teacher(task: Task) -> None:
    method = method_of(task, targets="distilled")
    with pytest.raises(ConfigError, match=r"learns from a trained network of its own kind; name one as qc\."):
        check_start(method)
    check_start(method_of(task))


def test_unknown_kind_of_error(task: Task) -> None:
    with pytest.raises(ConfigError, match="leave_out names hole; kinds of label error are untouched, "):
        DQEMethod(task, QCConfig(leave_out=("hole",)))


def test_averaged_variances_below_zero_count_as_zero(task: Task, cases: list[Case]) -> None:
    method = method_of(task)
    network = method.build(0)
    network.state_dict()["rater.features.norm0.running_var"][:] = -1e-3
    assert all(np.isfinite(score.quality) for score in method.score(network, cases[:1], CPU))


def test_files_come_to_what_their_case_does(tmp_path: Path, task: Task) -> None:
    method = method_of(task)
    card = ModelCard(task=task, qc=method.config, federation="", seed=0, rounds=0, samples=0, sites=())
    save_model(tmp_path / "model", method.build(2).state_dict(), card)
    model = fedqc.load_model(tmp_path / "model", device="cpu")
    rng = np.random.default_rng(0)
    image = rng.uniform(1, 99, (2, 30, 14, 15)).astype(np.float32)
    label = np.zeros((30, 14, 15), dtype=np.uint8)
    label[8:20, 3:10, 4:12] = 2
    label[10:14, 5:8, 6:9] = 1
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("T1", "T2", "label")}
    for path, volume in zip(paths.values(), (*image, label), strict=True):
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    found = model.score({"T1": paths["T1"], "T2": paths["T2"]}, paths["label"])
    case = preprocess(CaseFiles("", "", (paths["T1"], paths["T2"]), paths["label"]), task)
    (expected,) = method.score(method.build(2), [case], CPU)
    assert found.stars == pytest.approx(expected.stars, abs=1e-4)
    assert found == model.score(image, label)
    coarse = model.score(image, label, spacing=(2, 2, 2))  # resampled, so read as a whole
    assert coarse.stars != found.stars
    with pytest.raises(DataError, match="found a label without any marked voxel"):
        model.score(image, 0 * label)
    strange = label.copy()
    strange[0, 0, 0] = 7
    with pytest.raises(DataError, match="label: found label value 7 in 1 voxel"):
        model.score(image, strange)


# ------------------------------------------------------------------------------------- published scores

PUBLISHED = {
    "seg-BraTS23_1": (5.315627, 5.452539, 5.138649, 5.355692),
    "seg-bratstoolkit_isen": (5.239011, 5.330348, 5.036618, 5.350067),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution(DQE_PACKAGE)
    except PackageNotFoundError:
        pytest.skip(f"the package {DQE_PACKAGE} is not installed (pip install fedqc[dqe])")
    folder = tmp_path_factory.mktemp("dqe") / "model"
    card = import_dqe(folder)
    assert (card.licence, card.task.name) == ("Apache-2.0", "brats-glioma")
    return fedqc.load_model(folder, device="cpu")


@pytest.mark.real_data
def test_published_scores(real_data: Path, published: Any) -> None:
    folder = real_data / "BraTS-GLI-00001-000"
    images = {name: folder / f"BraTS-GLI-00001-000-{name}.nii.gz" for name in ("t1n", "t1c", "t2w", "t2f")}
    arrays = {name: read_volume(path).data for name, path in images.items()}
    for name, expected in PUBLISHED.items():
        path = folder / f"{name}.nii.gz"
        found = published.score(images, path)
        assert [found.stars, *found.views.values()] == pytest.approx(expected, abs=1e-3)
        stored = read_volume(path)
        label = stored.data
        assert (4 in label) == (name == "seg-bratstoolkit_isen")
        for values in (label, np.where(label == 4, 3, label), np.where(label == 3, 4, label)):
            again = published.score(arrays, values, affine=stored.affine)
            assert [again.stars, *again.views.values()] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(DataError, match="found a label without any marked voxel"):
        published.score(images, 0 * label)


@pytest.mark.real_data
def test_published_scores_of_the_prepared_case(real_data: Path, published: Any) -> None:
    folder = real_data / "BraTS-GLI-00001-000"
    images = tuple(folder / f"BraTS-GLI-00001-000-{name}.nii.gz" for name in ("t1n", "t1c", "t2w", "t2f"))
    task = published.card.task
    stored = published._stored
    case = preprocess(CaseFiles("a", "p", images, folder / "seg-BraTS23_1.nii.gz"), task)
    (found,) = stored.method.score(stored.network, [case], CPU)
    assert [found.stars, *found.views.values()] == pytest.approx(PUBLISHED["seg-BraTS23_1"], abs=1e-3)
