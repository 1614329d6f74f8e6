import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images, or a skipped test."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FEDQC_REAL_DATA", beside))
    if not (folder / "Task04_Hippocampus" / "dataset.json").is_file():
        pytest.skip(f"no real images in {folder}; set FEDQC_REAL_DATA to their folder")
    return folder
