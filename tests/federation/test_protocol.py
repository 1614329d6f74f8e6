import io
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedqc.config import CurationConfig, QCConfig, SegmentationConfig
from fedqc.errors import ProtocolError
from fedqc.protocol import (
    PROTOCOL_VERSION,
    REPLIES,
    CalibrateRequest,
    CrossCheckRequest,
    ErrorCode,
    ErrorReply,
    EvaluateSegmentationRequest,
    HandshakeReply,
    HandshakeRequest,
    ModelRequest,
    Provenance,
    Reply,
    Request,
    ScoreRequest,
    StatisticsReply,
    SummariseRequest,
    TrainReply,
    TrainRequest,
    TrainSegmentationRequest,
    TrainSegmenterRequest,
    Weights,
    content_digest,
    reply_from_records,
    reply_to_records,
    request_from_records,
    request_to_records,
    weights_from_record,
    weights_to_record,
)

COMMON: dict[str, Any] = {"federation": "f", "task": "0" * 64, "seed": 1, "min_count": 3}
WEIGHTS: Weights = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.count": np.array(5, np.int64),
}
MODEL: dict[str, Any] = COMMON | {"qc": QCConfig(rounds=7), "weights": WEIGHTS}
SEGMENTATION: dict[str, Any] = COMMON | {"segmentation": SegmentationConfig(rounds=3), "weights": WEIGHTS}
PROVENANCE = Provenance(rounds=7, samples=9, sites=("a", "b"))


@pytest.mark.parametrize(
    "request_",
    [
        HandshakeRequest(**COMMON),
        SummariseRequest(**COMMON),
        TrainRequest(**MODEL, round=2, rounds=7),
        CalibrateRequest(**MODEL, curation=CurationConfig(threshold=0.6)),
        CrossCheckRequest(**MODEL),
        ScoreRequest(**MODEL, curation=CurationConfig(), provenance=PROVENANCE),
        TrainSegmentationRequest(**SEGMENTATION, round=1, rounds=3),
        EvaluateSegmentationRequest(**SEGMENTATION, provenance=PROVENANCE),
    ],
    ids=lambda request_: request_.kind,
)
def test_a_request_comes_back_as_it_went(request_: Request) -> None:
    read = request_from_records(request_to_records(request_), type(request_))
    assert read.model_dump_json() == request_.model_dump_json()
    if isinstance(request_, ModelRequest) and isinstance(read, ModelRequest):
        assert list(read.weights) == ["b.weight", "a.count"]
        for name, values in WEIGHTS.items():
            np.testing.assert_array_equal(read.weights[name], values)
            assert read.weights[name].dtype == values.dtype


def test_another_protocol_version_is_told_apart() -> None:
    records = request_to_records(HandshakeRequest(**COMMON))
    records.config_records["request"]["version"] = PROTOCOL_VERSION + 1
    with pytest.raises(ProtocolError, match="speaks protocol version 5, this site version 4"):
        request_from_records(records, HandshakeRequest)


def test_a_request_that_is_none() -> None:
    with pytest.raises(ProtocolError, match="no record 'request'"):
        request_from_records(RecordDict(), HandshakeRequest)
    for model in (TrainRequest, CrossCheckRequest, TrainSegmentationRequest):
        with pytest.raises(ProtocolError, match="carries no weights"):
            request_from_records(request_to_records(HandshakeRequest(**COMMON)), model)
    records = request_to_records(HandshakeRequest(**COMMON))
    records.config_records["request"]["body"] = '{"seed": -1, "more": 2}'
    with pytest.raises(ProtocolError, match="5 fields differ"):
        request_from_records(records, HandshakeRequest)
    records.config_records["request"]["body"] = "no json"
    with pytest.raises(ProtocolError, match="cannot be read"):
        request_from_records(records, HandshakeRequest)


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("query.handshake", HandshakeReply(site="a", protocol=1, fedqc="0.1.0", task="f" * 64)),
        ("query.summarise", StatisticsReply({"cases": 3, "volume_ml.ball.mean": 0.5, "quality": [1, -1]})),
        ("query.score", ErrorReply(ErrorCode.DATA)),
        ("query.cross_check", StatisticsReply({"references": 9, "quality_mean": 0.5})),
        ("train.segmentation", ErrorReply(ErrorCode.NOTHING_KEPT)),
        ("train.segmentation", ErrorReply(ErrorCode.NO_PART)),
        ("evaluate.segmentation", StatisticsReply({"cases": 9, "dice.ball": 0.5})),
    ],
)
def test_a_reply_comes_back_as_it_went(kind: str, reply: Reply) -> None:
    assert reply_from_records(reply_to_records(reply), kind) == reply


