import math
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedqc.compute import Compute
from fedqc.errors import ConfigError, TrainingError
from fedqc.training import TrainSettings, train

FP32 = Compute(torch.device("cpu"), torch.float32)
Pair = tuple[Tensor, Tensor]


class Weight(nn.Module):
    """One number to learn."""

    def __init__(self, value: float = 1.0, size: int = 1) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((size,), value))


def weight_times(factor: float, network: nn.Module) -> Tensor:
    assert isinstance(network, Weight)
    return network.w.sum() * factor


def slope(network: nn.Module, factor: float) -> Mapping[str, Tensor]:
    return {"slope": weight_times(factor, network)}


def constant_settings(**changes: float) -> TrainSettings:
    settings = TrainSettings(learning_rate=0.1, total_steps=10, schedule="constant", weight_decay=0.0)
    return TrainSettings(**(vars(settings) | changes))


# ------------------------------------------------------------------------------------------------ schedules


def test_cosine() -> None:
    settings = TrainSettings(learning_rate=1e-3, total_steps=100, schedule="cosine")
    rates = [settings.rate_at(step) for step in (0, 25, 50, 75, 100, 120)]
    expected = [1e-3, 1e-3 * (2 + math.sqrt(2)) / 4, 5e-4, 1e-3 * (2 - math.sqrt(2)) / 4, 0, 0]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_exponential_ends_at_a_hundredth_as_published() -> None:
    settings = TrainSettings(learning_rate=1e-4, total_steps=200, schedule="exponential")
    rates = [settings.rate_at(step) for step in (0, 50, 100, 200, 300)]
    assert rates == pytest.approx([1e-4, 1e-4 / math.sqrt(10), 1e-5, 1e-6, 1e-6])


def test_warm_up_rises_to_the_schedule() -> None:
    settings = TrainSettings(learning_rate=1.0, total_steps=100, schedule="constant", warmup_steps=5)
    assert [settings.rate_at(step) for step in (0, 1, 3, 4, 5, 99)] == pytest.approx([0.2, 0.4, 0.8, 1, 1, 1])
    cosine = TrainSettings(learning_rate=1.0, total_steps=100, schedule="cosine", warmup_steps=100)
    assert cosine.rate_at(50) == pytest.approx(0.5 * 51 / 100)


def test_the_rate_of_a_step_is_used_in_that_step() -> None:
    # The first step of Adam is the learning rate, against the sign of the gradient.
    for first_step, expected in ((0, 0.1), (5, 0.05)):
        network = Weight()
        settings = TrainSettings(
            learning_rate=0.1, total_steps=10, first_step=first_step, schedule="cosine", weight_decay=0.0
        )
        train(network, [1.0], slope, settings, FP32)
        assert network.w.item() == pytest.approx(1 - expected, abs=1e-5)


# ---------------------------------------------------------------------------------------------- one network


def test_a_line_is_learned() -> None:
    draw = torch.Generator().manual_seed(0)
    points = torch.rand(300, 16, 1, generator=draw)
    batches = [(x, 2 * x - 1) for x in points]
    torch.manual_seed(0)
    network = nn.Linear(1, 1)

    def losses(network: nn.Module, batch: Pair) -> Mapping[str, Tensor]:
        return {"error": nn.functional.mse_loss(network(batch[0]), batch[1])}

    settings = TrainSettings(learning_rate=0.05, total_steps=300, weight_decay=0.0)
    means = train(network, batches, losses, settings, FP32)
    assert network.weight.item() == pytest.approx(2, abs=0.01)
    assert network.bias.item() == pytest.approx(-1, abs=0.01)
    assert means["loss"] == means["error"] > losses(network, batches[0])["error"].item()


def test_the_parts_of_the_loss_are_averaged_over_the_steps() -> None:
    def losses(network: nn.Module, value: float) -> Mapping[str, Tensor]:
        zero = weight_times(0.0, network)
        return {"quality": zero + value, "error": zero + 2 * value**2}

    means = train(Weight(), [1.0, 2.0, 6.0], losses, constant_settings(), FP32)
    assert means == pytest.approx({"quality": 3.0, "error": 2 * 41 / 3, "loss": 3.0 + 2 * 41 / 3})


def test_all_parts_are_minimised() -> None:
    def losses(network: nn.Module, _: float) -> Mapping[str, Tensor]:
        return {"up": weight_times(-3.0, network), "down": weight_times(1.0, network)}

    network = Weight()
    train(network, [0.0], losses, constant_settings(), FP32)
    assert network.w.item() == pytest.approx(1.1, abs=1e-5)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    network = Weight(size=4)
    train(network, [100.0], slope, constant_settings(clip_norm=0.5), FP32)
    assert network.w.grad is not None
    assert network.w.grad.tolist() == pytest.approx([0.25] * 4)  # norm 0.5 of 4 equal parts
    train(network, [0.01], slope, constant_settings(clip_norm=0.5), FP32)
    assert network.w.grad.tolist() == pytest.approx([0.01] * 4)  # a small one is left alone


def test_weight_decay_of_both_optimisers() -> None:
    decoupled = Weight(2.0)
    train(decoupled, [0.0], slope, constant_settings(weight_decay=0.5), FP32)
    assert decoupled.w.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))
    coupled = Weight(2.0)
    adam = TrainSettings(0.1, 10, optimizer="adam", weight_decay=0.5, schedule="constant")
    train(coupled, [0.0], slope, adam, FP32)
    assert coupled.w.item() == pytest.approx(2.0 - 0.1, abs=1e-5)  # a gradient like any other


