import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from monai.metrics.meandice import compute_dice
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import NetworkConfig, QCConfig, SamplesConfig
from fedqc.errors import ConfigError
from fedqc.methods.base import RoundPlan
from fedqc.methods.pairs import PairBatch
from fedqc.methods.qcresunet import QCResUNetMethod
from fedqc.networks.qcresunet import QCOutput
from fedqc.task import Task

FP32 = Compute(torch.device("cpu"), torch.float32)
PLAN = RoundPlan(seed=0, site="hospital-1", round=1, rounds=2, steps=2, batch_size=3)


NETWORKS = (
    NetworkConfig(architecture="corrective"),
    NetworkConfig(architecture="published", width=4, blocks=(1, 1, 1)),
)


@pytest.fixture(params=NETWORKS, ids=lambda network: network.architecture)
def method(request: pytest.FixtureRequest, task: Task) -> QCResUNetMethod:
    config = QCConfig(leave_out=("shift",), network=request.param, learning_rate=3e-3)
    return QCResUNetMethod(task, config)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def trained(method: QCResUNetMethod, cases: list[Case], **changes: Any) -> nn.Module:
    network = method.build(0)
    method.train_round(network, cases, RoundPlan(**(vars(PLAN) | changes)), FP32)
    return network


# --------------------------------------------------------------------------------------------------- build


def test_the_network_depends_on_nothing_but_the_seed(method: QCResUNetMethod) -> None:
    torch.manual_seed(1)
    first, state = method.build(7), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # other draws are not disturbed
    torch.rand(3)
    assert same(method.build(7), first)
    assert not same(method.build(8), first)
    assert {(p.device.type, p.dtype) for p in first.parameters()} == {("cpu", torch.float32)}


def test_the_published_network_is_there_in_its_published_size(task: Task) -> None:
    config = QCConfig(network=NetworkConfig(architecture="published"))
    with torch.device("meta"):
        method = QCResUNetMethod(task.model_copy(update={"size": (160, 192, 160)}), config)
        network = method.build(0)
    # Published: five channels in, one value out. Here: two modalities, two classes; mean and three regions.
    expected = 66_151_042 - (5 - 4) * 64 * 7**3 + (4 - 1) * (512 + 1)
    assert sum(p.numel() for p in network.parameters()) == expected


def test_a_size_that_the_strides_do_not_divide(task: Task) -> None:
    with pytest.raises(ConfigError, match="size along y is 17"):
        QCResUNetMethod(task.model_copy(update={"size": (32, 17, 16)}), QCConfig())


def test_the_published_network_takes_any_size(task: Task) -> None:
    config = QCConfig(network=NetworkConfig(architecture="published", width=4))
    method = QCResUNetMethod(task.model_copy(update={"size": (40, 56, 33)}), config)
    assert method.shortest_axis == 2


def test_a_size_of_one_voxel_in_the_last_layer(task: Task) -> None:
    with pytest.raises(ConfigError, match="8x8x8 leaves 1x1x1 voxels"):
        QCResUNetMethod(task.model_copy(update={"size": (8, 8, 8)}), QCConfig())


def test_the_label_goes_in_as_one_channel_a_class(method: QCResUNetMethod, cases: list[Case]) -> None:
    image = torch.from_numpy(cases[0].image)[None]
    label = torch.from_numpy(cases[0].label)[None]
    inputs = method.inputs(image, label)
    assert torch.equal(inputs[:, :2], image)
    assert torch.equal(inputs[:, 2], (label == 1).float())
    assert torch.equal(inputs[:, 3], (label == 2).float())


# -------------------------------------------------------------------------------------------------- batches


def batches(task: Task, cases: list[Case], samples: SamplesConfig, seed: int = 0) -> Iterator[PairBatch]:
    method = QCResUNetMethod(task, QCConfig(samples=samples))
    return method.batches(cases, method.pool(cases), np.random.default_rng(seed), 6, 4)


