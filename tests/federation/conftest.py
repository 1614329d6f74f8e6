"""Small federations on disk: balls of known place, labels of known quality, a method without training."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedqc_server.roster import Clock
from numpy.typing import NDArray
from torch import nn

from fedqc.cases.volumes import Case, write_volume
from fedqc.compute import Compute
from fedqc.methods.base import Method, RoundPlan, RoundResult, Score
from fedqc.seeding import generator
from fedqc.training import Progress

SIDE = 20
TASK = """
name = "ball"
modalities = ["t1"]
spacing = [1.0, 1.0, 1.0]
size = [16, 16, 16]
[classes]
ball = [1]
[regions]
ball = ["ball"]
"""


def ball(centre: NDArray[np.float64], radius: float = 5.0) -> NDArray[np.bool_]:
    grid = np.indices((SIDE, SIDE, SIDE))
    offset = grid - centre.reshape(3, 1, 1, 1)
    inside: NDArray[np.bool_] = (offset**2).sum(axis=0) <= radius**2
    return inside


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
    ) -> RoundResult:
        assert len(cases) > 0
        with torch.no_grad():
            for index, parameter in enumerate(network.parameters()):
                parameter.add_(_normal(plan.seed, plan.site, plan.round, index, parameter.shape))
        return RoundResult({"loss": 0.5, "quality": 0.25}, plan.steps * plan.batch_size)

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


@pytest.fixture
def tiny_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install `TinyMethod` as a plug-in would."""
    monkeypatch.setattr("fedqc.methods.base.entry_points", lambda group: [_Point("tiny", TinyMethod)])


SiteMaker = Callable[..., Path]


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    path = tmp_path / "ball.toml"
    path.write_text(TASK)
    return path


@pytest.fixture
def make_site(tmp_path: Path, task_file: Path) -> SiteMaker:
    """Writes a site's folder: reference cases, good candidates and candidates with a shifted label."""

    def make(
        name: str,
        *,
        references: int = 4,
        good: int = 3,
        spoiled: int = 1,
        min_count: int = 1,
        task: Path | None = None,
        prefix: str = "",
    ) -> Path:
        folder = tmp_path / "sites" / name
        rng = generator(1, name)
        kinds = ["ref"] * references + ["good"] * good + ["bad"] * spoiled
        rows: list[dict[str, str]] = []
        (folder / "data").mkdir(parents=True)
        for index, kind in enumerate(kinds):
            case = f"{prefix}{kind}-{index}"
            place = 9.5 + rng.uniform(-1, 1, size=3)
            image = np.where(ball(place), 100.0, 10.0) + rng.uniform(0, 1, (SIDE,) * 3)
            label = ball(place + (6 if kind == "bad" else 0))
            # An axis runs the other way, so that error maps have to find their way back.
            affine = np.diag([-1.0, 1.0, 1.0, 1.0])
            write_volume(folder / "data" / f"{case}.nii.gz", image.astype(np.float32), affine)
            write_volume(folder / "data" / f"{case}-label.nii.gz", label, affine)
            rows.append(
                {"id": case, "t1": f"{case}.nii.gz", "label": f"{case}-label.nii.gz", "patient": f"P{index}"}
            )
        with (folder / "data" / "cases.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "t1", "label", "patient"])
            writer.writeheader()
            writer.writerows(rows)
        vouched = [row["id"] for row in rows[:references]]
        (folder / "reference.csv").write_text("\n".join(["id", *vouched]) + "\n")
        site = folder / "site.toml"
        site.write_text(
            f'name = "{name}"\ntask = "{task or task_file}"\n'
            '[data]\npath = "data"\nlayout = "csv"\nreference = "reference.csv"\n'
            '[compute]\ndevice = "cpu"\nprecision = "fp32"\nworkers = 1\n'
            f"[policy]\nmin_count = {min_count}\n"
        )
        return site

    return make


@pytest.fixture
def make_federation(tmp_path: Path, task_file: Path) -> Callable[..., Path]:
    """Writes a federation.toml."""

    def make(
        sites: Iterable[str],
        *,
        minimum: int = 1,
        rounds: int = 2,
        deadline: str = "60s",
        method: str = "tiny",
    ) -> Path:
        path = tmp_path / "federation.toml"
        path.write_text(
            f'name = "test"\ntask = "{task_file}"\n'
            f'[sites]\nexpected = {sorted(sites)}\nminimum = {minimum}\nwait = "1s"\n'
            f'[qc]\nmethod = "{method}"\nrounds = {rounds}\nlocal_steps = 2\nbatch_size = 2\n'
            f'deadline = "{deadline}"\n[privacy]\nmin_count = 1\n'
        )
        return path

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
