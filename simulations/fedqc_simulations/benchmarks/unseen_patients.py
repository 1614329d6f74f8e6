"""What several benchmarks begin with: a simulation's QC model, and patients whom it has not seen."""

import argparse
from pathlib import Path

import torch

from fedqc.cases.cache import CaseCache
from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import find_cases
from fedqc.model import StoredModel, load_model
from fedqc.task import load_task
from fedqc_simulations.consortium import read_candidates


def options_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that `read_model_and_cases` needs, and a seed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a simulation")
    parser.add_argument("--data", type=Path, required=True, help="the data set that it was built from")
    parser.add_argument("--task", required=True)
    parser.add_argument("--model", type=Path, help="another than RUN/models/qc")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def read_model_and_cases(options: argparse.Namespace) -> tuple[StoredModel, CachedCases]:
    """The model, and all cases of the candidates' patients with their labels as they were before."""
    torch.set_num_threads(options.threads)
    if not options.run.is_dir():
        raise SystemExit(f"{options.run}: there is no such folder; name that of a simulation")
    task = load_task(options.task)
    patients = {one.patient for one in read_candidates(options.run)}
    files = [one for one in find_cases(options.data, task).cases if one.patient in patients]
    model = load_model(options.model or options.run / "models" / "qc", task)
    return model, CachedCases(CaseCache(options.run / "truth" / "cache", task), files)
