"""Samples calibration text from the source model itself: no text is needed, and it is what the model knows."""

from collections.abc import Iterator

import torch
from transformers import GenerationConfig

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import CalibrationError
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.device import compute_dtype, resolve_device
from hcsmoe_hub.machine.memory import available_memory
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.result.reload import load_whole

# Tokens of one document at most, and documents that are written side by side.
TOKENS = 512
DOCUMENTS = 16


def sample_from_source(plan: ConversionPlan, seed: int) -> Iterator[list[int]]:
    """Documents that the source model writes at temperature 1, without end.

    The model is loaded as a whole when the first document is asked for.

    Args:
        plan: The conversion.
        seed: Seed of the first batch of documents; later ones count up.

    Yields:
        The token ids of each document: the begin token, and what follows up to the end token or 512 tokens.

    Raises:
        CalibrationError: If the model does not fit into memory, or has no token to begin with.
    """
    model = plan.model
    config = model.skeleton.text_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [end for end in ends if end is not None]
    begin = next((token for token in (config.bos_token_id, *ends) if token is not None), None)
    if begin is None:
        raise CalibrationError(
            f"the config of {model.source.label} names no token that a text begins with.",
            hint="use another text for `dataset`",
        )
    device = resolve_device(plan.options.device)
    _check_room(plan, device)
    for shard in model.source.shards:
        path = model.source.fetch(shard)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=min(TOKENS, (getattr(config, "max_position_embeddings", None) or TOKENS + 1) - 1),
        bos_token_id=begin,
        eos_token_id=ends or None,
        pad_token_id=begin,
    )
    how = {"attn_implementation": None, "experts_implementation": None, "output_loading_info": True}
    whole, _ = load_whole(path.parent, LocalSource(path.parent), how, run_code=False)
    # Qwen3-Omni thinks with one model, which generates text, and speaks with another.
    whole = getattr(whole, "thinker", whole).to(device, dtype=_dtype(plan, device)).eval()
    prompt = torch.full((DOCUMENTS, 1), begin, device=device)
    while True:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            written = whole.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        for document in written.tolist():
            end = next((place for place, token in enumerate(document[1:], 1) if token in ends), len(document))
            yield document[: end + 1]
        seed += 1


def _dtype(plan: ConversionPlan, device: torch.device) -> torch.dtype:
    """The dtype to write in: that of the model, unless the device would take ages for it."""
    own = plan.model.skeleton.dtype
    return compute_dtype(device) if own == torch.bfloat16 else own


def _check_room(plan: ConversionPlan, device: torch.device) -> None:
    """Checks that the whole model fits where it is to write.

    Raises:
        CalibrationError: If it does not.
    """
    state = plan.model.skeleton.state.values()
    needed = sum(tensor.numel() for tensor in state) * _dtype(plan, device).itemsize
    free = available_memory()
    place = "memory"
    if not accelerator.is_host(device) and accelerator.free_bytes(device) < free:
        free, place = accelerator.free_bytes(device), "the memory of the GPU"
    if needed > free:
        raise CalibrationError(
            f"{plan.model.source.label} takes {format_bytes(needed)} to write text itself, and {place} has "
            f"{format_bytes(free)} free.",
            hint="serve it elsewhere, and pass the server as `dataset='http://HOST:PORT/v1'`",
        )
