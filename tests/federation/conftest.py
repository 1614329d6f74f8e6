"""Small federations on disk: balls of known place, labels of known quality, a method without training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedqc_server.roster import Clock
from torch import nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.methods.base import Known, Method, RoundPlan, RoundResult, Score
from fedqc.seeding import generator
from fedqc.training import Progress
from tests.federation.runs import write_federation, write_site, write_task


class TinyMethod(Method):
    """Sees the ball in the image itself, so its quality is the true DSC; training draws new weights."""

    name = "tiny"
    judges = "label"

    def build(self, seed: int) -> nn.Module:
        network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        with torch.no_grad():
            for index, parameter in enumerate(network.parameters()):
                parameter.copy_(_normal(seed, index, parameter.shape))
        return network

    def train_round(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        progress: Progress | None = None,
        *,
        known: Known | None = None,
    ) -> RoundResult:
        assert len(cases) > 0
        with torch.no_grad():
            for index, parameter in enumerate(network.parameters()):
                parameter.add_(_normal(plan.seed, plan.site, plan.round, index, parameter.shape))
        drawn = tuple(case.patient for case in cases)[: plan.steps * plan.batch_size]
        return RoundResult({"loss": 0.5, "quality": 0.25}, plan.steps * plan.batch_size, patients=drawn)

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int = 8
    ) -> Iterator[Score]:
        for case in cases:
            seen, label = case.image[0] > 0.5, case.label == 1
            dsc = 2 * float((seen & label).sum()) / float(seen.sum() + label.sum())
            yield Score(case.id, dsc, {"ball": dsc}, (seen != label).astype(np.float32))


def _normal(*names: Any) -> torch.Tensor:
    *rest, shape = names
    values = generator(0, *rest).normal(size=tuple(shape))
    return torch.from_numpy(values.astype(np.float32))


@dataclass(frozen=True)
class _Point:
    name: str
    method: type[Method]

    def load(self) -> type[Method]:
        return self.method


def _install_tiny_method(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fedqc.methods.base.entry_points", lambda group: [_Point("tiny", TinyMethod)])


@pytest.fixture
def tiny_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install `TinyMethod` as a plug-in would."""
    _install_tiny_method(monkeypatch)


@pytest.fixture(scope="module")
def tiny_method_throughout() -> Iterator[None]:
    """The same for all tests of a module, and for what they share."""
    with pytest.MonkeyPatch.context() as patch:
        _install_tiny_method(patch)
        yield


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report at the end of a run: its figures take longer than the run."""
    monkeypatch.setattr("fedqc_server.phases.build_coordinator_report", lambda folder: None)


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    return write_task(tmp_path)


@pytest.fixture
def make_site(tmp_path: Path, task_file: Path) -> Callable[..., Path]:
    """Writes a site's folder: reference cases, good candidates and candidates with a shifted label."""

    def make(name: str, *, task: Path | None = None, **options: Any) -> Path:
        return write_site(tmp_path, name, task or task_file, **options)

    return make


@pytest.fixture
def make_federation(tmp_path: Path, task_file: Path) -> Callable[..., Path]:
    """Writes a federation.toml."""

    def make(sites: Iterable[str], **options: Any) -> Path:
        return write_federation(tmp_path, sites, task_file, **options)

    return make


class FakeTime:
    """A clock that only moves when someone sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.now, sleep=self.sleep)


@pytest.fixture
def fake_time() -> FakeTime:
    return FakeTime()
