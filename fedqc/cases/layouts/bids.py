"""Layout `bids`: the Brain Imaging Data Structure, raw images with labels among the derivatives."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqc.cases.layouts.base import (
    CaseBuilder,
    CaseFiles,
    Layout,
    Listing,
    has_list,
    is_file,
    is_folder,
    names_in,
    read_json,
    unexpected,
    walk,
    without_ending,
)
from fedqc.cases.layouts.modalities import common_names
from fedqc.cases.layouts.table import read_table
from fedqc.cases.problems import Problem
from fedqc.errors import DataError
from fedqc.task import Task

_DERIVATIVES_DEPTH = 6
_SCAN = ("acq", "ce", "rec", "run")
"""Entities that tell several scans of one session apart."""
_SUFFIXES = {"t1n": "T1w", "t1c": "ce-gadolinium_T1w", "t2w": "T2w", "t2f": "FLAIR"}
"""How the file of a modality is called, by the modality's common name."""


@dataclass(frozen=True)
class _File:
    """A file whose name says what it is: `sub-01_ses-02_run-1_T1w.nii.gz`."""

    path: Path
    entities: Mapping[str, str]
    suffix: str

    @property
    def session(self) -> str:
        """`sub-01_ses-02`, or `sub-01`: the id of its case."""
        return "_".join(f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities)

    @property
    def order(self) -> tuple[int, int, str]:
        """What of several files is first: the lowest run, then the fewest entities, then the name."""
        run = self.entities.get("run", "")
        return int(run) if run.isdecimal() else 0, len(self.entities), self.path.name

    @property
    def shows_brain(self) -> bool:
        """Whether it is the mask of the brain that many tools leave behind."""
        return "brain" in (self.entities.get("desc"), self.entities.get("label"))

    def shows(self, modality: str) -> bool:
        """Whether it is an image of a modality, given by its common name."""
        if modality in {"t1n", "t1c"}:
            return self.suffix.casefold() == "t1w" and ("ce" in self.entities) == (modality == "t1c")
        return self.suffix.casefold() == _SUFFIXES.get(modality, modality).casefold()


class BidsLayout(Layout):
    """BIDS: images in `sub-*/[ses-*/]anat`, labels below `derivatives/*`.

    Each session is a case, `sub-01_ses-02` or `sub-01`, and each subject a patient. A T1w image with an
    entity `ce` is one with contrast agent. Where several folders below `derivatives` hold labels, the layout
    is named with the one to use, as `bids:expert`.
    """

    name = "bids"
    needs = "folders sub-*/anat or sub-*/ses-*/anat"

    def __init__(self, option: str | None = None) -> None:
        super().__init__()
        self._derivative = option

    @staticmethod
    def detect(root: Path) -> bool:
        """Whether subjects have an `anat`, or there is a description of the set; and no list of cases."""
        if not is_folder(root) or has_list(root):
            return False
        subjects = _subjects(root)
        described = bool(subjects) and is_file(root / "dataset_description.json")
        return described or any(True for subject in subjects for _ in _anat_folders(root / subject, []))

    def find(self, root: Path, task: Task) -> Listing:
        """List the sessions with an image of the task's modalities or a label."""
        wanted = dict(zip(common_names(task), task.modalities, strict=True))
        problems: list[Problem] = []
        images: dict[str, list[_File]] = {}
        for file in _raw_files(root, problems):
            if any(file.shows(modality) for modality in wanted):
                images.setdefault(file.session, []).append(file)
        labels = _Labels.find(root, self._derivative, task, problems)
        sessions = sorted({*images, *labels.by_session})
        if not sessions:
            raise DataError(
                f"{root}: no folder sub-*/anat or sub-*/ses-*/anat holds an image of task {task.name!r}; "
                f"expected names that end in {', '.join(f'_{_suffix(*names)}' for names in wanted.items())}"
            )
        participants = _participants(root / "participants.tsv", problems)
        cases = [
            _case(
                root / session.replace("_", "/") / "anat",
                session,
                images.get(session, []),
                labels,
                wanted=wanted,
                groups=participants.get(session.partition("_")[0], {}),
            )
            for session in sessions
        ]
        return Listing(cases=cases, problems=problems)


