"""What is segmented: modalities, classes, regions, spacing and the network's input size."""

import hashlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedqc.config import FrozenModel, Voxels, read_toml
from fedqc.errors import ConfigError, did_you_mean

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Millimetres = Annotated[float, Field(gt=0)]
LabelValue = Annotated[int, Field(ge=1, le=65535)]


class Anatomy(FrozenModel):
    """What is known of where the classes lie and how they look, to tell which label value means which class.

    Not every case shows it: it is evidence, no rule.
    """

    outermost: Name | None = None
    """The class that borders most on the background, for its surface."""
    innermost: Name | None = None
    """The class that borders least on the background."""
    brightest: dict[Name, Name] = Field(default_factory=dict)
    """By modality, the class with the highest mean intensity."""


class Task(FrozenModel):
    """One segmentation task.

    A label volume inside fedqc holds class indices: 0 is background, class `k` (from 1) is the k-th entry of
    `classes`. Regions are unions of classes; they are what is scored.
    """

    name: Name
    description: str = ""
    modalities: tuple[Name, ...] = Field(min_length=1)
    classes: dict[Name, tuple[LabelValue, ...]] = Field(min_length=1, max_length=254)
    """Label values in the files for each class; several values may mean one class (BraTS 3 and 4)."""
    regions: dict[Name, tuple[Name, ...]] = Field(min_length=1)
    core: Name | None = None
    """The region in whose middle a person would look first; left out: all that is labelled."""
    spacing: tuple[Millimetres, Millimetres, Millimetres]
    """Voxel size in mm that the network sees."""
    size: tuple[Voxels, Voxels, Voxels]
    """Network input in voxels, axes right-left, posterior-anterior, inferior-superior (RAS+)."""

    spacing_range: tuple[Millimetres, Millimetres] = (0.05, 20.0)
    """Smallest and largest voxel side in mm that files of this task may have."""
    empty_label: Literal["error", "allowed"] = "error"
    """Whether a label without any marked voxel can be right."""
    smallest_part: int = Field(default=3, ge=1)
    """A separate part of a label with fewer voxels was hardly meant."""
    conventions: dict[Name, dict[Name, tuple[LabelValue, ...]]] = Field(default_factory=dict)
    """Known ways to number the classes: by name, the label values of each class."""
    anatomy: Anatomy = Anatomy()

    @field_validator("modalities")
    @classmethod
    def _no_modality_twice(cls, modalities: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(modalities)) < len(modalities):
            msg = "a modality is named twice"
            raise ValueError(msg)
        return modalities

    @model_validator(mode="after")
    def _classes_and_regions_fit(self) -> Self:
        owner: dict[int, str] = {}
        for name, values in self.classes.items():
            if not values:
                msg = f"class {name!r} has no label value"
                raise ValueError(msg)
            for value in values:
                if value in owner:
                    msg = f"classes overlap: label value {value} belongs to {owner[value]!r} and {name!r}"
                    raise ValueError(msg)
                owner[value] = name
        for region, members in self.regions.items():
            unknown = [member for member in members if member not in self.classes]
            if unknown or not members:
                found = f"names {unknown}" if unknown else "is empty"
                msg = f"region {region!r} {found}; classes are {list(self.classes)}"
                raise ValueError(msg)
            if len(set(members)) < len(members):
                msg = f"region {region!r} names a class twice"
                raise ValueError(msg)
        if self.core is not None and self.core not in self.regions:
            msg = f"core names {self.core!r}; regions are {list(self.regions)}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _checks_name_what_is_there(self) -> Self:
        smallest, largest = self.spacing_range
        if not all(smallest <= side <= largest for side in self.spacing):
            msg = f"spacing {list(self.spacing)} is outside spacing_range {[smallest, largest]}"
            raise ValueError(msg)
        for name, convention in self.conventions.items():
            if set(convention) != set(self.classes):
                msg = f"convention {name!r} names {list(convention)}; classes are {list(self.classes)}"
                raise ValueError(msg)
        anatomy = self.anatomy
        named = {anatomy.outermost, anatomy.innermost, *anatomy.brightest.values()} - {None}
        unknown = sorted(map(str, named - set(self.classes)))
        if unknown:
            msg = f"anatomy names {unknown}; classes are {list(self.classes)}"
            raise ValueError(msg)
        if set(anatomy.brightest) - set(self.modalities):
            msg = f"anatomy.brightest names {list(anatomy.brightest)}; modalities are {list(self.modalities)}"
            raise ValueError(msg)
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of all of the task that changes what is computed (its description does not)."""
        return hashlib.sha256(self.model_dump_json(exclude={"description"}).encode()).hexdigest()

    @property
    def n_classes(self) -> int:
        """Number of classes without background."""
        return len(self.classes)

    @property
    def label_values(self) -> tuple[int, ...]:
        """All values that a label may hold, background first."""
        return 0, *sorted(value for members in self.classes.values() for value in members)

    def region_indices(self) -> tuple[tuple[int, ...], ...]:
        """Class indices (from 1) of each region, in the order of `regions`."""
        index = {name: position for position, name in enumerate(self.classes, start=1)}
        return tuple(tuple(index[member] for member in members) for members in self.regions.values())

    def core_indices(self) -> tuple[int, ...]:
        """Class indices (from 1) of the core; of all classes where the task names none."""
        if self.core is None:
            return tuple(range(1, self.n_classes + 1))
        return dict(zip(self.regions, self.region_indices(), strict=True))[self.core]

    def check_strides(self, stride: int) -> None:
        """Refuse a size that a network which halves the volume down to 1/`stride` cannot take.

        Raises:
            ConfigError: with the axis, the size and the nearest sizes that fit.
        """
        for axis, voxels in zip("xyz", self.size, strict=True):
            if voxels % stride:
                below, above = voxels // stride * stride, (voxels // stride + 1) * stride
                fits = f"{below} or {above}" if below else str(above)
                raise ConfigError(
                    f"task {self.name!r}: size along {axis} is {voxels}, which the network's stride of "
                    f"{stride} does not divide; use {fits}"
                )


def built_in_tasks() -> list[str]:
    """Names of the tasks that come with fedqc."""
    folder = resources.files("fedqc") / "tasks"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_task(name_or_path: str) -> Task:
    """A built-in task by name, or one from a TOML file.

    Raises:
        ConfigError: there is no such task, or its file is wrong.
    """
    if name_or_path in built_in_tasks():
        with resources.as_file(resources.files("fedqc") / "tasks" / f"{name_or_path}.toml") as path:
            return read_toml(path, Task)
    path = Path(name_or_path)
    if path.suffix != ".toml":
        hint = did_you_mean(name_or_path, built_in_tasks())
        raise ConfigError(
            f"task {name_or_path!r} is not built in; {hint}built in: {', '.join(built_in_tasks())}; "
            "a task of your own is given as the path of its .toml file"
        )
    return read_toml(path, Task)
