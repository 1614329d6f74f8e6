"""A trained model on disk: a folder with `weights.safetensors` and `card.json`. Nothing is ever unpickled."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from fedqc import __version__
from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.preprocessing import preprocess
from fedqc.cases.volumes import Case, sha256_file
from fedqc.config import FrozenModel, QCConfig, SegmentationConfig, parse
from fedqc.errors import ConfigError, DataError, ModelError
from fedqc.lazy import Kept, Lazy
from fedqc.methods.base import Method, get_method
from fedqc.segmentation import Segmentation
from fedqc.task import Task

WEIGHTS = "weights.safetensors"
CARD = "card.json"
_PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
"""Endings of files whose opening can run any program."""
_KEPT_BYTES = 2**30
"""Of prepared reference cases that stay in memory."""


class ReferenceFiles(FrozenModel):
    """Where a reference case lies that a model compares others with; the model itself holds nothing of it."""

    id: str
    patient: str
    images: tuple[Path, ...]
    label: Path
    sha256: tuple[str, ...]
    """Of these files' content: a card from elsewhere cannot make other files of this machine references."""

    @model_validator(mode="after")
    def _one_hash_a_file(self) -> Self:
        if len(self.sha256) != len(self.images) + 1:
            msg = f"reference {self.id!r} has {len(self.images) + 1} files, found {len(self.sha256)} hashes"
            raise ValueError(msg)
        return self

    @property
    def files(self) -> CaseFiles:
        """The case."""
        return CaseFiles(self.id, self.patient, self.images, self.label)


class ModelCard(FrozenModel):
    """What a model is and where it comes from."""

    format: Literal[1] = 1
    fedqc: str = __version__
    task: Task
    stage: Literal["qc", "segmentation"] = "qc"
    qc: QCConfig | None = None
    """How it was trained, where it is a QC model."""
    segmentation: SegmentationConfig | None = None
    """How it was trained, where it is a segmentation model."""
    federation: str
    """Empty where it was trained on one machine alone; it has no sites then."""
    seed: int
    rounds: int
    """Rounds of training that went into the weights."""
    samples: int
    """Training samples drawn in all, over all sites."""
    sites: tuple[str, ...]
    cases: int | None = None
    """Cases that it was trained on, where whoever stored it may know."""
    patients: int | None = None
    """Whose they are."""
    figures: dict[str, float | int | None] = Field(default_factory=dict)
    """How well it did on held-back cases, by name; None where a figure is not defined."""
    licence: str | None = None
    """Under which the weights may be used."""
    source: str = ""
    """Where weights come from that were not trained with fedqc."""
    references: tuple[ReferenceFiles, ...] = ()
    """On this machine, where the method needs them to score (`Method.needs_references`)."""

    @model_validator(mode="after")
    def _one_configuration(self) -> Self:
        found = {name for name in ("qc", "segmentation") if getattr(self, name) is not None}
        if found != {self.stage}:
            msg = f"stage {self.stage!r} needs the table {self.stage!r} and no other (found {sorted(found)})"
            raise ValueError(msg)
        return self


@dataclass(frozen=True)
class StoredModel:
    """A QC model as read from disk."""

    card: ModelCard
    method: Method
    network: nn.Module
    sha256: str
    """Of the weights file."""


@dataclass(frozen=True)
class StoredSegmentation:
    """A segmentation model as read from disk."""

    card: ModelCard
    segmentation: Segmentation
    network: nn.Module
    sha256: str
    """Of the weights file."""


