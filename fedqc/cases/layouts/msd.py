"""Layout `msd`: the Medical Segmentation Decathlon."""

from pathlib import Path

from fedqc.cases.layouts import dataset_json
from fedqc.cases.layouts.base import (
    CaseBuilder,
    CaseFiles,
    Layout,
    Listing,
    is_file,
    read_json,
    without_ending,
)
from fedqc.errors import DataError
from fedqc.task import Task


class MsdLayout(Layout):
    """Medical Segmentation Decathlon: `dataset.json` lists pairs of image and label under `training`.

    An image holds all modalities, in the task's order. The id of a case is the name of its image file, and
    every case is a patient of its own.
    """

    name = "msd"
    needs = "a dataset.json"

    @staticmethod
    def detect(root: Path) -> bool:
        """Whether there is a `dataset.json`, and it is not nnU-Net's."""
        return is_file(root / dataset_json.NAME) and not dataset_json.is_nnunet(root)

    def find(self, root: Path, task: Task) -> Listing:
        """List the cases of `training`."""
        path = root / dataset_json.NAME
        dataset = read_json(path, self.name)
        order = dataset_json.channel_order(path, dataset, task)
        if order != sorted(order):
            names = dataset_json.channel_names(path, dataset, task)
            raise DataError(
                f"{path}: the images hold {', '.join(names[str(n)] for n in range(len(order)))}, task "
                f"{task.name!r} needs {', '.join(task.modalities)} in this order; write a task with the "
                "modalities in the order of the images, or use one file for each with another layout"
            )
        training = dataset.get("training")
        if not isinstance(training, list) or not training:
            raise DataError(
                f"{path}: 'training' is no list of cases; list {{'image': ..., 'label': ...}} there"
            )
        cases = [self._case(path, number, entry) for number, entry in enumerate(training)]
        return Listing(
            cases=cases,
            problems=[
                *dataset_json.convention_problems(path, dataset, task),
                *dataset_json.count_problems(path, dataset, len(training)),
                *dataset_json.unlisted_problems(path, cases),
            ],
        )

    @staticmethod
    def _case(path: Path, number: int, entry: object) -> CaseFiles:
        place = f"{path}: training[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise DataError(f"{place}: no text under 'image'; give the path of the image")
        label = entry.get("label")
        if label is not None and not isinstance(label, str):
            raise DataError(f"{place}: 'label' is {label!r}; give the path of the label")
        case = CaseBuilder(without_ending(Path(entry["image"]).name), path.parent, place)
        return case.build([case.path(entry["image"])], case.path(label) if label else None)
