"""Published weights as fedqc models."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor

from fedqc.config import DQEConfig, QCConfig
from fedqc.errors import ModelError
from fedqc.methods.dqe import RATER, DQEMethod
from fedqc.model import ModelCard, load_weights, save_model
from fedqc.task import load_task

DQE_PACKAGE, DQE_VERSION = "deep-quality-estimation", "0.0.3"
_DQE_WEIGHTS = "weights/dqe_weights.pth"
_DQE_SHA256 = "6d35ecc74095594d68d6ef2e1a49e7772c84aff9d8882dae84eb7c9516825f2c"
_DQE_CHANNELS = ("t1c", "t1n", "t2w", "t2f", "tumour-core", "whole-tumour", "enhancing")
"""What the published network sees, in the names of the task `brats-glioma`."""
_INSTALL = f"install it with: pip install --no-deps {DQE_PACKAGE}=={DQE_VERSION}"


def import_dqe(out: Path) -> ModelCard:
    """Make a fedqc model of the weights in the package deep-quality-estimation (Apache-2.0).

    Nothing of the package is run: its weights file is read, if it is exactly the published one.

    Args:
        out: Folder of the model, which is not there or empty.

    Raises:
        ModelError: the package is not installed, or another version of it, or its weights are others.
    """
    path = _dqe_weights()
    published = torch.load(path, map_location="cpu", weights_only=True)
    task = load_task("brats-glioma")
    qc = QCConfig(method=DQEMethod.name, dqe=DQEConfig(side=240))
    method = DQEMethod(task, qc)
    network = method.build(0)
    order = [_DQE_CHANNELS.index(name) for name in (*task.modalities, *task.regions)]
    state = _dqe_state(published, order)
    load_weights(network, state, source=str(path))
    card = ModelCard(
        task=task,
        qc=qc,
        federation="",
        seed=0,
        rounds=0,
        samples=0,
        sites=(),
        licence="Apache-2.0",
        source=f"{DQE_PACKAGE} {DQE_VERSION} (PyPI), trained on ratings of single radiologists",
    )
    save_model(out, network.state_dict(), card)
    return card


def _dqe_weights() -> Path:
    """The published weights file.

    Raises:
        ModelError: it is not there, or is another one.
    """
    try:
        package = distribution(DQE_PACKAGE)
    except PackageNotFoundError:
        raise ModelError(
            f"the package {DQE_PACKAGE}, which holds the weights, is missing; {_INSTALL}"
        ) from None
    if package.version != DQE_VERSION:
        raise ModelError(f"the package {DQE_PACKAGE} is version {package.version}; {_INSTALL}")
    listed = [file for file in package.files or () if file.as_posix().endswith(_DQE_WEIGHTS)]
    path = Path(str(listed[0].locate())) if listed else None
    if path is None or not path.is_file():
        raise ModelError(f"the package {DQE_PACKAGE} holds no {_DQE_WEIGHTS}; {_INSTALL} --force-reinstall")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _DQE_SHA256:
        raise ModelError(
            f"{path}: SHA-256 {found[:12]}..., expected {_DQE_SHA256[:12]}... of the published weights; "
            f"{_INSTALL} --force-reinstall"
        )
    return path


def _dqe_state(published: Mapping[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """Published tensors by our names, the first layer's channels in `order`."""
    state = {
        f"{RATER}.{name.removeprefix('module.')}": values
        for name, values in published.items()
        if not name.endswith("num_batches_tracked")
    }
    first = f"{RATER}.features.conv0.weight"
    state[first] = state[first][:, order]
    return state
