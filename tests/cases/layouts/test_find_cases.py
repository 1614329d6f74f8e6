from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fedqc.cases import layouts
from fedqc.cases.layouts import CaseFiles, Layout, Listing, find_cases, load_layouts
from fedqc.cases.layouts.bids import BidsLayout
from fedqc.cases.layouts.brats import BratsLayout
from fedqc.cases.layouts.msd import MsdLayout
from fedqc.cases.layouts.nnunet import NnunetLayout
from fedqc.cases.layouts.table import TableLayout
from fedqc.errors import ConfigError, DataError
from fedqc.task import Task
from tests.cases.layouts.trees import cases_in, make_files, refusal, write_json

Register = Callable[..., None]


class ByFolder(Layout):
    """A plug-in: each folder is a case."""

    name = "folders"

    @staticmethod
    def detect(root: Path) -> bool:
        return (root / "a").is_dir()

    def find(self, root: Path, task: Task) -> Listing:
        folders = sorted(root.iterdir(), reverse=True)
        return Listing([CaseFiles(one.name, one.name, (one / "image.nii",), None) for one in folders])


class WithOption(ByFolder):
    def __init__(self, option: str | None = None) -> None:
        super().__init__()
        self._file = option

    def find(self, root: Path, task: Task) -> Listing:
        return Listing([CaseFiles("a", "a", (root / f"{self._file}.nii",), None)])