@pytest.mark.parametrize("kind", ["train.qc", "train.segmentation"])
def test_an_update_comes_back_as_it_went(kind: str) -> None:
    reply = reply_from_records(
        reply_to_records(TrainReply(weights=WEIGHTS, samples=16, losses={"loss": 0.5})), kind
    )
    assert isinstance(reply, TrainReply)
    assert (reply.samples, reply.losses) == (16, {"loss": 0.5})
    assert list(reply.weights) == list(WEIGHTS)


COUNTS: dict[str, int | list[int]] = {
    "made": [0, 8, *[-1] * 8],
    "chosen": [4] * 10,
    "sources.seggen": 30,
    "sources.side-outputs": 10,
}


def test_counts_of_labels_come_with_an_update_of_qc() -> None:
    records = reply_to_records(TrainReply(weights=WEIGHTS, samples=40, losses={}, labels=COUNTS))
    reply = reply_from_records(records, "train.qc")
    assert isinstance(reply, TrainReply)
    assert reply.labels == COUNTS
    with pytest.raises(ProtocolError, match="neither a loss nor a count of labels"):
        reply_from_records(records, "train.segmentation")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("made", 3),
        ("made", [1] * 9),
        ("chosen", [-2] * 10),
        ("chosen", [0.5] * 10),
        ("sources.seggen", -1),
        ("sources.seggen", [1] * 10),
        ("sources.seggen", 0.5),
        ("patients", 3),
    ],
)
def test_counts_of_labels_have_one_form(name: str, value: Any) -> None:
    records = reply_to_records(TrainReply(weights=WEIGHTS, samples=40, losses={}, labels={name: value}))
    with pytest.raises(ProtocolError, match=f"labels.{name}"):
        reply_from_records(records, "train.qc")


def _train_records() -> RecordDict:
    return reply_to_records(TrainReply(weights=WEIGHTS, samples=16, losses={"loss": 0.5}))


def _with(records: RecordDict, name: str, record: Any) -> RecordDict:
    records[name] = record
    return records


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (_with(_train_records(), "more", ConfigRecord({"path": "/data"})), "holds the records"),
        (_with(_train_records(), "statistics", MetricRecord({"n": 1})), "holds the records"),
        (RecordDict({"training": MetricRecord({"samples": 1})}), "holds the records"),
        (_with(_train_records(), "training", MetricRecord({"loss.loss": 0.5})), "'samples' is missing"),
        (_with(_train_records(), "training", MetricRecord({"samples": 0})), "no count above 0"),
        (_with(_train_records(), "training", MetricRecord({"samples": 1.5})), "no count above 0"),
        (
            _with(_train_records(), "training", MetricRecord({"samples": 1, "n": 1.0})),
            "'n' is neither",
        ),
        *(
            (
                _with(_train_records(), "training", MetricRecord({"samples": 1, "loss.x": number})),
                "not finite",
            )
            for number in (float("inf"), float("nan"), 1e300, -1e300)
        ),
        (_with(_train_records(), "training", MetricRecord({"samples": 2**60})), "above 1e\\+15"),
        (
            _with(_train_records(), "training", MetricRecord({"samples": 1, "loss./data/x": 0.1})),
            "no dotted name",
        ),
        (
            _with(_train_records(), "training", MetricRecord({"samples": 1, "loss.x": [0.1] * 201})),
            "more than 200",
        ),
        (RecordDict({"error": ConfigRecord({"code": "Traceback: /data/x"})}), "holds one of"),
        (RecordDict({"error": ConfigRecord({"code": "data-error", "text": "x"})}), "nothing else"),
        (_with(_train_records(), "error", ConfigRecord({"code": "data-error"})), "nothing else"),
        (RecordDict({"error": MetricRecord({"code": 1})}), "nothing else"),
    ],
)
def test_what_the_protocol_does_not_allow_is_refused(records: RecordDict, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        reply_from_records(records, "train.qc")


@pytest.mark.parametrize(
    "change",
    [{"task": "short"}, {"fedqc": "0.1 /data"}, {"protocol": "1"}, {"site": "No Name"}, {"extra": "x"}],
)
def test_a_handshake_holds_nothing_else(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"site": "a", "protocol": 1, "fedqc": "0.1.0", "task": "f" * 64}
    reply_from_records(RecordDict({"handshake": ConfigRecord(good)}), "query.handshake")
    with pytest.raises(ProtocolError, match="1 fields of the handshake differ"):
        reply_from_records(RecordDict({"handshake": ConfigRecord(good | change)}), "query.handshake")


def _saved(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def test_weights_travel_as_numpy_saves_them() -> None:
    strided = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    record = weights_to_record(
        {"w": strided, "scalar": np.array(2.5, np.float64), "none": np.zeros((0, 3), np.float32)}
    )
    assert record["w"].data == _saved(np.array(strided, order="C"))
    read = weights_from_record(record)
    np.testing.assert_array_equal(read["w"], strided)
    assert read["scalar"].shape == ()
    assert read["none"].shape == (0, 3)


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (2,), "numpy.ndarray", _saved(np.zeros(2, np.float32)) + b"secret"),
        Array("float32", (2**40,), "numpy.ndarray", _saved(np.zeros(2, np.float32))),
        Array("float32", (-1, -2), "numpy.ndarray", _saved(np.zeros(2, np.float32))),
        Array("float64", (1,), "numpy.ndarray", _saved(np.zeros(2, np.float32))),
        Array("float32", (2,), "pickle", _saved(np.zeros(2, np.float32))),
        Array("uint8", (2,), "numpy.ndarray", _saved(np.zeros(2, np.uint8))),
        # The header's padding may not carry anything.
        Array("float32", (2,), "numpy.ndarray", _saved(np.zeros(2, np.float32)).replace(b"  \n", b" x\n")),
    ],
)
def test_an_array_that_could_carry_more_is_refused(array: Array) -> None:
    with pytest.raises(ProtocolError, match="weight 'w'"):
        weights_from_record(ArrayRecord({"w": array}))


