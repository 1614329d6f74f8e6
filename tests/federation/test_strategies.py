"""Strategies of averaging in whole runs; their arithmetic is in test_averaging.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedqc_server.averaging import packed
from fedqc_server.fedadam import Moments, adam_step
from fedqc_server.run_folder import listening
from flwr.app import Message

from fedqc.config import AveragingConfig
from fedqc.errors import ModelError
from fedqc.protocol import Weights, weights_from_record
from fedqc.statistics.update_privacy import epsilon
from tests.federation.runs import RecordingGrid, Sites, model_bytes, record, run, weights

pytestmark = pytest.mark.usefixtures("tiny_method_throughout", "no_report")

QC_ONLY = ["train.qc"]


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> Sites:
    return {name: make_site(name) for name in ("a", "b", "c")}


def bodies(grid: RecordingGrid, kind: str) -> list[dict[str, Any]]:
    """What the sites were asked in messages of a kind."""
    asked: list[Message] = [request for _, request in grid.asked if request.metadata.message_type == kind]
    return [json.loads(str(request.content.config_records["request"]["body"])) for request in asked]


def updates(grid: RecordingGrid, round_number: int) -> list[Weights]:
    """What the sites answered in a round of QC training."""
    return [
        weights_from_record(reply.content.array_records["weights"])
        for _, reply in grid.sent
        if reply.metadata.message_type == "train.qc" and reply.metadata.group_id == str(round_number)
    ]


@pytest.mark.parametrize(
    ("averaging", "mu"), [('strategy = "fedprox"\nproximal = 0.5', 0.5), ('strategy = "median"', 0.0)]
)
def test_sites_are_told_how_strongly_they_are_held(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, averaging: str, mu: float
) -> None:
    grid = RecordingGrid(sites)
    run(grid, make_federation(sites, averaging=averaging), tmp_path / "run")
    for kind in ("train.qc", "train.segmentation"):
        assert {body["proximal"] for body in bodies(grid, kind)} == {mu}


def test_the_model_is_the_median_of_the_updates(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    grid = RecordingGrid(sites)
    run(
        grid,
        make_federation(sites, rounds=1, averaging='strategy = "median"'),
        tmp_path / "run",
        only=QC_ONLY,
    )
    sent = updates(grid, 1)
    assert len(sent) == len(sites)
    for name, values in weights(tmp_path / "run").items():
        expected = np.median([update[name] for update in sent], axis=0)
        np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_fedadam_remembers_over_rounds_and_over_a_cut(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    federation = make_federation(sites, rounds=3, averaging='strategy = "fedadam"\nlearning_rate = 0.05')
    grid = RecordingGrid(sites)
    run(grid, federation, tmp_path / "run", only=QC_ONLY)
    config = AveragingConfig(strategy="fedadam", learning_rate=0.05)
    sent = {
        number: weights_from_record(request.content.array_records["weights"])
        for _, request in grid.asked
        if request.metadata.message_type == "train.qc"
        for number in [int(request.metadata.group_id)]
    }
    current, moments = sent[1], Moments()
    for number in (1, 2, 3):
        answers = updates(grid, number)
        mean = {name: np.mean([one[name] for one in answers], axis=0) for name in current}
        current, moments = adam_step(current, mean, moments, number, config)
    for name, values in weights(tmp_path / "run").items():
        np.testing.assert_allclose(values, current[name], rtol=1e-4, atol=1e-6)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "round-finished" and event["round"] == 2:
            raise KeyboardInterrupt

    with listening(stop), pytest.raises(KeyboardInterrupt):
        run(RecordingGrid(sites), federation, tmp_path / "cut", only=QC_ONLY)
    run(RecordingGrid(sites), federation, tmp_path / "cut", only=QC_ONLY, resume=True)
    assert model_bytes(tmp_path / "cut") == model_bytes(tmp_path / "run")


def test_half_precision_halves_the_bytes_and_hardly_changes_the_model(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    for name, transfer in (("whole", "fp32"), ("half", "fp16")):
        averaging = f'strategy = "fedavg"\ntransfer = "{transfer}"'
        run(
            RecordingGrid(sites),
            make_federation(sites, rounds=2, averaging=averaging),
            tmp_path / name,
            only=QC_ONLY,
        )
    whole, half = (record(tmp_path / name)["rounds"]["qc"] for name in ("whole", "half"))
    assert [one["round"] for one in whole] == [1, 2]
    counters = 8 * len(sites)  # whole numbers stay as they are
    for one, other in zip(whole, half, strict=True):
        assert one["bytes_sent"] == one["bytes_received"] > counters
        assert other["bytes_sent"] == other["bytes_received"]
        assert 2 * (other["bytes_sent"] - counters) == one["bytes_sent"] - counters
        assert one["seconds"] > 0
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "half")
    for name, values in before.items():
        assert after[name].dtype == values.dtype
        assert np.linalg.norm(after[name] - values) <= 0.01 * np.linalg.norm(values)


def test_what_half_precision_cannot_hold_is_a_sentence() -> None:
    with pytest.raises(ModelError, match="weight 'w' is too large for fp16"):
        packed({"w": np.array([1e5], np.float32)}, "fp16")


def test_noise_on_updates_is_drawn_at_the_site_and_its_worth_is_noted(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    federation = make_federation(sites, rounds=1, cross_check_rounds=0)
    text = federation.read_text().replace("[privacy]\n", "[privacy]\nupdate_clip = 0.1\nupdate_noise = 2.0\n")
    federation.write_text(text)
    grids = [RecordingGrid(sites) for _ in range(2)]
    for number, grid in enumerate(grids):
        run(grid, federation, tmp_path / str(number), only=QC_ONLY)
    first, second = (updates(grid, 1) for grid in grids)
    (start,) = {body["update_noise"] for body in bodies(grids[0], "train.qc")}
    assert start == 2.0
    # The seed of the run, which the coordinator knows, does not decide the noise.
    assert all(
        not np.array_equal(one["0.weight"], other["0.weight"])
        for one, other in zip(first, second, strict=True)
    )
    privacy = record(tmp_path / "0")["update_privacy"]
    assert privacy["epsilon"]["qc"] == pytest.approx(epsilon(2.0, 1), abs=1e-3)
