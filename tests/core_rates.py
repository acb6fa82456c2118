"""Rates of a machine that estimates of time are tested with."""

from hcsmoe_hub.machine.rates import DeviceRates, DiskRates, Products, Rates

DISK = DiskRates(read=1e9, write=5e8)
# One core of a server.
CORE = Rates(
    device=DeviceRates(
        products=Products(float32=5.5e10, float64=3e10, bfloat16=5.5e10, tf32=5.5e10, few_rows=3e10),
        memory=1e10,
        launch_seconds=6e-6,
        to_device=float("inf"),
        to_host=float("inf"),
        host_memory=1e10,
    ),
    source_disk=DISK,
    output_disk=DISK,
)
