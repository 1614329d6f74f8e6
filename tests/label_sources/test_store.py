import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases.volumes import Case
from fedqc.errors import DataError
from fedqc.label_sources import store as store_module
from fedqc.label_sources.store import LabelStore

MakeCase = Callable[..., Case]
REGIONS = ((1,), (2,), (1, 2))
REPOSITORY = Path(__file__).parents[2]
SETTINGS = {"task": "f00", "seed": 1, "depths": (2, 4)}


@pytest.fixture
def case(make_case: MakeCase) -> Case:
    return make_case()


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return LabelStore(tmp_path, "forest", SETTINGS)


def halved(case: Case) -> NDArray[np.uint8]:
    """Half of class 1, 16 of its 32 voxels in fact, and none of class 2 is left."""
    label = np.where(case.label == 1, case.label, 0).astype(np.uint8)
    label[2] = 0
    return label


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("forest/*/*.labels")
    return path


def contents(store: LabelStore, case: Case) -> list[NDArray[np.uint8]]:
    return [store.read(case, index) for index in range(len(store.of(case)))]


# ------------------------------------------------------------------------------------------ what is stored


def test_labels_come_back_with_recipe_and_dsc(store: LabelStore, case: Case) -> None:
    assert store.of(case) == ()
    worse = halved(case)
    store.add(case, [({"depth": 2}, worse), ({"depth": 4}, case.label)], REGIONS)
    first, second = store.of(case)
    assert (first.recipe, second.recipe) == ({"depth": 2}, {"depth": 4})
    # 16 of 32 voxels of class 1, none of 32 of class 2; both together: 16 of 64.
    assert first.dsc == pytest.approx((2 * 16 / 48, 0, 2 * 16 / 80))
    assert first.mean == pytest.approx((2 * 16 / 48 + 0 + 2 * 16 / 80) / 3)
    assert (second.dsc, second.mean) == ((1, 1, 1), 1)
    for read, expected in zip(contents(store, case), (worse, case.label), strict=True):
        assert read.dtype == np.uint8
        assert np.array_equal(read, expected)
        read[:] = 9  # a copy of its own
    assert np.array_equal(store.read(case, 0), worse)


def test_a_region_that_the_reference_lacks_is_left_out_of_the_mean(
    store: LabelStore, make_case: MakeCase
) -> None:
    case = make_case()
    single = make_case(label=(case.label == 1).astype(np.uint8))
    store.add(single, [({}, case.label)], ((1,), (2,)))
    assert (store.of(single)[0].dsc, store.of(single)[0].mean) == ((1, 0), 1)


def test_more_labels_go_behind_those_that_are_there(store: LabelStore, case: Case, tmp_path: Path) -> None:
    labels = [np.roll(case.label, shift, axis=1) for shift in range(4)]
    for start in (0, 2):
        store.add(case, [({"shift": i}, labels[i]) for i in (start, start + 1)], REGIONS)
    again = LabelStore(tmp_path, "forest", SETTINGS)
    assert [stored.recipe["shift"] for stored in again.of(case)] == [0, 1, 2, 3]
    assert all(map(np.array_equal, contents(again, case), labels))


def test_a_label_takes_the_place_of_one_with_its_recipe(
    store: LabelStore, case: Case, tmp_path: Path
) -> None:
    """Whatever fold it was in: of an earlier run, whose segmenters learned from other cases."""
    worse = halved(case)
    first = [({"scales": (1, 3), "fold": 0}, worse), ({"scales": [2], "fold": 0}, worse)]
    store.add(case, first, REGIONS)
    before = only_file(tmp_path).stat()
    store.add(case, first, REGIONS)
    store.add(case, [], REGIONS)
    after = only_file(tmp_path).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    store.add(case, [({"scales": [1, 3], "fold": 1}, case.label)], REGIONS)
    replaced, other = store.of(case)
    assert (replaced.recipe, replaced.mean) == ({"scales": [1, 3], "fold": 1}, 1)
    assert other.recipe == {"scales": [2], "fold": 0}
    assert np.array_equal(store.read(case, 0), case.label)
    assert np.array_equal(store.read(case, 1), worse)


def test_in_folds_neither_seed_nor_whom_it_learned_from_tells_a_segmenter(
    store: LabelStore, case: Case
) -> None:
    """They change as patients come and go; without folds a seed is what tells labels apart."""
    for number in range(2):
        store.add(
            case,
            [
                ({"depth": 2, "seed": number, "fold": number, "learned_from": str(number)}, case.label),
                ({"strength": 2, "seed": number}, case.label),
            ],
            REGIONS,
        )
    assert [one.recipe for one in store.of(case)] == [
        {"depth": 2, "seed": 1, "fold": 1, "learned_from": "1"},
        {"strength": 2, "seed": 0},
        {"strength": 2, "seed": 1},
    ]


