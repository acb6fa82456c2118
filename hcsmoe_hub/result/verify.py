"""Verifies a written checkpoint: structure, finite values, a strict reload, and generation."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.durable import INCOMPLETE
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.shards import top_safetensors
from hcsmoe_hub.checkpoint.source import LocalSource, Source
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE, SINGLE_FILE, StoredTensor, total_bytes
from hcsmoe_hub.checkpoint.unfinished import refuse_unfinished
from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.model.raw_config import loading_problem
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.model.trained import layer_keys, trained_keys
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.model.wrong_experts import wrong_experts_warning
from hcsmoe_hub.observation.overflow import overflow_hint, overflow_in
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.factored_layout import factor_tensors
from hcsmoe_hub.planning.own_code import OWN_CODE
from hcsmoe_hub.planning.tensor_fates import MtpRule, take_account
from hcsmoe_hub.result.layout_check import (
    check_code,
    check_neurons,
    check_report,
    experts_per_layer,
    layout_of,
    trained_parts,
)
from hcsmoe_hub.result.reload import GENERATION_FILE, Step

GENERATED_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A checkpoint that passed all checks.

    Attributes:
        tensors: Number of tensors.
        weights_bytes: Their size.
        experts: Experts per MoE layer.
        moe_layers: Number of MoE layers, that of a multi-token prediction head included.
        generated: Token ids that the reloaded model generated.
        identical: Number of tensors that are bit-identical to the source's; ``None`` without a source to compare with.
        warnings: What users of the installed version of transformers should know.
    """

    tensors: int
    weights_bytes: int
    experts: int
    moe_layers: int
    generated: list[int]
    identical: int | None = None
    warnings: list[str] = field(default_factory=list)


class PartialResult(LocalSource):
    """The folder of a running conversion; some shards may have been uploaded and deleted."""

    def __init__(self, folder: Path, sent: Mapping[str, Mapping[str, StoredTensor]]) -> None:
        super().__init__(folder)
        self._sent = sent

    def files(self) -> list[str]:
        return sorted({*super().files(), *self._sent})

    def shard_tensors(self, shard: str) -> dict[str, StoredTensor]:
        return dict(self._sent[shard]) if shard in self._sent else super().shard_tensors(shard)


def check_structure(folder: Path, *, sent: Mapping[str, Mapping[str, StoredTensor]] | None = None) -> SourceModel:
    """Checks index, headers, names, shapes, expert numbering and config against each other, without reading weights.

    Args:
        folder: The checkpoint.
        sent: Passed only by a running conversion: shards that it has uploaded and deleted, with the tensors from their
            headers.

    Raises:
        VerificationError: If they disagree.
        SourceError: If the folder is not a readable checkpoint.
    """
    source = LocalSource(folder) if sent is None else PartialResult(folder, sent)
    files = source.files()
    # Below the folder, other programs may keep downloads of their own.
    unfinished = [file for file in files if file.endswith(INCOMPLETE) and "/" not in file]
    if unfinished:
        raise VerificationError(f"{folder} holds unfinished files: {', '.join(unfinished[:3])}.", hint="convert again")
    stray = set(top_safetensors(files)) - set(source.shards)
    if stray:
        raise VerificationError(
            f"{folder} holds shards that its index does not list: {', '.join(sorted(stray)[:3])}. Some programs "
            "load every shard in a folder.",
            hint="delete them",
        )
    if source.weight_map is None and source.shards != [SINGLE_FILE]:
        raise VerificationError(
            f"{folder} has no {INDEX_FILE}, without which transformers does not load its shards.",
            hint="convert again, or download the index",
        )
    if source.weight_map is not None:
        unlisted = source.tensors.keys() - source.weight_map.keys()
        if unlisted:
            raise VerificationError(
                f"the index of {folder} does not list {len(unlisted)} stored tensors, such as {sorted(unlisted)[0]!r}.",
                hint="convert again",
            )
    model = read_model(source)
    check_report(model)
    check_neurons(model)
    check_code(model)
    return model


def verify(folder: Path, *, against: Source | None = None) -> Verification:
    """Checks a checkpoint completely, and finally loads it and generates text in a fresh process.

    Args:
        folder: The checkpoint.
        against: Its source; tensors that the conversion copied must be bit-identical.

    Raises:
        VerificationError: For the first check that fails.
        SourceError: If the folder, or the source, is not a readable checkpoint.
    """
    refuse_unfinished(folder)
    model = check_structure(folder)
    tensors = model.source.tensors
    with TensorReader(model.source) as reader:
        for name, stored in tensors.items():
            content = reader.read(stored)
            if content.is_floating_point() and not _is_finite(content):
                raise VerificationError(f"tensor {name!r} in {stored.shard} is not finite.", hint="convert again")
    identical = None if against is None else _compare(model, against)
    # A result with a modelling file brings the right code along.
    warning = None if layout_of(model) in OWN_CODE else wrong_experts_warning(model.source.config["model_type"])
    return Verification(
        tensors=len(tensors),
        weights_bytes=total_bytes(tensors.values()),
        experts=experts_per_layer(model),
        moe_layers=len(model.blocks),
        generated=_reload(model),
        identical=identical,
        warnings=[] if warning is None else [warning],
    )


def _is_finite(content: Tensor) -> bool:
    wide = content.float() if content.dtype.itemsize < 2 else content
    return bool(wide.isfinite().all())


