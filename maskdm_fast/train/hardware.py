"""How fast machines are: data sheets of named GPUs, and a quick probe of the one at hand."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maskdm_fast import ops
from maskdm_fast.models import UViTConfig
from maskdm_fast.ops import backend
from maskdm_fast.ops.work import Work

PRODUCT_SHARE = 0.62
"""Share of a GPU's peak that matrix products of these widths (384 to 1152) reach: an assumption, not measured here."""
BANDWIDTH_SHARE = 0.85
"""Share of a GPU's bandwidth that kernels reach which stream through memory: an assumption, not measured here."""
LAUNCH_SECONDS = 4.5e-6
"""Until eager PyTorch has launched one kernel: 4 to 5 us. 1,300 launches took 5.2 ms beside an H100 in
github.com/deepspeedai/DeepSpeed/pull/8271."""


@dataclass(frozen=True)
class Hardware:
    """What a machine does.

    Attributes:
        title: for people.
        peaks: FLOP/s of dense matrix products by precision: bf16, fp16, tf32, fp32.
        bandwidth: bytes of memory per second.
        memory: its bytes; None where it was not asked for.
        launch: seconds until one operator is launched.
        product_share, bandwidth_share: share of peak and bandwidth that is reached; 1 where both were measured.
        asynchronous: whether the host launches ahead while the device works; else the times add up.
        device_names: names under which PyTorch knows it.
        source: where the numbers are from.
    """

    title: str
    peaks: Mapping[str, float]
    bandwidth: float
    memory: float | None = None
    launch: float = LAUNCH_SECONDS
    product_share: float = PRODUCT_SHARE
    bandwidth_share: float = BANDWIDTH_SHARE
    asynchronous: bool = True
    device_names: tuple[str, ...] = ()
    source: str = ""

    @property
    def is_named(self) -> bool:
        """Whether its peak is stated by its maker; else its rates were measured."""
        return bool(self.device_names)

    def compute_seconds(self, work: Work, precision: str) -> float:
        """Of the products alone."""
        return work.flops / (self.peaks[precision] * self.product_share)

    def memory_seconds(self, work: Work) -> float:
        """Of the traffic alone."""
        return work.bytes / (self.bandwidth * self.bandwidth_share)


HARDWARE: dict[str, Hardware] = {
    "a100": Hardware(
        title="A100 80GB SXM",
        peaks={"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
        bandwidth=2.039e12,
        memory=80e9,
        device_names=("NVIDIA A100-SXM4-80GB",),
        source="NVIDIA A100 data sheet (nvidia.com/en-us/data-center/a100): 312, 156 and 19.5 TFLOPS, 2,039 GB/s, 80GB",
    ),
    "h100": Hardware(
        title="H100 SXM",
        peaks={"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12},
        bandwidth=3.35e12,
        memory=80e9,
        device_names=("NVIDIA H100 80GB HBM3",),
        source="NVIDIA H100 data sheet (nvidia.com/en-us/data-center/h100): 1,979 and 989 TFLOPS with sparsity, half "
        "of it dense; 67 TFLOPS, 3.35 TB/s, 80GB",
    ),
    "h200": Hardware(
        title="H200 SXM",
        peaks={"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12},
        bandwidth=4.8e12,
        memory=141e9,
        device_names=("NVIDIA H200",),
        source="NVIDIA H200 data sheet (nvidia.com/en-us/data-center/h200): as H100, 4.8 TB/s, 141GB",
    ),
    "b200": Hardware(
        title="B200 SXM",
        peaks={"bf16": 2250e12, "fp16": 2250e12, "tf32": 1100e12, "fp32": 75e12},
        bandwidth=7.7e12,
        memory=180e9,
        device_names=("NVIDIA B200",),
        source="NVIDIA Blackwell data sheet, HGX B200 per GPU (nvidia.com/en-us/data-center/hgx): 4.5 and 2.2 PFLOPS "
        "with sparsity, half of it dense; 75 TFLOPS, 7.7 TB/s; 1,440GB for the eight of a DGX B200",
    ),
}
"""GPUs by the names that ``--hardware`` takes. Memory in decimal gigabytes: PyTorch finds a few percent more."""

HERE = "here"
"""The name of the machine at hand, which is measured."""
NAMES = (*HARDWARE, HERE)


def find_hardware(device: torch.device) -> Hardware | None:
    """The entry of `HARDWARE` for a device; None for the CPU and for GPUs whose peak is not in it."""
    if device.type != "cuda":
        return None
    name = backend.devices()["cuda"][device.index or 0]
    return next((hardware for hardware in HARDWARE.values() if name in hardware.device_names), None)


def stated_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s that MFU is the share of; None where nobody stated them.

    Under fp32 it is the peak of TF32 if PyTorch was told to multiply in it (`torch.set_float32_matmul_precision`).
    """
    hardware = find_hardware(device)
    if hardware is None:
        return None
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    return hardware.peaks[precision]


def probe(model: UViTConfig, tokens: int, precision: str, device: torch.device) -> Hardware:
    """Measure the machine at hand for about a second: a product of the network's MLP with this many rows, a copy of 64
    MiB, and an addition of two numbers.

    Args:
        model: its widths count.
        tokens: rows of the product, kept within 64 and 4096.
        precision: bf16, fp16 or fp32; tf32 is fp32 where PyTorch was told to use it.
        device: where.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    x = torch.full((max(64, min(tokens, 4096)), model.dim), 0.5, dtype=dtype, device=device)
    weight = torch.full((4 * model.dim, model.dim), 0.5, dtype=dtype, device=device)
    source = torch.zeros(1 << 24, device=device)
    target, one = torch.zeros_like(source), torch.zeros(1, device=device)
    product = _seconds(lambda: ops.linear(x, weight))
    copy = _seconds(lambda: target.copy_(source))
    return Hardware(
        title=str(device),
        peaks={precision: 2 * x.numel() * 4 * model.dim / product},
        bandwidth=2 * source.nbytes / copy,
        launch=_seconds(lambda: one + one, budget=0.05),
        product_share=1.0,
        bandwidth_share=1.0,
        asynchronous=device.type == "cuda",
        source="measured now",
    )


def _seconds(work: Callable[[], Tensor], budget: float = 0.3) -> float:
    """Median time of one call over ten groups that together take about `budget` seconds; reading a value waits."""
    work().flatten()[0].item()
    start = time.perf_counter()
    work().flatten()[0].item()
    repeats = max(1, int(budget / 10 / max(time.perf_counter() - start, 1e-6)))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(repeats):
            out = work()
        out.flatten()[0].item()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)
