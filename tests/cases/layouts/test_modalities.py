import pytest

from fedqc.cases.layouts.modalities import common_name, common_names, known_names
from fedqc.errors import DataError
from fedqc.task import Task


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (("t1n", "t1", "T1", "T1w", "t1W"), "t1n"),
        (("t1c", "t1ce", "T1ce", "T1CE", "T1Gd"), "t1c"),
        (("t2w", "t2", "T2"), "t2w"),
        (("t2f", "flair", "FLAIR", "Flair"), "t2f"),
        (("CT", "ct"), "ct"),
    ],
)
def test_names_that_mean_the_same(names: tuple[str, ...], common: str) -> None:
    assert {common_name(name) for name in names} == {common}


def test_modalities_of_a_task(task: Task, two_modalities: Task) -> None:
    assert common_names(two_modalities) == ["t1n", "t2f"]
    with pytest.raises(DataError, match=r"task 'blobs': T1 and t1n are the same modality in this layout; "):
        common_names(task.model_copy(update={"modalities": ("T1", "T2", "t1n")}))


def test_table_as_part_of_a_sentence() -> None:
    assert known_names() == "t1n (t1, t1w), t1c (t1ce, t1gd), t2w (t2), t2f (flair)"
