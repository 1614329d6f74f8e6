"""What every layout makes (cases as paths) and how: names checked, problems collected."""

import contextlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from fedqc.cases.problems import Problem
from fedqc.errors import DataError, printable
from fedqc.task import Task

FILE_ENDINGS = (".nii.gz", ".nii")
"""Of NIfTI files."""
LISTS = ("cases.csv", "cases.tsv", "dataset.json")
"""Files that list the cases of a folder. What they say counts more than what the names of files look like."""

MAX_LIST_BYTES = 2**23
"""Of a table or a JSON file; 80,000 cases need as much."""

# Ids become file names (error maps), so they must not be able to leave a folder.
_CASE_ID = re.compile(r"\w[\w .+-]*")


@dataclass(frozen=True)
class CaseFiles:
    """Paths of one case; nothing is read yet."""

    id: str
    patient: str
    images: tuple[Path | None, ...]
    """One file a modality in the task's order (None where none is listed), or one 4D file that holds all."""
    label: Path | None
    groups: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What else is known of it by name, such as the scanner; stays at the site."""
    problems: tuple[Problem, ...] = ()
    """What is wrong with its entry in the list."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The images that are listed, and last the label where one is."""
        return tuple(path for path in (*self.images, self.label) if path is not None)


@dataclass(frozen=True)
class Listing:
    """What a data folder holds."""

    cases: Sequence[CaseFiles]
    problems: Sequence[Problem] = ()
    """Of the folder as a whole."""
    layout: str = ""
    """Name of the layout that found the cases."""


class Layout(ABC):
    """One way to lay out a data folder. Plug-ins register under the entry-point group `fedqc.layouts`.

    A layout only lists paths; nothing is opened but the list itself (`dataset.json`, `cases.csv`). What is
    wrong with the list as a whole is a `DataError`; what is wrong with one case is a problem of that case. A
    file that should be there is listed, whether it is there or not.
    """

    name: ClassVar[str]
    needs: ClassVar[str] = "what its documentation says"
    """What has to be in a folder for this layout to fit, as part of a sentence."""

    def __init__(self, option: str | None = None) -> None:
        """A layout chosen as `name` or `name:option`; one that takes an option has its own constructor.

        Raises:
            DataError: there is an option, and the layout takes none.
        """
        if option is not None:
            raise DataError(
                f"layout {self.name!r} takes no option, found {option!r} behind the colon; "
                f"name the layout as {self.name!r}"
            )

    @staticmethod
    @abstractmethod
    def detect(root: Path) -> bool:
        """Whether `root` looks like this layout."""

    @abstractmethod
    def find(self, root: Path, task: Task) -> Listing:
        """List the cases under `root`.

        Raises:
            DataError: the list of cases is broken or does not fit the task.
        """


class CaseBuilder:
    """Collects the files of one case and what is wrong with its entry: one bad case stops no other."""

    def __init__(self, case_id: str, folder: Path, place: str) -> None:
        """A case of the list at `place` (named in problems), whose paths are relative to `folder`."""
        self._id = printable(case_id)
        self._folder = folder
        self._place = place
        self.problems: list[Problem] = []
        if _CASE_ID.fullmatch(case_id) is None:
            self.problems.append(
                Problem(
                    code="invalid-id",
                    case=self._id,
                    file=None,
                    found=f"the id {case_id!r} in {place}",
                    expected="letters, digits, spaces and any of _-+., the first a letter, digit or _",
                    fix="rename the case",
                )
            )

    def path(self, name: str) -> Path:
        """The path called `name` in the list; it may not name a place outside the folder."""
        # No file's name has a NUL, many functions trip over it; lists made on Windows have backslashes.
        path = PurePosixPath(name.replace("\0", "?").replace("\\", "/"))
        folders = (self._folder.absolute(), self._folder.resolve())
        is_outside = path.is_absolute() and not any(path.is_relative_to(folder) for folder in folders)
        if is_outside or ".." in path.parts or "\0" in name:
            self.problems.append(
                Problem(
                    code="path-outside",
                    case=self._id,
                    file=None,
                    found=f"the path {name!r} in {self._place}",
                    expected=f"a path inside {self._folder}",
                    fix="copy the file into the folder and list it there",
                )
            )
        return self._folder / path

    def first(self, files: Sequence[Path], role: str) -> Path:
        """The first of the files that may all be the same part of the case; a second one is a problem."""
        if len(files) > 1:
            self.problems.append(
                Problem(
                    code="ambiguous-file",
                    case=self._id,
                    file=files[0],
                    found=f"{len(files)} files for {role}: {', '.join(file.name for file in files)}",
                    expected="one",
                    fix=f"move the others away if {files[0].name}, which is taken, is the right one",
                )
            )
        return files[0]

    def build(
        self,
        images: Sequence[Path | None],
        label: Path | None,
        *,
        patient: str | None = None,
        groups: Mapping[str, str] | None = None,
    ) -> CaseFiles:
        """The case; without a patient it is a patient of its own."""
        return CaseFiles(
            id=self._id,
            patient=printable(patient or self._id),
            images=tuple(images),
            label=label,
            groups={printable(name): printable(value) for name, value in (groups or {}).items()},
            problems=tuple(self.problems),
        )


