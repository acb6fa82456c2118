"""Throughput of models in memory, run by transformers: prefill of a prompt, then decoding with its cache."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hcsmoe_hub.evaluation.cost_options import CostOptions
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.model.sequences import start_token
from hcsmoe_hub.model.skeleton import Skeleton

# Seconds of prefill and of decode.
Seconds = tuple[float, float]


class _Clock(LogitsProcessor):
    """Notes the time whenever the logits of the next token are there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        accelerator.wait(self._device)
        self.times.append(time.perf_counter())
        return scores


def prompts(batch_size: int, options: CostOptions, vocab_size: int) -> list[list[int]]:
    """Token ids of a batch, drawn at random, the same in every run and for all models of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    found: list[list[int]] = torch.randint(
        vocab_size, (batch_size, options.prompt_length), generator=generator, dtype=torch.long
    ).tolist()
    return found


def run(skeleton: Skeleton, ids: Sequence[Sequence[int]], new_tokens: int, device: torch.device) -> Seconds:
    """Generates greedily, once.

    Args:
        skeleton: The model with its weights.
        ids: Token ids of the prompts, all of one length.
        new_tokens: Tokens that are decoded after the first one, which comes from the prompt itself.
        device: Where the model is.

    Returns:
        Seconds until the logits after the prompts are there, and from then until those after the last new token are.
    """
    model: Any = skeleton.module
    # No token ends a text here, so that every run does the same work.
    settings = GenerationConfig(
        max_new_tokens=new_tokens + 1, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    if skeleton.is_encoder_decoder:
        settings.decoder_start_token_id = start_token(skeleton.config)
    model.generation_config = settings
    ids_BP = torch.tensor(ids, device=device)
    clock = _Clock(device)
    accelerator.wait(device)
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(
            ids_BP,
            attention_mask=torch.ones_like(ids_BP),
            generation_config=settings,
            logits_processor=LogitsProcessorList([clock]),
        )
    return clock.times[0] - start, clock.times[-1] - clock.times[0]


def time_models(
    skeletons: Sequence[Skeleton],
    options: CostOptions,
    device: torch.device,
    *,
    vocab_size: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Measures models in turns (A B A B), so that a machine that slows down does not favour one of them.

    Args:
        skeletons: The models with their weights.
        options: Sizes and repetitions.
        device: Where they are.
        vocab_size: Ids of the prompts are below this.
        advance: Called after every run.

    Returns:
        For each model: its throughput by batch size, as ``throughput`` gives it.
    """
    found: list[dict[str, Any]] = [{} for _ in skeletons]
    for batch_size in options.batch_sizes:
        ids = prompts(batch_size, options, vocab_size)
        runs: list[list[Seconds]] = [[] for _ in skeletons]
        for number in range(options.repetitions + 1):
            for skeleton, seconds in zip(skeletons, runs, strict=True):
                took = run(skeleton, ids, options.new_tokens, device)
                # The first run finds kernels and memory.
                seconds += [took] if number else []
                advance()
        for batches, seconds in zip(found, runs, strict=True):
            batches[str(batch_size)] = throughput(seconds, batch_size, options)
    return found


def throughput(runs: Sequence[Seconds], batch_size: int, options: CostOptions) -> dict[str, Any]:
    """Tokens per second of several runs of one batch size.

    Returns:
        ``{"prefill": {"seconds": spread, "tokens_per_second": spread}, "decode": the same}``; a spread is ``{"median",
        "min", "max"}``.
    """
    prefill, decode = zip(*runs, strict=True)
    return {
        "prefill": _rates(prefill, batch_size * options.prompt_length),
        "decode": _rates(decode, batch_size * options.new_tokens),
    }


def _rates(seconds: Sequence[float], tokens: int) -> dict[str, dict[str, float]]:
    return {"seconds": _spread(seconds), "tokens_per_second": _spread([tokens / took for took in seconds])}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}
