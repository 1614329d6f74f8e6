import numpy as np
import pytest

from fedqc.cases import conventions
from fedqc.cases.conventions import guess_convention
from fedqc.task import Anatomy, Task

SHAPE = (12, 10, 30)


@pytest.fixture
def nested() -> Task:
    return Task(
        name="nested",
        modalities=("T1",),
        classes={"core": (1,), "rim": (2,)},
        regions={"whole": ("core", "rim")},
        spacing=(1.0, 1.0, 1.0),
        size=(8, 8, 8),
        conventions={"ours": {"core": (1,), "rim": (2,)}, "theirs": {"core": (2,), "rim": (1,)}},
        anatomy=Anatomy(outermost="rim", innermost="core"),
    )


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("values", "name"), [((1, 2), "ours"), ((2, 1), "theirs")])
def test_what_lies_inside_tells_the_convention(
    nested: Task, values: tuple[int, int], name: str, order: str
) -> None:
    core, rim = values
    label = np.zeros(SHAPE, dtype=np.uint8, order="F" if order == "F" else "C")
    label[1:11, 1:9, 1:29] = rim
    label[4:8, 3:7, 4:25] = core
    guess = guess_convention(label, [np.ones(SHAPE, dtype=np.float32)], nested)
    assert guess.convention == name
    assert guess.is_foreign == (name == "theirs")


@pytest.mark.parametrize("slices", [1, 3, 100])
def test_shares_of_background_are_counted_face_by_face(monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
    monkeypatch.setattr(conventions, "_SLICES", slices)
    label = np.random.default_rng(0).choice([0, 0, 1, 2, 600], (5, 6, 7)).astype(np.uint16, order="F")
    padded = np.pad(label, 1)
    faces: dict[int, list[int]] = {1: [], 2: [], 600: []}
    for place in np.ndindex(*padded.shape):
        for axis in range(3):
            for step in (-1, 1):
                there = list(place)
                there[axis] += step
                if padded[place] and padded[tuple(there)] != padded[place]:
                    faces[int(padded[place])].append(int(padded[tuple(there)]))
    expected = {value: others.count(0) / len(others) for value, others in faces.items()}
    assert conventions._share_of_background(label, [1, 2, 600]) == pytest.approx(expected)


def test_of_a_large_label_some_slices_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conventions, "_SLICES", 2)
    monkeypatch.setattr(conventions, "_ENOUGH", 500)
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[1:11, 1:9, 1:29] = 2
    label[4:8, 3:7, 3:27] = 1
    shares = conventions._share_of_background(label, [1, 2])
    assert shares[1] < 0.1
    assert shares[2] > 0.5