def test_weights_of_another_dtype_are_not_sent() -> None:
    with pytest.raises(ProtocolError, match="weight 'w' is int32"):
        weights_to_record({"w": np.zeros(2, np.int32)})


def test_the_digest_is_that_of_what_flower_sends() -> None:
    records = _train_records()
    objects = get_all_nested_objects(records)
    size, sha256 = content_digest(records)
    assert size == sum(len(part.deflate()) for part in objects.values())
    assert sha256 == records.object_id
    # One number elsewhere is another digest.
    changed = TrainReply(
        weights=WEIGHTS | {"a.count": np.array(6, np.int64)}, samples=16, losses={"loss": 0.5}
    )
    assert content_digest(reply_to_records(changed))[1] != sha256
    assert content_digest(_train_records())[1] == sha256


def test_an_update_survives_flower_s_own_transport() -> None:
    records = _train_records()
    contents = {key: part.deflate() for key, part in get_all_nested_objects(records).items()}
    arrived = inflate_object_from_contents(records.object_id, contents)
    assert isinstance(arrived, RecordDict)
    reply = reply_from_records(arrived, "train.qc")
    assert isinstance(reply, TrainReply)
    assert list(reply.weights) == list(WEIGHTS)
    np.testing.assert_array_equal(reply.weights["b.weight"], WEIGHTS["b.weight"])
    assert content_digest(arrived) == content_digest(records)


def test_every_error_has_a_sentence() -> None:
    assert all(len(code.sentence) > 20 for code in ErrorCode)


def test_every_request_has_a_reply() -> None:
    requests = (
        HandshakeRequest,
        SummariseRequest,
        TrainSegmenterRequest,
        TrainRequest,
        CrossCheckRequest,
        CalibrateRequest,
        ScoreRequest,
        TrainSegmentationRequest,
        EvaluateSegmentationRequest,
    )
    assert set(REPLIES) == {request.kind for request in requests}


@pytest.mark.parametrize("kind", ["query.cross_check", "evaluate.segmentation"])
def test_only_a_training_request_is_answered_with_weights(kind: str) -> None:
    with pytest.raises(
        ProtocolError, match=rf"{kind}: the reply holds the records \['training', 'weights'\]"
    ):
        reply_from_records(_train_records(), kind)
