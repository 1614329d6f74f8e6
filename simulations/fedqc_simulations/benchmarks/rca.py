"""How well reverse classification accuracy tells the quality of labels, and how long it takes.

    python -m fedqc_simulations.benchmarks.rca --data Task04_Hippocampus [--task msd-hippocampus]
        [--form features registration] [--references 20] [--cases 40] [--threads 2] [--together]
    python -m fedqc_simulations.benchmarks.rca --full-size [--form features] [--references 20]

Patients are drawn; some are references, on which the method is calibrated, and each label of the others is
spoiled in every way. Labels are judged one by one, as those of a folder are, or with `--together` all labels
of an image at once, as in experiments. With `--full-size` volumes of 160x192x160 voxels and four modalities
are made up, and only the time counts; getting ready is what has to be done once for all cases.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedqc.cases.preprocessing import preprocess
from fedqc.cases.volumes import Case
from fedqc.compute import Compute, choose_compute
from fedqc.config import DataConfig, QCConfig, RCAConfig, SiteConfig
from fedqc.degradation.samples import ALL_KINDS, degrade_cases
from fedqc.methods.rca import RCAMethod
from fedqc.metrics.agreement import mae, pearson
from fedqc.seeding import derive_seed, generator
from fedqc.site_check import check_site
from fedqc.task import Task, load_task

FORMS = ("features", "registration")
SIZE = (160, 192, 160)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of cases whose labels are right")
    parser.add_argument("--task", default="msd-hippocampus")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--references", type=int, default=20)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", action="store_true", help="judge the labels of an image at once")
    parser.add_argument("--full-size", action="store_true", help="time volumes that are made up")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compute = choose_compute("cpu")
    if options.full_size:
        for form in options.form:
            time_full_size(form, options.references, options.threads, compute)
        return
    if options.data is None:
        parser.error("--data or --full-size is needed")
    task = load_task(options.task)
    cases = drawn_cases(options.data, task, options.references + options.cases, options.seed)
    references, others = cases[: options.references], cases[options.references :]
    for form in options.form:
        measure(
            form,
            task,
            references=references,
            others=others,
            threads=options.threads,
            seed=options.seed,
            together=options.together,
            compute=compute,
        )


def drawn_cases(data: Path, task: Task, count: int, seed: int) -> list[Case]:
    """So many cases, one of each patient."""
    site = SiteConfig(name="benchmark", task=task.name, data=DataConfig(path=data))
    usable = check_site(site, task, memory=None).checked.usable
    ordered = sorted(usable, key=lambda one: derive_seed(seed, "order", one.patient, one.id))
    first = {files.patient: files for files in reversed(ordered)}
    return [preprocess(files, task) for files in ordered if first[files.patient] is files][:count]


def measure(
    form: str,
    task: Task,
    *,
    references: list[Case],
    others: list[Case],
    threads: int,
    seed: int,
    together: bool,
    compute: Compute,
) -> None:
    """Calibrate on the references, judge the others, print a line for the estimates and one calibrated."""
    method = _method(form, task, len(references), threads, together=together)
    method.references = references
    network = method.build(seed)
    begin = time.perf_counter()
    method.fit(network, references, compute, generator(seed, "benchmark", "fit"))
    print(f"{form}: calibrated on {len(references)} references in {time.perf_counter() - begin:.0f} s")
    quality, true = [], []
    begin = time.perf_counter()
    for case in others:
        spoiled = list(degrade_cases([case], task, ALL_KINDS, generator(seed, "benchmark", case.id)))
        labels = [one.case.label for one in spoiled]
        groups = [labels] if together else [[label] for label in labels]
        quality += [method.estimate(case, group, compute).mean for group in groups]
        true.append(np.array([one.mean_dsc for one in spoiled]))
    seconds = (time.perf_counter() - begin) / len(quality)
    raw, truth = np.concatenate(quality), np.concatenate(true)
    patients = len({case.patient for case in others})
    (maps,) = network.children()
    for name, found in (("as estimated", raw), ("calibrated", next(maps.children())(raw))):
        print(
            f"{form}, {name}: r {pearson(found, truth):.3f}, MAE {mae(found, truth):.3f} "
            f"({len(raw)} labels of {patients} patients, {len(references)} references), "
            f"{seconds:.1f} s {'an image' if together else 'a label'}"
        )


def time_full_size(form: str, count: int, threads: int, compute: Compute) -> None:
    """Time one case among references of the same size, and print both."""
    classes = ("necrosis", "edema", "enhancing")
    task = Task(
        name="full-size",
        modalities=("t1n", "t1c", "t2w", "t2f"),
        classes={name: (index,) for index, name in enumerate(classes, start=1)},
        regions={name: (name,) for name in classes},
        spacing=(1.0, 1.0, 1.0),
        size=SIZE,
    )
    method = _method(form, task, count, threads)
    method.references = [_made_up(number) for number in range(count)]
    case = _made_up(count)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        method.estimate(case, [case.label], compute)
        seconds.append(time.perf_counter() - begin)
    print(
        f"{form}, 160x192x160x4, {count} references, {threads} threads: {seconds[1]:.1f} s a case, "
        f"the first {seconds[0]:.1f} s with getting ready"
    )


def _method(form: str, task: Task, references: int, threads: int, *, together: bool = False) -> RCAMethod:
    rca = RCAConfig.model_validate(
        {"form": form, "references": references, "seconds": None, "threads": threads}
    )
    return RCAMethod(task, QCConfig(method="rca", rca=rca), together=together)


def _made_up(number: int) -> Case:
    """A head of noise in which a tumour of three shells lies somewhere."""
    rng = np.random.default_rng(number)
    grid: NDArray[np.float64] = np.indices(SIZE) - np.array(SIZE).reshape(3, 1, 1, 1) / 2
    head = ((grid / (np.array(SIZE) / 2.1).reshape(3, 1, 1, 1)) ** 2).sum(axis=0) < 1
    distance = np.linalg.norm(grid - rng.uniform(-25, 25, (3, 1, 1, 1)), axis=0)
    label = np.select([distance < 10, distance < 16, distance < 26], [1, 3, 2], 0).astype(np.uint8)
    image = (rng.normal(size=(4, *SIZE)) + label) * head
    case = Case(f"case-{number}", f"patient-{number}", image, label, np.eye(4), SIZE, np.eye(4))
    return replace(case, image=image.astype(np.float32))


if __name__ == "__main__":
    main()
