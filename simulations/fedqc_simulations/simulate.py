"""`fedqc simulate`: a consortium built, run and measured on one machine."""

import csv
import dataclasses
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
from fedqc_server.run_folder import Listener, RunFolder, check_new_folder
from pydantic import Field

from fedqc.cases.check import check_cases
from fedqc.cases.layouts import find_cases
from fedqc.compute import Compute, choose_compute
from fedqc.config import ComputeConfig, FederationConfig, FrozenModel, parse
from fedqc.degradation.base import Untouched
from fedqc.errors import ConfigError, DataError
from fedqc.files import write_json
from fedqc.methods.base import method_for_curation
from fedqc.model import load_model
from fedqc.segmentation import Segmentation
from fedqc.task import Task, load_task
from fedqc.trial import Tried
from fedqc_simulations.arms import (
    ARMS,
    OTHER_ARMS,
    PHASES,
    ArmScore,
    arm_figures,
    arm_folder,
    build_arm,
    count_kept,
    read_arm_scores,
    score_arms,
    taking_part,
)
from fedqc_simulations.consortium import build_consortium, read_references, site_files, write_federation
from fedqc_simulations.engine import run_local
from fedqc_simulations.evaluation import (
    curation_figures,
    diagnosis_figures,
    judge_test_cases,
    qc_figures,
    read_curated,
    read_judged,
)
from fedqc_simulations.noise import Noise
from fedqc_simulations.pathology import kind_for
from fedqc_simulations.phantoms import site_of, write_phantoms
from fedqc_simulations.ray_engine import check_ray, run_ray
from fedqc_simulations.report import write_pooled_report, write_simulation_report

SETTINGS = "simulation.json"
PHANTOMS_PER_SITE = 28


class Observer(Protocol):
    """Told what goes on; `fedqc.display.Display` is one."""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """How much of some work is done."""

    def say(self, line: str) -> None:
        """A line for people."""

    def listen(self, event: dict[str, Any]) -> None:
        """An event of a run, see `docs/reference/run-folder.md`."""


class Settings(FrozenModel):
    """What a simulation was started with: the content of `simulation.json`."""

    federation: FederationConfig
    data: Path | None
    """Folder of the data set, which is only read; None: phantoms, of the kind that the task is for."""
    layout: str | None
    """Layout of the data; None finds out."""
    noise: Noise
    """What is done to the labels."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Each decides everything that is drawn in one simulation."""
    compute: ComputeConfig
    """How the sites compute."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; None: all cores."""
    engine: Literal["local", "ray"] = "local"
    workers: int = Field(default=2, ge=1)
    """Processes of the engine `ray`."""


Owned = TypeVar("Owned", Tried, ArmScore)
"""Something that belongs to a patient."""


@dataclass(frozen=True)
class Seed:
    """One simulation of several that differ in their seed only."""

    seed: int
    out: Path


def simulate(settings: Settings, out: Path, observer: Observer) -> dict[str, Any]:
    """Build the sites from a data set, run the federation and the arms, measure.

    Args:
        settings: What is simulated.
        out: The run's folder; must not exist or be empty.
        observer: Told what goes on.

    Returns:
        The figures, as in `evaluation.json`.

    Raises:
        FedQCError: the input cannot be used, or the run failed.
    """
    check_new_folder(out)
    _check(settings, out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SETTINGS, settings.model_dump(mode="json"))
    try:
        return _go_on(settings, out, observer)
    except (ConfigError, DataError):
        if not any((run.out / "federation.toml").exists() for run in _runs(settings, out)):
            shutil.rmtree(out)  # the input is wrong and nothing was built: the next try finds a new folder
        raise


def resume(out: Path, observer: Observer) -> dict[str, Any]:
    """Go on with a simulation where it stopped; one that is finished only gets its report written again.

    Raises:
        ConfigError: the folder holds no simulation.
        FedQCError: as `simulate`.
    """
    path = out / SETTINGS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file, so {out} holds no simulation to resume") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore the file or start anew") from None
    settings = parse(values, Settings, source=str(path))
    if not (out / "evaluation.json").exists():
        _check(settings, out)
    return _go_on(settings, out, observer)


def site_names(count: int) -> tuple[str, ...]:
    """Names of the sites of a simulation.

    Raises:
        ConfigError: there is no site.
    """
    if count < 1:
        raise ConfigError(f"{count} sites: a consortium has at least one; use --sites 1 or more")
    return tuple(f"hospital-{number}" for number in range(1, count + 1))