def test_labels_may_lie_in_memory_in_any_way(store: LabelStore, case: Case, tmp_path: Path) -> None:
    np.save(tmp_path / "label.npy", case.label)
    mapped = replace(case, label=np.load(tmp_path / "label.npy", mmap_mode="r"))
    worse = np.asfortranarray(halved(case))
    store.add(mapped, [({"order": "F"}, worse), ({"order": "C"}, mapped.label)], REGIONS)
    turned = replace(case, label=np.asfortranarray(case.label))
    assert np.array_equal(store.read(turned, 0), worse)
    assert np.array_equal(store.read(case, 1), case.label)


@pytest.mark.parametrize("label", [np.zeros((8, 10, 7), np.uint8), np.zeros((8, 10, 6), np.int16)])
def test_a_label_on_another_grid_or_of_another_type(
    store: LabelStore, case: Case, label: NDArray[Any]
) -> None:
    with pytest.raises(DataError, match=r"case-1: .*'depth': 4.* is .* expected uint8 of shape \(8, 10, 6\)"):
        store.add(case, [({"depth": 2}, case.label), ({"depth": 4}, label)], REGIONS)
    assert store.of(case) == ()


def test_labels_take_little_room(store: LabelStore, case: Case, tmp_path: Path) -> None:
    store.add(case, [({"copy": number}, case.label) for number in range(10)], REGIONS)
    assert only_file(tmp_path).stat().st_size < 10 * case.label.size / 2


# ---------------------------------------------------------------------------------- which store, which case


