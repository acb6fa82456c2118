"""The two ways to run a checkpoint: entirely in memory, or one decoder layer at a time."""

from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hcsmoe_hub.evaluation.checkpoint import DTYPE, Checkpoint
from hcsmoe_hub.evaluation.scorer import Scorer
from hcsmoe_hub.events import Listener, ignore
from hcsmoe_hub.machine.device import default_batch_tokens
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.pipeline.stream import StreamedLayer, make_batcher, stream

# Share of the free memory for weights; the rest is for activations, logits and other programs.
_SHARE = 0.8
# Share of the free memory for the hidden states of a pass; a layer's input, its output and copies of both coexist.
_STATES_SHARE, _COPIES = 0.2, 4
_MIN_PASS_TOKENS, _MAX_PASS_TOKENS = 4096, 1 << 20
# Micro-batches of a conversion per batch here, where statistics do not compete for the processor's caches.
_BATCHES = 4
# Prompts per generated batch.
_PROMPTS = 32


class LoadedScorer(Scorer):
    """Holds the whole model in memory.

    Args:
        checkpoint: The checkpoint to run.
        device: Where the model runs.
        emit: Called with downloads.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, *, emit: Listener = ignore) -> None:
        super().__init__(checkpoint, batch_tokens=_BATCHES * default_batch_tokens(on_device=device.type != "cpu"))
        self._device = device
        skeleton = checkpoint.skeleton()
        with checkpoint.loading(skeleton, device, emit) as loader:
            loader.load(None)
            for layer in range(len(skeleton.layers)):
                loader.load(layer)
        skeleton.module.tie_weights()
        # Dequantised weights arrive in bfloat16.
        nn.Module.to(skeleton.module, device, DTYPE)
        self._filled = skeleton

    def _skeleton(self) -> Skeleton:
        return self._filled

    def _hidden(self, ids_BS: Tensor) -> Tensor:
        decoder: Any = self._filled.decoder
        hidden_BSH: Tensor = decoder(input_ids=ids_BS.to(self._device), use_cache=False)[0]
        return hidden_BSH

    def continuations(self, prompts: Sequence[Sequence[int]], *, tokens: int, last: int | None) -> list[list[int]]:
        settings = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, use_cache=True, eos_token_id=last, pad_token_id=last
        )
        # Otherwise the model's defaults would fill in what is unset here, such as the end-of-text token.
        model: Any = self._filled.module
        model.generation_config = settings
        added: list[list[int]] = []
        for begin in range(0, len(prompts), _PROMPTS):
            ids_BS = torch.tensor([list(prompt) for prompt in prompts[begin : begin + _PROMPTS]], device=self._device)
            with torch.no_grad():
                output_BS = model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), generation_config=settings)
            added += output_BS[:, ids_BS.shape[1] :].tolist()
        return [ids[: ids.index(last)] if last in ids else ids for ids in added]


def _run_in_float32(layer: StreamedLayer, inputs: Call) -> Any:
    """Runs a layer; weights that were dequantised have come in bfloat16."""
    nn.Module.to(layer.module, DTYPE)
    return layer.run(inputs)


class StreamedScorer(Scorer):
    """Reads the checkpoint once per pass, and holds only the current decoder layer and the next one.

    Args:
        checkpoint: The checkpoint to run.
        device: Where layers run.
        emit: Called with downloads.
        pass_tokens: Tokens per pass; ``None`` for as many as fit into a share of the free memory.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, *, emit: Listener = ignore, pass_tokens: int | None = None
    ) -> None:
        if pass_tokens is None:
            free = psutil.virtual_memory().available * _STATES_SHARE
            fitting = int(free / (_COPIES * DTYPE.itemsize * checkpoint.hidden_size))
            pass_tokens = min(max(fitting, _MIN_PASS_TOKENS), _MAX_PASS_TOKENS)
        super().__init__(checkpoint, batch_tokens=pass_tokens)
        self._device = device
        self._emit = emit
        self._passed: Skeleton | None = None

    def _skeleton(self) -> Skeleton:
        assert self._passed is not None, "a head is applied to the states of a pass"
        return self._passed

    def _hidden(self, ids_BS: Tensor) -> Tensor:
        # A streamed skeleton cannot be used again; it is freed before the new one is filled.
        self._passed = None
        skeleton = self.checkpoint.skeleton()
        states: list[Tensor] = []
        skeleton.decoder.register_forward_hook(lambda module, args, output: states.append(output[0]))
        # The logits of all sequences at once would take more memory than everything else.
        last: Any = skeleton.module.get_output_embeddings()
        vars(last)["forward"] = lambda states_BSH: states_BSH[:, :1]
        size = default_batch_tokens(on_device=self._device.type != "cpu")
        batcher = make_batcher(skeleton, ids_BS, batch_tokens=size, device=self._device)
        with self.checkpoint.loading(skeleton, self._device, self._emit) as loader:
            loader.load(None)
            nn.Module.to(skeleton.module, DTYPE)
            stream(skeleton, loader, _run_in_float32, ids_BS, batcher=batcher)
        del vars(last)["forward"]
        last.to(self._device)
        self._passed = skeleton
        return states[0]


def free_bytes(device: torch.device) -> int:
    """Free memory of a device in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)


def make_scorers(
    checkpoints: Sequence[Checkpoint], device: torch.device, *, stream: bool, emit: Listener = ignore
) -> list[Scorer]:
    """Makes scorers that run from memory if all checkpoints fit together, otherwise layer by layer.

    Args:
        checkpoints: Checkpoints that run side by side.
        device: Where they run.
        stream: Whether to run layer by layer in any case.
        emit: Called with downloads.

    Returns:
        A scorer for each checkpoint, in the same order.
    """
    needed = sum(checkpoint.nbytes for checkpoint in checkpoints)
    kind = StreamedScorer if stream or needed > _SHARE * free_bytes(device) else LoadedScorer
    return [kind(checkpoint, device, emit=emit) for checkpoint in checkpoints]
