"""What may leave a site beside weights, by name: the list that its guard and the coordinator both check."""

import re
from typing import get_args

from fedqc.cases.problems import ErrorCode as ErrorCodeOfCase
from fedqc.curation.calibration import BINS
from fedqc.curation.diagnosis import Kind
from fedqc.curation.guards import EMPTY, SIZES
from fedqc.curation.rules import Outcome as Decided
from fedqc.degradation.samples import ALL_KINDS, STORED_KINDS, source_of
from fedqc.protocol import Number, Reply, StatisticsReply, TrainReply
from fedqc.statistics.datasheet import AXES
from fedqc.statistics.privacy import HIDDEN
from fedqc.statistics.site import N_BINS, PROFILE_BINS
from fedqc.task import Task

LOSS_NAME = re.compile(r"[a-z][a-z_]{0,31}")
MAX_LOSSES = 16
SOURCES = {source_of(kind) for kind in (*ALL_KINDS, *STORED_KINDS)}
LABEL_KEYS = frozenset({"made", "chosen"} | {f"sources.{name}" for name in SOURCES})
"""Counts of the labels that a QC model is trained on."""
CALIBRATION_KEYS = frozenset({"failures", "others"})
"""Labels of known quality by predicted quality; see `fedqc.curation.calibration`."""
PROFILE_MEANS = {"profile.predicted": 1.0, "profile.true": 1.0, "profile.sd": 2.0}
"""Means and standard deviations of a profile's bins, with the largest that there can be."""
LISTS = {
    "quality": N_BINS,
    **dict.fromkeys(CALIBRATION_KEYS, BINS),
    **dict.fromkeys(("profile.labels", *PROFILE_MEANS), PROFILE_BINS),
}
"""Statistics that are tables, with the number of their bins."""


def statistic_keys(kind: str, task: Task) -> frozenset[str]:
    """Every key that statistics of a phase may have."""
    match kind:
        case "query.summarise":
            volumes = {f"volume_ml.{name}.{part}" for name in task.classes for part in ("mean", "sd")}
            left_out = {f"left_out.{code}" for code in get_args(ErrorCodeOfCase)}
            grid = {f"{what}.{axis}" for what in ("spacing_mm", "shape") for axis in AXES}
            intensity = {f"intensity.{name}" for name in task.modalities}
            counts = {"cases", "patients", "references"}
            return frozenset(counts | left_out | volumes | grid | intensity)
        case "query.cross_check":
            return frozenset({"references", "quality_mean", "quality_sd"})
        case "query.calibrate":
            regions = {f"regions_{what}.{name}" for what in ("mae", "r") for name in task.regions}
            agreement = {"samples", "r", "mae", "rmse", "auroc", "bias", "difference_sd"} | regions
            return frozenset(agreement | CALIBRATION_KEYS | {"profile.labels", *PROFILE_MEANS})
        case "query.score":
            decisions = {f"decisions.{outcome}" for outcome in Decided}
            decisions |= {f"diagnosis.{kind}" for kind in Kind}
            regions = {f"regions_mean.{name}" for name in task.regions}
            sizes = {f"not_kept.{size}" for size in (EMPTY, *SIZES)}
            counts = {"candidates", "curated", "gatherings", "quality"}
            return frozenset(counts | {"quality_mean", "quality_sd"} | decisions | regions | sizes)
        case "evaluate.segmentation":
            return frozenset({"cases", "dice_mean", "dice_sd"} | {f"dice.{name}" for name in task.regions})
    return frozenset()


def not_allowed(reply: Reply, kind: str, task: Task) -> str | None:
    """What a reply to a message of type `kind` holds that is not on the list, in words; None if nothing."""
    if isinstance(reply, StatisticsReply) and (unknown := set(reply.values) - statistic_keys(kind, task)):
        return f"the statistics hold {sorted(unknown)}, which are not on the list"
    if isinstance(reply, StatisticsReply):
        for name, value in reply.values.items():
            if not _has_form(name, value):
                return f"{name!r} has not the form that it should have"
    if isinstance(reply, TrainReply):
        if len(reply.losses) > MAX_LOSSES or not all(LOSS_NAME.fullmatch(name) for name in reply.losses):
            return f"losses are named {sorted(reply.losses)}"
        if unknown := set(reply.labels) - LABEL_KEYS:
            return f"counts of labels are named {sorted(unknown)}"
    return None


def _has_form(name: str, value: Number | list[int] | list[float]) -> bool:
    """Whether tables, and nothing else, are lists of counts or means: whoever adds up relies on it."""
    if name not in LISTS:
        return not isinstance(value, list)
    if not isinstance(value, list) or len(value) != LISTS[name]:
        return False
    if name in PROFILE_MEANS:
        return all(
            isinstance(mean, float) and (mean == HIDDEN or 0 <= mean <= PROFILE_MEANS[name]) for mean in value
        )
    lowest = 0 if name in CALIBRATION_KEYS else HIDDEN
    return all(isinstance(count, int) and count >= lowest for count in value)
