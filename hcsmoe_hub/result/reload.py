"""Loads a checkpoint as a user would, in a separate process, and reports what transformers found.

Run as ``python -m hcsmoe_hub.result.reload FOLDER TOKENS LAYOUT``; prints the name of every step before it begins, and
last one JSON object. A layout with a modelling file runs the one in the folder, so the caller must first have compared
it with the one that hcsmoe writes.
"""

import json
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from hcsmoe_hub.checkpoint.formats import LogicalTensor, logical_tensors
from hcsmoe_hub.checkpoint.formats.grid import WHOLE
from hcsmoe_hub.checkpoint.formats.mxfp4 import Mxfp4Blocks
from hcsmoe_hub.checkpoint.formats.scaled import ScaledCodec
from hcsmoe_hub.checkpoint.lazy_tensor import read_logical
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.model.model_class import build_config, model_class
from hcsmoe_hub.model.raw_config import SAME_CODE
from hcsmoe_hub.model.sequences import start_token
from hcsmoe_hub.model.transformers_seam import class_in_folder
from hcsmoe_hub.model.wrong_experts import run_chosen_experts
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.own_code import OWN_CODE

# Any short prompt will do: this checks the strict load, and that the model runs.
PROMPT_LENGTH = 8
GENERATION_FILE = "generation_config.json"


class Step(StrEnum):
    """What the process does, in order: what has failed is the step that was begun last."""

    DEFAULTS = "defaults"
    LOAD = "load"
    RUN = "run"


def _begin(step: Step) -> None:
    sys.stdout.write(f"{step}\n")
    sys.stdout.flush()


def reload(folder: Path, tokens: int, *, run_code: bool) -> dict[str, Any]:
    """Loads with ``from_pretrained`` and generates greedily.

    The defaults in the folder for generation are read, but not used: they may ask for what only some programs can do.
    Nor is the attention that its config names, which this machine may not have.

    Args:
        folder: The checkpoint.
        tokens: Number of tokens to generate.
        run_code: Whether the modelling file in the folder may run.

    Returns:
        The loading info as lists of names, the generated token ids, the dtype of the model, and whether the logits were
        finite.
    """
    source = LocalSource(folder)
    _begin(Step.DEFAULTS)
    if (folder / GENERATION_FILE).exists():
        GenerationConfig.from_pretrained(folder)
    _begin(Step.LOAD)
    size = sum(source.fetch(shard).stat().st_size for shard in source.shards)
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    with tempfile.TemporaryDirectory() as offload:
        # accelerate spreads a model that does not fit over devices, memory and disk.
        spread = {"device_map": "auto", "offload_folder": offload} if size > psutil.virtual_memory().available else {}
        how = {
            "output_loading_info": True,
            "generation_config": settings,
            "attn_implementation": None,
            "experts_implementation": None,
            **spread,
        }
        model, info = load_whole(folder, source, how, run_code=run_code)
        _begin(Step.RUN)
        # Qwen3-Omni thinks with one model, which generates text, and speaks with another.
        model = getattr(model, "thinker", model)
        vocab_size = model.config.get_text_config().vocab_size
        prompt = (torch.arange(PROMPT_LENGTH)[None] % vocab_size).to(model.device)
        # A modelling file of a result runs the right ones itself.
        if not run_code:
            run_chosen_experts(model)
        begun = {}
        if getattr(model.config, "is_encoder_decoder", False):
            settings.decoder_start_token_id = start_token(model.config)
            begun = {"decoder_input_ids": torch.full_like(prompt[:, :1], settings.decoder_start_token_id)}
        with torch.no_grad():
            finite = bool(model(prompt, **begun).logits.isfinite().all())
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    names = {kind: sorted(str(name) for name in found) for kind, found in info.items()}
    return {
        "error_msgs": [],
        **names,
        "finite": finite,
        "dtype": str(model.dtype).removeprefix("torch."),
        # What is generated follows the prompt, or the first token of a decoder that reads it through an encoder.
        "generated": output[0, 1 if begun else PROMPT_LENGTH :].tolist(),
    }


def load_whole(folder: Path, source: LocalSource, how: dict[str, Any], *, run_code: bool) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint, and what transformers says of its names.

    Args:
        folder: The checkpoint.
        source: Its tensors.
        how: Arguments of ``from_pretrained``.
        run_code: Whether its modelling file may run.
    """
    tensors = logical_tensors(source.config, source.tensors)
    config = build_config(source.config)
    # The class that the checkpoint names: a composite as a whole, with its vision tower.
    auto = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    loader: Any = auto if run_code else model_class(config)
    is_known = source.config["model_type"] not in SAME_CODE
    if is_known and all(_is_read_by_transformers(tensor) for tensor in tensors.values()):
        return loader.from_pretrained(folder, trust_remote_code=run_code, **how)
    if run_code:
        loader = class_in_folder(source.config["auto_map"][loader.__name__], folder)
    with TensorReader(source) as reader:
        state = {name: read_logical(tensor, reader)[1] for name, tensor in tensors.items()}
    return loader.from_pretrained(None, config=config, state_dict=state, dtype="auto", **how)


def _is_read_by_transformers(tensor: LogicalTensor) -> bool:
    """Whether transformers decodes a tensor on any machine: without other libraries, and with blocks that are whole."""
    match tensor.codec:
        case None | Mxfp4Blocks():
            return True
        case ScaledCodec(scale_key="{name}_scale_inv", grid=grid) if len(tensor.shape) == 2:
            sizes = zip(tensor.shape, grid.block, strict=True)
            return all(length == WHOLE or size % length == 0 for size, length in sizes)
        case _:
            return False


def main() -> None:
    """Entry point of the fresh process."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder, tokens, layout = sys.argv[1:]
    sys.stdout.write(json.dumps(reload(Path(folder), int(tokens), run_code=Layout(layout) in OWN_CODE)) + "\n")


if __name__ == "__main__":
    main()
