"""Sequences of preprocessed cases: what they hold open, which is nothing."""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases.cache import CaseCache
from fedqc.cases.cached import CachedCases, LabelsOf
from fedqc.cases.layouts import CaseFiles
from fedqc.compute import choose_compute
from fedqc.config import NetworkConfig, QCConfig
from fedqc.degradation.samples import degrade_cases
from fedqc.lazy import Chosen
from fedqc.methods.base import RoundPlan
from fedqc.methods.qcresunet import QCResUNetMethod
from fedqc.task import Task

CASES = 60
SPARE = 30
"""Files that may be opened beside those that are open already."""


@pytest.fixture
def few_files() -> Iterator[None]:
    """As many cases for so few files as 2,000 for the 1,024 that are usual."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(hard) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[SPARE], hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_a_site_may_have_more_cases_than_a_process_may_open_files(
    make_case: Callable[..., CaseFiles], tmp_path: Path, task: Task
) -> None:
    files = [make_case(f"case-{number:02}") for number in range(CASES)]
    cache = CaseCache(tmp_path / "cache", task)
    cache.prepare(files, workers=2)
    cases = CachedCases(cache, files)
    method = QCResUNetMethod(task, QCConfig(network=NetworkConfig(width=4, blocks=(1, 1))))
    plan = RoundPlan(0, "site", 1, 1, 20, 4)
    result = method.train_round(method.build(0), cases, plan, choose_compute("cpu", "fp32"))
    assert result.samples == 80
    tried = {sample.case.id for sample in degrade_cases(cases, task, ["shift"], np.random.default_rng(0))}
    assert len(tried) == CASES


@pytest.mark.usefixtures("few_files")
def test_so_many_cases_cannot_be_open_at_once(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.zeros(8))
    opened = []
    with pytest.raises(OSError, match="Too many open files"):
        opened += [np.load(tmp_path / "image.npy", mmap_mode="r") for _ in range(CASES)]


def test_labels_are_those_of_the_cases(
    make_case: Callable[..., CaseFiles], tmp_path: Path, task: Task, label: NDArray[np.uint8]
) -> None:
    files = [make_case(str(number), label=np.roll(label, number, axis=2)) for number in range(4)]
    cases = CachedCases(CaseCache(tmp_path / "cache", task), files)
    labels = LabelsOf(Chosen(cases, [3, 1]))
    assert len(labels) == 2
    assert np.array_equal(labels[1], cases[1].label)
    assert not np.array_equal(labels[0], cases[1].label)
    assert [label.shape for label in labels[1:]] == [cases[1].label.shape]
