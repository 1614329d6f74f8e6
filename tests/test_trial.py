"""Models whose answers are known, tried on labels whose errors are known."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig
from fedqc.degradation.samples import ALL_KINDS
from fedqc.methods.base import Method, RoundResult, Score
from fedqc.seeding import generator
from fedqc.task import Task
from fedqc.trial import Tried, trial_figures, try_model

CPU = Compute(torch.device("cpu"), torch.float32)
SHAPE = (16, 16, 16)


def block(start: int) -> NDArray[np.uint8]:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[start : start + 7, 4:11, 5:9] = 1
    label[start : start + 7, 4:11, 9:12] = 2
    return label


def case(name: str, start: int) -> Case:
    label = block(start)
    return Case(name, f"p-{name}", label[None].astype(np.float32), label, np.eye(4), SHAPE, np.eye(4))


@pytest.fixture
def task() -> Task:
    return Task(
        name="blocks",
        modalities=("T1",),
        classes={"left": (1,), "right": (2,)},
        regions={"left": ("left",), "right": ("right",)},
        spacing=(1.0, 1.0, 1.0),
        size=SHAPE,
    )


class Knowing(Method):
    """Reads the right label off the image; says `share` of the truth, and half of a wrong voxel's error."""

    name = "knowing"
    judges = "label"
    share = 1.0
    certainty = 1.0

    def build(self, seed: int) -> nn.Module:
        return nn.Identity()

    def train_round(self, *_: Any, **__: Any) -> RoundResult:
        raise AssertionError("nobody trains it here")

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int = 8
    ) -> Iterator[Score]:
        for one in cases:
            right, label = one.image[0], one.label
            dsc = [
                2 * ((right == k) & (label == k)).sum() / ((right == k).sum() + (label == k).sum())
                for k in (1, 2)
            ]
            error = np.where(right != label, self.certainty, 0).astype(np.float32)
            yield Score(one.id, self.share * float(np.mean(dsc)), {}, error)


def tried_with(task: Task, cases: Sequence[Case], **changes: float) -> list[Tried]:
    method = Knowing(task, QCConfig())
    for name, value in changes.items():
        setattr(method, name, value)
    return try_model(method, nn.Identity(), cases, generator(3), CPU)


def test_one_label_of_every_kind_and_case(task: Task) -> None:
    tried = tried_with(task, [case("a", 2), case("b", 5)])
    assert [one.patient for one in tried] == sorted(one.patient for one in tried)
    for patient in ("p-a", "p-b"):
        assert [one.kind for one in tried if one.patient == patient] == list(ALL_KINDS)
    by_kind = {one.kind: one for one in tried}
    assert by_kind["untouched"].true_dsc == 1
    assert by_kind["swapped-classes"].true_dsc == 0
    assert by_kind["another-patient"].true_dsc < 1


def test_a_model_that_knows(task: Task) -> None:
    tried = tried_with(task, [case("a", 2), case("b", 5)])
    assert all(one.predicted_dsc == pytest.approx(one.true_dsc, abs=1e-6) for one in tried)
    assert {one.error_dsc for one in tried if one.true_dsc < 1} == {1.0}
    assert {one.error_dsc for one in tried if one.true_dsc == 1} == {None}
    figures = trial_figures(tried, generator(1))
    assert (figures["n"], figures["patients"]) == (len(tried), 2)
    assert figures["r"] == pytest.approx(1)
    assert figures["mae"] == pytest.approx(0, abs=1e-6)
    assert figures["dsc_err_median"] == 1


def test_a_model_that_knows_half(task: Task) -> None:
    tried = tried_with(task, [case("a", 2), case("b", 5)], share=0.5, certainty=0.4)
    figures = trial_figures(tried, generator(1))
    true = [one.true_dsc for one in tried]
    assert figures["r"] == pytest.approx(1)
    assert figures["mae"] == pytest.approx(np.mean(true) / 2)
    assert figures["dsc_err_median"] == 0  # an error counts from 0.5


def test_figures_by_hand() -> None:
    tried = [
        Tried("p", "shift", 0.2, 0.4, 0.5),
        Tried("p", "shift", 0.6, 0.5, 0.9),
        Tried("p", "stale-label", 0.8, 0.8, 0.6),
        Tried("q", "untouched", 1.0, 0.9, None),
    ]
    figures = trial_figures(tried, generator(0))
    assert list(figures) == ["n", "patients", "r", "r_low", "r_high", "mae", "dsc_err_median"]
    assert (figures["n"], figures["patients"]) == (4, 2)
    assert figures["r"] == pytest.approx(np.corrcoef([0.2, 0.6, 0.8, 1.0], [0.4, 0.5, 0.8, 0.9])[0, 1])
    assert figures["mae"] == pytest.approx((0.2 + 0.1 + 0.0 + 0.1) / 4)
    assert figures["dsc_err_median"] == 0.6
    alone = trial_figures(tried[3:], generator(0))
    assert (alone["r"], alone["r_low"], alone["dsc_err_median"]) == (None, None, None)


class Fresh(Sequence[Case]):
    """Cases that are made anew when they are asked for; knows how many images are in memory."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._images: list[weakref.ref[NDArray[np.float32]]] = []
        self.most = 0

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Case: ...
    @overload
    def __getitem__(self, index: slice) -> list[Case]: ...
    def __getitem__(self, index: int | slice) -> Case | list[Case]:
        assert isinstance(index, int)
        if index >= self._count:
            raise IndexError
        made = case(str(index), index % 8)
        self._images.append(weakref.ref(made.image))
        self.most = max(self.most, sum(image() is not None for image in self._images))
        return made


def test_few_cases_are_in_memory(task: Task) -> None:
    cases = Fresh(12)
    told: list[tuple[int, int]] = []
    method = Knowing(task, QCConfig())
    tried = try_model(
        method, nn.Identity(), cases, generator(3), CPU, progress=lambda *step: told.append(step)
    )
    assert len(tried) == 12 * len(ALL_KINDS)
    assert cases.most <= 3
    assert told == [(done, len(tried)) for done in range(1, len(tried) + 1)]


def test_progress_ends_where_not_every_error_is_possible(task: Task) -> None:
    empty = case("a", 2)
    empty.label[:] = 0
    told: list[tuple[int, int]] = []
    tried = try_model(
        Knowing(task, QCConfig()),
        nn.Identity(),
        [empty],
        generator(3),
        CPU,
        progress=lambda *step: told.append(step),
    )
    assert len(tried) < len(ALL_KINDS)
    assert told[-1] == (len(ALL_KINDS),) * 2
