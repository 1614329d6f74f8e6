from datetime import datetime, time
from pathlib import Path

import numpy as np
import pytest
from fedqc_client.policy import is_within, phase_of, planned_size, refusal, takes_no_part

from fedqc.config import DataConfig, NetworkConfig, PolicyConfig, QCConfig, SegmentationConfig, SiteConfig
from fedqc.errors import ProtocolError
from fedqc.protocol import (
    REPLIES,
    CrossCheckRequest,
    ErrorCode,
    HandshakeRequest,
    Request,
    SummariseRequest,
    TrainRequest,
    TrainSegmentationRequest,
)

NOON = datetime(2026, 11, 21, 12)
COMMON = {"federation": "test", "task": "x", "seed": 0, "min_count": 1}
MODEL = {**COMMON, "weights": {"w": np.zeros((10, 10), np.float32)}}


def site(**policy: object) -> SiteConfig:
    return SiteConfig(
        name="a", task="wmh", data=DataConfig(path=Path("d")), policy=PolicyConfig.model_validate(policy)
    )


def train(**changes: object) -> TrainRequest:
    return TrainRequest.model_validate({**MODEL, "qc": QCConfig(), "rounds": 2, **changes})


def test_by_default_all_is_allowed() -> None:
    requests: list[Request] = [
        HandshakeRequest.model_validate(COMMON),
        train(),
        TrainSegmentationRequest.model_validate({**MODEL, "segmentation": SegmentationConfig(), "rounds": 1}),
    ]
    assert [refusal(site(), request, NOON) for request in requests] == [None] * 3


def test_a_site_that_does_not_train_segmentation_still_gets_the_model() -> None:
    policy = site(segmentation=False)
    assert takes_no_part(policy, "train.segmentation")
    assert [kind for kind in REPLIES if takes_no_part(policy, kind)] == ["train.segmentation"]


@pytest.mark.parametrize(
    ("phase", "request_", "kept"),
    [
        ("summarise", SummariseRequest.model_validate(COMMON), train()),
        ("training", train(), SummariseRequest.model_validate(COMMON)),
        (
            "cross-check",
            CrossCheckRequest.model_validate({**MODEL, "qc": QCConfig()}),
            train(),
        ),
    ],
)
def test_a_phase_that_the_site_refuses(phase: str, request_: Request, kept: Request) -> None:
    policy = site(refuse=[phase])
    assert refusal(policy, request_, NOON) == ErrorCode.NO_PART
    assert refusal(policy, kept, NOON) is None


def test_every_phase_can_be_refused_by_a_name() -> None:
    names = {phase_of(kind) for kind in REPLIES}
    assert names == {
        "handshake",
        "summarise",
        "cross-check",
        "training",
        "calibrate",
        "score",
        "segmentation",
    }


def test_a_model_beyond_the_largest() -> None:
    planned = planned_size(site(), train())
    assert planned > 1000
    assert refusal(site(largest_model=planned - 1), train(), NOON) == ErrorCode.TOO_LARGE
    assert refusal(site(largest_model=planned), train(), NOON) is None
    more = train(weights={"w": np.zeros(planned + 1, np.float32)})
    assert refusal(site(largest_model=planned), more, NOON) == ErrorCode.TOO_LARGE


def test_a_network_that_is_described_only_is_beyond_it_too() -> None:
    """One number comes along; the network would take all memory there is."""
    wide = NetworkConfig(architecture="published", width=1024, blocks=(100, 100, 100, 100))
    request = train(qc=QCConfig(network=wide), weights={"w": np.zeros(1, np.float32)})
    assert refusal(site(), request, NOON) == ErrorCode.TOO_LARGE
    channels = SegmentationConfig(channels=(4, 2048, 2048, 2048))
    segmentation = {**MODEL, "segmentation": channels, "rounds": 1}
    assert refusal(site(), TrainSegmentationRequest.model_validate(segmentation), NOON) == ErrorCode.TOO_LARGE


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [("08:00-18:00", [8, 12, 17], [7, 18, 23]), ("20:00-6:00", [20, 23, 0, 5], [6, 12, 19])],
)
def test_the_hours_of_the_site(hours: str, inside: list[int], outside: list[int]) -> None:
    policy = site(hours=hours)
    for hour in (*inside, *outside):
        expected = None if hour in inside else ErrorCode.NOT_NOW
        assert refusal(policy, train(), NOON.replace(hour=hour)) == expected
    assert refusal(policy, SummariseRequest.model_validate(COMMON), NOON.replace(hour=outside[0])) is None
    assert policy.policy.hours is not None
    assert is_within(policy.policy.hours, time(inside[0]))


@pytest.mark.parametrize("hours", ["20-6", "25:00-06:00", "all day", "20:00"])
def test_hours_that_are_none(hours: str) -> None:
    with pytest.raises(ValueError, match="hours are two times of the day"):
        site(hours=hours)


def test_a_path_in_a_request_is_refused() -> None:
    with pytest.raises(ProtocolError, match="names a path on this machine"):
        refusal(site(), train(qc=QCConfig(initial=Path("/etc"))), NOON)
