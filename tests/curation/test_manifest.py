import csv
import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedqc.config import CurationConfig
from fedqc.curation.manifest import (
    Entry,
    InputFile,
    LeftOut,
    Manifest,
    Overruled,
    UsedModel,
    UsedRule,
    carried_over,
    changing,
    kept,
    overrule,
    read_manifest,
    with_overruled,
    write_manifest,
    write_scores,
)
from fedqc.curation.rules import Outcome
from fedqc.errors import ConfigError, DataError
from fedqc.task import Task, load_task


def entry(case: str, score: float, outcome: Outcome, **changes: Any) -> Entry:
    values = {
        "id": case,
        "patient": f"patient-{case}",
        "quality": score,
        "regions": {"posterior": score, "anterior": score / 2},
        "decision": outcome,
        "reason": f"predicted DSC {score}, as a sentence",
        "files": {
            "T1": InputFile(path=f"images/{case}.nii.gz", sha256="a" * 64),
            "label": InputFile(path=f"labels/{case}.nii.gz", sha256="b" * 64),
        },
    }
    return Entry.model_validate({**values, **changes})


def manifest(*entries: Entry, **changes: Any) -> Manifest:
    values = {
        "site": "hospital-1",
        "federation": "glioma-2026",
        "task": "msd-hippocampus",
        "created": "2026-03-01T12:30:00+00:00",
        "model": UsedModel(method="qcresunet", sha256="c" * 64, fedqc="0.1.0"),
        "rule": UsedRule(config=CurationConfig(review=0.1)),
        "entries": entries,
        "left_out": (
            LeftOut(case="d", code="missing-label", file="labels/d.nii.gz", found="nothing", fix="add"),
        ),
    }
    return Manifest.model_validate({**values, **changes})


@pytest.fixture
def example() -> Manifest:
    return manifest(
        entry("c", 0.9, Outcome.KEEP), entry("a", 0.1, Outcome.DROP), entry("b", 0.8, Outcome.REVIEW),
        entry("e", 0.875, Outcome.KEEP),
    )  # fmt: skip


@pytest.fixture
def task() -> Task:
    return load_task("msd-hippocampus")


def test_comes_back_as_it_was(tmp_path: Path, example: Manifest) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, example)
    assert read_manifest(path) == example


def test_json_has_the_documented_keys(tmp_path: Path, example: Manifest) -> None:
    write_manifest(tmp_path / "manifest.json", example)
    values = json.loads((tmp_path / "manifest.json").read_text())
    assert values["version"] == 1
    assert values["model"] == {"method": "qcresunet", "sha256": "c" * 64, "fedqc": "0.1.0"}
    assert (values["rule"]["config"]["rule"], values["rule"]["config"]["review"]) == ("threshold", 0.1)
    assert (values["rule"]["calibration"], values["rule"]["suspended"]) == (None, None)
    assert values["entries"][1] == {
        "id": "a",
        "patient": "patient-a",
        "quality": 0.1,
        "regions": {"posterior": 0.1, "anterior": 0.05},
        "decision": "drop",
        "reason": "predicted DSC 0.1, as a sentence",
        "weight": 1.0,
        "interval": None,
        "stars": None,
        "diagnosis": None,
        "overruled": None,
        "files": {
            "T1": {"path": "images/a.nii.gz", "sha256": "a" * 64},
            "label": {"path": "labels/a.nii.gz", "sha256": "b" * 64},
        },
    }
    assert values["remembered"] == []
    assert values["left_out"][0]["code"] == "missing-label"


def test_kept_leaves_review_out(example: Manifest) -> None:
    assert [entry.id for entry in kept(example)] == ["c", "e"]


KEPT_ANYWAY = Overruled(decision=Outcome.KEEP, by="Dr. Doe", when="2026-03-02T09:00:00+00:00", reason="fine")


