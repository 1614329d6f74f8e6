"""`fedqc simulate`: a consortium built, run and measured on one machine."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from fedqc_server.run_folder import Listener, check_new_folder

from fedqc.cases.layouts import find_cases
from fedqc.cases.validation import Problem, validate
from fedqc.compute import choose_compute
from fedqc.config import ComputeConfig, FederationConfig
from fedqc.curation.rules import ThresholdRule
from fedqc.errors import ConfigError, DataError
from fedqc.methods.base import get_method
from fedqc.model import load_model
from fedqc.task import load_task
from fedqc_simulations.consortium import Progress, build_consortium
from fedqc_simulations.engine import run_local
from fedqc_simulations.evaluation import evaluate
from fedqc_simulations.noise import Noise


@dataclass(frozen=True)
class Simulation:
    """A finished simulation."""

    evaluation: dict[str, Any]
    problems: tuple[Problem, ...]
    """What is wrong with the cases that were left out."""


def simulate(
    config: FederationConfig,
    data: Path,
    layout: str | None,
    out: Path,
    *,
    seed: int,
    noise: Noise,
    compute: ComputeConfig,
    progress: Progress,
    listener: Listener,
) -> Simulation:
    """Build the sites that `config.sites.expected` names from a data set, run the federation, measure it.

    Args:
        config: The federation.
        data: Folder of the data set; it is only read.
        layout: Its layout; None finds out.
        out: The run's folder; must not exist or be empty.
        seed: Decides everything that is drawn.
        noise: What is done to the candidates' labels.
        compute: How the sites compute.
        progress: Told what is being done before and after the run.
        listener: Told every event of the run.

    Raises:
        FedQCError: the input cannot be used, or the run failed.
    """
    check_new_folder(out)
    if "all" in config.sites.expected:
        raise ConfigError("a site is called 'all', which evaluation.json uses for all of them; rename it")
    task = load_task(config.task)
    # What does not fit is said before any work is done.
    if out.resolve().is_relative_to(data.resolve()):
        raise ConfigError(
            f"{out}: lies inside the data folder {data}, which is only read; name another folder"
        )
    n_sites, minimum = len(config.sites.expected), config.sites.minimum
    if minimum > n_sites > 0:
        raise ConfigError(
            f"sites.minimum is {minimum}, but there are {n_sites} sites; lower it or use --sites {minimum}"
        )
    ThresholdRule(config.curation.threshold, config.curation.review)
    get_method(config.qc.method)(task, config.qc)
    device = choose_compute(compute.device, compute.precision)
    cases = find_cases(data, task, layout)
    checked = validate(
        cases, task, workers=compute.workers, progress=lambda n, of: progress("checking the cases", n, of)
    )
    if not checked.usable:
        raise DataError(
            f"{data}: none of {len(cases)} cases can be used; the first problem: {checked.problems[0]}"
        )
    sites = build_consortium(
        checked.usable,
        task,
        out,
        names=config.sites.expected,
        seed=seed,
        noise=noise,
        min_count=config.privacy.min_count,
        compute=compute,
        progress=progress,
    )
    federation = out / "federation.toml"
    federation.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    run_local(federation, sites, out, seed=seed, listener=listener)
    figures = evaluate(
        out,
        load_model(out / "models" / "qc"),
        config.sites.expected,
        config.curation,
        seed=seed,
        compute=device,
        progress=progress,
    )
    (out / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return Simulation(figures, tuple(checked.problems))


def site_names(count: int) -> tuple[str, ...]:
    """Names of the sites of a simulation.

    Raises:
        ConfigError: there is no site.
    """
    if count < 1:
        raise ConfigError(f"{count} sites: a consortium has at least one; use --sites 1 or more")
    return tuple(f"hospital-{number}" for number in range(1, count + 1))
