import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedqc.cases import cache as cache_module
from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import CaseFiles, find_cases
from fedqc.cases.preprocessing import preprocess
from fedqc.cases.volumes import Case, sha256_file
from fedqc.errors import DataError
from fedqc.task import Task, load_task

MakeCase = Callable[..., CaseFiles]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the cases that were preprocessed, in order."""
    ids: list[str] = []

    def counted(files: CaseFiles, task: Task) -> Case:
        ids.append(files.id)
        return preprocess(files, task)

    monkeypatch.setattr(cache_module, "preprocess", counted)
    return ids


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != "hashes"]


def same(first: Case, second: Case) -> bool:
    return (
        (first.id, first.patient, first.native_shape) == (second.id, second.patient, second.native_shape)
        and np.array_equal(first.image, second.image)
        and np.array_equal(first.label, second.label)
        and np.array_equal(first.affine, second.affine)
        and np.array_equal(first.native_affine, second.native_affine)
        and first.intensities == second.intensities
    )


def test_stored_case_is_the_preprocessed_one(
    make_case: MakeCase, task: Task, folder: Path, made: list[str]
) -> None:
    files = make_case(affine=np.diag([-1.1, 0.9, 1.3, 1]))
    first = CaseCache(folder, task).get(files)
    second = CaseCache(folder, task).get(files)
    assert made == ["case-1"]
    assert same(first, preprocess(files, task))
    assert same(second, first)
    assert second.image.dtype == np.float32
    assert second.label.dtype == np.uint8


def test_arrays_are_memory_mapped_and_read_only(make_case: MakeCase, task: Task, folder: Path) -> None:
    case = CaseCache(folder, task).get(make_case())
    assert isinstance(case.image, np.memmap)
    assert isinstance(case.label, np.memmap)
    assert not case.image.flags.writeable


def test_changed_file_is_another_entry(
    make_case: MakeCase, task: Task, folder: Path, made: list[str], label: Any
) -> None:
    cache = CaseCache(folder, task)
    before = cache.get(make_case())
    label[3] = 0
    after = cache.get(make_case(label=label))
    assert made == ["case-1", "case-1"]
    assert before.label.sum() > after.label.sum()


def test_other_settings_are_another_entry(
    make_case: MakeCase, task: Task, folder: Path, made: list[str]
) -> None:
    files = make_case()
    for changes in (
        {},
        {"spacing": (1.0, 1.0, 2.0)},
        {"size": (16, 16, 16)},
        {"modalities": ("T2",)},
        {"classes": {"core": (1,), "rim": (2,), "dot": (5,)}},
    ):
        CaseCache(folder, task.model_copy(update=changes)).get(files)
    assert len(made) == len(entries(folder)) == 5
    regions = {"core": ("core",)}
    CaseCache(folder, task.model_copy(update={"name": "other", "regions": regions})).get(files)
    assert len(made) == 5  # preprocessing does not look at names and regions


def test_raised_format_makes_all_entries_again(
    make_case: MakeCase, task: Task, folder: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    CaseCache(folder, task).get(make_case())
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    CaseCache(folder, task).get(make_case())
    assert len(made) == 2


def test_same_content_under_two_ids_is_one_entry(
    make_case: MakeCase, task: Task, folder: Path, made: list[str]
) -> None:
    files = make_case()
    cache = CaseCache(folder, task)
    cache.get(files)
    twin = cache.get(replace(files, id="twin", patient="p"))
    assert (twin.id, twin.patient) == ("twin", "p")
    assert made == ["case-1"]


def flip_a_byte(entry: Path) -> None:
    content = bytearray((entry / "image.npy").read_bytes())
    content[-1000] ^= 1
    (entry / "image.npy").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "image.npy").write_bytes((entry / "image.npy").read_bytes()[:-1]),
        lambda entry: (entry / "image.npy").write_bytes(b""),
        lambda entry: (entry / "label.npy").write_text("nonsense"),
        lambda entry: (entry / "label.npy").unlink(),
        lambda entry: (entry / "case.json").unlink(),
        lambda entry: (entry / "case.json").write_text("{"),
        lambda entry: (entry / "case.json").write_text("[]"),
        lambda entry: (entry / "case.json").write_bytes(b"\xff\xfe"),
        lambda entry: (entry / "case.json").write_text(
            json.dumps({**json.loads((entry / "case.json").read_text()), "affine": [1, 2]})
        ),
        flip_a_byte,
    ],
)
def test_damaged_entry_is_made_again(
    make_case: MakeCase, task: Task, folder: Path, made: list[str], damage: Callable[[Path], Any]
) -> None:
    files = make_case()
    cache = CaseCache(folder, task)
    cache.get(files)
    (entry,) = entries(folder)
    damage(entry)
    assert same(cache.get(files), preprocess(files, task))
    assert len(made) == 2
    cache.get(files)
    assert len(made) == 2
    assert entries(folder) == [entry]


def test_file_in_the_place_of_an_entry(
    make_case: MakeCase, task: Task, folder: Path, made: list[str]
) -> None:
    cache = CaseCache(folder, task)
    cache.get(make_case())
    (entry,) = entries(folder)
    for path in entry.iterdir():
        path.unlink()
    entry.rmdir()
    entry.touch()
    cache.get(make_case())
    cache.get(make_case())
    assert len(made) == 2


def test_mapped_case_outlives_its_entry(make_case: MakeCase, task: Task, folder: Path) -> None:
    files = make_case()
    case = CaseCache(folder, task).get(files)
    (entry,) = entries(folder)
    (entry / "case.json").unlink()
    CaseCache(folder, task).get(files)
    assert same(case, preprocess(files, task))


def test_unchanged_files_are_hashed_once(
    make_case: MakeCase, task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_case()
    assert files.label is not None
    expected = tuple(sha256_file(path) for path in files.files)
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return sha256_file(path)

    monkeypatch.setattr(cache_module, "sha256_file", counted)
    assert CaseCache(folder, task).hashes(files) == expected
    assert CaseCache(folder, task).hashes(files) == expected
    assert hashed == list(files.files)
    os.utime(files.label, ns=(0, 0))
    assert CaseCache(folder, task).hashes(files) == expected
    assert len(hashed) == 4
    for memo in (folder / "hashes").iterdir():
        memo.write_text("[")
    assert CaseCache(folder, task).hashes(files) == expected


def test_missing_file_is_named(make_case: MakeCase, task: Task, folder: Path) -> None:
    files = make_case()
    files.files[0].unlink()
    with pytest.raises(DataError, match=r"case-1\.nii\.gz: cannot be read"):
        CaseCache(folder, task).get(files)


def test_case_with_a_problem_leaves_nothing(
    make_case: MakeCase, task: Task, folder: Path, label: Any
) -> None:
    with pytest.raises(DataError, match="without any marked voxel"):
        CaseCache(folder, task).get(make_case(label=0 * label))
    assert entries(folder) == []


def test_folder_that_cannot_be_written(tmp_path: Path, task: Task) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match="cache/hashes: the cache cannot be written"):
        CaseCache(tmp_path / "cache", task)


def test_full_disk(make_case: MakeCase, task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_case()
    cache = CaseCache(folder, task)
    cache.hashes(files)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        cache.get(files)
    assert entries(folder) == []


def test_prepare_makes_all_entries(make_case: MakeCase, task: Task, folder: Path) -> None:
    images = np.random.default_rng(1).uniform(10, 200, (5, 16, 18, 20)).astype(np.float32)
    cases = [make_case(f"case-{number}", image=image) for number, image in enumerate(images)]
    calls: list[tuple[int, int]] = []
    CaseCache(folder, task).prepare(cases, workers=3, progress=lambda *call: calls.append(call))
    assert len(entries(folder)) == 5
    assert calls == [(done, 5) for done in range(1, 6)]


# Runs in a process of its own: argv holds the cache's folder, image, label, task and what to do.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import CaseFiles
from fedqc.task import Task

folder, image, label, task, what = sys.argv[1:]
cache = CaseCache(Path(folder), Task.model_validate_json(task))
files = CaseFiles(id="case-1", patient="case-1", images=(Path(image),), label=Path(label))
if what == "die":
    real, calls = os.fsync, []
    def die(descriptor):
        real(descriptor)
        calls.append(descriptor)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = die
    cache.get(files)
else:
    print("ready", flush=True)
    sys.stdin.readline()
    for round in range(20):
        case = cache.get(files)
        print(int(case.label.sum()), flush=True)
        for path in Path(folder).glob("*/case.json"):  # damage it, so that both make it again
            path.unlink(missing_ok=True)
"""


