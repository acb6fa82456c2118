"""How long a conversion takes, from what it does and how fast this machine is; without the download."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.machine.rates import DeviceRates, Rates, machine_rates
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.disk_space import existing_part
from hcsmoe_hub.planning.work import Work, count_work

# Python, torch, transformers and the skeletons of both models, and the report and the check of the result at the end.
START_SECONDS = 8.0
# What reading and cutting text takes: the libraries for it once, and so many tokens per second.
TEXT_SECONDS, TEXT_TOKENS_PER_SECOND = 4.0, 200_000
# Decompositions in float64 reach this share of the rate of products.
DECOMPOSITION_SHARE = 0.5
# Rows of the product whose rate is measured as that of few rows.
_FEW_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """Seconds of a conversion by what they are spent on.

    Layers are read and written while others are computed, so that of ``read``, ``write``, ``copy`` and the rest only
    the longest counts; of the first layer nothing else is done while it is read, and of the last while it is written.

    Attributes:
        start: Starting and ending: libraries, text, the report.
        read: Reading the source from its disk.
        write: Writing the result to its disk.
        copy: Copies between the host and the accelerator; 0 on the host.
        decode: Turning what is stored into numbers and back, on the host.
        products: Matrix products of the layers.
        refit: Matrix products of the refits.
        memory: Operations on single numbers, which the memory limits.
        launch: Starting operations, where a device waits for the next one.
        layers: Steps between which reading, computing and writing overlap.
        on_device: Whether the host decodes while an accelerator computes.
    """

    start: float
    read: float
    write: float
    copy: float
    decode: float
    products: float
    refit: float
    memory: float
    launch: float
    layers: int
    on_device: bool

    @property
    def lanes(self) -> dict[str, float]:
        """Seconds of what goes on side by side, by name: ``reading``, ``writing``, ``copies``, ``arithmetic``."""
        work = self.products + self.refit + self.memory + self.launch
        lanes = {"reading": self.read, "writing": self.write, "copies": self.copy, "arithmetic": work}
        if self.on_device:
            # One thread of the host reads and decodes.
            lanes["reading"] += self.decode
        else:
            lanes["arithmetic"] += self.decode
        return lanes

    @property
    def seconds(self) -> float:
        """Seconds from start to end."""
        return self.start + max(self.lanes.values()) + (self.read + self.write) / max(1, self.layers)

    @property
    def binds(self) -> str:
        """What takes longest: one of ``lanes``."""
        return max(self.lanes, key=self.lanes.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        """The parts, their sum as ``seconds`` and what ``binds``, as JSON holds them; seconds have three digits."""
        parts = {name: value for name, value in asdict(self).items() if isinstance(value, float)}
        return {name: round(value, 3) for name, value in {"seconds": self.seconds, **parts}.items()} | {
            "binds": self.binds
        }


def plan_duration(plan: ConversionPlan, rates: Rates, *, on_device: bool | None = None) -> Duration:
    """Estimates the time of a conversion, without the download.

    Args:
        plan: The conversion.
        rates: How fast its machine is.
        on_device: Whether layers run on an accelerator, if the rates are those of another machine.
    """
    work, device = count_work(plan), rates.device
    on_device = plan.on_device if on_device is None else on_device
    text = 0.0
    if not plan.calibration.is_token_ids and plan.statistics is None:
        text = TEXT_SECONDS + plan.calibration.tokens / TEXT_TOKENS_PER_SECOND
    copied = work.copied_up / device.to_device + work.copied_down / device.to_host
    return Duration(
        start=START_SECONDS + text,
        read=work.read_bytes / rates.source_disk.read,
        write=work.written_bytes / rates.output_disk.write,
        copy=copied if on_device else 0.0,
        decode=work.host_bytes / device.host_memory,
        products=_product_seconds(work, device),
        # Where a device has no instructions for bfloat16, its rate is that of float32.
        refit=work.refit_flops / device.products.bfloat16,
        memory=work.touched_bytes / device.memory,
        launch=work.launches * device.launch_seconds,
        layers=plan.model.skeleton.depth,
        on_device=on_device,
    )


def _product_seconds(work: Work, device: DeviceRates) -> float:
    products = device.products
    rate = products.of(work.dtype)
    # A product with few rows takes as long as one with more: the matrix must be read.
    missing = _FEW_ROWS * max(0.0, rate / products.few_rows - 1)
    experts = work.expert_flops * (1 + missing / work.expert_rows)
    single = work.float32_flops / products.float32
    double = work.float64_flops / (DECOMPOSITION_SHARE * products.float64)
    return (work.large_flops + experts) / rate + single + double


def measured_rates(plan: ConversionPlan) -> Rates:
    """The rates of this machine for a plan; measured in about two seconds where no earlier run has done so."""
    cache = plan.model.source.cache
    source = plan.model.source.path if cache is None else cache
    return machine_rates(
        resolve_device(plan.options.device),
        source=existing_part(Path(source or plan.output).resolve()),
        output=existing_part(plan.output.resolve()),
    )
