"""The one training loop, used for every network, alone or in a federation."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from fedqc.compute import Compute, denormals_as_zero
from fedqc.errors import ConfigError, TrainingError

SGD_MOMENTUM = 0.95
"""As in Kofler et al. 2022, 2."""

Batch = TypeVar("Batch")
Progress = Callable[[int, int], None]
"""Called with steps done and steps in all, both over all rounds."""


@dataclass(frozen=True)
class TrainSettings:
    """How a network is optimised; `total_steps` spans all rounds, so that a schedule goes on between them."""

    learning_rate: float
    total_steps: int
    first_step: int = 0
    optimizer: Literal["adam", "adamw", "sgd", "ranger21"] = "adamw"
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "exponential", "constant"] = "cosine"
    warmup_steps: int = 0
    clip_norm: float = 1.0
    """Largest L2 norm of the gradient."""
    proximal: float = 0.0
    """mu of FedProx's term, which is not there at 0."""

    def rate_at(self, step: int) -> float:
        """Learning rate of one step; `exponential` ends at a hundredth, as 1e-4 to 1e-6 in QCResUNet."""
        done = min(1.0, step / max(1, self.total_steps))
        factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "exponential": 0.01**done, "constant": 1.0}
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return float(self.learning_rate * warm * factor[self.schedule])


@denormals_as_zero()
def train(  # noqa: PLR0917 - what is trained, on what, how and where; the method calls it by position
    network: nn.Module,
    batches: Iterable[Batch],
    losses: Callable[[nn.Module, Batch], Mapping[str, Tensor]],
    settings: TrainSettings,
    compute: Compute,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train a network in place, one step a batch.

    Args:
        network: Already on the device of `compute`.
        batches: What the loss function takes, on the same device.
        losses: The parts of the loss by name, each a scalar; their sum is minimised. Called under autocast.
        settings: Optimiser and schedule.
        compute: Device and precision.
        progress: Told after every step.

    Returns:
        Mean of every part over the steps, and of their sum as `loss`.

    Raises:
        TrainingError: a loss is not finite; the message says which batch and part.
    """
    optimizer = _optimizer(network, settings)
    start = [weight.detach().clone() for weight in network.parameters()] if settings.proximal else []
    network.train()
    sums: dict[str, float] = {}
    count = 0
    for count, batch in enumerate(batches, start=1):
        step = settings.first_step + count - 1
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        with compute.autocast():
            parts = losses(network, batch)
        if settings.proximal:
            parts = {**parts, "proximal": _proximal(network, start, settings.proximal)}
        total = torch.stack([part.float() for part in parts.values()]).sum()
        values = {name: part.item() for name, part in parts.items()}
        if not math.isfinite(total.item()):
            found = ", ".join(f"{name} {value}" for name, value in values.items())
            raise TrainingError(
                f"the loss of batch {count} (step {step + 1} of {settings.total_steps}) is not finite: "
                f"{found}; lower the learning rate or compute in fp32"
            )
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]  # torch ships no hint for it
        norm = nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        if not math.isfinite(norm.item()):
            raise TrainingError(f"the gradient of batch {count} is not finite; lower the learning rate")
        optimizer.step()
        for name, value in (values | {"loss": total.item()}).items():
            sums[name] = sums.get(name, 0.0) + value
        if progress is not None:
            progress(step + 1, settings.total_steps)
    return {name: value / count for name, value in sums.items()}


def _optimizer(network: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """What takes the steps.

    Raises:
        ConfigError: the package of `ranger21` is not installed.
    """
    weights, rate, decay = network.parameters(), settings.learning_rate, settings.weight_decay
    match settings.optimizer:
        case "sgd":
            return torch.optim.SGD(weights, lr=rate, weight_decay=decay, momentum=SGD_MOMENTUM)
        case "ranger21":
            try:
                from pytorch_optimizer import Ranger21  # noqa: PLC0415 - only here, and takes seconds
            except ImportError:
                raise ConfigError(
                    "qc.optimizer 'ranger21' needs the package pytorch-optimizer; "
                    "install it with: pip install 'fedqc[dqe]'"
                ) from None
            # Its own warm-up and warm-down would begin anew in every round; the schedule spans all of them.
            ranger: torch.optim.Optimizer = Ranger21(
                weights,
                num_iterations=settings.total_steps,
                lr=rate,
                weight_decay=decay,
                disable_lr_scheduler=True,
            )
            return ranger
        case kind:
            # eps is far above the rounding noise of gradients: with 1e-8 Adam would make full steps of noise.
            adam = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
            return adam(weights, lr=rate, weight_decay=decay, eps=1e-6)


def _proximal(network: nn.Module, start: Sequence[Tensor], mu: float) -> Tensor:
    """How far the weights have gone from where they started (Li et al. 2020, FedProx, eq. 2)."""
    moved = [
        (weight - begin).square().sum() for weight, begin in zip(network.parameters(), start, strict=True)
    ]
    return mu / 2 * torch.stack(moved).sum()
