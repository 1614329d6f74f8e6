from importlib.metadata import EntryPoint
from typing import Any

import pytest

from fedqc.errors import ConfigError
from fedqc.methods import base
from fedqc.methods.base import Method, get_method
from fedqc.methods.qcresunet import QCResUNetMethod


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
