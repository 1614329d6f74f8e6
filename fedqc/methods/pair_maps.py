"""What Dice regression sees beside the label: image, uncertainty map or error map (Williams et al.).

Maps come from networks that never saw the patient, in training as in use.
"""

import hashlib
import math
import shutil
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedqc.cases.memo import digest
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig
from fedqc.files import replacing
from fedqc.methods.base import part_of
from fedqc.methods.segmenters import CrossFitted, Reconstructors, Segmenters
from fedqc.task import Task

KEPT_BYTES = 2**30
"""Of maps that are kept in memory from round to round, at a byte a voxel."""


class KeptMaps:
    """Maps of cases in memory, as many as have room; those that were not asked for longest go first."""

    def __init__(self, room: int = KEPT_BYTES) -> None:
        self.room = room
        self._maps: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()

    def get(self, key: tuple[str, ...]) -> Tensor | None:
        """What was kept under a key, if it still is."""
        if key in self._maps:
            self._maps.move_to_end(key)
        return self._maps.get(key)

    def put(self, key: tuple[str, ...], made: Tensor) -> None:
        """Keep a map on the CPU."""
        self._maps[key] = made
        while sum(kept.nbytes for kept in self._maps.values()) > self.room:
            self._maps.popitem(last=False)


@dataclass(frozen=True)
class TrainedParts:
    """The networks that make maps, and where they compute."""

    network: nn.Module
    """The method's, with all its parts, on the device."""
    compute: Compute
    kept: KeptMaps | None = None
    owner: tuple[str, ...] = ()
    """Whose cases they are, and what makes the maps, see `folder_of_maps`: under this maps are kept."""
    folder: Path | None = None
    """Where they are kept on disk, for the next round may be another process; None: nowhere."""

    def file_of(self, case: Case) -> Path | None:
        """Where a case's map is kept on disk."""
        return None if self.folder is None else self.folder / f"{digest(case.id)}.npy"


class PairMaps(ABC):
    """One kind of map."""

    channels: int
    networks: tuple[CrossFitted, ...] = ()
    """What has to be trained for it."""

    def of_cases(self, parts: TrainedParts, cases: Sequence[Case]) -> list[Tensor]:
        """What depends on the case alone, each `[N, X, Y, Z]` uint8, to be augmented as a label is."""
        return []

    @abstractmethod
    def of_pairs(
        self,
        parts: TrainedParts,
        patients: Sequence[str],
        image: Tensor,
        label: Tensor,
        of_cases: Sequence[Tensor],
    ) -> Tensor:
        """The maps `[N, channels, X, Y, Z]` float32.

        Args:
            parts: the networks.
            patients: of each of N pairs.
            image: `[N, C, X, Y, Z]` float32, z-scored.
            label: `[N, X, Y, Z]` uint8 class indices, to be judged.
            of_cases: what `of_cases` made, augmented as the label was.
        """


class Images(PairMaps):
    """The image itself."""

    def __init__(self, task: Task) -> None:
        self.channels = len(task.modalities)

    def of_pairs(
        self,
        parts: TrainedParts,
        patients: Sequence[str],
        image: Tensor,
        label: Tensor,
        of_cases: Sequence[Tensor],
    ) -> Tensor:
        """The images."""
        return image


class Uncertainties(PairMaps):
    """Entropy of MC-dropout segmenters as a share of the most there can be."""

    channels = 1

    def __init__(self, task: Task, config: QCConfig) -> None:
        self.segmenters = Segmenters(task, config)
        self.networks = (self.segmenters,)

    def of_cases(self, parts: TrainedParts, cases: Sequence[Case]) -> list[Tensor]:
        """The entropy, in 255 steps: N passes over a case take far longer than a step of training."""
        return [torch.stack([self._entropy(parts, case) for case in cases]).to(parts.compute.device)]

    def of_pairs(
        self,
        parts: TrainedParts,
        patients: Sequence[str],
        image: Tensor,
        label: Tensor,
        of_cases: Sequence[Tensor],
    ) -> Tensor:
        """The entropy in [0, 1]."""
        return of_cases[0][:, None].float() / 255

    def _entropy(self, parts: TrainedParts, case: Case) -> Tensor:
        key, file = (*parts.owner, case.id), parts.file_of(case)
        if parts.kept is not None and (kept := parts.kept.get(key)) is not None:
            return kept
        entropy = _read(file, case)
        if entropy is None:
            found = self.segmenters.predict(parts.network, case, parts.compute)
            share = found.entropy / math.log(len(found.probability))
            entropy = (255 * share).round().clamp(0, 255).to(torch.uint8).cpu()
            if file is not None:
                _write(file, entropy)
        if parts.kept is not None:
            parts.kept.put(key, entropy)
        return entropy


class Errors(PairMaps):
    """What a reconstruction of the image without what the label marks gives back, minus what is there."""

    def __init__(self, task: Task, config: QCConfig) -> None:
        self.reconstructors = Reconstructors(task, config)
        self.networks = (self.reconstructors,)
        self.channels = len(self.reconstructors.channels)

    def of_pairs(
        self,
        parts: TrainedParts,
        patients: Sequence[str],
        image: Tensor,
        label: Tensor,
        of_cases: Sequence[Tensor],
    ) -> Tensor:
        """The error with its sign, of each chosen modality."""
        return self.reconstructors.errors(parts.network, patients, image, label, parts.compute)


def pair_maps(task: Task, config: QCConfig) -> PairMaps:
    """The kind that the configuration names."""
    chosen = config.regression.input
    if chosen == "image":
        return Images(task)
    return Uncertainties(task, config) if chosen == "uncertainty" else Errors(task, config)


def folder_of_maps(folder: Path, site: str, made_by: str) -> Path:
    """Where a site keeps the maps that some weights make in so many passes; those of others are removed.

    Args:
        folder: of all sites.
        site: whose cases they are.
        made_by: digest of the weights and the number of passes.
    """
    own = folder / digest(site) / made_by
    for other in set(own.parent.glob("*")) - {own}:
        shutil.rmtree(other, ignore_errors=True)
    return own


def _read(file: Path | None, case: Case) -> Tensor | None:
    """A map that was kept on disk; None where there is none, or a damaged one."""
    if file is None:
        return None
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if values.dtype != np.uint8 or values.shape != case.label.shape:
        return None
    return torch.from_numpy(values)


def _write(file: Path, made: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as aside:
        np.save(aside, made.numpy())


def weights_digest(network: nn.Module, parts: Sequence[str]) -> str:
    """SHA-256 of the weights of some parts."""
    found = hashlib.sha256()
    for part in parts:
        for weight in part_of(network, part).state_dict().values():
            found.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
