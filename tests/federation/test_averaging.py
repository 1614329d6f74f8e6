import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedqc_server import averaging
from fedqc_server.averaging import Updates, check_update, rule_of, update_norm
from fedqc_server.fedadam import Moments, adam_step
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray
from pydantic import ValidationError

from fedqc.config import AveragingConfig
from fedqc.protocol import Weights, weights_to_record

MEAN = rule_of(AveragingConfig())
CURRENT: Weights = {"w": np.zeros((2, 2), np.float32), "n": np.zeros((), np.int64)}


def rule(strategy: str, **settings: float) -> averaging.Rule:
    return rule_of(AveragingConfig.model_validate({"strategy": strategy, **settings}))


def update(value: float, count: int = 0) -> Weights:
    return {"w": np.full((2, 2), value, np.float32), "n": np.array(count, np.int64)}


def single(value: float) -> Weights:
    """An update that changes one number by `value`: its norm."""
    return {"w": np.array([value])}


@pytest.fixture
def updates(tmp_path: Path) -> Iterator[Updates]:
    with Updates(tmp_path) as opened:
        yield opened


def of_norms(updates: Updates, **norms: float) -> Updates:
    for site, norm in norms.items():
        updates.add(site, single(norm), samples=1, current=single(0.0))
    return updates


def test_mean_is_weighted_by_samples(updates: Updates) -> None:
    updates.add("a", update(1.0, count=10), samples=1, current=CURRENT)
    updates.add("b", update(5.0, count=13), samples=3, current=CURRENT)
    # (1 * 1 + 3 * 5) / 4 = 4; (10 + 3 * 13) / 4 = 12.25, rounded to 12
    result = updates.combined(MEAN)
    np.testing.assert_array_equal(result["w"], np.full((2, 2), 4.0, np.float32))
    assert result["n"] == 12
    assert result["w"].dtype == np.float32
    assert result["n"].dtype == np.int64
    assert result["n"].shape == ()
    assert updates.sites == ("a", "b")
    assert updates.samples == 4


@pytest.mark.parametrize("strategy", ["fedavg", "trimmed-mean", "median"])
def test_one_site_comes_back_bit_for_bit(updates: Updates, strategy: str) -> None:
    rng = np.random.default_rng(0)
    strided = rng.normal(size=(4, 3, 5)).astype(np.float32).transpose(2, 0, 1)
    sent: Weights = {
        "z": strided,
        "m": rng.normal(size=100).astype(np.float32),
        "a": rng.normal(size=7),
        "count": np.array(2**40, np.int64),
        "nothing": np.zeros((0, 2), np.float32),
    }
    updates.add("a", sent, samples=7, current=sent)
    mean = updates.combined(rule(strategy))
    # A file of tensors has an order of its own; sites take weights in the order of the network only.
    assert list(mean) == ["z", "m", "a", "count", "nothing"]
    for name, values in sent.items():
        np.testing.assert_array_equal(mean[name], values)
        assert (mean[name].dtype, mean[name].shape) == (values.dtype, values.shape)


def arrays(seed: int, scale: float = 1.0) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        "w": (scale * rng.normal(size=(3, 50))).astype(np.float32),
        "n": np.array(seed, np.int64),
        "b": scale * rng.normal(size=7),
    }


