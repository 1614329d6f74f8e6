from importlib.metadata import EntryPoint
from typing import Any

import pytest

from fedqc.config import NetworkConfig, QCConfig
from fedqc.errors import ConfigError
from fedqc.methods import base
from fedqc.methods.base import Method, get_method
from fedqc.methods.qcresunet import QCResUNetMethod
from fedqc.methods.rca_labels import RCALabelsMethod
from fedqc.task import Task


def test_a_method_is_found_by_its_name() -> None:
    assert get_method("qcresunet") is QCResUNetMethod
    assert issubclass(QCResUNetMethod, Method)
    assert (QCResUNetMethod.name, QCResUNetMethod.judges) == ("qcresunet", "label")


def test_an_unknown_method() -> None:
    with pytest.raises(ConfigError, match=r"qc\.method 'qcresnet' is unknown; installed: .*qcresunet"):
        get_method("qcresnet")


def test_a_plug_in_is_a_method_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(**_: Any) -> list[EntryPoint]:
        name = "fedqc.methods.qcresunet:QCResUNetMethod"
        return [EntryPoint(name, name, "fedqc.methods"), EntryPoint("theirs", name, "fedqc.methods")]

    monkeypatch.setattr(base, "entry_points", installed)
    assert get_method("theirs") is QCResUNetMethod


@pytest.mark.parametrize("name", ["expected-dice", "ensemble", "rca", "uncertainty-sum", "error-sum"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", 0.1), ("optimizer", "sgd"), ("schedule", "constant"), ("weight_decay", 0.0)],
)
def test_how_to_optimise_is_refused_where_nothing_is_optimised_by_it(
    task: Task, name: str, key: str, value: object
) -> None:
    config = QCConfig.model_validate({"method": name, "segmenter": {"channels": (4, 8)}})
    get_method(name)(task, config)
    with pytest.raises(ConfigError, match=f"qc.{key} is of no use to qc.method {name!r}, .*; leave it out"):
        get_method(name)(task, config.model_copy(update={key: value}))


def test_what_a_network_learns_by_is_nothing_to_whom_it_learns_from(task: Task) -> None:
    network = NetworkConfig(width=4, blocks=(1, 1))
    method = RCALabelsMethod(task, QCConfig(method="rca-labels", learning_rate=0.5, network=network))
    assert method.config.learning_rate == 0.5
    assert method.rca.config.learning_rate is None
