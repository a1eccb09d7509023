"""What makers say of a few devices: peak rates of dense arithmetic and of memory, from public datasheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Datasheet:
    """Peak FLOP/s by dtype, without sparsity (float32 without TF32), bytes/s of memory, and where they are stated."""

    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    source: str


def _sheet(half: float, single: float, memory_gb_s: float, source: str, bfloat: bool = True) -> Datasheet:
    """Return a datasheet from TFLOP/s and GB/s."""
    rates = {"bfloat16": half * 1e12} if bfloat else {}
    every = {**rates, "float16": half * 1e12, "float32": single * 1e12}
    return Datasheet(MappingProxyType(every), memory_gb_s * 1e9, source)


DATASHEETS: Mapping[str, Datasheet] = {
    "nvidia h100 80gb hbm3": _sheet(989.4, 66.9, 3350, "NVIDIA H100 datasheet, SXM"),
    "nvidia h100 pcie": _sheet(756, 51, 2000, "NVIDIA H100 datasheet, PCIe"),
    "nvidia h200": _sheet(989.4, 66.9, 4800, "NVIDIA H200 datasheet, SXM"),
    "nvidia a100-sxm4-80gb": _sheet(312, 19.5, 2039, "NVIDIA A100 datasheet, 80 GB SXM"),
    "nvidia a100 80gb pcie": _sheet(312, 19.5, 1935, "NVIDIA A100 datasheet, 80 GB PCIe"),
    "nvidia a100-sxm4-40gb": _sheet(312, 19.5, 1555, "NVIDIA A100 datasheet, 40 GB"),
    "nvidia a100-pcie-40gb": _sheet(312, 19.5, 1555, "NVIDIA A100 datasheet, 40 GB"),
    "nvidia l40s": _sheet(362.05, 91.6, 864, "NVIDIA L40S datasheet"),
    "nvidia l4": _sheet(121, 30.3, 300, "NVIDIA L4 datasheet"),
    "nvidia a10": _sheet(125, 31.2, 600, "NVIDIA A10 datasheet"),
    "tesla t4": _sheet(65, 8.1, 320, "NVIDIA T4 datasheet", bfloat=False),
    "tesla v100-sxm2-16gb": _sheet(125, 15.7, 900, "NVIDIA V100 datasheet, SXM2", bfloat=False),
    "tesla v100-sxm2-32gb": _sheet(125, 15.7, 900, "NVIDIA V100 datasheet, SXM2", bfloat=False),
    "nvidia geforce rtx 4090": _sheet(165.2, 82.6, 1008, "NVIDIA Ada architecture whitepaper, FP32 accumulation"),
    "nvidia geforce rtx 3090": _sheet(71, 35.6, 936, "NVIDIA GA102 architecture whitepaper, FP32 accumulation"),
    "amd instinct mi300x": _sheet(1307.4, 163.4, 5300, "AMD Instinct MI300X datasheet"),
}
"""By the device's name as torch gives it, in lower case."""


def datasheet(device_name: str) -> Datasheet | None:
    """Return the datasheet of a device by torch's name for it, None of one that is not known."""
    return DATASHEETS.get(device_name.strip().lower())