def _compare(model: SourceModel, against: Source) -> int:
    """Compares every tensor that a conversion copies, and returns their number.

    Raises:
        VerificationError: If one is missing or differs.
    """
    original = read_model(against, with_mtp=model.skeleton.mtp is not None)
    factors = {tensor.name for block in model.blocks for tensor in factor_tensors(block, model.skeleton.state)}
    whole = {tensor.name for block in original.blocks for tensor in block.experts} if factors else set[str]()
    kept_names = model.skeleton.state.keys() - factors
    # Matrices that became factors are missing; biases of experts are not.
    if not original.skeleton.state.keys() - whole <= kept_names <= original.skeleton.state.keys():
        raise VerificationError(
            f"{against.label} is not the source of {model.source.label}: their tensors differ.",
            hint="pass the checkpoint that it was made from; hcsmoe.json names it",
        )
    layout = layout_of(model)
    is_unmerged = (
        layout is Layout.REDUCED
        and original.settings.experts == model.settings.experts
        and neurons_of(original) == neurons_of(model)
    )
    # What the model does not load of a prediction head is kept as a whole, or left out.
    is_kept = bool(model.source.tensors.keys() & set(original.parts_of(original.mtp_keys)))
    rule = MtpRule(fits=True) if is_kept else MtpRule(dropped="the result has none of it")
    keeps_format = model.is_quantized or not original.is_quantized
    account = take_account(original, model.skeleton.state, layout=layout, mtp=rule, keep_format=keeps_format)
    dropped = set(original.parts_of(account.dropped))
    is_complete = is_unmerged and keeps_format
    changed = _trained(original, trained_parts(model))
    kept = against.tensors.keys() - dropped if is_complete else original.parts_of(account.copied)
    copied = sorted(set(kept) - changed)
    with TensorReader(model.source) as ours, TensorReader(against) as theirs:
        for name in copied:
            found, expected = model.source.tensors.get(name), against.tensors[name]
            if found is None:
                raise VerificationError(f"tensor {name!r} of {against.label} is missing.", hint="convert again")
            is_same_kind = (found.dtype, found.shape) == (expected.dtype, expected.shape)
            if not is_same_kind or not torch.equal(_bits(ours.read(found)), _bits(theirs.read(expected))):
                raise VerificationError(
                    f"tensor {name!r} differs from {against.label}, although the conversion only copies it.",
                    hint="convert again",
                )
    return len(copied)


def _trained(original: SourceModel, parts: Collection[str]) -> set[str]:
    """Stored tensors of a source that a training of the result may have changed."""
    if "lora" in parts:
        return set(layer_keys(original))
    named = {"routers": "router" in parts, "experts": "experts" in parts, "norms": "norms" in parts}
    return set(trained_keys(original, **named))


def _bits(content: Tensor) -> Tensor:
    return content.reshape(-1).view(torch.uint8)


def _reload(model: SourceModel) -> list[int]:
    """Loads the checkpoint in a fresh process, and returns the token ids that it generates."""
    assert model.source.path is not None
    problem = loading_problem(model.source.config)
    if problem is not None:
        raise VerificationError(
            f"transformers cannot load {model.source.path} with its config.json: {problem}.",
            hint="correct it in config.json, here and in the source",
        )
    # -P: files in the current folder must not shadow libraries.
    command = [sys.executable, "-P", "-m", "hcsmoe_hub.result.reload"]
    command += [str(model.source.path), str(GENERATED_TOKENS), layout_of(model)]
    with tempfile.TemporaryDirectory() as modules:
        # transformers copies the checkpoint's code before it runs, by default into the user's cache.
        environment = os.environ | {"HF_MODULES_CACHE": modules}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    printed = done.stdout.splitlines()
    if done.returncode != 0:
        raise _failed(model.source.path, printed, done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])
    result: dict[str, Any] = json.loads(printed[-1])
    expected = model.not_loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        # Tensors that the model does not load in the source either, such as a vision tower, are expected.
        found = [name for name in result[kind] if name not in expected]
        if found:
            raise VerificationError(
                f"transformers reports {len(found)} {kind.replace('_', ' ')}, the first is {found[0]!r}.",
                hint="convert again",
            )
    if not result["finite"]:
        dtype = getattr(torch, result["dtype"])
        raise VerificationError(
            f"the reloaded model does not generate from finite logits, although all of its weights are finite: "
            f"{overflow_in(dtype)}.",
            hint=overflow_hint(dtype),
        )
    if len(result["generated"]) != GENERATED_TOKENS:
        raise VerificationError(
            f"the reloaded model does not generate {GENERATED_TOKENS} tokens: {result['generated']}.",
            hint="convert again",
        )
    generated: list[int] = result["generated"]
    return generated


def _failed(folder: Path, printed: Sequence[str], errors: Sequence[str]) -> VerificationError:
    """What to report of a process that has ended early: the step that it had begun, and its last words."""
    begun = [step for step in Step if step in printed]
    match begun[-1] if begun else None:
        case Step.DEFAULTS:
            return VerificationError(
                f"transformers cannot read {folder / GENERATION_FILE}: {errors[-1]}",
                hint=f"correct {GENERATION_FILE}, or delete it",
            )
        case Step.RUN:
            return VerificationError(
                f"transformers loads {folder}, but the model does not generate: {errors[-1]}", hint="convert again"
            )
        case _:
            return VerificationError(f"transformers cannot load {folder}: {errors[-1]}", hint="convert again")
