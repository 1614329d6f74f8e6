"""Networks that are trained to make labels: on whom, what is kept, and what is not made twice."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig, SamplesConfig, SourcesConfig
from fedqc.errors import ConfigError, TrainingError
from fedqc.label_sources.making import (
    CaseLabels,
    label_store,
    make_stored_labels,
    segmenter_source,
    stored_labels,
)
from fedqc.label_sources.segmenters import make_labels
from fedqc.label_sources.side_outputs import SideOutputSource
from fedqc.label_sources.snapshots import SnapshotSource
from fedqc.methods.base import RoundPlan, RoundResult
from fedqc.metrics.overlap import overlap
from fedqc.task import Task
from fedqc.training import Progress

FP32 = Compute(torch.device("cpu"), torch.float32)
SMALL = SourcesConfig(rounds=3, local_steps=1, width=4, learning_rate=0.01, trees=2)


@pytest.fixture
def task() -> Task:
    return Task(
        name="box",
        modalities=("T1", "T2"),
        classes={"core": (1,), "rim": (2,)},
        regions={"core": ("core",), "whole": ("core", "rim")},
        spacing=(1.0, 1.0, 1.0),
        size=(16, 16, 16),
    )


@pytest.fixture
def cases() -> list[Case]:
    return [make(number) for number in range(4)]


def make(number: int) -> Case:
    """A bright box in the first modality; the second is noise."""
    rng = np.random.default_rng(number)
    label: NDArray[np.uint8] = np.zeros((16, 16, 16), dtype=np.uint8)
    x, y, z = rng.integers(2, 6, 3)
    label[x : x + 8, y : y + 8, z : z + 8] = 2
    label[x + 2 : x + 6, y + 2 : y + 6, z + 2 : z + 6] = 1
    seen = label + rng.normal(0, 0.1, label.shape)
    image = np.stack([seen, rng.normal(size=label.shape)]).astype(np.float32)
    return Case(
        id=f"case-{number}",
        patient=f"patient-{number}",
        image=image,
        label=label,
        affine=np.eye(4),
        native_shape=(16, 16, 16),
        native_affine=np.eye(4),
    )


class Spy(SnapshotSource):
    """Writes down whom each network learned from and whom it segments."""

    def __init__(self, task: Task, config: SourcesConfig) -> None:
        super().__init__(task, config)
        self.learned: dict[int, set[str]] = {}
        self.segmented: dict[int, set[str]] = {}

    def train_round(
        self,
        variant: str,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        *,
        progress: Progress | None = None,
    ) -> RoundResult:
        self.learned.setdefault(id(network), set()).update(case.patient for case in cases)
        return RoundResult({"loss": 0.0}, 1)

    def segment(self, variant: str, network: nn.Module, case: Case, compute: Compute) -> Any:
        self.segmented.setdefault(id(network), set()).add(case.patient)
        return super().segment(variant, network, case, compute)


def test_no_network_segments_whom_it_learned_from(task: Task, cases: list[Case], tmp_path: Path) -> None:
    source = Spy(task, SMALL)
    networks = []
    build = source.build
    source.build = lambda variant, seed: networks.append(build(variant, seed)) or networks[-1]  # type: ignore[method-assign, func-returns-value]
    store = label_store(tmp_path, source.name, task, SMALL, 0)
    make_labels(source, cases, store, seed=0, compute=FP32)
    assert len(networks) == 3 * 2  # both modalities together and each alone, in two folds
    everyone = {case.patient for case in cases}
    for network in networks:
        learned, segmented = source.learned[id(network)], source.segmented[id(network)]
        assert learned | segmented == everyone
        assert not learned & segmented
    assert all(len(store.of(case)) == 3 * 3 for case in cases)


def test_what_is_there_is_not_made_again(task: Task, cases: list[Case], tmp_path: Path) -> None:
    first = Spy(task, SMALL)
    store = label_store(tmp_path, first.name, task, SMALL, 0)
    make_labels(first, cases, store, seed=0, compute=FP32)
    again = Spy(task, SMALL)
    told: list[tuple[int, int]] = []
    make_labels(again, cases, store, seed=0, compute=FP32, progress=lambda *done: told.append(done))
    assert not again.learned
    assert not told
    make_labels(again, [*cases, make(9)], store, seed=0, compute=FP32)
    assert again.learned


@pytest.mark.parametrize("change", ["corrected", "gone"])
def test_labels_are_those_of_networks_that_learned_from_the_present_cases(
    task: Task, cases: list[Case], tmp_path: Path, change: str
) -> None:
    changed = cases[1:]
    if change == "corrected":
        changed = [replace(cases[0], label=np.roll(cases[0].label, 3, axis=0)), *changed]
    config = SMALL.model_copy(update={"rounds": 1, "local_steps": 4, "learning_rate": 0.02})
    source = segmenter_source("snapshots", task, config)
    store, anew = (label_store(tmp_path / name, source.name, task, config, 0) for name in ("kept", "anew"))
    make_labels(source, cases, store, seed=0, compute=FP32)
    make_labels(source, changed, store, seed=0, compute=FP32)
    make_labels(source, changed, anew, seed=0, compute=FP32)
    for case in changed:
        assert store.of(case) == anew.of(case)
        for index in range(len(anew.of(case))):
            assert np.array_equal(store.read(case, index), anew.read(case, index))
    told: list[tuple[int, int]] = []
    make_labels(source, changed[::-1], store, seed=0, compute=FP32, progress=lambda *done: told.append(done))
    assert not told


def test_snapshots_get_better_and_know_their_quality(task: Task, cases: list[Case], tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"rounds": 4, "local_steps": 12, "learning_rate": 0.02})
    source = segmenter_source("snapshots", task, config)
    store = label_store(tmp_path, source.name, task, config, 0)
    make_labels(source, cases, store, seed=0, compute=FP32)
    means: dict[tuple[str, int], list[float]] = {}
    for case in cases:
        for index, known in enumerate(store.of(case)):
            means.setdefault((known.recipe["variant"], known.recipe["round"]), []).append(known.mean)
            label, reference = (torch.from_numpy(one)[None] for one in (store.read(case, index), case.label))
            assert known.mean == pytest.approx(overlap(label, reference, task.region_indices()).mean.item())
    quality = {key: float(np.mean(values)) for key, values in means.items()}
    assert quality["all-modalities", 4] > quality["all-modalities", 1] + 0.1
    assert quality["T1", 4] > quality["T2", 4] + 0.1  # the second modality shows nothing


def test_a_seed_decides_the_labels(task: Task, cases: list[Case], tmp_path: Path) -> None:
    labels = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        source = segmenter_source("snapshots", task, SMALL)
        store = label_store(tmp_path / str(number), source.name, task, SMALL, seed)
        make_labels(source, cases, store, seed=seed, compute=FP32)
        labels.append([store.read(case, index) for case in cases for index in range(len(store.of(case)))])
    assert all(np.array_equal(a, b) for a, b in zip(labels[0], labels[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(labels[0], labels[2], strict=True))


@pytest.mark.parametrize("variant", ["3d", "2d"])
def test_side_outputs_are_those_of_the_network(task: Task, cases: list[Case], variant: str) -> None:
    source = SideOutputSource(task, SMALL)
    network = source.build(variant, 0).eval()
    made = source.segment(variant, network, cases[0], FP32)
    assert [recipe["output"] for recipe, _ in made] == ["final", "side-2", "side-3", "side-4", "side-5"]
    image = torch.from_numpy(cases[0].image)
    least, most = (end(image, dim=(1, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
    image = 2 * (image - least) / (most - least) - 1
    with torch.inference_mode():
        if variant == "3d":
            final = network(image[None]).final[0].argmax(dim=0)
        else:
            final = torch.stack(
                [network(image[None, ..., z]).final[0].argmax(dim=0) for z in range(16)], dim=-1
            )
    agreement = (final.numpy() == made[0][1]).mean()
    assert agreement > 0.999  # batches of slices and single ones round differently


def test_side_outputs_learn(task: Task, cases: list[Case]) -> None:
    source = SideOutputSource(task, SMALL)
    for variant in source.variants:
        network = source.build(variant, 0)
        plans = [RoundPlan(0, "a", number, 2, 8, 2) for number in (1, 2)]
        first, second = (
            source.train_round(variant, network, cases, plan, FP32).losses["loss"] for plan in plans
        )
        assert second < first


def test_all_sources_with_a_share_are_made_and_found(task: Task, cases: list[Case], tmp_path: Path) -> None:
    samples = SamplesConfig(snapshots=0.2, forest=0.2, side_outputs=0.2)
    config = QCConfig(samples=samples, sources=SMALL)
    told: set[str] = set()
    make_stored_labels(
        tmp_path, cases, task, config, seed=0, compute=FP32, progress=lambda kind, *_: told.add(kind)
    )
    assert told == {"snapshots", "forest", "side-outputs"}
    stored = stored_labels(tmp_path, cases, task, config, 0)
    assert {kind: labels.total for kind, labels in stored.items()} == {
        "snapshots": 4 * 3 * 3,
        "forest": 4 * 10,
        "side-outputs": 4 * 10,
    }
    assert isinstance(stored["forest"], CaseLabels)
    assert stored["forest"].count(1) == 10
    assert stored["forest"].read(1, 0).shape == (16, 16, 16)
    assert not stored_labels(tmp_path, cases, task, config, 1)["forest"].total  # another seed, other labels


def test_one_patient_is_too_few(task: Task, cases: list[Case], tmp_path: Path) -> None:
    source = segmenter_source("snapshots", task, SMALL)
    store = label_store(tmp_path, source.name, task, SMALL, 0)
    with pytest.raises(TrainingError, match="two patients"):
        make_labels(source, cases[:1], store, seed=0, compute=FP32)


def test_no_networks_make_labels_of_a_forest(task: Task) -> None:
    with pytest.raises(ConfigError, match="no networks make labels of kind 'forest'"):
        segmenter_source("forest", task, SMALL)
