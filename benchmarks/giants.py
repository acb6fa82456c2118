"""What DeepSeek-V3 and a checkpoint of a trillion parameters need: time, memory, disk, and which resource binds.

Run: python benchmarks/giants.py [--json FILE] [--measured]

Plans come from the planner of ``hcsmoe convert`` on the published configs, and times from its estimate with the rates
of machines that are not at hand: those of their data sheets, of which programs are assumed to reach 60 %.
``--measured`` adds the machine that this runs on, with its measured rates. No weight is read, nothing is downloaded.
"""

import argparse
import itertools
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from giant_headers import GIANTS, write_giant

from hcsmoe_hub import ConvertOptions, MethodOptions, Preset
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.machine.device import compute_dtype
from hcsmoe_hub.machine.known_rates import H100, SSD, SUSTAINED
from hcsmoe_hub.machine.memory import available_memory
from hcsmoe_hub.machine.rates import DeviceRates, DiskRates, Products, Rates, machine_rates
from hcsmoe_hub.machine.units import format_bytes, format_seconds
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.duration import plan_duration
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.planning.make import open_model, plan_model

PRESETS = (Preset.REAP, Preset.HC_SMOE, Preset.HC_REFIT)
CARDS = 8
# Two channels of DDR5-5600, and eight cores at 4.5 GHz with AVX2: 32 operations in float32 per cycle.
_DESKTOP_MEMORY, _DESKTOP_FLOPS = 90e9, 8 * 4.5e9 * 32
_INFINITE = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine that a conversion is planned for.

    Attributes:
        rates: How fast it is.
        memory: Bytes of memory.
        device_memory: Bytes of each accelerator; 0 without one.
        processes: How many share a conversion: one for each accelerator.
        compute: Dtype in which it multiplies bfloat16 weights.
        comes_from: Where the rates are from.
    """

    rates: Rates
    memory: int
    device_memory: int
    compute: torch.dtype
    comes_from: str
    processes: int = 1


def together(device: DeviceRates, cards: int) -> DeviceRates:
    """The rates of several accelerators whose work divides evenly; they share the processors of the host."""
    products = device.products
    return replace(
        device,
        products=Products(
            float32=products.float32 * cards,
            float64=products.float64 * cards,
            bfloat16=products.bfloat16 * cards,
            tf32=products.tf32 * cards,
            few_rows=products.few_rows * cards,
        ),
        memory=device.memory * cards,
        launch_seconds=device.launch_seconds / cards,
        to_device=device.to_device * cards,
        to_host=device.to_host * cards,
    )


def desktop() -> DeviceRates:
    """A desktop computer without a GPU, by the data sheets of its processor and memory."""
    rate = _DESKTOP_FLOPS * SUSTAINED
    memory = _DESKTOP_MEMORY * SUSTAINED
    return DeviceRates(
        # 32 rows of float32: 64 operations per 4 bytes.
        products=Products(float32=rate, float64=rate / 2, bfloat16=rate, tf32=rate, few_rows=min(rate, 16 * memory)),
        memory=memory,
        launch_seconds=3e-6,
        to_device=_INFINITE,
        to_host=_INFINITE,
        host_memory=memory,
    )


def machines() -> dict[str, Machine]:
    """The machines of the page, by name."""
    striped = DiskRates(read=4 * SSD.read, write=4 * SSD.write)
    node = Rates(device=together(H100.device, CARDS), source_disk=striped, output_disk=striped)
    common = {"compute": torch.bfloat16, "device_memory": 80_000_000_000, "comes_from": "data sheet"}
    return {
        "one H100": Machine(rates=H100, memory=256_000_000_000, **common),
        f"{CARDS} H100": Machine(rates=node, memory=2_000_000_000_000, processes=CARDS, **common),
        "desktop": Machine(
            rates=Rates(device=desktop(), source_disk=SSD, output_disk=SSD),
            memory=64_000_000_000,
            device_memory=0,
            compute=torch.float32,
            comes_from="data sheet",
        ),
    }


def this_machine() -> Machine:
    """The machine that this runs on, its processor alone."""
    device = torch.device("cpu")
    place = Path(tempfile.gettempdir())
    return Machine(
        rates=machine_rates(device, source=place, output=place),
        memory=available_memory(),
        device_memory=0,
        compute=compute_dtype(device),
        comes_from="measured here",
    )


def opened(source: Path, machine: Machine) -> SourceModel:
    """A checkpoint as a machine computes it: config and headers alone."""
    options = ConvertOptions(experts=1, device="cpu", output=Path("result"))
    is_on_device = bool(machine.device_memory)
    return open_model(open_source(str(source)), options, on_device=is_on_device, compute=machine.compute)


def planned(model: SourceModel, experts: int, preset: Preset, machine: Machine) -> ConversionPlan:
    """A conversion to so many experts, with the calibration text that ``convert`` uses by default."""
    options = ConvertOptions(experts=experts, method=MethodOptions(preset=preset), device="cpu", output=Path("result"))
    return plan_model(model, options, device_room=machine.device_memory or None)


def needed(plan: ConversionPlan, machine: Machine) -> dict[str, Any]:
    """What a plan needs on a machine, as JSON holds it."""
    needs, duration = estimate_needs(plan), plan_duration(plan, machine.rates)
    memory = machine.processes * needs.memory_bytes
    return {
        "duration": duration.as_dict(),
        "memory_bytes": needs.memory_bytes,
        "device_bytes": needs.device_bytes,
        "disk_bytes": needs.disk_bytes,
        "flops": needs.flops,
        "fits": memory <= machine.memory and needs.device_bytes <= machine.device_memory,
    }


def row(model: str, name: str, preset: Preset, found: dict[str, Any]) -> str:
    """One line of the table."""
    device = format_bytes(found["device_bytes"]) if found["device_bytes"] else ""
    duration = found["duration"]
    cells = [model, name, f"`{preset}`", format_seconds(duration["seconds"]), duration["binds"]]
    cells += [format_bytes(found["memory_bytes"]), device, format_bytes(found["disk_bytes"])]
    return f"| {' | '.join([*cells, 'yes' if found['fits'] else 'no'])} |"


def rates_row(name: str, machine: Machine) -> str:
    """The rates of one machine, as a line of a table."""
    device = machine.rates.device
    flops = [f"{rate / 1e12:,.1f}" for rate in (device.products.bfloat16, device.products.float32)]
    speeds = [device.memory, device.to_device, machine.rates.source_disk.read, machine.rates.output_disk.write]
    gigabytes = [f"{rate / 1e9:,.0f}" if rate < _INFINITE else "" for rate in speeds]
    sizes = [format_bytes(machine.memory), format_bytes(machine.device_memory) if machine.device_memory else ""]
    return f"| {' | '.join([name, *flops, *gigabytes, *sizes, machine.comes_from])} |"


def print_rows(model: str, source: Path, experts: int, all_machines: dict[str, Machine]) -> dict[str, Any]:
    """Prints what a checkpoint needs on every machine; returns it by machine and preset.

    Args:
        model: Its name.
        source: Its folder.
        experts: How many are to be left in every layer.
        all_machines: By name.
    """
    found: dict[str, Any] = {}
    by_kind: dict[tuple[bool, torch.dtype], list[str]] = {}
    for name, machine in all_machines.items():
        by_kind.setdefault((bool(machine.device_memory), machine.compute), []).append(name)
    # Machines that compute alike have the same plans, and these take longer than what is computed from them.
    for names in by_kind.values():
        first = all_machines[names[0]]
        whole = opened(source, first)
        plans = {preset: planned(whole, experts, preset, first) for preset in PRESETS}
        for name, (preset, plan) in itertools.product(names, plans.items()):
            result = needed(plan, all_machines[name])
            found.setdefault(name, {})[preset] = result
            print(row(model, name, preset, result), flush=True)
    return found


def print_table(*columns: str) -> None:
    """Prints the head of a table."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measured", action="store_true", help="add the machine that this runs on")
    wanted = parser.parse_args()
    all_machines = machines() | ({"this machine": this_machine()} if wanted.measured else {})
    speeds = ("bf16, TFLOP/s", "float32, TFLOP/s", "memory, GB/s", "copies, GB/s", "read, GB/s", "write, GB/s")
    print_table("machine", *speeds, "RAM", "card", "rates")
    for name, machine in all_machines.items():
        print(rates_row(name, machine))
    print_table("model", "machine", "preset", "time", "binds", "memory", "per card", "disk", "fits")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="giants-") as folder:
        for model, config in GIANTS.items():
            source = write_giant(Path(folder) / model, config)
            found[model] = print_rows(model, source, config["n_routed_experts"] // 2, all_machines)
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
