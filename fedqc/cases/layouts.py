"""Where the files of each case are: how a data folder is laid out.

A layout only lists paths; nothing is opened but the list itself (`dataset.json`, `cases.csv`). What is wrong
with the list as a whole is a `DataError`; what is wrong with one case is left to validation.
"""

import csv
import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

from fedqc.errors import ConfigError, DataError
from fedqc.task import Task

# Ids become file names (error maps), so they must not be able to leave a folder.
_CASE_ID = re.compile(r"\w[\w .+-]*")


@dataclass(frozen=True)
class CaseFiles:
    """Paths of one case; nothing is read yet."""

    id: str
    patient: str
    images: tuple[Path, ...]
    """One file a modality in the task's order, or one 4D file that holds all of them in that order."""
    label: Path | None


class Layout(ABC):
    """One way to lay out a data folder. Plug-ins register under the entry-point group `fedqc.layouts`."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def detect(root: Path) -> bool:
        """Whether `root` looks like this layout."""

    @abstractmethod
    def find(self, root: Path, task: Task) -> list[CaseFiles]:
        """List the cases under `root`.

        Raises:
            DataError: the list of cases is broken or does not fit the task.
        """


class MsdLayout(Layout):
    """Medical Segmentation Decathlon: `dataset.json` lists pairs of image and label under `training`.

    The id of a case is the name of its image file, and every case is a patient of its own.
    """

    name = "msd"

    @staticmethod
    def detect(root: Path) -> bool:
        """Whether there is a `dataset.json`."""
        return (root / "dataset.json").is_file()

    def find(self, root: Path, task: Task) -> list[CaseFiles]:
        """List the cases of `training`."""
        path = root / "dataset.json"
        dataset = _read_json(path)
        _check_modalities(path, dataset, task)
        training = dataset.get("training")
        if not isinstance(training, list) or not training:
            raise DataError(
                f"{path}: 'training' is no list of cases; list {{'image': ..., 'label': ...}} there"
            )
        return [self._case(path, number, entry) for number, entry in enumerate(training)]

    @staticmethod
    def _case(path: Path, number: int, entry: object) -> CaseFiles:
        place = f"{path}: training[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise DataError(f"{place}: no text under 'image'; give the path of the image")
        label = entry.get("label")
        if label is not None and not isinstance(label, str):
            raise DataError(f"{place}: 'label' is {label!r}; give the path of the label")
        image = _inside(path.parent, entry["image"], place)
        case_id = _checked_id(image.name.removesuffix(".gz").removesuffix(".nii"), place)
        return CaseFiles(
            id=case_id,
            patient=case_id,
            images=(image,),
            label=_inside(path.parent, label, place) if label else None,
        )


class CsvLayout(Layout):
    """A table with the columns `id`, one for each modality of the task, `label`, and optionally `patient`.

    The folder holds it as `cases.csv`, or the data path is the table itself. Paths are relative to it. A case
    without a patient is a patient of its own.
    """

    name = "csv"

    @staticmethod
    def detect(root: Path) -> bool:
        """Whether `root` is a .csv file or holds `cases.csv`."""
        return _table(root).is_file()

    def find(self, root: Path, task: Task) -> list[CaseFiles]:
        """List the cases of the table; an empty cell is a file that is not there."""
        path = _table(root)
        rows = _read_table(path, ("id", *task.modalities, "label"))
        if not rows:
            raise DataError(f"{path}: the table has no row; give each case a row")
        return [self._case(path, line, row, task) for line, row in rows]

    @staticmethod
    def _case(path: Path, line: int, row: dict[str, str], task: Task) -> CaseFiles:
        place = f"{path}: line {line}"
        case_id = _checked_id(row["id"], place)
        return CaseFiles(
            id=case_id,
            patient=row.get("patient") or case_id,
            images=tuple(_inside(path.parent, row[name], place) for name in task.modalities if row[name]),
            label=_inside(path.parent, row["label"], place) if row["label"] else None,
        )


def load_layouts() -> dict[str, type[Layout]]:
    """All installed layouts by name, those of plug-ins included.

    Raises:
        ConfigError: a plug-in cannot be imported or is no layout.
    """
    layouts: dict[str, type[Layout]] = {}
    for entry in sorted(entry_points(group="fedqc.layouts"), key=lambda entry: entry.name):
        try:
            layout = entry.load()
        except Exception as error:  # a plug-in is foreign code: whatever it raises, it cannot be used
            raise ConfigError(
                f"layout {entry.name!r} ({entry.value}) cannot be loaded: {error}; "
                "repair or uninstall its package"
            ) from error
        if not (isinstance(layout, type) and issubclass(layout, Layout)):
            raise ConfigError(f"layout {entry.name!r} ({entry.value}) is no subclass of fedqc's Layout")
        layouts[entry.name] = layout
    return layouts


def find_cases(root: Path, task: Task, layout: str | None = None) -> list[CaseFiles]:
    """The cases under `root`, sorted by id.

    Args:
        root: data folder, or a file that a layout knows (a .csv table).
        task: what the data show.
        layout: name of the layout; None finds out which one fits.

    Raises:
        DataError: the folder is missing or empty, the layout is unknown or does not fit, its list is broken.
    """
    try:
        is_empty = root.is_dir() and not any(root.iterdir())
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}); give this user access to it") from None
    if not root.exists():
        raise DataError(f"{root}: there is no such folder; correct the path of the data")
    if is_empty:
        raise DataError(f"{root}: the folder is empty; put the data there or correct the path")
    layouts = load_layouts()
    if layout is None:
        layout = _detect(root, layouts)
    elif layout not in layouts:
        raise DataError(f"layout {layout!r} is not known; known layouts: {', '.join(layouts)}")
    cases = layouts[layout]().find(root, task)
    return sorted(cases, key=lambda case: case.id)


def read_ids(path: Path) -> frozenset[str]:
    """The case ids in column `id` of a CSV, such as the reference cases of a site.

    Raises:
        DataError: there is no such file or no such column.
    """
    return frozenset(row["id"] for _, row in _read_table(path, ("id",)) if row["id"])


def _detect(root: Path, layouts: dict[str, type[Layout]]) -> str:
    fitting = [name for name, layout in layouts.items() if layout.detect(root)]
    if not fitting:
        raise DataError(
            f"{root}: no layout fits (known: {', '.join(layouts)}); "
            "'msd' needs a dataset.json in the folder, 'csv' a cases.csv"
        )
    if len(fitting) > 1:
        raise DataError(f"{root}: the layouts {' and '.join(fitting)} both fit; name the one to use")
    return fitting[0]


def _checked_id(case_id: str, place: str) -> str:
    if _CASE_ID.fullmatch(case_id) is None:
        raise DataError(
            f"{place}: {case_id!r} cannot be the id of a case; start with a letter, a digit or '_' "
            "and go on with these, '-', '+', '.' or spaces"
        )
    return case_id


def _inside(folder: Path, name: str, place: str) -> Path:
    """The path called `name` in a list that lies in `folder`; it may not lead out of the folder."""
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a loop of links, a NUL character
        inside = False
    if not inside:
        raise DataError(
            f"{place}: {name!r} leads out of {folder}; copy the file into the folder and list it there"
        )
    return folder / Path(name)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; layout 'msd' needs it")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); correct or copy it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected an object with 'training'")
    return content


def _check_modalities(path: Path, dataset: dict[str, Any], task: Task) -> None:
    """The channels listed (`modality`, or `channel_names` in newer files) must be as many as the task's."""
    key = "modality" if "modality" in dataset else "channel_names"
    listed = dataset.get(key)
    if not isinstance(listed, dict | list):
        raise DataError(
            f"{path}: neither 'modality' nor 'channel_names' is there; list the images' modalities"
        )
    names = [str(name) for name in (listed.values() if isinstance(listed, dict) else listed)]
    if len(names) != len(task.modalities):
        raise DataError(
            f"{path}: '{key}' lists {len(names)} ({', '.join(names)}), task {task.name!r} needs "
            f"{len(task.modalities)} ({', '.join(task.modalities)}); choose the task that fits the data"
        )


def _table(root: Path) -> Path:
    return root if root.suffix.lower() == ".csv" and not root.is_dir() else root / "cases.csv"


def _read_table(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells, stripped, of each row that is not blank."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; make a table with the columns {', '.join(columns)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); save it as CSV in UTF-8") from None
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(
            f"{path}: column {', '.join(missing)} is missing; found {', '.join(header) or 'no header'}, "
            f"expected {', '.join(columns)} separated by commas"
        )
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{path}: line {line} has {len(cells)} cells, the header {len(header)}; "
                "give each row one cell a column"
            )
    return [(line, dict(zip(header, cells, strict=True))) for line, cells in rows]
