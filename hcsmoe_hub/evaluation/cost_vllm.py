"""Throughput of a model in vLLM, through its offline interface; runs in a process of its own (``cost_process``).

vLLM pins its own torch, so it is not among the optional libraries of this program: it is used where it is installed.
"""

import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from hcsmoe_hub.evaluation.cost_options import CostOptions
from hcsmoe_hub.evaluation.cost_timing import Seconds, prompts, throughput


def time_in_vllm(location: str, revision: str | None, options: CostOptions, *, vocab_size: int) -> dict[str, Any]:
    """Measures one model.

    Prefill is the time to the first token; decode is what further tokens take in addition.

    Args:
        location: Folder, or repository id.
        revision: Commit of the repository.
        options: Sizes and repetitions.
        vocab_size: Ids of the prompts are below this.

    Returns:
        Throughput by batch size, as ``cost_timing.throughput`` gives it.
    """
    vllm: Any = import_module("vllm")
    # Prompts are the same in all runs: a cache of prefixes would answer from memory.
    engine = vllm.LLM(
        model=location,
        revision=revision,
        skip_tokenizer_init=True,
        max_model_len=options.prompt_length + options.new_tokens + 1,
        max_num_seqs=max(options.batch_sizes),
        enable_prefix_caching=False,
        seed=0,
    )
    found = {}
    for batch_size in options.batch_sizes:
        inputs = [{"prompt_token_ids": ids} for ids in prompts(batch_size, options, vocab_size)]
        runs: list[Seconds] = []
        for number in range(options.repetitions + 1):
            first = _generate(vllm, engine, inputs, 1)
            whole = _generate(vllm, engine, inputs, 1 + options.new_tokens)
            runs += [(first, whole - first)] if number else []
        found[str(batch_size)] = throughput(runs, batch_size, options)
    return found


def _generate(vllm: Any, engine: Any, inputs: Sequence[dict[str, list[int]]], tokens: int) -> float:
    """Seconds to generate so many tokens after every prompt."""
    settings = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    engine.generate(inputs, settings, use_tqdm=False)
    return time.perf_counter() - start
