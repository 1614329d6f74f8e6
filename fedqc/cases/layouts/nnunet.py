"""Layout `nnunet`: the raw data of nnU-Net, versions 1 and 2."""

import re
from pathlib import Path

from fedqc.cases.layouts import dataset_json
from fedqc.cases.layouts.base import (
    FILE_ENDINGS,
    CaseBuilder,
    CaseFiles,
    Layout,
    Listing,
    is_folder,
    nifti_names,
    read_json,
    unexpected,
)
from fedqc.cases.problems import Problem
from fedqc.errors import DataError
from fedqc.task import Task


class NnunetLayout(Layout):
    """nnU-Net's raw data, version 1 or 2: `imagesTr/ID_0000.nii.gz`, a file a channel, `labelsTr/ID.nii.gz`.

    `dataset.json` names the channels; where they are the task's modalities they are put into the task's
    order, otherwise they are taken as they come. Cases are found by their files, or listed with explicit
    paths under `dataset`. Every case is a patient of its own. What else version 2 writes is for training
    (`regions_class_order`) or for reading (`overwrite_image_reader_writer`) and plays no part here.
    """

    name = "nnunet"
    needs = "a dataset.json and imagesTr with files called ID_0000.nii.gz"

    @staticmethod
    def detect(root: Path) -> bool:
        """Whether there is a `dataset.json` with files called `_0000`, or with a `dataset` of paths."""
        return dataset_json.is_nnunet(root)

    def find(self, root: Path, task: Task) -> Listing:
        """List the cases with an image in `imagesTr` or a label in `labelsTr`, or those of `dataset`."""
        path = root / dataset_json.NAME
        content = read_json(path, self.name)
        order = dataset_json.channel_order(path, content, task)
        ending = content.get("file_ending", FILE_ENDINGS[0])  # version 1 knows no other
        if ending not in FILE_ENDINGS:
            raise DataError(
                f"{path}: 'file_ending' is {ending!r}, expected .nii.gz or .nii; convert the files to NIfTI"
            )
        problems = dataset_json.convention_problems(path, content, task)
        if "dataset" in content:
            cases = self._listed(path, content["dataset"], order)
            problems += dataset_json.unlisted_problems(path, cases)
        else:
            cases = self._found(root, ending, order, problems)
        problems += dataset_json.count_problems(path, content, len(cases))
        return Listing(cases=cases, problems=problems)

    @staticmethod
    def _listed(path: Path, dataset: object, order: list[int]) -> list[CaseFiles]:
        if not isinstance(dataset, dict) or not dataset:
            raise DataError(
                f"{path}: 'dataset' is no list of cases; give each id its 'images' and its 'label' there"
            )
        cases = []
        for name, entry in dataset.items():
            place = f"{path}: dataset[{name!r}]"
            images = entry.get("images") if isinstance(entry, dict) else None
            if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
                raise DataError(f"{place}: no list of paths under 'images'; give one path a channel")
            label = entry.get("label")
            if label is not None and not isinstance(label, str):
                raise DataError(f"{place}: 'label' is {label!r}; give the path of the label")
            if len(images) > len(order):
                raise DataError(
                    f"{place}: lists {len(images)} images, expected {len(order)}; give one path a channel"
                )
            case = CaseBuilder(name, path.parent, place)
            listed = [
                case.path(images[channel]) if channel < len(images) and images[channel] else None
                for channel in order
            ]
            cases.append(case.build(listed, case.path(label) if label else None))
        return cases

    @staticmethod
    def _found(root: Path, ending: str, order: list[int], problems: list[Problem]) -> list[CaseFiles]:
        images, labels = root / "imagesTr", root / "labelsTr"
        last = len(order) - 1
        expected = " to ".join(f"ID_{number:04d}{ending}" for number in sorted({0, last}))
        fix = "rename or remove the file, or correct dataset.json"
        ids = set()
        for file in nifti_names(images):
            case_id, _, channel = file.removesuffix(ending).rpartition("_")
            if file.endswith(ending) and re.fullmatch("[0-9]{4}", channel) and int(channel) <= last:
                ids.add(case_id)
            else:
                found = "an image that is no channel of dataset.json"
                problems.append(unexpected(images / file, found, f"a name as {expected}", fix))
        for file in nifti_names(labels) if is_folder(labels) else []:  # images alone can be segmented
            if file.endswith(ending):
                ids.add(file.removesuffix(ending))
            else:
                found = "a label of another type than dataset.json says"
                problems.append(unexpected(labels / file, found, f"a name as ID{ending}", fix))
        if not ids:
            raise DataError(f"{images}: there is no image; put ID_0000{ending} and so on there")
        cases = []
        for case_id in sorted(ids):
            case = CaseBuilder(case_id, root, str(root))
            names = [f"imagesTr/{case_id}_{channel:04d}{ending}" for channel in order]
            cases.append(
                case.build([case.path(name) for name in names], case.path(f"labelsTr/{case_id}{ending}"))
            )
        return cases