def test_the_network_is_trained_in_training_mode_and_gradients_do_not_pile_up() -> None:
    network = Weight().eval()
    modes = []

    def losses(network: nn.Module, factor: float) -> Mapping[str, Tensor]:
        modes.append(network.training)
        return slope(network, factor)

    train(network, [0.1, 0.2, 0.3], losses, constant_settings(), FP32)
    assert modes == [True] * 3
    assert network.w.grad is not None
    assert network.w.grad.item() == pytest.approx(0.3)


def test_the_loss_is_computed_under_autocast_and_summed_in_fp32() -> None:
    seen = []

    def losses(network: nn.Module, x: Tensor) -> Mapping[str, Tensor]:
        y = network(x).mean()
        seen.append(y.dtype)
        return {"y": y, "large": y * 0 + 4096.0, "small": y * 0 + 1.0}

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        means = train(
            nn.Linear(4, 1), [torch.zeros(2, 4)], losses, constant_settings(), Compute(FP32.device, dtype)
        )
        assert means["loss"] == pytest.approx(4097 + means["y"], abs=0.01)  # bf16 would lose the 1
    assert seen == [torch.float32, torch.bfloat16]


# ------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_batch_and_part_and_is_not_learned_from(value: float) -> None:
    def losses(network: nn.Module, factor: float) -> Mapping[str, Tensor]:
        zero = weight_times(0.0, network)
        return {"quality": weight_times(1.0, network), "error": zero + factor}

    network = Weight()
    settings = constant_settings(first_step=20, total_steps=40)
    with pytest.raises(TrainingError, match=rf"batch 3 \(step 23 of 40\).*quality 0\.\d+, error {value}"):
        train(network, [1.0, 1.0, value, 1.0], losses, settings, FP32)
    assert network.w.item() == pytest.approx(0.8, abs=1e-4)  # two steps were made


def test_progress_counts_over_all_rounds() -> None:
    told: list[tuple[int, int]] = []
    settings = constant_settings(first_step=4, total_steps=9)
    train(Weight(), [1.0, 1.0, 1.0], slope, settings, FP32, lambda done, of: told.append((done, of)))
    assert told == [(5, 9), (6, 9), (7, 9)]


def test_no_batch() -> None:
    network = Weight()
    assert train(network, [], slope, constant_settings(), FP32) == {}
    assert network.w.item() == 1


@pytest.mark.parametrize(("mu", "end"), [(0.0, 5.0), (1.0, 3.0), (3.0, 2.0)])
def test_fedprox_holds_the_network_to_its_start(mu: float, end: float) -> None:
    """(w - 5)^2 / 2 + mu / 2 (w - 1)^2 is least at (5 + mu) / (1 + mu)."""
    network = Weight(1.0, size=2)

    def fit(trained: nn.Module, _: float) -> Mapping[str, Tensor]:
        assert isinstance(trained, Weight)
        return {"fit": (trained.w - 5).square().sum() / 2}

    settings = constant_settings(learning_rate=0.05, total_steps=400, proximal=mu)
    told = train(network, [0.0] * 400, fit, settings, FP32)
    assert network.w.tolist() == pytest.approx([end, end], abs=1e-3)
    assert ("proximal" in told) == (mu > 0)
    assert told["loss"] == pytest.approx(told["fit"] + told.get("proximal", 0.0))


# ----------------------------------------------------------------------------------------------- denormals


def test_numbers_below_the_least_exponent_are_zero_in_training_only() -> None:
    tiny, seen = torch.full((8,), 1e-40), []

    def losses(network: nn.Module, factor: float) -> Mapping[str, Tensor]:
        seen.append(torch.count_nonzero(tiny * 1.0).item())
        return slope(network, factor)

    train(Weight(), [1.0, 1.0], losses, constant_settings(), FP32)
    assert seen == [0, 0]
    assert torch.count_nonzero(tiny * 1.0).item() == 8


def test_sgd_with_the_published_momentum() -> None:
    network = Weight(1.0)
    settings = constant_settings(clip_norm=100.0)
    train(network, [1.0, 1.0], slope, replace(settings, optimizer="sgd"), FP32)
    # Steps of 0.1 and of 0.1 + 0.95 * 0.1 along a slope of 1.
    assert network.w.item() == pytest.approx(1 - 0.1 - 0.195)


def test_ranger21_learns_a_line() -> None:
    pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(64, 3)
    target = x.sum(dim=1, keepdim=True)

    def losses(network: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"mse": nn.functional.mse_loss(network(batch), target)}

    before = losses(network, x)["mse"].item()
    settings = TrainSettings(learning_rate=0.02, total_steps=150, optimizer="ranger21", weight_decay=1e-4)
    train(network, [x] * 150, losses, settings, FP32)
    assert losses(network, x)["mse"].item() < before / 3


def test_ranger21_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(
        ConfigError, match=r"'ranger21' needs the package pytorch-optimizer; .*'fedqc\[dqe\]'"
    ):
        train(nn.Linear(1, 1), [], slope, TrainSettings(0.1, 1, optimizer="ranger21"), FP32)
