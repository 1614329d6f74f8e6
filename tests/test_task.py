from pathlib import Path
from typing import Any

import pytest

from fedqc.config import parse
from fedqc.errors import ConfigError
from fedqc.task import Task, built_in_tasks, load_task

GLIOMA: dict[str, Any] = {
    "name": "glioma",
    "modalities": ["t1", "flair"],
    "classes": {"necrosis": [1], "edema": [2], "enhancing": [3, 4]},
    "regions": {"whole": ["necrosis", "edema", "enhancing"], "core": ["enhancing", "necrosis"]},
    "spacing": [1, 1, 1],
    "size": [32, 48, 64],
}


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse({**GLIOMA, **changes}, Task, source="glioma.toml")
    source, _, message = str(caught.value).partition(": ")
    assert source == "glioma.toml"
    return message


def test_regions_become_class_indices_in_the_order_of_the_file() -> None:
    task = parse(GLIOMA, Task, source="glioma.toml")
    assert task.n_classes == 3
    assert task.region_indices() == ((1, 2, 3), (3, 1))


def test_overlapping_classes() -> None:
    message = refusal(classes={"necrosis": [1], "edema": [2], "enhancing": [3, 1]})
    assert message == "classes overlap: label value 1 belongs to 'necrosis' and 'enhancing'"


def test_class_without_a_value() -> None:
    assert refusal(classes={"necrosis": []}) == "class 'necrosis' has no label value"


def test_background_is_no_class() -> None:
    message = refusal(classes={"necrosis": [0]})
    assert message == "classes.necrosis.0: input should be greater than or equal to 1 (found 0)"


def test_unknown_region() -> None:
    message = refusal(regions={"core": ["necrosis", "edma"]})
    assert message == "region 'core' names ['edma']; classes are ['necrosis', 'edema', 'enhancing']"


def test_region_that_is_empty_or_repeats_itself() -> None:
    assert refusal(regions={"core": []}).startswith("region 'core' is empty")
    assert refusal(regions={"core": ["edema", "edema"]}) == "region 'core' names a class twice"


def test_core() -> None:
    assert parse({**GLIOMA, "core": "core"}, Task, source="glioma.toml").core_indices() == (3, 1)
    assert parse(GLIOMA, Task, source="glioma.toml").core_indices() == (1, 2, 3)
    assert refusal(core="heart") == "core names 'heart'; regions are ['whole', 'core']"


def test_modality_missing_or_twice() -> None:
    assert "modalities" in refusal(modalities=[])
    assert refusal(modalities=["t1", "t1"]) == "modalities: a modality is named twice (found ['t1', 't1'])"


@pytest.mark.parametrize("spacing", [[0, 1, 1], [1, 1, float("inf")], [1, 1, 1, 1]])
def test_spacing_has_three_positive_finite_sides(spacing: list[float]) -> None:
    assert refusal(spacing=spacing).startswith("spacing")


def test_too_few_sides() -> None:
    assert refusal(spacing=[1, 1]) == "spacing: too few values (found [1, 1])"


def test_unknown_key() -> None:
    assert refusal(spacings=[1, 1, 1]).startswith("unknown key 'spacings'; did you mean 'spacing'?")


def test_strides_that_divide_the_size_pass() -> None:
    parse(GLIOMA, Task, source="glioma.toml").check_strides(16)


def test_strides_that_do_not_divide_the_size() -> None:
    task = parse(GLIOMA, Task, source="glioma.toml")
    with pytest.raises(ConfigError) as caught:
        task.check_strides(32)
    assert str(caught.value) == (
        "task 'glioma': size along y is 48, which the network's stride of 32 does not divide; use 32 or 64"
    )
    with pytest.raises(ConfigError, match=r"size along x is 32, .* use 64$"):
        task.check_strides(64)


def test_built_in_task() -> None:
    assert "msd-hippocampus" in built_in_tasks()
    task = load_task("msd-hippocampus")
    assert task.size == (40, 56, 40)
    assert task.classes == {"anterior": (1,), "posterior": (2,)}
    task.check_strides(8)


def test_the_tasks_that_are_built_in() -> None:
    assert built_in_tasks() == [
        "brats-glioma",
        "cardiac-cine",
        "msd-hippocampus",
        "phantom",
        "phantom-lesions",
        "whole-heart",
        "wmh",
    ]


@pytest.mark.parametrize("name", built_in_tasks())
def test_every_built_in_task_carries_its_file_name_and_fits_the_default_network(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert task.description
    task.check_strides(8)


@pytest.mark.parametrize(
    ("name", "values", "whole"),
    [
        ("brats-glioma", {"necrosis": (1,), "edema": (2,), "enhancing": (3, 4)}, "whole-tumour"),
        ("wmh", {"lesion": (1,)}, "lesion"),
        ("cardiac-cine", {"rv": (1,), "myocardium": (2,), "lv": (3,)}, "heart"),
        (
            "whole-heart",
            {
                "myocardium": (205,),
                "left-atrium": (420,),
                "left-ventricle": (500,),
                "right-atrium": (550,),
                "right-ventricle": (600,),
                "ascending-aorta": (820,),
                "pulmonary-artery": (850,),
            },
            "whole-heart",
        ),
    ],
)
def test_label_values_as_the_challenges_have_them(
    name: str, values: dict[str, tuple[int, ...]], whole: str
) -> None:
    task = load_task(name)
    assert task.classes == values
    assert task.regions[whole] == tuple(values)


def test_stack_of_18_slices_fits_the_cine_task() -> None:
    task = load_task("cardiac-cine")
    assert task.spacing == (1.5, 1.5, 10.0)
    assert task.size[2] >= 18


def test_task_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "liver.toml"
    path.write_text(
        'name = "liver"\nmodalities = ["CT"]\nspacing = [1.5, 1.5, 3]\nsize = [32, 32, 16]\n'
        '[classes]\nliver = [1]\n[regions]\nliver = ["liver"]\n'
    )
    assert load_task(str(path)).spacing == (1.5, 1.5, 3.0)


def test_unknown_task_names_the_nearest_one() -> None:
    with pytest.raises(
        ConfigError, match=r"'hippocampus-msd' is not built in; .*built in: .*msd-hippocampus"
    ):
        load_task("hippocampus-msd")
    with pytest.raises(ConfigError, match="did you mean 'msd-hippocampus'"):
        load_task("msd-hipocampus")


def test_missing_task_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"liver\.toml: there is no such file"):
        load_task(str(tmp_path / "liver.toml"))


def test_the_digest_of_a_task_covers_what_is_computed() -> None:
    task = load_task("msd-hippocampus")
    assert task.digest == task.model_copy(update={"description": "other words"}).digest
    assert task.digest != task.model_copy(update={"spacing": (2.0, 2.0, 2.0)}).digest
    swapped = dict(reversed(task.classes.items()))
    assert task.digest != task.model_copy(update={"classes": swapped}).digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spacing_range": (2.0, 4.0)}, "spacing .* is outside spacing_range"),
        ({"conventions": {"other": {"core": (1,)}}}, "convention 'other' names .'core'.; classes are"),
        ({"anatomy": {"outermost": "skull"}}, "anatomy names .'skull'.; classes are"),
        ({"anatomy": {"brightest": {"PET": "edema"}}}, "anatomy.brightest names .'PET'.; modalities are"),
    ],
)
def test_checks_name_what_is_there(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({**GLIOMA, **changes}, Task, source="glioma.toml")
