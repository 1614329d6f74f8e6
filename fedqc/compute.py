"""Where and how precisely to compute: one place decides, everything else is told."""

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from fedqc.errors import ConfigError, DeviceError
from fedqc.networks.layers import InstanceNorm3d

SHORTEST_BF16_AXIS = 3
"""Voxels of a network's deepest layer from which training in bf16 is safe on a CPU (docs/decisions/0009)."""

VOXELS_AT_ONCE = 2**20
"""Voxels that are judged or segmented at a time, unless a single case has more."""

_GIB = 2**30
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
"""Parameters of glibc's `mallopt`."""
_TOO_LITTLE = (
    "the GPU's memory is too small for one case at a time; use another one or the CPU ([compute] device), "
    "end what else uses it, or raise [compute] memory"
)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Compute:
    """A device and the precision of the network's inner arithmetic."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision while a network runs; nothing in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network to the device, in the memory layout its convolutions like there, and keep it."""
        if self.device.type == "cpu":
            for module in network.modules():
                if type(module) is nn.InstanceNorm3d:
                    module.__class__ = InstanceNorm3d  # the same parameters under the same names
        is_flat = any(weight.dim() == 4 for weight in network.parameters())
        layout = torch.channels_last if is_flat else torch.channels_last_3d
        # torch's hints do not know the argument.
        return network.to(self.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]

    def for_training(self, shortest_axis: int) -> "Compute":
        """The same, but in fp32 where the weight gradients of bf16 are wrong.

        Args:
            shortest_axis: Voxels along the shortest axis of the network's deepest layer.
        """
        if self.device.type == "cpu" and shortest_axis < SHORTEST_BF16_AXIS:
            return replace(self, dtype=torch.float32)
        return self


def choose_compute(device: str = "auto", precision: str = "auto", memory: float | None = None) -> Compute:
    """The fastest device at hand, with bf16 where its hardware computes in it.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto`, `fp32` or `bf16`.
        memory: the most that this process may take of a GPU's, in GiB; None: all of it.

    Raises:
        ConfigError: a CUDA device is asked for that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(
            f"device {device!r}: this machine has {found} CUDA devices; use device = 'auto' or 'cpu'"
        )
    if memory is not None and chosen.type == "cuda":
        total = torch.cuda.get_device_properties(chosen).total_memory
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory * _GIB / total), index)
    if chosen.type == "cpu":
        _keep_freed_memory(keep=True)
    if precision == "auto":
        precision = "bf16" if _has_bf16(chosen) else "fp32"
    return Compute(chosen, torch.bfloat16 if precision == "bf16" else torch.float32)


def _keep_freed_memory(*, keep: bool) -> None:
    """Have the C library keep memory that is freed for what is asked for next, or as it does of itself.

    Of itself it hands arrays of over 32 MB back to the system, which fills each new one with zeros, page by
    page: a third of the time that a volume of 160x192x160 took (docs/decisions/0019). Other C libraries than
    glibc have no such switch.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):
        return
    settings = (
        {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26}
        if keep
        else {_M_MMAP_MAX: 2**16, _M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: 2**26, _M_TOP_PAD: 2**17}
    )
    for name, value in settings.items():
        library.mallopt(name, value)
    if not keep:
        library.malloc_trim(0)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """PyTorch's own generators, from which first weights and dropout are drawn, begin at `seed`.

    Behind it they go on as before: those of the CPU, and of `device` where that is a GPU.
    """
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Numbers below the least exponent of fp32 count as zero in this thread and those that it starts.

    Where a loss is small, gradients are full of them, and the backward pass took six times as long
    (docs/decisions/0019). Nothing else in the process should lose them: headers of files hold any bits.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def freed_memory_returned(compute: Compute) -> Iterator[None]:
    """For networks with feature maps so large that memory which is kept becomes more than there is."""
    if compute.device.type != "cpu":
        yield
        return
    _keep_freed_memory(keep=False)
    try:
        yield
    finally:
        _keep_freed_memory(keep=True)


def _has_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is done in hardware: emulated, it is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def cases_at_once(size: Sequence[int]) -> int:
    """How many cases of `X, Y, Z` voxels are judged or segmented at a time; one where they are large."""
    return max(1, VOXELS_AT_ONCE // math.prod(size))


def halved_when_full(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """Work on all items at once, or on halves of them where the GPU's memory is too small for that.

    Args:
        work: gives one result for each item, whichever others it is given.
        items: one or more.

    Raises:
        DeviceError: the memory is too small for a single item.
    """
    try:
        return list(work(items))
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise DeviceError(_TOO_LITTLE) from None
    torch.cuda.empty_cache()  # behind the handler, whose traceback holds on to what did not fit
    middle = len(items) // 2
    return halved_when_full(work, items[:middle]) + halved_when_full(work, items[middle:])


def with_smaller_batches(
    attempt: Callable[[int], R], batch_size: int, say: Callable[[str], None] | None = None
) -> R:
    """Train with batches of this size, or of half of it, and so on, where the GPU's memory is too small.

    Args:
        attempt: trains from the beginning with batches of the size it is given.
        batch_size: the first.
        say: is told of every smaller one.

    Raises:
        DeviceError: the memory is too small for a single sample.
    """
    while True:
        try:
            return attempt(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise DeviceError(_TOO_LITTLE) from None
        torch.cuda.empty_cache()
        batch_size //= 2
        if say is not None:
            say(f"the GPU's memory is too small; trains with batches of {batch_size} instead")