@dataclass(frozen=True)
class _Labels:
    """The labels of one folder below `derivatives`."""

    folder: Path
    by_session: Mapping[str, Sequence[_File]]
    """Of each session: the one to take, and then others that could be meant as well."""

    @classmethod
    def find(cls, root: Path, option: str | None, task: Task, problems: list[Problem]) -> "_Labels":
        """Those of the folder that the option names, or of the only one that holds labels for the task."""
        above = root / "derivatives"
        folders = [name for name in names_in(above) if is_folder(above / name)] if is_folder(above) else []
        if option is not None and option not in folders:
            raise DataError(
                f"{above}: holds no folder {option!r}; found {', '.join(folders) or 'none'}; "
                "name one of them behind the colon of 'bids:NAME'"
            )
        holding = {}
        for name in folders if option is None else [option]:
            by_session = _labels_in(above / name, task, problems)
            if by_session:
                holding[name] = cls(above / name, by_session)
        if len(holding) > 1:
            raise DataError(
                f"{above}: {' and '.join(holding)} hold labels for task {task.name!r}; "
                f"name the one to use, as layout 'bids:{next(iter(holding))}'"
            )
        return next(iter(holding.values()), cls(above / (option or "labels"), {}))

    def expected(self, session: str) -> Path:
        """Where the label of a session without one should be: as those of other sessions are."""
        folders = session.split("_")
        for other, files in self.by_session.items():
            if len(other.split("_")) == len(folders):
                place = files[0].path.relative_to(self.folder).as_posix()
                for theirs, ours in zip(other.split("_"), folders, strict=True):
                    place = place.replace(f"{theirs}/", f"{ours}/").replace(f"{theirs}_", f"{ours}_")
                return self.folder / place
        return self.folder.joinpath(*folders, "anat", f"{session}_dseg.nii.gz")


def _subjects(root: Path) -> list[str]:
    return [name for name in names_in(root) if name.startswith("sub-") and is_folder(root / name)]


def _anat_folders(subject: Path, problems: list[Problem]) -> Iterator[tuple[Path, list[str], str]]:
    """Each `anat` of a subject with its files and its session (`sub-01` or `sub-01_ses-02`)."""
    for folder, names in walk(subject, 2, problems):
        match folder.relative_to(subject).parts:
            case ("anat",):
                yield folder, names, subject.name
            case (session, "anat") if session.startswith("ses-"):
                yield folder, names, f"{subject.name}_{session}"


def _raw_files(root: Path, problems: list[Problem]) -> Iterator[_File]:
    for subject in _subjects(root):
        for folder, names, session in _anat_folders(root / subject, problems):
            for name in names:
                file = _parsed(folder / name)
                if file is not None and file.session == session:
                    yield file
                    continue
                problems.append(
                    unexpected(
                        folder / name,
                        "an image whose name does not fit its folder",
                        f"a name as {session}_T1w.nii.gz",
                        "rename the file if it belongs to this session; it is not used otherwise",
                    )
                )


def _parsed(path: Path) -> _File | None:
    """The file with what its name says; None where it is no name of BIDS.

    Parts without a hyphen before the suffix, as in `sub-01_T1w_label-lesion_mask`, are passed over.
    """
    *parts, suffix = without_ending(path.name).split("_")
    entities = dict(part.split("-", 1) for part in parts if "-" in part)
    if not parts or not parts[0].startswith("sub-") or not suffix or "-" in suffix:
        return None
    return _File(path, entities, suffix)


