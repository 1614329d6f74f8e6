"""A network in training, on disk after every round: one file, so that it is either the old or the new one."""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedqc.config import FrozenModel
from fedqc.errors import ModelError
from fedqc.files import replacing
from fedqc.protocol import Weights
from fedqc_server.fedadam import Moments

_FIRST, _SECOND = "fedadam first moment/", "fedadam second moment/"


class TrainingState(FrozenModel):
    """How far a network has come, weights apart."""

    rounds: int = 0
    """Finished rounds."""
    samples: int = 0
    """Training samples drawn in all."""
    sites: tuple[str, ...] = ()
    """The sites in the last mean."""
    excused: tuple[str, ...] = ()
    """Sites that have nothing to train on; they are not asked again."""
    strikes: dict[str, int] = Field(default_factory=dict)
    """Rounds in a row that each site has failed."""
    out: dict[str, str] = Field(default_factory=dict)
    """Sites that failed too many rounds in a row, with the last reason."""
    history: tuple[dict[str, Any], ...] = ()
    """For each round its number, mean loss, sites and failures."""


class Checkpoint(NamedTuple):
    """A network in training."""

    weights: Weights
    state: TrainingState
    moments: Moments = Moments()
    """What FedAdam remembers; nothing with other strategies."""


def save_checkpoint(
    path: Path, weights: Weights, state: TrainingState, moments: Moments | None = None
) -> None:
    """Write a checkpoint; whoever is killed here leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = moments or Moments()
    tensors = {
        **weights,
        **{f"{_FIRST}{name}": values for name, values in known.first.items()},
        **{f"{_SECOND}{name}": values for name, values in known.second.items()},
    }
    with replacing(path) as aside:
        # The file keeps tensors in an order of its own.
        names = {"names": "\n".join(weights), "state": state.model_dump_json()}
        save_file(tensors, aside, metadata=names)


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint, or None where there is none.

    Raises:
        ModelError: the file is not a checkpoint.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            weights = {name: file.get_tensor(name) for name in metadata["names"].split("\n")}
            names = list(file.keys())
            first, second = (
                {name.removeprefix(kind): file.get_tensor(name) for name in names if name.startswith(kind)}
                for kind in (_FIRST, _SECOND)
            )
            state = TrainingState.model_validate_json(metadata["state"])
            return Checkpoint(weights, state, Moments(first, second))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: not a checkpoint ({error}); restore the file or start the run anew"
        ) from None
