import pytest

from fedqc.task import Task, load_task


@pytest.fixture
def two_modalities(task: Task) -> Task:
    return task.model_copy(update={"modalities": ("T1", "FLAIR")})


@pytest.fixture
def one_class(two_modalities: Task) -> Task:
    """T1 and FLAIR, one class."""
    return two_modalities.model_copy(update={"classes": {"lesion": (1,)}, "regions": {"lesion": ("lesion",)}})


@pytest.fixture
def glioma() -> Task:
    return load_task("brats-glioma")