def test_a_person_has_the_last_word(tmp_path: Path, example: Manifest, task: Task) -> None:
    changed = with_overruled(example, "a", KEPT_ANYWAY)
    (entry_a,) = (entry for entry in changed.entries if entry.id == "a")
    assert (entry_a.decision, entry_a.outcome) == (Outcome.DROP, Outcome.KEEP)
    assert [entry.id for entry in kept(changed)] == ["c", "a", "e"]
    write_manifest(tmp_path / "manifest.json", changed)
    assert read_manifest(tmp_path / "manifest.json") == changed
    write_scores(tmp_path / "scores.csv", changed, task)
    with (tmp_path / "scores.csv").open(newline="") as file:
        row = {one["id"]: one for one in csv.DictReader(file)}["a"]
    assert (row["decision"], row["reason"]) == ("keep", "Dr. Doe: fine")
    assert with_overruled(changed, "a", None) == example


def test_a_case_that_is_not_there_cannot_be_overruled(example: Manifest) -> None:
    with pytest.raises(DataError, match="case 'x' is not among the 4 candidates"):
        with_overruled(example, "x", KEPT_ANYWAY)


def test_review_is_no_decision_of_a_person() -> None:
    with pytest.raises(ValidationError, match="decision"):
        Overruled(decision="review", by="me", when="2026-03-02", reason="")


def test_what_people_decided_is_carried_over_for_the_very_same_files(example: Manifest) -> None:
    earlier = with_overruled(with_overruled(example, "a", KEPT_ANYWAY), "b", KEPT_ANYWAY)
    other = {"label": InputFile(path="labels/b.nii.gz", sha256="d" * 64)}
    new = [
        entry("a", 0.2, Outcome.DROP),
        entry("b", 0.2, Outcome.DROP, files=other),
        entry("n", 1, Outcome.KEEP),
    ]
    carried, remembered = carried_over(earlier, new)
    assert [one.overruled for one in carried] == [KEPT_ANYWAY, None, None]
    assert [(one.id, one.hashes) for one in remembered] == [("b", ("a" * 64, "b" * 64))]
    assert carried_over(None, new) == (tuple(new), ())


def test_a_decision_outlives_a_run_without_its_case_and_a_file_that_moved(example: Manifest) -> None:
    earlier = with_overruled(example, "a", KEPT_ANYWAY)
    without, remembered = carried_over(earlier, [entry("c", 0.9, Outcome.KEEP)])
    meanwhile = manifest(*without, remembered=remembered)
    moved = {
        role: file.model_copy(update={"path": f"elsewhere/{file.path}"})
        for role, file in example.entries[1].files.items()
    }
    (back,), rest = carried_over(meanwhile, [entry("a", 0.1, Outcome.DROP, files=moved)])
    assert (back.outcome, rest) == (Outcome.KEEP, ())


def test_whoever_overrules_waits_for_whoever_scores(tmp_path: Path, example: Manifest, task: Task) -> None:
    write_manifest(tmp_path / "manifest.json", example)
    done: list[str] = []

    def decide() -> None:
        overrule(tmp_path, task, "a", "keep", by="x", reason="")
        done.append("overruled")

    person = threading.Thread(target=decide)
    with changing(tmp_path):
        person.start()
        person.join(0.2)
        done.append("scored")
        write_manifest(tmp_path / "manifest.json", example)
    person.join()
    assert done == ["scored", "overruled"]
    assert kept(read_manifest(tmp_path / "manifest.json"))[1].id == "a"


def test_a_manifest_of_somebody_else_is_left_alone(
    tmp_path: Path, example: Manifest, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(tmp_path / "manifest.json", example)
    monkeypatch.setattr("fedqc.curation.manifest.os.geteuid", lambda: 4321)
    with pytest.raises(ConfigError, match=r"belongs to .*; do this as that user: sudo -u"):
        overrule(tmp_path, task, "a", "keep", by="x", reason="")
    assert read_manifest(tmp_path / "manifest.json") == example


def test_writing_again_keeps_permissions_and_leaves_nothing_aside(tmp_path: Path, example: Manifest) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, example)
    path.chmod(0o640)
    shorter = manifest()
    write_manifest(path, shorter)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert read_manifest(path) == shorter
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_in_the_middle_sees_the_whole_old_file(tmp_path: Path, example: Manifest) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, example)
    old = path.read_text()
    with path.open() as reader:
        write_manifest(path, manifest())
        assert reader.read() == old


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, example: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, example)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedqc.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(path, manifest())
    assert read_manifest(path) == example
    assert list(tmp_path.iterdir()) == [path]