def save_model(folder: Path, state: Mapping[str, Tensor], card: ModelCard) -> str:
    """Write a model; an older one in `folder` is replaced only when the new one is complete.

    Two folders cannot change places in one step, so the older one is put aside before the new one takes its
    place. After a kill between the two, a model is read from there.

    Returns:
        SHA-256 of the weights file.
    """
    new, old = folder.with_name(f".{folder.name}.new"), _put_aside(folder)
    weights = save_tensors({name: tensor.contiguous() for name, tensor in state.items()})
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir(parents=True)
    try:
        (new / WEIGHTS).write_bytes(weights)
        (new / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return hashlib.sha256(weights).hexdigest()


def load_model(folder: Path, task: Task | None = None) -> StoredModel:
    """Read a QC model.

    Args:
        folder: Holds `weights.safetensors` and `card.json`.
        task: The task at hand; a model of another one is refused.

    Raises:
        ModelError: a file is missing or broken, the weights do not fit, the task is another one, or it is a
            segmentation model.
    """
    card, state, sha256 = _read(folder, task)
    if card.qc is None:
        raise ModelError(f"{folder}: a segmentation model, expected a QC model; name the folder of one")
    method = get_method(card.qc.method)(card.task, card.qc)
    network = method.build(card.seed)
    load_weights(network, state, source=str(folder / WEIGHTS))
    references = _OpenedReferences(card, folder / CARD)
    method.references = Kept(references, lambda case: case.image.nbytes + case.label.nbytes, _KEPT_BYTES)
    return StoredModel(card, method, network, sha256)


def reference_files(method: Method, cases: CachedCases) -> tuple[ReferenceFiles, ...]:
    """What a card has to say of the reference cases at hand: nothing where the method has no use for them."""
    if not method.needs_references:
        return ()
    return tuple(
        ReferenceFiles(
            id=files.id,
            patient=files.patient,
            images=files.files[:-1],
            label=files.files[-1],
            sha256=hashes,
        )
        for files, hashes in zip(cases.files, cases.hashes(), strict=True)
    )


class _OpenedReferences(Lazy[Case]):
    """The reference cases of a model's card, each prepared when it is asked for.

    Args:
        card: Of the model.
        source: Where the card lies.
    """

    def __init__(self, card: ModelCard, source: Path) -> None:
        self._card = card
        self._source = source

    def __len__(self) -> int:
        return len(self._card.references)

    def make(self, index: int) -> Case:
        """Prepare a case.

        Raises:
            DataError: a file cannot be read, or is not what it was.
        """
        one = self._card.references[index]
        for path, sha256 in zip(one.files.files, one.sha256, strict=True):
            if sha256_file(path) != sha256:
                raise DataError(
                    f"{path}: its content is not that of reference {one.id} in {self._source}; restore the "
                    "file, or make the model again"
                )
        return preprocess(one.files, self._card.task)


def load_segmentation(folder: Path, task: Task | None = None) -> StoredSegmentation:
    """Read a segmentation model.

    Args:
        folder: Holds `weights.safetensors` and `card.json`.
        task: The task at hand; a model of another one is refused.

    Raises:
        ModelError: a file is missing or broken, the weights do not fit, the task is another one, or it is a
            QC model.
    """
    card, state, sha256 = _read(folder, task)
    if card.segmentation is None:
        raise ModelError(f"{folder}: a QC model, expected a segmentation model; name the folder of one")
    segmentation = Segmentation(card.task, card.segmentation)
    network = segmentation.build(card.seed)
    load_weights(network, state, source=str(folder / WEIGHTS))
    return StoredSegmentation(card, segmentation, network, sha256)


def has_model(folder: Path) -> bool:
    """Whether `save_model` has written a model to `folder`, even if it was killed as it replaced one."""
    return folder.exists() or _put_aside(folder).exists()


def _put_aside(folder: Path) -> Path:
    """Where an older model lies while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _read(folder: Path, task: Task | None) -> tuple[ModelCard, dict[str, Tensor], str]:
    """Card, weights and the SHA-256 of the weights file."""
    if not folder.exists() and _put_aside(folder).exists():
        folder = _put_aside(folder)
    try:
        card = parse(json.loads((folder / CARD).read_bytes()), ModelCard, source=str(folder / CARD))
        data = (folder / WEIGHTS).read_bytes()
        state = load_tensors(data)
    except OSError as error:
        raise ModelError(f"{folder}: not a model: {_why_no_model(folder, error)}") from None
    except ConfigError as error:
        raise ModelError(f"{error}; it is no model card of this version of fedqc") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder / CARD}: not a model card: {error}; copy it again") from None
    except (SafetensorError, KeyError) as error:  # KeyError: a type of number that torch does not have
        raise ModelError(f"{folder / WEIGHTS}: not a safetensors file: {error}; copy it again") from None
    # As text: two tasks that name the same classes in another order give them other indices.
    if task is not None and _definition(card.task) != _definition(task):
        raise ModelError(
            f"{folder}: model of task {card.task.name!r} (or another definition of it), not {task.name!r}"
        )
    return card, state, hashlib.sha256(data).hexdigest()


def _why_no_model(folder: Path, error: OSError) -> str:
    """What is there instead of a model, and what to do."""
    if folder.name in {WEIGHTS, CARD} and folder.is_file():
        return f"it is a file of one; name its folder, {folder.parent}"
    held = [folder] if folder.is_file() else sorted(folder.glob("*"))
    pickled = next((path.name for path in held if path.suffix.lower() in _PICKLES), None)
    if pickled is not None:
        return (
            f"{pickled} looks like a pickle, which can run any program when it is opened, so fedqc opens "
            f"none; name a model that fedqc wrote, a folder with {WEIGHTS} and {CARD}"
        )
    return f"{error.strerror}; a model is a folder that holds {WEIGHTS} and {CARD}"


def load_weights(network: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Put weights into a network.

    Raises:
        ModelError: names or shapes differ, or a number is not finite; the message names the first tensor.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        name = next(n for n in [*expected, *found] if expected.get(n) != found.get(n))
        raise ModelError(
            f"{source}: weights do not fit the network: {name} is {found.get(name, 'missing')}, "
            f"expected {expected.get(name, 'nothing of that name')}"
        )
    broken = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise ModelError(f"{source}: {broken} holds numbers that are not finite; copy or train it again")
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(state[name])


def _definition(task: Task) -> str:
    return task.model_dump_json(exclude={"description"})