def aggregated(strategy: strategies.FedAvg, sent: list[Weights]) -> Weights:
    """What Flower's own strategy makes of the updates of equal weight."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    replies = []
    for number, weights in enumerate(sent):
        request = Message(RecordDict(), dst_node_id=number + 2, message_type="train")
        metrics = MetricRecord({"num-examples": 5})
        records = RecordDict({"arrays": weights_to_record(weights), "metrics": metrics})
        replies.append(Message(records, reply_to=request))
    record, _ = strategy.aggregate_train(1, replies)
    assert record is not None
    return {name: array.numpy() for name, array in record.items()}


@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        ("fedavg", {}, strategies.FedAvg()),
        ("fedprox", {}, strategies.FedProx(proximal_mu=0.01)),
        ("median", {}, strategies.FedMedian()),
        ("trimmed-mean", {"trim": 0.2}, strategies.FedTrimmedAvg(beta=0.2)),
        ("trimmed-mean", {"trim": 0.4}, strategies.FedTrimmedAvg(beta=0.4)),
    ],
)
@pytest.mark.parametrize("n_sites", [5, 10])
def test_combined_as_by_flower(
    updates: Updates,
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str,
    settings: dict[str, float],
    theirs: strategies.FedAvg,
    n_sites: int,
) -> None:
    monkeypatch.setattr(averaging, "_AT_ONCE", 100)  # many parts, the last one smaller
    sent = [arrays(seed, 10.0 ** (seed % 3)) for seed in range(n_sites)]
    for number, weights in enumerate(sent):
        updates.add(f"s{number}", weights, samples=5, current=CURRENT | weights)
    ours = updates.combined(rule(name, **settings))
    expected = aggregated(theirs, sent)
    for key in ("w", "b"):
        np.testing.assert_allclose(ours[key], expected[key], rtol=1e-6, atol=1e-6)
        assert ours[key].dtype == sent[0][key].dtype


@pytest.mark.parametrize("n_sites", [3, 4])
def test_a_trimmed_mean_of_few_sites_still_cuts(updates: Updates, n_sites: int) -> None:
    """A fifth of four sites is none; then the mean would be at the mercy of one of them."""
    for number, value in enumerate([1e9, 1.0, 2.0, 3.0][:n_sites]):
        updates.add(f"s{number}", single(value), samples=1000 if number == 0 else 1, current=single(0.0))
    assert updates.combined(rule("trimmed-mean"))["w"] == {3: 2.0, 4: 2.5}[n_sites]


def test_samples_buy_no_weight_in_a_median(updates: Updates) -> None:
    for number, value in enumerate([9.0, 1.0, 2.0]):
        updates.add(f"s{number}", single(value), samples=1000 if number == 0 else 1, current=single(0.0))
    assert updates.combined(rule("median"))["w"] == 2.0
    assert updates.combined(MEAN)["w"] > 8.9


def test_adam_as_by_flower() -> None:
    settings = {"learning_rate": 0.05, "momentum": 0.8, "second_momentum": 0.95, "adaptivity": 1e-2}
    config = AveragingConfig.model_validate({"strategy": "fedadam", **settings})
    theirs = strategies.FedAdam(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-2)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    ours, expected, moments = arrays(0), arrays(0), Moments()
    for number in (1, 2, 3):
        mean = {name: values + arrays(number, 0.1)[name] for name, values in arrays(0).items()}
        theirs.current_arrays = expected
        request = Message(RecordDict(), dst_node_id=2, message_type="train")
        metrics = MetricRecord({"num-examples": 5})
        records = RecordDict({"arrays": weights_to_record(mean), "metrics": metrics})
        record, _ = theirs.aggregate_train(number, [Message(records, reply_to=request)])
        assert record is not None
        expected = {name: array.numpy() for name, array in record.items()}
        ours, moments = adam_step(ours, mean, moments, number, config)
        for key in ("w", "b"):
            np.testing.assert_allclose(ours[key], expected[key], rtol=1e-5, atol=1e-7)
            assert ours[key].dtype == mean[key].dtype
        assert ours["n"] == mean["n"]


@pytest.mark.parametrize(
    ("strategy", "key"), [("fedavg", "trim"), ("median", "proximal"), ("fedprox", "learning_rate")]
)
def test_settings_of_another_strategy_are_refused(strategy: str, key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} is for strategy"):
        AveragingConfig.model_validate({"strategy": strategy, key: 0.3})


def test_sums_in_float64(updates: Updates) -> None:
    # In float32 the small updates vanish beside 2**24.
    big: Weights = {"w": np.array([2.0**24], np.float32)}
    updates.add("a", big, samples=1, current=big)
    for index in range(7):
        updates.add(f"b{index}", {"w": np.array([1.0], np.float32)}, samples=1, current=big)
    assert updates.combined(MEAN)["w"][0] == np.float32((2.0**24 + 7) / 8)


def test_the_order_of_arrival_does_not_change_the_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sent = {f"s{index}": {"w": rng.normal(size=50) * 10.0 ** rng.integers(-9, 9)} for index in range(9)}
    means = []
    for names in (sorted(sent), sorted(sent, reverse=True)):
        with Updates(tmp_path) as updates:
            for site in names:
                updates.add(site, sent[site], samples=3 + int(site[1]), current=sent["s0"])
            means.append(updates.combined(MEAN)["w"].tobytes())
            assert updates.sites == tuple(sorted(sent))
    assert means[0] == means[1]


def _peak(folder: Path, n_sites: int, strategy: str) -> int:
    """Most bytes in use at once while `n_sites` updates of 400 kB come and are averaged."""
    tracemalloc.start()
    with Updates(folder) as updates:
        current = {"w": np.zeros(100_000, np.float32)}
        for index in range(n_sites):
            sent = {"w": np.full(100_000, index, np.float32)}
            updates.add(f"site-{index:02}", sent, samples=1, current=current)
        updates.combined(rule(strategy))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("strategy", ["fedavg", "trimmed-mean", "median"])
def test_memory_does_not_grow_with_the_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setattr(averaging, "_AT_ONCE", 2**12)
    few, many = _peak(tmp_path, 4, strategy), _peak(tmp_path, 40, strategy)
    assert few > 800_000  # the measure sees the arrays
    assert many < few + 200_000


def test_the_caller_s_arrays_stay(updates: Updates) -> None:
    first = {"w": np.ones(3, np.float64)}
    updates.add("a", first, samples=1, current=first)
    updates.add("b", first, samples=1, current=first)
    updates.combined(MEAN)
    np.testing.assert_array_equal(first["w"], np.ones(3))


def test_a_site_has_one_update(updates: Updates) -> None:
    updates.add("b", update(1.0), samples=1, current=CURRENT)
    with pytest.raises(ValueError, match="'b' has an update in this round already"):
        updates.add("b", update(1.0), samples=1, current=CURRENT)
    assert updates.samples == 1


def test_nothing_has_no_mean(updates: Updates) -> None:
    assert updates.refuse_huge(10.0) == ()
    with pytest.raises(ValueError, match="no update"):
        updates.combined(MEAN)
    with pytest.raises(ValueError, match="0 samples"):
        updates.add("a", update(1.0), samples=0, current=CURRENT)


def test_the_files_are_gone_after_the_round(tmp_path: Path) -> None:
    with Updates(tmp_path) as updates:
        updates.add("a", update(1.0), samples=1, current=CURRENT)
        assert len(list(tmp_path.rglob("*.float32"))) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="0 samples"), Updates(tmp_path) as updates:
        updates.add("a", update(1.0), samples=0, current=CURRENT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"w": np.array([[4.0, 1.0], [1.0, 5.0]], np.float32), "n": np.array(0, np.int64)}, 5.0),
        ({"w": np.array([[6.0, 1.0], [1.0, 1.0]], np.float32), "n": np.array(-12, np.int64)}, 13.0),
        ({"w": np.ones((2, 2), np.float32), "n": np.array(0, np.int64)}, 0.0),
    ],
)
def test_a_norm_is_that_of_the_change_over_all_arrays(values: Weights, expected: float) -> None:
    # The changes are 3 and 4; 5 and 12; none.
    current: Weights = {"w": np.ones((2, 2), np.float32), "n": np.zeros((), np.int64)}
    assert update_norm(values, current) == expected


def test_a_norm_beyond_float64_is_infinite() -> None:
    assert update_norm({"w": np.array([1e200, 0.0])}, {"w": np.zeros(2)}) == np.inf
    # Squares of float32 are taken in float64.
    assert update_norm({"w": np.array([3e38], np.float32)}, {"w": np.zeros(1, np.float32)}) == pytest.approx(
        3e38
    )


@pytest.mark.parametrize(
    ("norms", "huge"),
    [
        ({"a": 1.0, "b": 1.5, "c": 50.0}, ("c",)),
        ({"a": 1.0, "b": 1.5, "c": 15.0}, ()),  # ten times the median is still allowed
        ({"a": 1.0, "b": 1.5, "c": 15.1}, ("c",)),
        ({"a": 50.0, "b": 1.0, "c": 60.0, "d": 2.0, "e": 1.0}, ("a", "c")),
        # Of an even number the lower median counts, so of two sites the smaller one.
        ({"a": 1.0, "b": 10.1}, ("b",)),
        ({"a": 10.1, "b": 1.0}, ("a",)),
        ({"a": 1.0, "b": 10.0}, ()),
        ({"a": 1.0, "b": 1.0, "c": 30.0, "d": 40.0}, ("c", "d")),
        ({"a": 7.0}, ()),
        # Sites that change nothing set no measure.
        ({"a": 0.0, "b": 0.0, "c": 5.0}, ()),
        ({"a": 0.0, "b": 1.0, "c": 11.0}, ("c",)),
        ({"a": 0.0}, ()),
        # Infinite is huge whatever the others are.
        ({"a": 1e200}, ("a",)),
        ({"a": 0.0, "b": 0.0, "c": 1e200}, ("c",)),
        ({"a": 1e200, "b": 1e200, "c": 1.0}, ("a", "b")),
    ],
)
def test_huge_updates_are_refused(norms: dict[str, float], huge: tuple[str, ...], updates: Updates) -> None:
    of_norms(updates, **norms)
    assert updates.refuse_huge(10.0) == huge
    left = {site: norm for site, norm in norms.items() if site not in huge}
    assert (updates.sites, updates.samples) == (tuple(sorted(left)), len(left))
    if left:
        assert updates.combined(MEAN)["w"] == pytest.approx(np.mean(list(left.values())))


def test_the_factor_counts(updates: Updates) -> None:
    of_norms(updates, a=1.0, b=1.0, c=3.5)
    assert updates.refuse_huge(4.0) == ()
    assert updates.refuse_huge(3.0) == ("c",)


def test_check_update() -> None:
    def check(**changes: NDArray[Any]) -> str | None:
        return check_update(update(1.0) | changes, CURRENT)

    assert check() is None
    assert check_update({"w": update(1.0)["w"]}, CURRENT) == "names-differ"
    assert check(more=np.zeros(1, np.float32)) == "names-differ"
    assert check_update(dict(reversed(update(1.0).items())), CURRENT) == "names-differ"
    assert check(w=np.zeros((4,), np.float32)) == "shape-differs"
    assert check(n=np.zeros((1,), np.int64)) == "shape-differs"
    assert check(w=np.zeros((2, 2), np.float64)) == "dtype-differs"
    assert check_update(update(np.nan), CURRENT) == "not-finite"
    assert check_update(update(-np.inf), CURRENT) == "not-finite"
