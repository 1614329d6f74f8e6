"""What a network of 16.6 million parameters costs, the journal version of the published one."""

from pathlib import Path

import numpy as np
import pytest
from fedqc_simulations.benchmarks.server_memory import RULES, measure_apart
from fedqc_simulations.benchmarks.transfer import run

pytestmark = pytest.mark.deploy_long
WIDTH = 32


@pytest.mark.parametrize("rule", RULES)
def test_memory_does_not_grow_with_the_sites(rule: str) -> None:
    few, many = (measure_apart(rule, sites, rounds=2, width=WIDTH) for sites in (4, 100))
    assert few["parameters"] == pytest.approx(16.57e6, rel=2e-3)  # the published one has five channels in
    assert many["peak"] < 1.1 * few["peak"]


def test_fp16_halves_the_bytes_and_changes_next_to_nothing(tmp_path: Path) -> None:
    before, after = (run(tmp_path / kind, kind, 4, 2, 2, WIDTH) for kind in ("fp32", "fp16"))
    assert before.weights.size > 16e6
    for name in ("bytes sent a round", "bytes received a round"):
        assert after.figures[name] == pytest.approx(before.figures[name] / 2, rel=1e-3)
    assert after.change_of_weights(before) < 0.01
    assert after.figures["loss of the last round"] == pytest.approx(
        before.figures["loss of the last round"], rel=0.01
    )
    np.testing.assert_allclose(after.qualities, before.qualities, rtol=0.01)
