"""Loads a checkpoint as a user would, in a separate process, and reports what transformers found.

Run as ``python -m hcsmoe_hub.result.reload FOLDER TOKENS LAYOUT``; prints one JSON object. ``mapped`` runs the
modelling file in the folder, so the caller must first have compared it with the one that hcsmoe writes.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.model.skeleton import build_config, model_class
from hcsmoe_hub.options import Layout

# Any short prompt will do: this checks the strict load, and that the model runs.
PROMPT_LENGTH = 8


def reload(folder: Path, tokens: int, *, run_code: bool) -> dict[str, Any]:
    """Loads with ``from_pretrained`` and generates greedily.

    Args:
        folder: The checkpoint.
        tokens: Number of tokens to generate.
        run_code: Whether the modelling file in the folder may run.

    Returns:
        The loading info as lists of names, the generated token ids, and whether the logits were finite.
    """
    source = LocalSource(folder)
    loader: Any = AutoModelForCausalLM
    if not run_code and type(AutoConfig.from_pretrained(folder)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        loader = model_class(build_config(source.config))
    size = sum(source.fetch(shard).stat().st_size for shard in source.shards)
    with tempfile.TemporaryDirectory() as offload:
        # accelerate spreads a model that does not fit over devices, memory and disk.
        spread = {"device_map": "auto", "offload_folder": offload} if size > psutil.virtual_memory().available else {}
        model, info = loader.from_pretrained(folder, output_loading_info=True, trust_remote_code=run_code, **spread)
        vocab_size = model.config.get_text_config().vocab_size
        prompt = torch.arange(PROMPT_LENGTH)[None] % vocab_size
        with torch.no_grad():
            finite = bool(model(prompt.to(model.device)).logits.isfinite().all())
            output = model.generate(
                prompt.to(model.device), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
    names = {kind: sorted(str(name) for name in found) for kind, found in info.items()}
    return {"error_msgs": [], **names, "finite": finite, "generated": output[0, PROMPT_LENGTH:].tolist()}


def main() -> None:
    """Entry point of the fresh process."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder, tokens, layout = sys.argv[1:]
    sys.stdout.write(json.dumps(reload(Path(folder), int(tokens), run_code=Layout(layout) is Layout.MAPPED)) + "\n")


if __name__ == "__main__":
    main()