def test_scores_table(tmp_path: Path, example: Manifest, task: Task) -> None:
    only_anterior = entry("f,1", 0.5, Outcome.DROP, regions={"anterior": 0.25})
    whole = example.model_copy(update={"entries": (*example.entries, only_anterior)})
    write_scores(tmp_path / "scores.csv", whole, task)
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["id", "patient", "quality", "anterior", "posterior", "decision", "reason"]
    assert rows[1] == [
        "c", "patient-c", "0.900000", "0.450000", "0.900000", "keep", "predicted DSC 0.9, as a sentence",
    ]  # fmt: skip
    assert [row[5] for row in rows[1:]] == ["keep", "drop", "review", "keep", "drop"]
    assert rows[5][:5] == ["f,1", "patient-f,1", "0.500000", "0.250000", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_scores_of_another_task_are_refused(tmp_path: Path, task: Task) -> None:
    with pytest.raises(DataError, match="the manifest is of task 'wmh', not 'msd-hippocampus'"):
        write_scores(tmp_path / "scores.csv", manifest(task="wmh"), task)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quality": float("nan")}, "quality"),
        ({"quality": 1.5}, "quality"),
        ({"regions": {"anterior": float("nan")}}, "anterior"),
        ({"decision": "maybe"}, "'keep', 'drop' or 'review'"),
        ({"files": {"T1": {"path": "/etc/passwd", "sha256": "a" * 64}}}, "relative"),
        ({"files": {"T1": {"path": "images/../../x", "sha256": "a" * 64}}}, "relative"),
        ({"files": {"T1": {"path": "x", "sha256": "A" * 64}}}, "sha256"),
        ({"files": {}}, "files"),
    ],
)
def test_entries_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        entry("a", 0.5, Outcome.DROP, **change)


def test_a_file_name_with_two_dots_is_fine() -> None:
    assert InputFile(path="images/a..b.nii.gz", sha256="a" * 64).path == "images/a..b.nii.gz"


def test_a_case_twice_or_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="case listed twice: a;"):
        manifest(entry("a", 0.5, Outcome.DROP), entry("b", 0.5, Outcome.DROP), entry("a", 0.6, Outcome.DROP))
    with pytest.raises(ValidationError, match="created"):
        manifest(created="yesterday")


BROKEN: dict[str, tuple[bytes, str]] = {
    "not json": (b"{", "not valid JSON"),
    "not utf-8": (b"\xff\xfe{}", "not valid JSON"),
    "too deep": (b"[" * 100_000, "not valid JSON"),
    "a list": (b"[]", "holds a list"),
    "another version": (b'{"version": 2}', "version 2, this fedqc reads 1"),
    "no version": (b"{}", "version None"),
    "missing keys": (b'{"version": 1}', "key 'site' is missing"),
    "unknown key": (b'{"version": 1, "sites": 3}', "unknown key 'sites'; did you mean 'site'"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_manifest_is_one_sentence_that_names_the_file(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "score the site's cases again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_manifest_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file; score the site's cases first"):
        read_manifest(tmp_path / "manifest.json")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_manifest(tmp_path)


def test_a_decision_changed_by_hand_to_nonsense_names_the_entry(tmp_path: Path, example: Manifest) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, example)
    path.write_text(path.read_text().replace('"review",', '"later",'))
    with pytest.raises(DataError, match=r"entries\.2\.decision: .*'later'"):
        read_manifest(path)
