"""The two ways to run a checkpoint: entirely in memory, or one decoder layer at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hcsmoe_hub.evaluation.checkpoint import DTYPE, Checkpoint
from hcsmoe_hub.evaluation.encoder_mask import hiding_padding
from hcsmoe_hub.evaluation.scorer import Scorer
from hcsmoe_hub.events import Listener, ignore
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.device import default_batch_tokens
from hcsmoe_hub.model.sequences import run_through, start_token
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.pipeline.stream import StreamedLayer, make_batcher, stream

# Share of the free memory for weights; the rest is for activations, logits and other programs.
MEMORY_SHARE = 0.8
# Share of the free memory for the hidden states of a pass; a layer's input, its output and copies of both coexist.
_STATES_SHARE, _COPIES = 0.2, 4
_MIN_PASS_TOKENS, _MAX_PASS_TOKENS = 4096, 1 << 20
# Micro-batches of a conversion per batch here, where statistics do not compete for the caches of a CPU.
_HOST_BATCHES = 4
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
        on_device = not accelerator.is_host(device)
        batches = 1 if on_device else _HOST_BATCHES
        super().__init__(checkpoint, batch_tokens=batches * default_batch_tokens(on_device=on_device))
        self._device = device
        self._filled = checkpoint.filled(device, emit)

    def _skeleton(self) -> Skeleton:
        return self._filled

    def _hidden(self, ids_BS: Tensor, sources: Sequence[int]) -> Tensor:
        with hiding_padding(self._filled, sources):
            return run_through(self._filled, ids_BS.to(self._device), source_length=max(sources))

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        tokens: int,
        last: int | None,
        begins: Sequence[Sequence[int]] = (),
    ) -> list[list[int]]:
        settings = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, use_cache=True, eos_token_id=last, pad_token_id=last
        )
        # Otherwise the model's defaults would fill in what is unset here, such as the end-of-text token.
        model: Any = self._filled.module
        model.generation_config = settings
        added: list[list[int]] = [[] for _ in prompts]
        for rows in _alike(prompts, begins):
            ids_BS = torch.tensor([list(prompts[row]) for row in rows], device=self._device)
            inputs: dict[str, Tensor] = {}
            known = ids_BS.shape[1]
            if begins:
                settings.decoder_start_token_id = start_token(self._filled.config)
                written = [settings.decoder_start_token_id, *begins[rows[0]]]
                inputs["decoder_input_ids"] = torch.tensor([written] * len(rows), device=self._device)
                known = len(written)
            with torch.no_grad():
                output_BS = model.generate(
                    ids_BS, attention_mask=torch.ones_like(ids_BS), generation_config=settings, **inputs
                )
            for row, ids in zip(rows, output_BS[:, known:].tolist(), strict=True):
                added[row] = ids[: ids.index(last)] if last in ids else ids
        return added


def _alike(prompts: Sequence[Sequence[int]], begins: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of prompts that can be continued side by side: of one length, with the same beginning."""
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault((len(prompt), tuple(begins[row]) if begins else ()), []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), _PROMPTS):
            yield rows[start : start + _PROMPTS]


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
        self.is_unpadded = checkpoint.shares_biases
        self._device = device
        self._emit = emit
        self._passed: Skeleton | None = None

    def _skeleton(self) -> Skeleton:
        assert self._passed is not None, "a head is applied to the states of a pass"
        return self._passed

    def _hidden(self, ids_BS: Tensor, sources: Sequence[int]) -> Tensor:
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
            with hiding_padding(skeleton, sources):
                stream(skeleton, loader, _run_in_float32, ids_BS, batcher=batcher, source_length=max(sources))
        del vars(last)["forward"]
        last.to(self._device)
        self._passed = skeleton
        return states[0]


def free_bytes(device: torch.device) -> int:
    """Free memory of a device in bytes."""
    return int(psutil.virtual_memory().available) if accelerator.is_host(device) else accelerator.free_bytes(device)


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
    kind = StreamedScorer if stream or needed > MEMORY_SHARE * free_bytes(device) else LoadedScorer
    return [kind(checkpoint, device, emit=emit) for checkpoint in checkpoints]