def without_ending(name: str) -> str:
    """The name of a NIfTI file without `.nii` or `.nii.gz`."""
    return name.removesuffix(".gz").removesuffix(".nii")


def has_list(root: Path) -> bool:
    """Whether a folder holds a list of its cases (`LISTS`)."""
    return any(is_file(root / name) for name in LISTS)


def is_file(path: Path) -> bool:
    """Whether there is such a file; one that may not be looked at counts as none."""
    with contextlib.suppress(OSError, ValueError):
        return path.is_file()
    return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; one that may not be looked at counts as none."""
    with contextlib.suppress(OSError, ValueError):
        return path.is_dir()
    return False


def names_in(folder: Path) -> list[str]:
    """Names of the files and folders in a folder, sorted, hidden ones aside.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}); the layout needs this folder"
        ) from None


def nifti_names(folder: Path) -> list[str]:
    """Names of the NIfTI files in a folder, sorted, hidden ones aside.

    Raises:
        DataError: the folder cannot be listed.
    """
    return [name for name in names_in(folder) if name.endswith(FILE_ENDINGS)]


def walk(root: Path, depth: int, problems: list[Problem]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder from `root` to `depth` levels below it, with the sorted names of its NIfTI files.

    Hidden ones are left out. Links to folders are followed, but no folder comes twice, and none that `root`
    lies in: a link to / would lead through all of the machine. One that cannot be listed is added to
    `problems`.
    """
    seen = {_identity(folder) for folder in root.resolve().parents}
    level = [root]
    for _ in range(depth + 1):
        below: list[Path] = []
        for folder in level:
            try:
                identity = _identity(folder)
                if identity in seen:
                    continue
                seen.add(identity)
                with os.scandir(folder) as entries:
                    listed = sorted((one for one in entries if one.name[0] != "."), key=lambda one: one.name)
            except OSError as error:
                problems.append(_unlisted(folder, error))
                continue
            folders = {one.name for one in listed if _is_folder(one)}
            yield (
                folder,
                [one.name for one in listed if one.name not in folders and one.name.endswith(FILE_ENDINGS)],
            )
            # What is reached by a link, too, is known by its own path.
            in_turn = sorted((one for one in listed if one.name in folders), key=os.DirEntry.is_symlink)
            below += [folder / one.name for one in in_turn]
        level = below


def unexpected(path: Path, found: str, expected: str, fix: str) -> Problem:
    """A file that is not what its place promises."""
    return Problem(code="unexpected-file", case=None, file=path, found=found, expected=expected, fix=fix)


def read_json(path: Path, layout: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        DataError: it is missing, too large, no JSON or no object.
    """
    if not is_file(path):
        raise DataError(f"{path}: there is no such file; layout {layout!r} needs it")
    check_length(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); correct or copy it again") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: holds a {type(content).__name__}, expected an object that describes the data"
        )
    return content


def check_length(path: Path) -> None:
    """Refuse a list that no program wrote on purpose, before it fills the memory.

    Raises:
        DataError: it is longer than `MAX_LIST_BYTES`.
    """
    with contextlib.suppress(OSError):  # said by whoever reads it
        length = path.stat().st_size
        if length > MAX_LIST_BYTES:
            raise DataError(
                f"{path}: holds {length} bytes, expected at most {MAX_LIST_BYTES}; "
                "split the data into several folders"
            )


def _identity(folder: Path) -> tuple[int, int]:
    """What is the same for all paths to a folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # A link that goes round in circles is no folder, where entry.is_dir() would raise.
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and is_folder(Path(entry.path)))


def _unlisted(folder: Path, error: OSError) -> Problem:
    return Problem(
        code="no-permission",
        case=None,
        file=folder,
        found=f"a folder that cannot be listed ({error.strerror})",
        expected="a folder that this user may read",
        fix="give this user access to it, or move it away if it holds no case",
    )
