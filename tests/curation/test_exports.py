import csv
import io
import json
from pathlib import Path

import pytest

from fedqc.cases.layouts import find_cases
from fedqc.config import CurationConfig
from fedqc.curation.exports import as_csv, as_list, as_msd, as_nnunet
from fedqc.curation.manifest import Entry, InputFile, Manifest, Overruled, UsedModel, UsedRule
from fedqc.curation.rules import Outcome
from fedqc.errors import DataError
from fedqc.task import load_task

TASK = load_task("msd-hippocampus")
SEVERAL = load_task("brats-glioma")


def manifest(n: int = 12, patients: int = 6) -> Manifest:
    """Every third case is dropped; the first of these is kept all the same."""
    entries = []
    for index in range(n):
        dropped = index % 3 == 2
        person = Overruled(
            decision=Outcome.KEEP, by="Dr. Doe", when="2026-03-02T09:00:00", reason="fine, I think"
        )
        entries.append(
            Entry(
                id=f"case-{index:02}",
                patient=f"patient-{index % patients}",
                quality=0.2 if dropped else 0.9,
                regions={"anterior": 0.5},
                decision=Outcome.DROP if dropped else Outcome.KEEP,
                reason="so says the rule",
                files={
                    role: InputFile(path=f"{folder}/case-{index:02}.nii.gz", sha256="a" * 64)
                    for role, folder in ((TASK.modalities[0], "imagesTr"), ("label", "labelsTr"))
                },
                overruled=person if index == 2 else None,
            )
        )
    return Manifest(
        site="a",
        federation="f",
        task=TASK.name,
        created="2026-03-01T12:30:00+00:00",
        model=UsedModel(method="qcresunet", sha256="c" * 64, fedqc="0.1.0"),
        rule=UsedRule(config=CurationConfig()),
        entries=tuple(entries),
    )


KEPT = [index for index in range(12) if index % 3 != 2 or index == 2]


def test_list_has_the_files_of_what_is_kept() -> None:
    lines = as_list(manifest(), TASK).splitlines()
    assert lines == [f"{kind}Tr/case-{index:02}.nii.gz" for index in KEPT for kind in ("images", "labels")]


def test_table_tells_the_rule_and_the_person_apart() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(manifest(), TASK))))
    assert len(rows) == 12
    assert [rows[2][key] for key in ("rule", "outcome", "by", "why")] == [
        "drop",
        "keep",
        "Dr. Doe",
        "fine, I think",
    ]
    assert [rows[5][key] for key in ("rule", "outcome", "by", "anterior", "posterior")] == [
        "drop", "drop", "", "0.500000", "",
    ]  # fmt: skip


def test_dataset_json_is_read_by_the_layout_it_is_of(tmp_path: Path) -> None:
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / kind).mkdir()
        for index in range(12):
            (tmp_path / kind / f"case-{index:02}.nii.gz").write_bytes(b"")
    (tmp_path / "dataset.json").write_text(as_msd(manifest(), TASK))
    found = find_cases(tmp_path, TASK, "msd").cases
    assert [case.id for case in found] == [f"case-{index:02}" for index in KEPT]
    values = json.loads((tmp_path / "dataset.json").read_text())
    assert values["labels"] == {"0": "background", "1": "anterior", "2": "posterior"}
    assert values["numTraining"] == len(values["training"]) == 9


def test_a_class_of_several_values_has_no_dataset_json() -> None:
    with pytest.raises(DataError, match=r"class 'enhancing' has several label values"):
        as_msd(manifest(), SEVERAL)


def test_modalities_in_files_of_their_own_are_a_list_in_the_order_of_the_task() -> None:
    task = load_task("phantom-lesions")
    entry = manifest().entries[0]
    files = {role: InputFile(path=f"{role}.nii.gz", sha256="a" * 64) for role in ("FLAIR", "label", "T1")}
    one = manifest().model_copy(update={"entries": (entry.model_copy(update={"files": files}),)})
    (training,) = json.loads(as_msd(one, task))["training"]
    assert training == {"image": ["./T1.nii.gz", "./FLAIR.nii.gz"], "label": "./label.nii.gz"}


def test_splits_are_five_folds_that_no_patient_is_in_twice() -> None:
    folds = json.loads(as_nnunet(manifest(), TASK))
    assert len(folds) == 5
    patient = {entry.id: entry.patient for entry in manifest().entries}
    for fold in folds:
        assert not {patient[case] for case in fold["train"]} & {patient[case] for case in fold["val"]}
        assert sorted(fold["train"] + fold["val"]) == [f"case-{index:02}" for index in KEPT]
    assert sorted(case for fold in folds for case in fold["val"]) == [f"case-{index:02}" for index in KEPT]
    assert as_nnunet(manifest(), TASK) == as_nnunet(manifest(), TASK)


def test_too_few_patients_make_no_folds() -> None:
    with pytest.raises(DataError, match="are of 4 patients; nnU-Net has 5 folds"):
        as_nnunet(manifest(patients=4), TASK)