def _check(settings: Settings, out: Path) -> None:
    """What does not fit is said before any work is done."""
    config = settings.federation
    if "all" in config.sites.expected:
        raise ConfigError("a site is called 'all', which evaluation.json uses for all of them; rename it")
    if len(set(settings.seeds)) < len(settings.seeds):
        raise ConfigError(f"--seeds {','.join(map(str, settings.seeds))}: name each seed once")
    task = load_task(config.task)
    if settings.data is None:
        kind_for(task)
    if settings.data is not None and out.resolve().is_relative_to(settings.data.resolve()):
        raise ConfigError(
            f"{out}: lies inside the data folder {settings.data}, which is only read; name another folder"
        )
    n_sites, minimum = len(config.sites.expected), config.sites.minimum
    if minimum > n_sites > 0:
        raise ConfigError(
            f"sites.minimum is {minimum}, but there are {n_sites} sites; lower it or use --sites {minimum}"
        )
    method_for_curation(config, task)
    Segmentation(task, config.segmentation)
    if config.qc.initial is not None:
        load_model(config.qc.initial, task)
    choose_compute(settings.compute.device, settings.compute.precision)
    if settings.engine == "ray":
        check_ray()
    if settings.data is not None:
        find_cases(settings.data, task, settings.layout)


def _go_on(settings: Settings, out: Path, observer: Observer) -> dict[str, Any]:
    """All that is not done yet, seed by seed."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    runs = _runs(settings, out)
    several = len(runs) > 1
    for run in runs:
        if several:
            observer.say(f"seed {run.seed}, in {run.out}")
            run.out.mkdir(exist_ok=True)
            own = settings.model_copy(update={"seeds": (run.seed,)})
            write_json(run.out / SETTINGS, own.model_dump(mode="json"))
        if not (run.out / "evaluation.json").exists():
            _simulate_seed(settings, run, observer)
        write_simulation_report(run.out)
    if several and not (out / "evaluation.json").exists():
        write_json(out / "evaluation.json", _pooled(settings, runs))
    if several:
        write_pooled_report(out)
    figures: dict[str, Any] = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    return figures


def _runs(settings: Settings, out: Path) -> list[Seed]:
    """The simulations and their folders: one lies in `out` itself, several below it."""
    several = len(settings.seeds) > 1
    return [Seed(seed, out / f"seed-{seed}" if several else out) for seed in settings.seeds]


def _simulate_seed(settings: Settings, run: Seed, observer: Observer) -> None:
    """One simulation from what is there of it to its figures."""
    out, config = run.out, settings.federation
    task = load_task(config.task)
    if not (out / "federation.toml").exists():  # the last file that is built
        _build(settings, task, run, observer)
    sites = site_files(out, config.sites.expected)
    _run(settings, out, out / "federation.toml", sites, seed=run.seed, listener=observer.listen)
    for arm in OTHER_ARMS:
        folder = arm_folder(out, arm)
        federation, sites = build_arm(out, arm, config, settings.compute, run.seed)
        listener = _named(arm, observer.listen)
        _run(settings, folder, federation, sites, seed=run.seed, phases=PHASES, listener=listener)
    compute = choose_compute(settings.compute.device, settings.compute.precision)
    write_json(out / "evaluation.json", _figures(settings, task, run, compute, observer))


def _build(settings: Settings, task: Task, run: Seed, observer: Observer) -> None:
    """Check the cases and build the sites; what an earlier attempt left half built goes first."""
    out, config = run.out, settings.federation
    for name in ("sites", "truth", "phantoms"):
        shutil.rmtree(out / name, ignore_errors=True)
    data, layout, home = settings.data, settings.layout, None
    if data is None:
        data, layout, home = out / "phantoms", "msd", site_of
        write_phantoms(
            data,
            config.sites.expected,
            PHANTOMS_PER_SITE,
            seed=run.seed,
            progress=observer.progress,
            kind=kind_for(task),
        )
    checked = check_cases(
        find_cases(data, task, layout),
        data,
        task,
        workers=settings.compute.workers,
        progress=lambda done, total: observer.progress("checking the cases", done, total),
    )
    errors = [problem for problem in checked.problems if problem.is_error]
    for problem in checked.problems:
        observer.say(f"{'left out' if problem.is_error else 'warning'}: {problem}")
    if not checked.usable:
        raise DataError(
            f"{data}: none of {len(checked.cases)} cases can be used; the first problem: {errors[0]}"
        )
    build_consortium(
        checked.usable,
        task,
        out,
        names=config.sites.expected,
        seed=run.seed,
        noise=settings.noise,
        min_count=config.privacy.min_count,
        compute=settings.compute,
        progress=observer.progress,
        home=home,
    )
    with (out / "truth" / "left_out.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "code", "file", "found", "expected", "fix"])
        writer.writerows([one.case, one.code, one.file, one.found, one.expected, one.fix] for one in errors)
    write_federation(out, config)


def _run(
    settings: Settings,
    out: Path,
    federation: Path,
    sites: Mapping[str, Path],
    *,
    seed: int,
    phases: Sequence[str] = (),
    listener: Listener,
) -> None:
    """Start a run or go on with it; one that is completed is left alone."""
    if RunFolder(out, resume=True).record.get("outcome") == "completed":
        return
    if settings.engine == "local":
        run_local(federation, sites, out, seed=seed, resume=True, phases=phases, listener=listener)
        return
    run_ray(
        federation,
        sites,
        out,
        seed=seed,
        workers=settings.workers,
        threads=settings.threads,
        resume=True,
        phases=phases,
        listener=listener,
    )


def _named(arm: str, listener: Listener) -> Listener:
    """A listener that is told which arm an event is from."""
    return lambda event: listener(event | {"arm": arm})


def _figures(
    settings: Settings, task: Task, run: Seed, compute: Compute, observer: Observer
) -> dict[str, Any]:
    """The content of a simulation's `evaluation.json`."""
    out, config, seed = run.out, settings.federation, run.seed
    sites = config.sites.expected
    model = load_model(_judging_model(out, sites), task)
    judged = judge_test_cases(out, model, seed=seed, compute=compute, progress=observer.progress)
    scores = score_arms(out, task, compute=compute, progress=observer.progress)
    n_train = {arm: count_kept(out, arm, taking_part(out, config)) for arm in ARMS}
    curated = read_curated(out, sites)
    return {
        "seed": seed,
        "qc": qc_figures(judged, config.qc.leave_out, seed=seed),
        "curation": curation_figures(curated, config.curation.threshold),
        "diagnosis": diagnosis_figures((one.kind, one.diagnosis) for one in curated if one.diagnosis),
        "suspected": _suspected(out),
        "segmentation": arm_figures([scores], n_train, seed=seed),
    }


