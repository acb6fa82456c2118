"""What a conversion will need, computed from headers: download, disk, memory and time."""

from dataclasses import dataclass

# Resident size of a Python process that has imported torch and transformers, before any weight.
PROCESS_BYTES = 420_000_000
# Fusing the stored tensors of a layer briefly holds a part of it twice; the figure is for per-expert checkpoints.
LOADING_FACTOR = 1.35
# Rough reading speed of a local disk, for the estimate of time only.
DISK_BYTES_PER_SECOND = 1e9
# Besides matrix products there are activations, attention and clustering.
COMPUTE_OVERHEAD = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What the largest decoder layer weighs, and what all of them compute per token.

    Attributes:
        layer_bytes: Bytes of the largest decoder layer in memory.
        merged_bytes: Bytes of its experts after the merge.
        rest_bytes: Bytes of everything outside the decoder layers.
        flops_per_token: Floating-point operations per calibration token, over all layers.
    """

    layer_bytes: int
    merged_bytes: int
    rest_bytes: int
    flops_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a conversion needs.

    Attributes:
        download_bytes: Weights that are not on this machine yet.
        disk_bytes: Size of the result, without the download.
        memory_bytes: Peak of resident memory.
        device_bytes: Peak of the accelerator's memory, 0 on the CPU.
        flops: Floating-point operations of the whole run.
        seconds: Estimated time without the download, ``None`` if the speed of the device is unknown.
    """

    download_bytes: int
    disk_bytes: int
    memory_bytes: int
    device_bytes: int
    flops: int
    seconds: float | None = None


def estimate(
    cost: LayerCost,
    *,
    tokens: int,
    batch_tokens: int,
    token_bytes: int,
    hidden_size: int,
    download_bytes: int,
    disk_bytes: int,
    read_bytes: int,
    on_device: bool,
    flops_per_second: float | None = None,
) -> Needs:
    """Adds up the peak: the rest of the model, the layer at work, the one being loaded, and the hidden states.

    Args:
        cost: Sizes of the layers.
        tokens: Calibration tokens.
        batch_tokens: Tokens per micro-batch.
        token_bytes: Bytes per element of a hidden state.
        hidden_size: H.
        download_bytes: Weights still to fetch.
        disk_bytes: Size of the result.
        read_bytes: Weights that are read.
        on_device: Whether layers run on an accelerator instead of the CPU.
        flops_per_second: Measured speed of the device, if known.
    """
    # Input and output of the layer, input of its MoE block, and what its experts returned.
    states = 4 * tokens * hidden_size * token_bytes
    layers = int(cost.layer_bytes * (1 + LOADING_FACTOR)) + cost.merged_bytes
    micro_batch = 16 * min(batch_tokens, tokens) * hidden_size * token_bytes
    flops = cost.flops_per_token * tokens
    seconds = None
    if flops_per_second is not None:
        seconds = COMPUTE_OVERHEAD * flops / flops_per_second + (read_bytes + disk_bytes) / DISK_BYTES_PER_SECOND
    return Needs(
        download_bytes=download_bytes,
        disk_bytes=disk_bytes,
        memory_bytes=PROCESS_BYTES + cost.rest_bytes + states + (0 if on_device else layers + micro_batch),
        device_bytes=layers + micro_batch if on_device else 0,
        flops=flops,
        seconds=seconds,
    )