def _labels_in(folder: Path, task: Task, problems: list[Problem]) -> dict[str, list[_File]]:
    """The labels for the task below a folder: for each session those of the best kind, sorted."""
    files = [
        file
        for place, names in walk(folder, _DERIVATIVES_DEPTH, problems)
        if not {"sourcedata", "code"} & set(place.relative_to(folder).parts)
        for file in (_parsed(place / name) for name in names)
        if file is not None and not file.shows_brain
    ]
    kinds = [[file for file in files if file.suffix == "dseg"]]
    if len(task.classes) == 1:  # a mask knows one class
        masks = [file for file in files if file.suffix == "mask"]
        of_class = _masks_of_class([file for file in masks if "label" in file.entities], *task.classes)
        kinds += [of_class, [file for file in masks if "label" not in file.entities]]
    found: dict[str, list[_File]] = {}
    for kind in kinds:
        best: dict[str, list[_File]] = {}
        for file in sorted(kind, key=lambda file: file.order):
            best.setdefault(file.session, []).append(file)
        found = best | found
    return found


def _masks_of_class(masks: Sequence[_File], name: str) -> list[_File]:
    """Those whose label is the class, or all where they have one label only, however it is called."""
    named = [mask for mask in masks if _letters(mask.entities["label"]) == _letters(name)]
    labels = {mask.entities["label"] for mask in masks}
    return named or (list(masks) if len(labels) == 1 else [])


def _letters(name: str) -> str:
    """A name as BIDS allows it in a label, letters and digits only."""
    return re.sub(r"[\W_]", "", name).casefold()


def _case(
    anat: Path,
    session: str,
    images: Sequence[_File],
    labels: _Labels,
    *,
    wanted: Mapping[str, str],
    groups: Mapping[str, str],
) -> CaseFiles:
    """A case; `wanted` are the modalities by their common names."""
    case = CaseBuilder(session, anat, str(anat))
    files = labels.by_session.get(session, [])
    label = files[0] if files else None
    paths, first = [], None
    for common, modality in wanted.items():
        found = sorted(
            (image for image in images if image.shows(common)),
            key=lambda image: (_differences(image, label), image.order),
        )
        first = first or next(iter(found), None)
        expected = anat / f"{session}_{_suffix(common, modality)}.nii.gz"
        paths.append(case.first([image.path for image in found], modality) if found else expected)
    return case.build(
        paths,
        case.first([file.path for file in files], "the label") if files else labels.expected(session),
        patient=session.partition("_")[0],
        groups={**groups, **_scanner(first)},
    )


def _suffix(common: str, modality: str) -> str:
    """How the file of a missing modality would be called."""
    return _SUFFIXES.get(common, modality)


def _differences(image: _File, label: _File | None) -> int:
    """In how much of what the label's name says of its scan an image is another one."""
    said = {key: label.entities[key] for key in _SCAN if key in label.entities} if label else {}
    return sum(image.entities.get(key) != value for key, value in said.items())


def _scanner(image: _File | None) -> dict[str, str]:
    """Group `scanner` from the file beside an image that describes it; many sets have none."""
    if image is None:
        return {}
    sidecar = image.path.with_name(f"{without_ending(image.path.name)}.json")
    try:
        described: dict[str, Any] = read_json(sidecar, BidsLayout.name)
    except DataError:
        return {}
    words = [described.get(key) for key in ("Manufacturer", "ManufacturersModelName")]
    scanner = " ".join(word.strip() for word in words if isinstance(word, str) and word.strip())
    return {"scanner": scanner} if scanner else {}


def _participants(path: Path, problems: list[Problem]) -> dict[str, dict[str, str]]:
    """What participants.tsv says of each subject; a broken one costs the groups, not the cases."""
    if not is_file(path):
        return {}
    try:
        rows = read_table(path, ("participant_id",))
    except DataError as error:
        problems.append(
            unexpected(
                path,
                f"a table that cannot be read ({error})",
                "a column participant_id and others, separated by tabs",
                "correct the table if groups of cases matter; they are left out",
            )
        )
        return {}
    return {
        f"sub-{row['participant_id'].removeprefix('sub-')}": {
            name: cell
            for name, cell in row.items()
            if name and name != "participant_id" and cell and cell.casefold() != "n/a"
        }
        for _, row in rows
    }