def _judging_model(out: Path, sites: Sequence[str]) -> Path:
    """A QC model that can judge: the coordinator's lacks what sites fit, and their references."""
    at_sites = (out / "sites" / name / "models" / "qc" for name in sites)
    return next((folder for folder in at_sites if folder.is_dir()), out / "models" / "qc")


def _pooled(settings: Settings, runs: Sequence[Seed]) -> dict[str, Any]:
    """The figures over all seeds; patients are still the unit of every interval."""
    config = settings.federation
    task, sites, seed = load_task(config.task), config.sites.expected, settings.seeds[0]
    judged = [_owned(settings, run, one) for run in runs for one in read_judged(run.out)]
    curated = list(itertools.chain.from_iterable(read_curated(run.out, sites) for run in runs))
    suspected = [_suspected(run.out) for run in runs]
    return {
        "seeds": list(settings.seeds),
        "qc": qc_figures(judged, config.qc.leave_out, seed=seed),
        "curation": {"all": curation_figures(curated, config.curation.threshold)["all"]},
        "diagnosis": diagnosis_figures((one.kind, one.diagnosis) for one in curated if one.diagnosis),
        "suspected": {
            key: [
                f"{run.out.name}/{site}"
                for run, one in zip(runs, suspected, strict=True)
                for site in one[key]
            ]
            for key in ("spoiled", "named")
        },
        "segmentation": arm_figures(
            [[_owned(settings, run, one) for one in read_arm_scores(run.out, task)] for run in runs],
            {
                arm: sum(count_kept(run.out, arm, taking_part(run.out, config)) for run in runs)
                for arm in ARMS
            },
            seed=seed,
        ),
    }


def _owned(settings: Settings, run: Seed, one: Owned) -> Owned:
    """Phantoms of two seeds are two patients, whatever they are called; people stay who they are."""
    if settings.data is not None:
        return one
    return dataclasses.replace(one, patient=f"{run.seed}/{one.patient}")


def _suspected(out: Path) -> dict[str, list[str]]:
    """The sites whose references are spoiled, and those that the federation named."""
    statistics = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
    spoiled = {one.site for one in read_references(out) if one.kind != Untouched.kind}
    return {"spoiled": sorted(spoiled), "named": sorted(statistics.get("suspected", {}))}
