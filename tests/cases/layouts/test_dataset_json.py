"""What `labels` of a dataset.json says against the task: nnU-Net 1 and 2, the Decathlon."""

from pathlib import Path
from typing import Any

import pytest

from fedqc.cases.layouts.dataset_json import convention_problems, count_problems
from fedqc.task import Task

PATH = Path("dataset.json")


def found(labels: object, task: Task) -> list[tuple[str, str]]:
    problems = convention_problems(PATH, {"labels": labels}, task)
    assert {(one.code, one.case, one.file) for one in problems} <= {("label-convention", None, PATH)}
    return [(one.found.removeprefix("labels that list "), one.expected) for one in problems]


@pytest.mark.parametrize(
    "labels",
    [
        None,
        [],
        "labels",
        {"0": "background", "1": "core", "2": "rim", "5": "rim"},  # version 1
        {"background": 0, "core": 1, "rim": 2},  # version 2
        {"background": 0, "Core": 1, "cyst": 9},  # what the task does not name says nothing
        {"background": 0, "whole": [1, 2, 5], "core": [1]},  # regions of version 2
        {"background": 0, "everything": [1, 2], "centre": [1], "edge": 2},  # the same, under other names
        {"everything": [0, 1, 2]},
        {"background": 0, "whole": [1, 2], "core": 1, "ignore": 3},  # voxels nobody annotated
        {"core": "one", "rim": None, "whole": {}, "x": [[]], "y": 1e999},  # no number at all
    ],
)
def test_labels_that_say_nothing_else_than_the_task(task: Task, labels: object) -> None:
    assert found(labels, task) == []


@pytest.mark.parametrize(
    ("labels", "problems"),
    [
        ({"0": "background", "2": "core", "1": "rim"}, [("'core' as 2", "1"), ("'rim' as 1", "2, 5")]),
        ({"background": 0, "CORE": 2}, [("'CORE' as 2", "1")]),
        ({"background": 0, "whole": [1, 3], "core": 1}, [("'whole' as 1, 3", "1, 2, 5")]),
        (
            {"background": 0, "everything": [1, 2, 5], "edge": [1, 5], "half": [1, 2]},
            [("'edge' as 1, 5; 'half' as 1, 2", "1 or 1, 2, 5 or 2, 5")],
        ),
        ({"background": 0, "core": 1, "ignore": 5}, [("'ignore' (not annotated) as 5", "5 as a class")]),
        (
            {"background": 0, "everything": [1, 2], "ignore": 2},
            [("'ignore' (not annotated) as 2", "2 as a class")],
        ),
    ],
)
def test_labels_that_mean_something_else(
    task: Task, labels: dict[str, Any], problems: list[tuple[str, str]]
) -> None:
    assert found(labels, task) == [(what, f"{expected} in task 'blobs'") for what, expected in problems]


def test_edema_and_necrosis_swapped_as_in_nnunet(glioma: Task) -> None:
    swapped = {"0": "background", "1": "edema", "2": "non-enhancing", "3": "enhancing"}
    assert found(swapped, glioma) == [("'edema' as 1", "2 in task 'brats-glioma'")]
    regions = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
    assert found(regions, glioma) == [
        ("'tumor core' as 2, 3", "1 or 1, 2, 3 or 1, 3 or 2 or 3 in task 'brats-glioma'")
    ]
    unswapped = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": 3}
    assert found(unswapped, glioma) == []


def test_class_that_is_called_ignore(task: Task) -> None:
    own = task.model_copy(update={"classes": {"ignore": (3,)}, "regions": {"ignore": ("ignore",)}})
    assert found({"background": 0, "ignore": 3}, own) == []
    assert found({"background": 0, "ignore": 2}, own) == [("'ignore' as 2", "3 in task 'blobs'")]


def test_number_of_cases() -> None:
    assert count_problems(PATH, {}, 3) == count_problems(PATH, {"numTraining": 3}, 3) == []
    (problem,) = count_problems(PATH, {"numTraining": 4}, 3)
    assert (problem.code, problem.found, problem.expected) == (
        "case-count",
        "3 cases",
        "4 as 'numTraining' says",
    )