class Unfinished(Layout):
    name = "unfinished"

    @staticmethod
    def detect(root: Path) -> bool:
        return True


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Make these the installed layouts."""

    def change(**targets: str) -> None:
        entries = [EntryPoint(name, value, "fedqc.layouts") for name, value in targets.items()]
        monkeypatch.setattr(layouts, "entry_points", lambda group: entries)

    return change


def test_the_layouts_that_come_with_fedqc() -> None:
    known = load_layouts()
    expected = {
        "bids": BidsLayout,
        "brats": BratsLayout,
        "csv": TableLayout,
        "msd": MsdLayout,
        "nnunet": NnunetLayout,
    }
    assert expected.items() <= known.items()
    assert all(layout.name == name for name, layout in expected.items())


@pytest.mark.parametrize("target", ["fedqc.no_such_module:Layout", "fedqc.errors:DataError"])
def test_broken_plug_in_is_named(target: str, register: Register) -> None:
    register(broken=target)
    with pytest.raises(ConfigError, match=f"layout 'broken' .{target}."):
        load_layouts()


def test_plug_in_that_is_not_finished(register: Register) -> None:
    register(half=f"{__name__}:Unfinished")
    with pytest.raises(ConfigError, match=r"layout 'half' .* lacks find; complete its class"):
        load_layouts()


def test_plug_in_finds_its_cases_sorted_by_id(tmp_path: Path, task: Task, register: Register) -> None:
    register(folders=f"{__name__}:ByFolder")
    make_files(tmp_path, "a/image.nii", "b/image.nii")
    listing = find_cases(tmp_path, task)
    assert [case.id for case in listing.cases] == ["a", "b"]
    assert listing.layout == "folders"
    (tmp_path / "a").rename(tmp_path / "c")
    assert refusal(tmp_path, task).endswith("no layout fits; 'folders' needs what its documentation says")


def test_option_behind_a_colon(tmp_path: Path, task: Task, register: Register) -> None:
    register(plain=f"{__name__}:ByFolder", choosy=f"{__name__}:WithOption")
    make_files(tmp_path, "a/image.nii")
    (case,) = cases_in(tmp_path, task, "choosy:of:mine")
    assert case.images == (tmp_path / "of:mine.nii",)
    assert find_cases(tmp_path, task, "choosy:of:mine").layout == "choosy:of:mine"
    assert cases_in(tmp_path, task, "choosy")[0].images == (tmp_path / "None.nii",)
    assert cases_in(tmp_path, task, "choosy:")[0].images == (tmp_path / ".nii",)
    with pytest.raises(DataError, match=r"layout 'folders' takes no option, found 'x' behind the colon; "):
        find_cases(tmp_path, task, "plain:x")


def test_missing_folder(tmp_path: Path, task: Task) -> None:
    assert refusal(tmp_path / "no", task) == (
        f"{tmp_path / 'no'}: there is no such folder; correct the path of the data"
    )


def test_empty_folder(tmp_path: Path, task: Task) -> None:
    assert refusal(tmp_path, task).startswith(f"{tmp_path}: the folder is empty; ")


def test_folder_that_may_not_be_read(tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert refusal(tmp_path, task) == (
        f"{tmp_path}: cannot be read (Permission denied); give this user access to it"
    )


def test_unknown_layout(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "scan.nii.gz")
    expected = "layout 'dicom' is not known; known layouts: bids, brats, csv, msd, nnunet"
    assert refusal(tmp_path, task, "dicom") == expected
    assert refusal(tmp_path, task, "dicom:series") == expected


def test_no_layout_fits(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "scan.nii.gz")
    message = refusal(tmp_path, task)
    assert message.startswith(f"{tmp_path}: no layout fits; 'bids' needs folders sub-*/anat")
    assert "'csv' needs a cases.csv or cases.tsv" in message
    assert "is a single volume; name the folder" in refusal(tmp_path / "scan.nii.gz", task)


def test_the_folder_below_is_meant(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "notes.txt", "set/cases.csv", "other/a.nii.gz")
    message = refusal(tmp_path, task)
    assert message.endswith(f"but one does a folder below; name {tmp_path / 'set'} (layout 'csv')")


def test_a_misspelt_layout(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "cases.csv")
    with pytest.raises(DataError, match=r"layout 'BIDS' is not known; did you mean 'bids'\? known layouts"):
        find_cases(tmp_path, task, "BIDS")


def test_a_table_that_is_not_there_is_a_file(tmp_path: Path, task: Task) -> None:
    assert "there is no such file; correct" in refusal(tmp_path / "nope.csv", task)
    assert "there is no such folder; correct" in refusal(tmp_path / "nope", task)


def test_two_layouts_fit(tmp_path: Path, task: Task) -> None:
    write_json(tmp_path, {"modality": {"0": "MRI"}, "training": [{"image": "b.nii"}]})
    (tmp_path / "cases.csv").write_text("id,T1,label\na,a.nii,l.nii\n")
    assert "csv and msd both fit; name the one to use" in refusal(tmp_path, task)
    assert [case.id for case in cases_in(tmp_path, task, "csv")] == ["a"]


@pytest.mark.parametrize("name", ["cases.csv", "cases.tsv", "dataset.json"])
def test_list_counts_more_than_names_of_files(tmp_path: Path, task: Task, name: str) -> None:
    make_files(tmp_path, "p1/p1_t1.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz")
    assert (BratsLayout.detect(tmp_path), BidsLayout.detect(tmp_path)) == (True, True)
    assert "bids and brats both fit" in refusal(tmp_path, task)
    (tmp_path / name).touch()
    assert (BratsLayout.detect(tmp_path), BidsLayout.detect(tmp_path)) == (False, False)


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        ("msd", "dataset.json: there is no such file; layout 'msd' needs it"),
        ("nnunet", "dataset.json: there is no such file; layout 'nnunet' needs it"),
        ("csv", "cases.csv: there is no such file"),
        ("brats", "no file has a name of BraTS; layout 'brats' needs files called ID_t1.nii.gz"),
        ("bids", "no folder sub-*/anat or sub-*/ses-*/anat holds an image of task 'blobs'; expected"),
    ],
)
def test_layout_that_does_not_fit(tmp_path: Path, task: Task, layout: str, part: str) -> None:
    make_files(tmp_path, "scan.nii.gz")
    assert part in refusal(tmp_path, task, layout)
