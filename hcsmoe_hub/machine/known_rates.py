"""Rates of a machine that is not at hand, from its maker's data sheet; none of them was measured here."""

from hcsmoe_hub.machine.rates import DeviceRates, DiskRates, Products, Rates

# What programs reach of the rates in data sheets.
SUSTAINED = 0.6

# H100 SXM: 989 TFLOP/s in bfloat16 without sparsity, 495 in TF32, 67 in float32 and in float64 with tensor cores,
# 3.35 TB/s of memory, 64 GB/s each way on PCIe 5.0. 32 rows are limited by the memory: 64 operations per 2 bytes.
# The host has eight channels of DDR5-4800, 307 GB/s.
H100_DEVICE = DeviceRates(
    products=Products(
        float32=67e12 * SUSTAINED,
        float64=67e12 * SUSTAINED,
        bfloat16=989e12 * SUSTAINED,
        tf32=495e12 * SUSTAINED,
        few_rows=32 * 3.35e12 * SUSTAINED,
    ),
    memory=3.35e12 * SUSTAINED,
    launch_seconds=5e-6,
    to_device=64e9 * SUSTAINED,
    to_host=64e9 * SUSTAINED,
    host_memory=307e9 * SUSTAINED,
)
# An SSD on four lanes of PCIe 4.0.
SSD = DiskRates(read=7e9 * SUSTAINED, write=5e9 * SUSTAINED)
H100 = Rates(device=H100_DEVICE, source_disk=SSD, output_disk=SSD)
