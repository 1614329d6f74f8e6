"""What other rules would find in simulations that are finished, with the same scores.

    python -m fedqc_simulations.benchmarks.rules SEED...

SEED is the folder of a simulation of one seed. The run's own rule has to be `target` or `conformal`, for
then manifests hold what the sites counted of labels of known quality. Each rule decides about all candidates
again; prints recall and precision of finding failures over all seeds, with 95 % intervals (Wilson).
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedqc.config import CurationConfig
from fedqc.curation.deciding import decide
from fedqc.curation.manifest import MANIFEST, Manifest, read_manifest
from fedqc.curation.rules import Outcome
from fedqc.curation.self_test import SELF_TEST, read_self_test
from fedqc.reports.words import with_interval
from fedqc_simulations.evaluation import Curated, curation_figures, read_curated

LEVELS = (0.9, 0.95, 0.98)
RULES: dict[str, dict[str, Any]] = {
    "threshold": {"rule": "threshold"},
    **{f"target {level:g}": {"rule": "target", "level": level, "pooled": True} for level in LEVELS},
    **{
        f"target {level:g}, each site's own": {"rule": "target", "level": level, "pooled": False}
        for level in LEVELS
    },
}
"""Keys of `[curation]`, by the name that is printed."""
WITH_ANY_RULE = {"threshold", "most_dropped", "max_mae", "min_auroc"}
"""What stays as it was in the run."""


def main() -> None:
    """Decide again, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", type=Path, nargs="+", metavar="SEED")
    options = parser.parse_args()
    taus = {manifest.rule.config.threshold for seed in options.seeds for manifest in manifests(seed).values()}
    if len(taus) != 1:
        raise SystemExit(f"the seeds have the thresholds {sorted(taus)}; give seeds of one and the same")
    (tau,) = taus
    for seed in options.seeds:
        if not any(manifest.rule.calibration for manifest in manifests(seed).values()):
            raise SystemExit(f"{seed}: no manifest holds labels of known quality; give runs of rule target")
    print(f"{'rule':31} {'failures':>8} {'recall':22} {'dropped':>8} precision")
    for name, rule in RULES.items():
        decided = [one for seed in options.seeds for one in decided_again(seed, rule)]
        figures = curation_figures(decided, tau)["all"]
        recall, precision = (
            with_interval(figures[key], figures[f"{key}_ci"]) for key in ("recall", "precision")
        )
        print(f"{name:31} {figures['n_failures']:8} {recall:22} {figures['n_dropped']:8} {precision}")


def manifests(seed: Path) -> dict[str, Manifest]:
    """The manifest of each site, by its name."""
    found = {path.parent.name: read_manifest(path) for path in sorted(seed.glob(f"sites/*/{MANIFEST}"))}
    if not found:
        raise SystemExit(f"{seed}: no site has a manifest; name the folder of a simulation of one seed")
    return found


def decided_again(seed: Path, rule: Mapping[str, Any]) -> Iterator[Curated]:
    """Every candidate with what another rule makes of it.

    Args:
        seed: folder of a simulation.
        rule: keys of `[curation]` and their values.
    """
    for site, manifest in manifests(seed).items():
        quality = {entry.id: entry.quality for entry in manifest.entries}
        test = read_self_test(seed / "sites" / site / SELF_TEST)
        config = CurationConfig(**(manifest.rule.config.model_dump(include=WITH_ANY_RULE) | dict(rule)))
        _, decisions = decide(quality, config, test, manifest.rule.calibration)
        for entry, one in zip(manifest.entries, read_curated(seed, [site]), strict=True):
            yield replace(one, dropped=decisions[entry.id].outcome is not Outcome.KEEP)


if __name__ == "__main__":
    main()
