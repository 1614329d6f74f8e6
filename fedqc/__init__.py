"""fedqc: federated quality control of medical image segmentations."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from fedqc.api import QCModel

__version__ = "0.1.0"


def load_model(path: "str | os.PathLike[str]", *, device: str = "auto", precision: str = "auto") -> "QCModel":
    """Read a trained QC model.

    Args:
        path: Its folder, as `fedqc train` or a run of a federation leaves it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto` (bf16 where the hardware computes in it), `fp32` or `bf16`.

    Returns:
        A model whose `score(image, label)` judges a label.

    Raises:
        fedqc.errors.ModelError: there is no QC model, or it cannot be read.
        fedqc.errors.ConfigError: device or precision is wrong, or the model's method is not installed.
    """
    from fedqc.api import open_model  # noqa: PLC0415 - PyTorch takes seconds to import, `import fedqc` none

    return open_model(path, device=device, precision=precision)
