"""What can be wrong with a case or a data folder: one `Problem` each, with a code that stays the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from fedqc.errors import printable

Severity = Literal["error", "warning"]

ErrorCode = Literal[
    # which files a case has
    "missing-modality",
    "missing-label",
    "duplicate-id",
    "invalid-id",
    "path-outside",
    # one file
    "no-permission",
    "empty-file",
    "truncated",
    "not-nifti",
    "unreadable",
    "too-large",
    # its grid
    "wrong-dimensions",
    "invalid-spacing",
    "singular-affine",
    "spacing-out-of-range",
    "shape-mismatch",
    "orientation-mismatch",
    "affine-mismatch",
    # its voxels
    "non-finite",
    "constant-image",
    "non-integral-label",
    "unknown-label-value",
    "empty-label",
    "exchanged-files",
    "image-as-label",
]
"""The case is left out."""

WarningCode = Literal[
    # which files a case has
    "ambiguous-file",
    "name-clash",
    "link-outside",
    "duplicate-image",
    "duplicate-label",
    # its grid
    "qform-sform-mismatch",
    "unit-not-mm",
    # its voxels
    "normalised-image",
    "clipped-image",
    "label-convention",
    "label-outside-image",
    "label-cropped",
    "label-fills-image",
    "tiny-islands",
    "unusual-volume",
    "missing-class",
    # the folder and its lists
    "unexpected-file",
    "case-count",
    "shared-patient",
    "unknown-reference",
    "unknown-rating",
    "key-exposed",
    "missing-credential",
]
"""The case stays; somebody should look."""

Code = Literal[ErrorCode, WarningCode]

CODES: Mapping[Code, Severity] = MappingProxyType(
    {code: ("error" if code in get_args(ErrorCode) else "warning") for code in get_args(Code)}
)
"""Every code and how bad it is."""

MEANINGS: Mapping[Code, str] = MappingProxyType(
    {
        "missing-modality": "the image of a modality is not there",
        "missing-label": "there is no label",
        "duplicate-id": "several cases have the same id",
        "invalid-id": "the id cannot be part of a file's name",
        "path-outside": "a path in the list leads out of the data folder",
        "no-permission": "this user may not read a file or folder",
        "empty-file": "a file holds nothing",
        "truncated": "a file ends too early",
        "not-nifti": "a file is no NIfTI file, whatever its name says",
        "unreadable": "a file is damaged, or its header makes no sense",
        "too-large": "the images of a case are too large to work with",
        "wrong-dimensions": "a file has other dimensions than the task needs",
        "invalid-spacing": "a header gives a voxel side that is no number above 0",
        "singular-affine": "a header gives the voxels no place in the scanner",
        "spacing-out-of-range": "voxels are smaller or larger than the task allows",
        "shape-mismatch": "two volumes of a case have different numbers of voxels",
        "orientation-mismatch": "the headers of two volumes give their axes different directions",
        "affine-mismatch": "the headers of two volumes put them in different places",
        "non-finite": "voxels are NaN or infinite",
        "constant-image": "an image holds one value only, or one beside zero",
        "non-integral-label": "label values are not whole numbers, as after interpolation",
        "unknown-label-value": "a label holds values that the task does not know",
        "empty-label": "nothing is marked, and the task does not allow that",
        "exchanged-files": "image and label have each other's place",
        "image-as-label": "a scan lies in the label's place",
        "ambiguous-file": "several files could be the same part of a case",
        "name-clash": "ids differ in upper and lower case only",
        "link-outside": "a file is a link that leads out of the data folder",
        "duplicate-image": "two images have the same voxels",
        "duplicate-label": "two cases have the same label, voxel for voxel",
        "qform-sform-mismatch": "a header puts its volume in two different places",
        "unit-not-mm": "a header gives lengths in another unit than mm",
        "normalised-image": "intensities look normalised already",
        "clipped-image": "the highest intensities look cut off",
        "label-convention": "label values seem to mean other classes than the task says",
        "label-outside-image": "part of a label lies where the image is empty",
        "label-cropped": "the network does not see all of a label",
        "label-fills-image": "nearly everything is marked",
        "tiny-islands": "a label has parts of very few voxels",
        "unusual-volume": "a class is far larger or smaller than at the site's other cases",
        "missing-class": "a class is not marked that nearly all labels of the site have",
        "unexpected-file": "something in the folder does not fit its layout",
        "case-count": "the list promises another number of cases than there are",
        "shared-patient": "a patient has cases among the references and among the others",
        "unknown-reference": "the table of references names something that is no case",
        "unknown-rating": "the table of ratings names something that is no case",
        "key-exposed": "other users of this machine can read the site's private key",
        "missing-credential": "the certificate or the key for the coordinator is not there",
    }
)
"""What each code means, as part of a sentence."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a case, or with the data as a whole (`case` is None)."""

    code: Code
    case: str | None
    file: Path | None
    found: str
    expected: str
    fix: str

    def __post_init__(self) -> None:
        for name in ("found", "expected", "fix"):  # they quote what lies in the folder, whatever it is
            object.__setattr__(self, name, printable(getattr(self, name)))

    @property
    def severity(self) -> Severity:
        """`error`: the case is left out; `warning`: it stays."""
        return CODES[self.code]

    @property
    def is_error(self) -> bool:
        """Whether the case is left out."""
        return self.severity == "error"

    def __str__(self) -> str:
        """The problem as one sentence."""
        named = (self.case and f"case {self.case}", self.file)
        place = printable(", ".join(str(part) for part in named if part is not None))
        return f"{place or 'the data'}: found {self.found}, expected {self.expected}; {self.fix}"

    def file_in(self, folder: Path) -> str:
        """The file as seen from a folder, whole where it lies elsewhere; empty where there is none."""
        if self.file is None:
            return ""
        is_inside = self.file.is_relative_to(folder) and self.file != folder
        return printable(str(self.file.relative_to(folder) if is_inside else self.file))

    def as_json(self) -> dict[str, Any]:
        """What `fedqc check --json` says of it."""
        return {
            "code": self.code,
            "severity": self.severity,
            "case": self.case,
            "file": None if self.file is None else str(self.file),
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Problem":
        """The problem that `as_json` wrote down."""
        file = values["file"]
        return cls(
            **{name: values[name] for name in ("code", "case", "found", "expected", "fix")},
            file=None if file is None else Path(file),
        )
