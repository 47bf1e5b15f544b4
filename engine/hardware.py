"""What GPUs can do, as their makers publish it: one table for plans and for the share of the peak that a run reports.

Rates are dense (without sparsity), in TFLOP/s; sizes in GB and bandwidths in GB/s of 10^9 bytes; a link's bandwidth is
that of one direction, of one GPU. Imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU and the machine it usually stands in."""

    key: str
    """What the command line calls it."""
    name: str
    """What the driver calls it."""
    memory_gb: float
    bf16_tflops: float
    """Matrix products in bf16."""
    tf32_tflops: float
    """Convolutions in fp32 as torch runs them by default."""
    fp32_tflops: float
    """Matrix products in fp32 as torch runs them by default: not on the matrix units."""
    bandwidth_gb_s: float
    """Its own memory."""
    node_link_gb_s: float
    """To the other GPUs of its machine."""
    network_gb_s: float
    """To other machines, where each GPU has an adapter of its own or its share of one."""
    host_link_gb_s: float
    """To the memory of its machine."""
    gpus_per_node: int
    watts: float


GPUS = {
    gpu.key: gpu
    for gpu in (
        Gpu("h200", "NVIDIA H200", 141, 989, 494, 67, 4800, 450, 50, 64, 8, 700),
        Gpu("h100", "NVIDIA H100 80GB HBM3", 80, 989, 494, 67, 3350, 450, 50, 64, 8, 700),
        Gpu("b200", "NVIDIA B200", 180, 2250, 1125, 75, 8000, 900, 50, 64, 8, 1000),
        Gpu("a100_80", "NVIDIA A100-SXM4-80GB", 80, 312, 156, 19.5, 2039, 300, 25, 32, 8, 400),
        Gpu("a100_40", "NVIDIA A100-SXM4-40GB", 40, 312, 156, 19.5, 1555, 300, 25, 32, 8, 400),
        Gpu("l40s", "NVIDIA L40S", 48, 362, 183, 91.6, 864, 32, 12.5, 32, 8, 350),
        Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 24, 165.2, 82.6, 82.6, 1008, 32, 0.625, 32, 2, 450),
    )
}
"""What the makers' documents say, by the command line's name.

    h100, h200   NVIDIA H100 and H200 Tensor Core GPU data sheets, SXM columns: memory, rates, watts; bf16 and tf32 are
                 with sparsity there, twice these. NVLink 900 GB/s and PCIe Gen5 128 GB/s are of both directions.
                 DGX H100 and H200 data sheets: 8 GPUs, 8 adapters of 400 Gb/s for them.
    a100_80, _40 NVIDIA A100 Tensor Core GPU data sheet, SXM columns: memory, rates without sparsity, watts; NVLink 600
                 GB/s and PCIe Gen4 64 GB/s are of both directions. DGX A100 data sheet: 8 GPUs, 8 adapters of 200 Gb/s.
    b200         NVIDIA DGX B200 data sheet, an eighth of the system's: 1,440 GB, 64 TB/s, NVLink 14.4 TB/s in both
                 directions, 8 adapters of 400 Gb/s. HGX B200 page, an eighth: bf16 36 and tf32 18 PFLOP/s with
                 sparsity, fp32 600 TFLOP/s; 1,000 W each. PCIe Gen5 as above.
    l40s         NVIDIA L40S data sheet: memory, rates without sparsity, watts; no NVLink, PCIe Gen4 x16.
    rtx4090      NVIDIA Ada GPU architecture whitepaper, appendix A: memory, dense rates with fp32 accumulation, watts;
                 no NVLink, PCIe Gen4 x16.

Assumed, for nobody publishes a machine of the last two: 8 L40S with 100 Gb/s each, 2 RTX 4090 that share 10 Gb/s.
"""
SAME_RATES = {"NVIDIA A100 80GB PCIe": "a100_80", "NVIDIA A100-PCIE-40GB": "a100_40"}
"""Drivers' names of other cards, with a GPU of the same rates: the PCIe columns of the A100's data sheet give them."""


def bf16_rate(device_name: str) -> float | None:
    """Published dense bf16 rate in FLOP/s of the GPU that a driver calls `device_name`; None when it is not known.

    The whole name counts: cards and parts of cards whose names begin alike, such as `NVIDIA H100 PCIe`,
    `NVIDIA H200 NVL`, `NVIDIA GB200` and `NVIDIA A100-SXM4-80GB MIG 1g.10gb`, have other rates.
    """
    keys = {gpu.name: gpu.key for gpu in GPUS.values()} | SAME_RATES
    return GPUS[keys[device_name]].bf16_tflops * 1e12 if device_name in keys else None