def test_batches_of_untouched_labels_promise_full_marks(task: Task, cases: list[Case]) -> None:
    made = list(batches(task, cases, SamplesConfig(seggen=0, annotator=0, untouched=1)))
    assert len(made) == 6
    for batch in made:
        assert batch.inputs.shape == (4, 4, 32, 16, 16)
        assert (batch.dsc == 1).all()
        assert (batch.mean == 1).all()
        assert not batch.error.any()


def test_batches_of_degraded_labels_tell_the_truth(task: Task, cases: list[Case]) -> None:
    made = list(batches(task, cases, SamplesConfig(untouched=0)))
    channels = torch.cat([batch.inputs[:, 2:] for batch in made])
    assert set(torch.unique(channels).tolist()) == {0, 1}
    assert channels.sum(dim=1).max() == 1  # a voxel has one class
    label = channels[:, 0] + 2 * channels[:, 1]
    reference = torch.cat([batch.reference for batch in made])
    assert torch.equal(torch.cat([batch.error for batch in made]), label != reference)

    def masks(classes: Tensor) -> Tensor:
        return torch.stack([classes == 2, classes == 1, classes > 0], dim=1).float()  # rim, core, whole

    dsc, present = torch.cat([b.dsc for b in made]), torch.cat([b.present for b in made])
    mean = torch.cat([b.mean for b in made])
    found = compute_dice(masks(label), masks(reference), ignore_empty=True)
    torch.testing.assert_close(torch.where(present, dsc, torch.nan), found, equal_nan=True)
    torch.testing.assert_close(mean, found.nanmean(dim=1))
    assert mean.std() > 0.15