def test_other_settings_and_sources_have_another_store(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LabelStore(tmp_path, "forest", SETTINGS).add(case, [({}, case.label)], REGIONS)
    same = dict(reversed(SETTINGS.items()))
    assert len(LabelStore(tmp_path, "forest", same).of(case)) == 1
    assert LabelStore(tmp_path, "snapshots", SETTINGS).of(case) == ()
    for changed in ({"seed": 2}, {"task": "f01"}, {"depths": (2, 4, 6)}, {"more": None}):
        assert LabelStore(tmp_path, "forest", SETTINGS | changed).of(case) == ()
    monkeypatch.setattr(store_module, "FORMAT", store_module.FORMAT + 1)
    assert LabelStore(tmp_path, "forest", SETTINGS).of(case) == ()


def test_another_reference_label_has_other_labels(store: LabelStore, case: Case) -> None:
    store.add(case, [({}, case.label)], REGIONS)
    corrected = case.label.copy()
    corrected[0, 0, 0] = 1
    assert store.of(replace(case, label=corrected)) == ()
    assert store.of(replace(case, label=case.label.reshape(10, 8, 6))) == ()
    assert store.of(replace(case, id="case-2")) == ()
    assert len(store.of(replace(case, image=case.image + 1))) == 1


def test_who_reads_while_labels_are_added_reads_the_old_file(
    store: LabelStore, case: Case, tmp_path: Path
) -> None:
    store.add(case, [({"depth": 2}, case.label)], REGIONS)
    before = only_file(tmp_path).read_bytes()
    with only_file(tmp_path).open("rb") as reading:
        store.add(case, [({"depth": 4}, case.label)], REGIONS)
        assert reading.read() == before
    assert only_file(tmp_path).read_bytes() != before


# -------------------------------------------------------------------------------------------- broken files


def test_truncated_or_changed_files_count_as_none_and_are_made_again(
    store: LabelStore, case: Case, tmp_path: Path
) -> None:
    labels = [({"depth": 2}, halved(case)), ({"depth": 4}, case.label)]
    store.add(case, labels, REGIONS)
    path = only_file(tmp_path)
    whole = path.read_bytes()
    broken = [whole[:length] for length in range(len(whole))]
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        broken.append(bytes(flipped))
    broken += [whole + b"\0", bytes(len(whole)), b"\n", b"\n\n"]
    for content in broken:
        path.write_bytes(content)
        assert store.of(case) == ()
        with pytest.raises(DataError, match="holds 0 whole labels of case case-1"):
            store.read(case, 0)
    store.add(case, labels, REGIONS)
    assert path.read_bytes() == whole


def forge(path: Path, index: object, packed: bytes) -> None:
    """A file whose checksum is right, whatever it holds."""
    content = (index if isinstance(index, bytes) else json.dumps(index).encode()) + b"\n" + packed
    path.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def entry(length: object, **changes: object) -> dict[str, object]:
    return {"recipe": {}, "dsc": [0.5, 0.5, 0.5], "mean": 0.5, "length": length} | changes


def test_forged_files_count_as_none(store: LabelStore, case: Case, tmp_path: Path) -> None:
    store.add(case, [({}, case.label)], REGIONS)
    path = only_file(tmp_path)
    packed = zlib.compress(case.label.tobytes())
    size = len(packed)
    forge(path, [entry(size)], packed)
    assert len(store.of(case)) == 1  # so it is what is forged that counts
    indices: list[object] = [
        [entry(size + 1)],
        [entry(size - 1)],
        [entry(-1), entry(size + 1)],
        [entry(10**30)],
        [entry(1e400)],
        [entry(str(size) + "x")],
        [entry(size, dsc=[1.5])],
        [entry(size, dsc=[float("nan")])],
        [entry(size, dsc="0.5")],
        [entry(size, mean=-0.1)],
        [entry(size, mean=None)],
        [entry(size, recipe=[])],
        [entry(size, path="/etc/passwd")],
        [{"length": size}],
        {"0": entry(size)},
        [[]],
        None,
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
    ]
    for index in indices:
        forge(path, index, packed)
        assert store.of(case) == ()


def test_forged_labels_are_refused_one_by_one(store: LabelStore, case: Case, tmp_path: Path) -> None:
    store.add(case, [({}, case.label)], REGIONS)
    whole = zlib.compress(case.label.tobytes())
    bad = [
        b"",
        b"no zlib stream",
        whole[:-1],  # as long as a label, but its checksum is not all there
        zlib.compress(case.label.tobytes()[:-1]),
        zlib.compress(case.label.tobytes() + b"\0"),
        zlib.compress(bytes(2**28)),
    ]
    parts = [*bad, whole]
    forge(only_file(tmp_path), [entry(len(part)) for part in parts], b"".join(parts))
    assert len(store.of(case)) == len(parts)
    tracemalloc.start()
    for index in range(len(bad)):
        with pytest.raises(DataError, match=f"label {index} of case case-1 is damaged; delete the file"):
            store.read(case, index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24  # the last of them is inflated no further than a label is long
    assert np.array_equal(store.read(case, len(bad)), case.label)


@pytest.mark.parametrize("index", [-1, 2])
def test_no_label_at_that_index(store: LabelStore, case: Case, index: int) -> None:
    store.add(case, [({"depth": 2}, case.label), ({"depth": 4}, case.label)], REGIONS)
    with pytest.raises(DataError, match=f"holds 2 whole labels of case case-1, asked for number {index}"):
        store.read(case, index)


# ---------------------------------------------------------------------------------------------- being cut off

# Runs in a process of its own, which is killed when all is written but nothing renamed yet.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import numpy as np
from fedqc.cases.volumes import Case
from fedqc.label_sources.store import LabelStore

label = np.load(sys.argv[2])
case = Case("case-1", "case-1", label[None].astype(np.float32), label, np.eye(4), label.shape, np.eye(4))
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
settings = {"task": "f00", "seed": 1, "depths": (2, 4)}
LabelStore(Path(sys.argv[1]), "forest", settings).add(case, [({"depth": 4}, label)], ((1,), (2,), (1, 2)))
"""


def test_a_kill_leaves_what_was_there(store: LabelStore, case: Case, tmp_path: Path) -> None:
    store.add(case, [({"depth": 2}, halved(case))], REGIONS)
    np.save(tmp_path / "label.npy", case.label)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / "label.npy")]
    killed = subprocess.run(command, cwd=REPOSITORY, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert [stored.recipe for stored in store.of(case)] == [{"depth": 2}]
    assert np.array_equal(store.read(case, 0), halved(case))
    store.add(case, [({"depth": 4}, case.label)], REGIONS)
    assert np.array_equal(store.read(case, 1), case.label)


def test_full_disk(store: LabelStore, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(case, [({"depth": 2}, case.label)], REGIONS)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        store.add(case, [({"depth": 4}, case.label)], REGIONS)
    assert len(store.of(case)) == 1
    assert list(only_file(tmp_path).parent.iterdir()) == [only_file(tmp_path)]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "labels").touch()
    with pytest.raises(DataError, match="cannot be written"):
        LabelStore(tmp_path / "labels", "forest", SETTINGS)
