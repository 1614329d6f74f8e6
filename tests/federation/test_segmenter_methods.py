"""Methods with segmenters of their own, trained across sites and fitted at each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedqc.config import load_site
from fedqc.methods.base import Method
from fedqc.methods.dice_regression import DiceRegressionMethod
from fedqc.methods.ensemble import EnsembleMethod
from fedqc.model import load_model
from tests.federation.runs import RecordingGrid, run, statistics, weights

TABLES = """
[qc.segmenter]
rounds = 1
local_steps = 1
batch_size = 2
channels = [4, 8]
passes = 2
snapshots = 2
[qc.regression]
input = "error"
"""


@dataclass(frozen=True)
class Point:
    method: type[Method]

    @property
    def name(self) -> str:
        return self.method.name

    def load(self) -> type[Method]:
        return self.method


KINDS: list[tuple[type[Method], list[str], tuple[str, ...]]] = [
    (
        EnsembleMethod,
        ["segmenter-1", "segmenter-1-2", "segmenter-2", "segmenter-2-2"],
        ("calibration.", "interval."),
    ),
    (DiceRegressionMethod, ["reconstruction-1", "reconstruction-2", "qc"], ()),
]
"""Methods, their stages, and what the names of tensors begin with that a site fits for itself."""


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("kind", KINDS, ids=["ensemble", "dice-regression"])
def test_stages_are_averaged_and_what_is_fitted_stays(
    kind: tuple[type[Method], list[str], tuple[str, ...]],
    make_site: Callable[..., Path],
    make_federation: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, stages, stays = kind
    monkeypatch.setattr("fedqc.methods.base.entry_points", lambda group: [Point(method)])
    sites = {name: make_site(name, references=4) for name in ("a", "b")}
    federation = make_federation(sites, method=method.name, rounds=1)
    federation.write_text(federation.read_text() + TABLES)
    out = tmp_path / "run"
    run(RecordingGrid(sites), federation, out, only=("summarise", "train.qc", "calibrate", "score"))

    names = ["qc" if stage == "qc" else f"qc-{stage}" for stage in stages]
    assert list(statistics(out)["train"]) == names
    everyones = weights(out)
    for site_file in sites.values():
        own = load_model(load_site(site_file).results / "models" / "qc").network.state_dict()
        assert set(own) == set(everyones)
        fitted = {name for name in own if not np.array_equal(own[name].numpy(), everyones[name])}
        for begin in stays:
            assert any(name.startswith(begin) for name in fitted)
        assert all(name.startswith(stays) for name in fitted)
