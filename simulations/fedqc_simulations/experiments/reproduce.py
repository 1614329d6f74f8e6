"""Which tables can be made again, and how one of them is made."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedqc.display import Display
from fedqc.errors import ConfigError, did_you_mean
from fedqc_simulations.experiments import dqe, methods, qcresunet, robinson, voxresnet, williams
from fedqc_simulations.experiments.base import Settings, Workshop, open_workshop


@dataclass(frozen=True)
class Experiment:
    """A table of a paper."""

    title: str
    quick_cases: int
    """Cases that `--quick` takes."""
    run: Callable[[Workshop], None]


EXPERIMENTS = {
    module.NAME: Experiment(module.TITLE, module.QUICK_CASES, module.reproduce)
    for module in (qcresunet, voxresnet, robinson, dqe, williams, methods)
}
ACROSS_SITES = (qcresunet.NAME, voxresnet.NAME, robinson.NAME)
"""Tables whose training can be federated too, beside the pooled data."""


def reproduce(name: str, settings: Settings, out: Path, display: Display) -> Path:
    """Make a table again; what was made before it was cut off is kept.

    Args:
        name: one of `EXPERIMENTS`.
        settings: on which data.
        out: a new folder, or one in which the same was begun.
        display: told how it goes.

    Returns:
        The table to read, a Markdown file.

    Raises:
        ConfigError: there is no such table, it has no part for sites, or the folder holds something else.
        FedQCError: whatever ends it.
    """
    if name not in EXPERIMENTS:
        hint = did_you_mean(name, list(EXPERIMENTS))
        raise ConfigError(f"no table is called {name!r}; {hint}known: {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    if settings.sites and name not in ACROSS_SITES:
        raise ConfigError(f"--sites: {name} has no federated rows beside the pooled ones; leave it out")
    if settings.quick:
        display.say("--quick: figures show that it runs, not how good a method is")
    workshop = open_workshop(name, settings, out, display, experiment.quick_cases if settings.quick else None)
    experiment.run(workshop)
    return out / "table.md"
