"""What the named devices can do, from the vendors' data sheets.

Dense bfloat16 with float32 accumulation and without sparsity; where a sheet gives only the figure with
sparsity, half of it. Memory is the marketed size; `USABLE` of it is left to a program.
"""

from dataclasses import dataclass

import jax

GIB = 2**30
USABLE = 0.92  # share of the memory that a program gets: XLA_PYTHON_CLIENT_MEM_FRACTION=.92


@dataclass(frozen=True)
class Device:
    """One accelerator. flops: FLOP/s. bandwidth, link: bytes/s of its memory, and to the next device."""

    flops: float
    bandwidth: float
    memory: int
    watts: float
    link: float
    source: str


# link: NVLink as the sheet gives it for one direction; PCIe x16 of the card's generation otherwise.
DEVICES: dict[str, Device] = {
    "rtx4090": Device(165.2e12, 1.008e12, 24 * GIB, 450, 25e9, "NVIDIA Ada GPU architecture, appendix A"),
    "rtx5090": Device(209.5e12, 1.792e12, 32 * GIB, 575, 50e9, "NVIDIA RTX Blackwell architecture, table 2"),
    "rtxpro6000": Device(503.8e12, 1.792e12, 96 * GIB, 600, 50e9, "NVIDIA RTX PRO 6000 data sheet"),
    "a100": Device(312e12, 2.039e12, 80 * GIB, 400, 300e9, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Device(989e12, 3.35e12, 80 * GIB, 700, 450e9, "NVIDIA H100 SXM data sheet"),
    "h200": Device(989e12, 4.8e12, 141 * 10**9, 700, 450e9, "NVIDIA H200 data sheet"),
    "b200": Device(2250e12, 8.0e12, 180 * 10**9, 1000, 900e9, "NVIDIA DGX B200 data sheet, per GPU"),
    # No sheet: two cores with AVX-512, for comparing plans and not for trusting them.
    "cpu": Device(0.15e12, 2e10, 16 * GIB, 65, 1e10, "assumed"),
}


def limit() -> int | None:
    """Bytes that this process may use on each device; None where the device does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None
