"""Measures one model in a process of its own, which ``cost_memory.py`` starts: peak memory, or throughput in vLLM.

Run as ``python -m hcsmoe_hub.evaluation.cost_process``. A request comes from standard input, the answer goes to
standard output, both as JSON.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.cost_options import CostOptions
from hcsmoe_hub.evaluation.cost_timing import prompts, run
from hcsmoe_hub.evaluation.cost_vllm import time_in_vllm
from hcsmoe_hub.events import ignore
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.device import peak_memory
from hcsmoe_hub.machine.memory import reset_resident_peak
from hcsmoe_hub.machine.out_of_memory import is_out_of_memory

OUT_OF_MEMORY = "the memory ran out"


def peaks(checkpoint: Checkpoint, options: CostOptions, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Peak memory while a model generates.

    Args:
        checkpoint: The model.
        options: Sizes of prompts and batches.
        device: Where it runs.
        dtype: Dtype of its weights.

    Returns:
        ``process``: resident bytes of the process before the model is loaded; ``batches``: peak bytes by batch size, of
        the process on the CPU, otherwise of the tensors on the device.
    """
    reset_resident_peak()
    before = peak_memory(device)["process"]
    skeleton = checkpoint.filled(device, ignore, dtype)
    found: dict[str, int] = {}
    for batch_size in options.batch_sizes:
        ids = prompts(batch_size, options, checkpoint.vocab_size)
        reset_resident_peak()
        accelerator.reset_peak(device)
        run(skeleton, ids, options.new_tokens, device)
        peak = peak_memory(device)
        found[str(batch_size)] = peak["process" if accelerator.is_host(device) else str(device)]
    return {"process": before, "batches": found}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Does what a request asks for: ``peak`` memory, or ``throughput`` in vLLM; ``problem`` if that failed."""
    options = CostOptions(**request["options"])
    cache_dir = None if request["cache_dir"] is None else Path(request["cache_dir"])
    location, revision = request["location"], request["revision"]
    try:
        if request["wanted"] == "throughput":
            return {"throughput": time_in_vllm(location, revision, options, vocab_size=request["vocab_size"])}
        source = open_source(location, revision=revision, token=request["token"], cache_dir=cache_dir)
        device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
        return {"peak": peaks(Checkpoint(source), options, device, dtype)}
    except (RuntimeError, MemoryError, HcsmoeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"problem": OUT_OF_MEMORY}


def main() -> None:
    """Entry point: answers one request."""
    # Libraries print; only the answer may go to the caller.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    json.dump(answer(json.loads(sys.stdin.read())), answers)
    answers.close()


if __name__ == "__main__":
    main()
