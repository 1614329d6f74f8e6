"""Where the files of each case are: how a data folder is laid out.

A layout only lists paths; nothing is opened but the list itself (`dataset.json`, `cases.csv`). What is wrong
with the list as a whole is a `DataError`; what is wrong with one case is left to validation. So a file that
should be there is listed, whether it is there or not.
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
_FILE_ENDINGS = (".nii.gz", ".nii")


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

    An image holds all modalities. The id of a case is the name of its image file, and every case is a patient
    of its own.
    """

    name = "msd"

    @staticmethod
    def detect(root: Path) -> bool:
        """Whether there is a `dataset.json`, and it is not nnU-Net's."""
        return (root / "dataset.json").is_file() and not _is_nnunet(root)

    def find(self, root: Path, task: Task) -> list[CaseFiles]:
        """List the cases of `training`."""
        path = root / "dataset.json"
        dataset = _read_json(path, self.name)
        _read_modalities(path, dataset, task)
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


class NnunetLayout(Layout):
    """nnU-Net's raw data, version 1 or 2: `imagesTr/ID_0000.nii.gz`, a file a channel, `labelsTr/ID.nii.gz`.

    `dataset.json` names the channels; where they are the task's modalities they are put into the task's
    order, otherwise they are taken as they come. Cases are found by their files, or listed with explicit
    paths under `dataset`. Every case is a patient of its own.
    """

    name = "nnunet"

    @staticmethod
    def detect(root: Path) -> bool:
        """Whether there is a `dataset.json` with files called `_0000`, or with a `dataset` of paths."""
        return _is_nnunet(root)

    def find(self, root: Path, task: Task) -> list[CaseFiles]:
        """List the cases with an image in `imagesTr` or a label in `labelsTr`, or those of `dataset`."""
        path = root / "dataset.json"
        content = _read_json(path, self.name)
        order = _channel_order(path, content, task)
        ending = content.get("file_ending", _FILE_ENDINGS[0])  # version 1 knows no other
        if ending not in _FILE_ENDINGS:
            raise DataError(
                f"{path}: 'file_ending' is {ending!r}, expected .nii.gz or .nii; convert the files to NIfTI"
            )
        if "dataset" in content:
            cases = self._listed(path, content["dataset"], order)
        else:
            cases = self._found(root, ending, order)
        expected = content.get("numTraining", len(cases))
        if expected != len(cases):
            raise DataError(
                f"{path}: 'numTraining' is {expected!r}, found {len(cases)} cases; "
                "copy the missing files or correct the number"
            )
        return cases

    @staticmethod
    def _listed(path: Path, dataset: object, order: list[int]) -> list[CaseFiles]:
        if not isinstance(dataset, dict) or not dataset:
            raise DataError(
                f"{path}: 'dataset' is no list of cases; give each id its 'images' and its 'label' there"
            )
        cases = []
        for name, entry in dataset.items():
            place = f"{path}: dataset[{name!r}]"
            images = entry.get("images") if isinstance(entry, dict) else None
            if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
                raise DataError(f"{place}: no list of paths under 'images'; give one path a channel")
            if len(images) != len(order):
                raise DataError(f"{place}: lists {len(images)} images, expected {len(order)}, one a channel")
            label = entry.get("label")
            if label is not None and not isinstance(label, str):
                raise DataError(f"{place}: 'label' is {label!r}; give the path of the label")
            cases.append(
                CaseFiles(
                    id=_checked_id(name, place),
                    patient=name,
                    images=tuple(_inside(path.parent, images[channel], place) for channel in order),
                    label=_inside(path.parent, label, place) if label else None,
                )
            )
        return cases

    @staticmethod
    def _found(root: Path, ending: str, order: list[int]) -> list[CaseFiles]:
        images, labels = root / "imagesTr", root / "labelsTr"
        last = len(order) - 1
        ids = set()
        for file in _nifti_files(images):
            case_id, _, channel = file.removesuffix(ending).rpartition("_")
            if not (file.endswith(ending) and re.fullmatch("[0-9]{4}", channel) and int(channel) <= last):
                expected = " to ".join(f"ID_{number:04d}{ending}" for number in sorted({0, last}))
                raise DataError(
                    f"{images / file}: is no channel that dataset.json lists, expected a name as {expected}; "
                    "rename or remove the file or correct dataset.json"
                )
            ids.add(_checked_id(case_id, str(images / file)))
        for file in _nifti_files(labels):
            ids.add(_checked_id(file.removesuffix(".gz").removesuffix(".nii"), str(labels / file)))
        if not ids:
            raise DataError(f"{images}: there is no image; put ID_0000{ending} and so on there")
        cases = []
        for case_id in ids:
            names = [f"imagesTr/{case_id}_{channel:04d}{ending}" for channel in order]
            place = f"case {case_id}"
            cases.append(
                CaseFiles(
                    id=case_id,
                    patient=case_id,
                    images=tuple(_inside(root, name, place) for name in names),
                    label=_inside(root, f"labelsTr/{case_id}{ending}", place),
                )
            )
        return cases


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
        rows = _read_table(path, ("id", *task.modalities, "label"), optional=("patient",))
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
            "'msd' and 'nnunet' need a dataset.json in the folder, 'csv' a cases.csv"
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


