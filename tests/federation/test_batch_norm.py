"""What becomes of batch norms in federated averaging."""

from pathlib import Path

import numpy as np
import torch
from fedqc_server.averaging import Updates, check_update, rule_of

from fedqc.config import AveragingConfig, DQEConfig, QCConfig
from fedqc.methods.dqe import RATER, DQEMethod
from fedqc.model import load_weights
from fedqc.protocol import WEIGHT_DTYPES, Weights
from fedqc.task import load_task


def test_running_values_are_averaged_like_weights(tmp_path: Path) -> None:
    method = DQEMethod(load_task("phantom"), QCConfig(method="dqe", dqe=DQEConfig()))
    network = method.build(0)
    current: Weights = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    assert {values.dtype.name for values in current.values()} == {"float32"} < set(WEIGHT_DTYPES)
    mean, variance = (f"{RATER}.features.norm0.running_{what}" for what in ("mean", "var"))
    with Updates(tmp_path) as updates:
        for site, shift, samples in (("a", 1.0, 10), ("b", 5.0, 30)):
            update = {name: values.copy() for name, values in current.items()}
            update[mean] += shift
            update[variance] += shift
            assert check_update(update, current) is None
            updates.add(site, update, samples, current)
        combined = updates.combined(rule_of(AveragingConfig()))
    assert np.allclose(combined[mean], 4)
    assert np.allclose(combined[variance], 1 + 4)
    load_weights(network, {name: torch.from_numpy(values) for name, values in combined.items()}, source="")
    assert network.state_dict()[mean].mean() == 4