def start(files: CaseFiles, task: Task, folder: Path, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            SCRIPT,
            folder,
            *files.files,
            task.model_dump_json(),
            what,
        ],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_race(make_case: MakeCase, task: Task, folder: Path) -> None:
    files = make_case()
    racers = [start(files, task, folder, "race") for _ in range(2)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    outputs = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        output, errors = racer.communicate(timeout=60)
        assert errors == ""
        outputs.append(output.split())
    expected = preprocess(files, task)
    assert outputs == [[str(int(expected.label.sum()))] * 20] * 2
    assert same(CaseCache(folder, task).get(files), expected)
    assert len(entries(folder)) == 1


def test_kill_in_the_middle(make_case: MakeCase, task: Task, folder: Path, made: list[str]) -> None:
    files = make_case()
    process = start(files, task, folder, "die")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert all(path.name.startswith("tmp-") for path in entries(folder))
    assert same(CaseCache(folder, task).get(files), preprocess(files, task))
    assert made == ["case-1"]


@pytest.mark.real_data
def test_all_real_cases_are_prepared(real_data: Path, folder: Path) -> None:
    task = load_task("msd-hippocampus")
    cases = find_cases(real_data / "Task04_Hippocampus", task).cases
    cache = CaseCache(folder, task)
    cache.prepare(cases, workers=2)
    prepared = [cache.get(files) for files in cases]
    assert {case.image.shape for case in prepared} == {(1, 40, 56, 40)}
    assert all(set(np.unique(case.label)) == {0, 1, 2} for case in prepared)
