import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedqc.compute import Compute, choose_compute, halved_when_full, with_smaller_batches
from fedqc.errors import ConfigError, DeviceError

CPU = torch.device("cpu")


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"neon": True}, torch.float32),
    ],
)
def test_auto_takes_bf16_only_where_the_cpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert choose_compute() == Compute(CPU, dtype)
    assert choose_compute(precision="fp32") == Compute(CPU, torch.float32)
    assert choose_compute(precision="bf16") == Compute(CPU, torch.bfloat16)


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for is_supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, answer=is_supported: answer
        )
        assert choose_compute() == Compute(torch.device("cuda"), dtype)
    assert choose_compute("cuda:1", "fp32").device == torch.device("cuda:1")
    assert choose_compute("cpu", "fp32").device == CPU
    with pytest.raises(ConfigError, match=r"'cuda:2'.* 2 CUDA devices"):
        choose_compute("cuda:2")


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{device}'.* 0 CUDA devices; use device = 'auto' or 'cpu'"):
        choose_compute(device)


def test_autocast_computes_in_the_chosen_precision() -> None:
    layer, x = nn.Linear(4, 4), torch.zeros(1, 4)
    with Compute(CPU, torch.float32).autocast():
        assert layer(x).dtype == torch.float32
    with Compute(CPU, torch.bfloat16).autocast():
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_place_lays_weights_out_for_3d_convolutions_and_changes_no_value() -> None:
    layer = nn.Conv3d(2, 3, 3)
    before = layer.weight.detach().clone()
    placed = Compute(CPU, torch.float32).place(layer)
    weight = next(placed.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not weight.is_contiguous()
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("device", "shortest_axis", "dtype"),
    [("cpu", 2, torch.float32), ("cpu", 3, torch.bfloat16), ("cuda", 2, torch.bfloat16)],
)
def test_bf16_trains_only_where_its_gradients_are_right(
    device: str, shortest_axis: int, dtype: torch.dtype
) -> None:
    compute = Compute(torch.device(device), torch.bfloat16)
    assert compute.for_training(shortest_axis) == Compute(torch.device(device), dtype)


class SmallDevice:
    """Has memory for so many items at once."""

    def __init__(self, items: int) -> None:
        self.items = items
        self.asked: list[int] = []

    def take(self, count: int) -> None:
        self.asked.append(count)
        if count > self.items:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def double(self, items: Sequence[int]) -> list[int]:
        self.take(len(items))
        return [2 * item for item in items]


@pytest.mark.parametrize("memory", range(1, 9))
def test_what_does_not_fit_at_once_is_done_in_halves(memory: int) -> None:
    device = SmallDevice(memory)
    assert halved_when_full(device.double, range(7)) == [0, 2, 4, 6, 8, 10, 12]
    assert device.asked[0] == 7
    assert sum(count for count in device.asked if count <= memory) == 7


def test_what_never_fits_is_said_so() -> None:
    with pytest.raises(DeviceError, match="too small for one case"):
        halved_when_full(SmallDevice(0).double, [1, 2])
    with pytest.raises(DeviceError, match=r"\[compute\] memory"):
        with_smaller_batches(SmallDevice(0).take, 8)


def test_training_begins_anew_with_smaller_batches() -> None:
    device, said = SmallDevice(2), list[str]()

    def attempt(batch_size: int) -> int:
        device.take(batch_size)
        return batch_size

    assert with_smaller_batches(attempt, 9, said.append) == 2
    assert device.asked == [9, 4, 2]
    assert [line.split()[-2] for line in said] == ["4", "2"]


def test_other_errors_are_not_taken_for_a_full_gpu() -> None:
    def fail(_: object) -> list[int]:
        raise ValueError("another matter")

    with pytest.raises(ValueError, match="another matter"):
        halved_when_full(fail, [1, 2])
    with pytest.raises(ValueError, match="another matter"):
        with_smaller_batches(fail, 4)


def test_a_gpu_is_shared_with_others_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=40 * 2**30)
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *bound: bounds.append(bound))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    choose_compute("cuda", "fp32", 10)  # torch takes no device without a number here
    choose_compute("cuda:0", "fp32", 100)
    choose_compute("cuda", "fp32")
    choose_compute("cpu", "fp32", 10)
    assert bounds == [(0.25, 0), (1.0, 0)]


DENORMALS = """
import torch
from fedqc.compute import denormals_as_zero
torch.set_num_threads(1)
x = torch.full((64,), 1e-40)
with denormals_as_zero():
    print(torch.count_nonzero(x * 1.0).item())
print(torch.count_nonzero(x * 1.0).item())
"""


def test_numbers_below_the_least_exponent_are_zero_for_a_while() -> None:
    assert subprocess.check_output([sys.executable, "-c", DENORMALS], text=True) == "0\n64\n"


FAULTS = """
import contextlib, resource, sys, torch
from fedqc.compute import choose_compute, freed_memory_returned
torch.set_num_threads(1)
compute, context = choose_compute("cpu"), contextlib.ExitStack()
if sys.argv[1] == "returned":
    context.enter_context(freed_memory_returned(compute))
if sys.argv[1] == "returned, then kept":
    with freed_memory_returned(compute):
        pass
for round in range(30):
    if round == 20:  # by then the heap has its shape
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    a = torch.ones(2**24)  # 64 MB
    del a
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such switch")
@pytest.mark.parametrize(
    ("how", "is_kept"), [("kept", True), ("returned", False), ("returned, then kept", True)]
)
def test_memory_that_is_freed_is_used_again_unless_it_is_returned(how: str, is_kept: bool) -> None:
    """Each page that the system gives anew is a fault: 163,840 of 4 KiB where it keeps nothing."""
    faults = int(subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True))
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().startswith("[always]") and not is_kept:
        pytest.skip("this system gives pages of 2 MiB")
    assert (faults < 40_000) == is_kept