def _read_json(path: Path, layout: str) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; layout {layout!r} needs it")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); correct or copy it again") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: holds a {type(content).__name__}, expected an object that describes the data"
        )
    return content


def _is_nnunet(root: Path) -> bool:
    """Whether a folder with a `dataset.json` is nnU-Net's rather than the Decathlon's.

    Version 1 has the Decathlon's list, so the files decide: there are images called `ID_0000`, which the list
    calls `ID`. Images of the Decathlon may be numbered with four digits, too, but are listed as they are.
    """
    path = root / "dataset.json"
    if not path.is_file():
        return False
    try:
        content = _read_json(path, "nnunet")
    except DataError:  # said by whichever layout reads it
        content = {}
    if isinstance(content.get("dataset"), dict):
        return True
    try:
        names = {file.name for file in (root / "imagesTr").iterdir()}
    except OSError:
        return False
    training = content.get("training")
    entries = training if isinstance(training, list) else []
    listed = {Path(str(entry.get("image"))).name for entry in entries if isinstance(entry, dict)}
    return any("_0000." in name for name in names) and not names & listed


def _nifti_files(folder: Path) -> list[str]:
    """Names of the NIfTI files in a folder, hidden ones aside."""
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}); layout 'nnunet' needs this folder"
        ) from None
    return [name for name in names if name.endswith(_FILE_ENDINGS) and not name.startswith(".")]


def _read_modalities(path: Path, dataset: dict[str, Any], task: Task) -> dict[str, str]:
    """The channels listed (`modality`, or `channel_names` in newer files), as many as the task's.

    Returns:
        Name of each channel by its number as written, in the order of the file.
    """
    key = "modality" if "modality" in dataset else "channel_names"
    listed = dataset.get(key)
    if isinstance(listed, list):
        listed = dict(enumerate(listed))
    if not isinstance(listed, dict):
        raise DataError(
            f"{path}: neither 'modality' nor 'channel_names' is there; list the images' modalities"
        )
    names = {str(number): str(name) for number, name in listed.items()}
    if len(names) != len(task.modalities):
        raise DataError(
            f"{path}: '{key}' lists {len(names)} ({', '.join(names.values())}), task {task.name!r} needs "
            f"{len(task.modalities)} ({', '.join(task.modalities)}); choose the task that fits the data"
        )
    return names


def _channel_order(path: Path, dataset: dict[str, Any], task: Task) -> list[int]:
    """The number of nnU-Net's channel for each of the task's modalities."""
    names = _read_modalities(path, dataset, task)
    numbers = [str(number) for number in range(len(names))]
    if set(names) != set(numbers):
        raise DataError(
            f"{path}: channels are numbered {', '.join(names)}, expected {', '.join(numbers)}; "
            "number them as the files are"
        )
    listed = [names[number].casefold() for number in numbers]
    wanted = [name.casefold() for name in task.modalities]
    if set(listed) == set(wanted) and len(set(wanted)) == len(wanted):
        return [listed.index(name) for name in wanted]
    return list(range(len(names)))


def _table(root: Path) -> Path:
    return root if root.suffix.lower() == ".csv" and not root.is_dir() else root / "cases.csv"


def _read_table(
    path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()
) -> list[tuple[int, dict[str, str]]]:
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
    _check_header(path, header, columns, optional)
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{path}: line {line} has {len(cells)} cells, the header {len(header)}; "
                "give each row one cell a column"
            )
    return [(line, dict(zip(header, cells, strict=True))) for line, cells in rows]


def _check_header(path: Path, header: list[str], columns: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """All columns must be there; other ones may be, but none that was meant to be one of them."""
    known = {name.casefold(): name for name in (*columns, *optional)}
    for name in header:
        meant = known.get(name.casefold())
        if meant is not None and name not in (*columns, *optional):
            raise DataError(f"{path}: found a column {name!r}, expected {meant!r}; rename or remove it")
        if name and header.count(name) > 1:
            raise DataError(f"{path}: column {name!r} occurs {header.count(name)} times; leave one of them")
    missing = [name for name in columns if name not in header]
    if missing:
        semicolons = any(";" in name for name in header)
        raise DataError(
            f"{path}: column {', '.join(missing)} is missing; found {', '.join(header) or 'no header'}, "
            f"expected {', '.join(columns)} separated by commas"
            + (", not by semicolons; save the table again" if semicolons else "")
        )
