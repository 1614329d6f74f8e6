"""Layout `brats`: the Brain Tumour Segmentation challenges, 2017 to 2021 and since 2023."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedqc.cases.layouts.base import (
    CaseBuilder,
    CaseFiles,
    Layout,
    Listing,
    has_list,
    is_folder,
    unexpected,
    walk,
)
from fedqc.cases.layouts.modalities import common_names, known_names
from fedqc.cases.problems import Problem
from fedqc.errors import DataError
from fedqc.task import Task

_LABEL = "the label"  # no modality can be called so
_SUFFIXES = {
    "_": {"t1n": "_t1", "t1c": "_t1ce", "t2w": "_t2", "t2f": "_flair", _LABEL: "_seg"},
    "-": {"t1n": "-t1n", "t1c": "-t1c", "t2w": "-t2w", "t2f": "-t2f", _LABEL: "-seg"},
}
"""By naming (2017 to 2021, since 2023) and by what the file is."""
_PARTS = {suffix: part for names in _SUFFIXES.values() for part, suffix in names.items()}
_FILE = re.compile(rf"(?P<id>.+)(?P<suffix>{'|'.join(_PARTS)})(?P<ending>\.nii(\.gz)?)")
_PATIENT = re.compile(r"(BraTS-.+-\d+)-\d{3}")
_DEPTH = 3  # such as Training/HGG/ID


class BratsLayout(Layout):
    """BraTS: `ID_t1.nii.gz`, `_t1ce`, `_t2`, `_flair`, `_seg`, or `ID-t1n.nii.gz`, `-t1c`, `-t2w` and so on.

    Each case has a folder of its own, up to three levels down, or all lie in one. Of ids such as
    `BraTS-GLI-00001-000`, the last three digits are the time point and the rest is the patient; any other id
    is a patient of its own.
    """

    name = "brats"
    needs = "files called ID_t1.nii.gz or ID-t1n.nii.gz and so on, up to three folders down"

    @staticmethod
    def detect(root: Path) -> bool:
        """Whether a file has the name of a BraTS image, and there is no list of cases."""
        if not is_folder(root) or has_list(root):
            return False
        matches = (_FILE.fullmatch(name) for _, names in walk(root, _DEPTH, []) for name in names)
        return any(match is not None and _PARTS[match["suffix"]] != _LABEL for match in matches)

    def find(self, root: Path, task: Task) -> Listing:
        """List the cases with an image or a label; two folders may hold cases of the same id."""
        parts = {**_modalities(task), _LABEL: _LABEL}
        problems: list[Problem] = []
        cases = []
        for folder, names in walk(root, _DEPTH, problems):
            matches = {name: _FILE.fullmatch(name) for name in names}
            by_id: dict[str, list[re.Match[str]]] = {}
            for match in filter(None, matches.values()):
                by_id.setdefault(match["id"], []).append(match)
            if by_id:
                problems += [_strange(folder / name) for name, match in matches.items() if match is None]
            cases += [_case(folder, case_id, found, parts) for case_id, found in by_id.items()]
        if not cases:
            raise DataError(f"{root}: no file has a name of BraTS; layout 'brats' needs {self.needs}")
        return Listing(cases=cases, problems=problems)


def _modalities(task: Task) -> dict[str, str]:
    """The modalities of the task by the names that BraTS has given them since 2023."""
    names = common_names(task)
    unknown = [
        modality for modality, name in zip(task.modalities, names, strict=True) if name not in _PARTS.values()
    ]
    if unknown:
        raise DataError(
            f"task {task.name!r} needs {', '.join(unknown)}, which is no modality of BraTS; these are "
            f"{known_names()}; choose the task or the layout that fits the data"
        )
    return dict(zip(names, task.modalities, strict=True))


def _case(
    folder: Path, case_id: str, matches: Sequence[re.Match[str]], parts: Mapping[str, str]
) -> CaseFiles:
    """A case from the names of its files in `folder`; `parts` are what it should have, last the label."""
    case = CaseBuilder(case_id, folder, str(folder))
    suffix, ending = matches[0]["suffix"], matches[0]["ending"]
    missing: Mapping[str, str] = _SUFFIXES[suffix[0]]
    files = []
    for part, role in parts.items():
        found = [folder / match[0] for match in matches if _PARTS[match["suffix"]] == part]
        files.append(case.first(found, role) if found else folder / f"{case_id}{missing[part]}{ending}")
    time_point = _PATIENT.fullmatch(case_id)
    return case.build(files[:-1], files[-1], patient=time_point[1] if time_point else None)


def _strange(path: Path) -> Problem:
    return unexpected(
        path,
        "an image among the cases that is none of theirs",
        f"a name that ends in {', '.join(_PARTS)}",
        "rename the file if it belongs to a case; it is not used otherwise",
    )