def test_the_seed_decides_the_batches(task: Task, cases: list[Case]) -> None:
    first, again, other = (list(batches(task, cases, SamplesConfig(), seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].inputs, other[0].inputs)


# --------------------------------------------------------------------------------------------------- losses


class Says(nn.Module):
    """A network that always says the same."""

    def __init__(self, quality: Tensor, error_logits: Tensor, corrected: Tensor | None = None) -> None:
        super().__init__()
        self.output = QCOutput(quality, error_logits, corrected)

    def forward(self, _: Tensor) -> QCOutput:
        return self.output


@pytest.fixture
def batch() -> PairBatch:
    """Two labels of 4x4x4 voxels: one is wrong in half of them, one is right; a region is absent there."""
    reference = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    reference[:, 2:] = 1
    error = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    error[0, :2] = True
    return PairBatch(
        inputs=torch.zeros(2, 4, 4, 4, 4),
        label=torch.where(error, 1 - reference, reference),
        dsc=torch.tensor([[0.2, 0.4, 0.6], [1.0, 0.0, 1.0]]),
        present=torch.tensor([[True, True, True], [True, False, True]]),
        mean=torch.tensor([0.4, 1.0]),
        reference=reference,
        error=error,
    )


@pytest.mark.parametrize("corrects", [False, True])
def test_the_loss_is_zero_for_a_perfect_answer_and_grows_from_there(
    task: Task, batch: PairBatch, corrects: bool
) -> None:
    method = QCResUNetMethod(task, QCConfig(error_weight=0.5))
    truth = torch.cat([batch.mean[:, None], batch.dsc], dim=1)
    truth[1, 2] = 0.77  # absent from the second reference: whatever is said of it does not count
    sign = batch.error.float() * 2 - 1
    right = nn.functional.one_hot(batch.reference.long(), 3).movedim(-1, 1).float()

    def losses(off: Tensor | float, certainty: float) -> dict[str, Tensor]:
        corrected = (right * certainty).log_softmax(dim=1) if corrects else None
        return method.losses(Says(truth + off, sign * certainty, corrected), batch)

    perfect, blind, worst = (losses(0.0, certainty) for certainty in (30.0, 0.0, -30.0))
    assert all(part.item() == pytest.approx(0, abs=1e-5) for part in perfect.values())
    for name in set(perfect) - {"quality"}:
        assert perfect[name] < blind[name] < worst[name]
    off = torch.tensor([[0.1, -0.1, 0.1, -0.1], [-0.1, 0.1, 5.0, 0.1]])
    assert losses(off, 30.0)["quality"].item() == pytest.approx(0.1)
    if not corrects:  # lambda times the cross-entropy of a coin
        assert blind["cross_entropy"].item() == pytest.approx(0.5 * math.log(2))


@pytest.mark.parametrize("architecture", ["corrective", "published"])
def test_an_error_map_for_each_class(
    task: Task, cases: list[Case], architecture: Literal["corrective", "published"]
) -> None:
    chosen = NetworkConfig(architecture=architecture, error_maps="classes", width=4, blocks=(1, 1, 1))
    method = QCResUNetMethod(task, QCConfig(network=chosen, learning_rate=3e-3))
    network = trained(method, cases)
    (score,) = method.score(network, cases[:1], FP32)
    assert list(score.class_error_maps) == ["core", "rim"]
    core, rim = score.class_error_maps.values()
    assert core.shape == rim.shape == cases[0].label.shape
    assert not np.array_equal(core, rim)
    assert score.error_map is not None
    if architecture == "published":
        np.testing.assert_array_equal(score.error_map, np.maximum(core, rim))
    else:  # wrong anywhere is at least as likely as wrong in one class
        assert (score.error_map >= np.maximum(core, rim) - 1e-4).all()


def test_class_error_maps_of_a_corrected_label() -> None:
    """The corrected label says 70 % core, 20 % rim: a label of rim is most likely wrong in both."""
    task = Task(
        name="two",
        modalities=("T1",),
        classes={"core": (1,), "rim": (2,)},
        regions={"core": ("core",)},
        spacing=(1.0, 1.0, 1.0),
        size=(16, 16, 16),
    )
    method = QCResUNetMethod(task, QCConfig(network=NetworkConfig(error_maps="classes")))
    corrected = torch.tensor([0.1, 0.7, 0.2]).log()[None, :, None, None, None].expand(1, 3, 16, 16, 16)
    label = torch.ones(1, 16, 16, 16, dtype=torch.uint8)
    label[:, 8:] = 2
    network = Says(torch.ones(1, 2), torch.zeros(1, 16, 16, 16), corrected)
    found = method.judge(network, torch.zeros(1, 1, 16, 16, 16), label)
    assert found.class_errors is not None
    for start, expected in ((0, (0.3, 0.2)), (8, (0.7, 0.8))):
        torch.testing.assert_close(found.class_errors[0, :, start, 0, 0], torch.tensor(expected))


def test_the_published_recipe_belongs_to_the_published_network(task: Task) -> None:
    published = QCConfig(network=NetworkConfig(architecture="published", width=4, blocks=(1, 1, 1)))
    settings = QCResUNetMethod(task, published).settings(PLAN)
    assert (settings.optimizer, settings.schedule) == ("adam", "exponential")
    assert (settings.learning_rate, settings.weight_decay) == (1e-4, 5e-4)
    changed = published.model_copy(update={"learning_rate": 0.01, "schedule": "constant"})
    settings = QCResUNetMethod(task, changed).settings(PLAN)
    assert (settings.optimizer, settings.schedule, settings.learning_rate) == ("adam", "constant", 0.01)
    assert QCResUNetMethod(task, QCConfig()).settings(PLAN).learning_rate == 3e-3


def test_attention_is_for_the_published_network(task: Task) -> None:
    with pytest.raises(ConfigError, match="architecture = 'published'"):
        QCResUNetMethod(task, QCConfig(network=NetworkConfig(attention=True)))


# ---------------------------------------------------------------------------------------------- train_round


def test_one_seed_one_result(method: QCResUNetMethod, cases: list[Case]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = trained(method, cases)
    assert torch.equal(torch.get_rng_state(), before)  # what others draw is not disturbed
    torch.manual_seed(4)
    assert same(trained(method, cases), first)
    assert not same(first, method.build(0))
    for change in ({"seed": 1}, {"site": "hospital-2"}, {"round": 2}):
        assert not same(trained(method, cases, **change), first)


def test_one_thread_and_two_give_the_same_weights(method: QCResUNetMethod, cases: list[Case]) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(trained(method, cases, steps=1).state_dict())
    finally:
        torch.set_num_threads(threads)
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=1e-5, rtol=0)


def test_what_a_round_reports(method: QCResUNetMethod, cases: list[Case]) -> None:
    told: list[tuple[int, int]] = []
    plan = RoundPlan(seed=0, site="a", round=2, rounds=3, steps=2, batch_size=3)
    result = method.train_round(method.build(0), cases, plan, FP32, lambda done, of: told.append((done, of)))
    assert result.samples == 6
    parts = dict(result.losses)
    assert parts.pop("loss") == pytest.approx(sum(parts.values()))
    assert "quality" in parts
    assert told == [(3, 6), (4, 6)]


def test_training_teaches(method: QCResUNetMethod, cases: list[Case]) -> None:
    network = method.build(0)
    rounds = [RoundPlan(seed=0, site="a", round=n, rounds=12, steps=10, batch_size=4) for n in (1, 2, 3, 4)]
    losses = [method.train_round(network, cases, plan, FP32).losses["loss"] for plan in rounds]
    assert losses[-1] < 0.85 * losses[0]


# ---------------------------------------------------------------------------------------------------- score


def test_scores_name_case_and_regions(method: QCResUNetMethod, cases: list[Case]) -> None:
    network = method.build(0)
    scores = list(method.score(network, iter(cases), FP32, batch_size=2))
    assert [score.case_id for score in scores] == [case.id for case in cases]
    for score in scores:
        assert list(score.regions) == ["rim", "core", "whole"]
        assert all(
            type(value) is float and 0 <= value <= 1 for value in [score.quality, *score.regions.values()]
        )
        assert score.error_map is not None
        assert score.error_map.shape == (32, 16, 16)
        assert score.error_map.dtype == np.float32
        assert 0 <= score.error_map.min() < score.error_map.max() <= 1


def test_scores_depend_on_neither_batch_nor_chance(method: QCResUNetMethod, cases: list[Case]) -> None:
    network = method.build(0).train()
    one, three = (list(method.score(network, cases, FP32, batch_size=size)) for size in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert a.quality == pytest.approx(b.quality, abs=1e-4)
        assert a.error_map is not None
        assert b.error_map is not None
        np.testing.assert_allclose(a.error_map, b.error_map, atol=1e-4)


def test_the_mean_comes_first_then_the_regions_all_clamped(
    method: QCResUNetMethod, cases: list[Case]
) -> None:
    logits = torch.zeros(1, *cases[0].label.shape)
    logits[0, 3] = np.log(3)
    network = Says(torch.tensor([[0.25, -3.0, 0.5, 7.0]]), logits)
    (score,) = method.score(network, cases[:1], FP32)
    assert score.quality == pytest.approx(0.25)
    assert score.regions == pytest.approx({"rim": 0.0, "core": 0.5, "whole": 1.0})
    assert score.error_map is not None
    assert score.error_map[3, 0, 0] == pytest.approx(0.75)
    assert score.error_map[4, 0, 0] == pytest.approx(0.5)


def test_no_case_is_read_before_its_batch(method: QCResUNetMethod, cases: list[Case]) -> None:
    read = []

    def reading() -> Iterator[Case]:
        for case in cases:
            read.append(case.id)
            yield case

    scores = method.score(method.build(0), reading(), FP32, batch_size=2)
    next(scores)
    assert len(read) == 2
    assert len(list(scores)) == 4
    assert list(method.score(method.build(0), [], FP32)) == []


def test_no_bf16_training_where_the_deepest_layer_is_two_voxels_thin(task: Task, cases: list[Case]) -> None:
    # 16 voxels through a stride of 8: docs/decisions/0009.
    method = QCResUNetMethod(task, QCConfig())
    bf16, weights = method.build(0), trained(method, cases)

    method.train_round(bf16, cases, PLAN, Compute(torch.device("cpu"), torch.bfloat16))

    assert same(bf16, weights)


def test_unknown_kinds_to_leave_out_are_refused(task: Task) -> None:
    with pytest.raises(
        ConfigError, match=r"qc\.leave_out names shfit; kinds of label error are untouched, seggen"
    ):
        QCResUNetMethod(task, QCConfig(leave_out=("shfit",)))
