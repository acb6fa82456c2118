"""The factored layout: each expert matrix as ``U V + S``, sizes in ``config.json``, a modelling file that reads them.

This is the second half of MC-SMoE (arXiv 2310.01334): merged experts are made low rank and structurally sparse.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import (
    INCOMING,
    LAYOUT,
    OUTGOING,
    SECTION,
    FactorSizes,
    experts_modules,
)
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.model.blocks import ExpertTensor, MoEBlock
from hcsmoe_hub.model.expert_kinds import experts_of
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.options import Compression, Layout
from hcsmoe_hub.planning.own_code import OWN_CODE
from hcsmoe_hub.report import Change

CODE = OWN_CODE[Layout.FACTORED]


def factored_refusal(model: SourceModel) -> str | None:
    """Why a model cannot have the factored layout; ``None`` if it can."""
    found = experts_modules(model.skeleton.module).keys()
    blocks = {block.experts_path for block in model.blocks}
    if missing := sorted(blocks - found):
        kind = type(model.skeleton.module.get_submodule(missing[0])).__name__
        return f"{kind} runs every expert on inputs that the router has scaled, which its modelling file does not do"
    if others := sorted(found - blocks):
        return f"the modelling file would also change the experts {others[0]!r}, which text does not run through"
    return None


def matrix_sides(model: SourceModel, block: MoEBlock) -> tuple[int, int, int]:
    """How many matrices an expert has before its activation function, its neurons I, and its hidden size H."""
    state = model.skeleton.state
    rows = {block.name_in_experts(tensor): tensor.split(state[tensor.name])[0] for tensor in block.experts}
    neurons = experts_of(model.skeleton.module.get_submodule(block.experts_path)).neurons(rows)
    parts = sum(tensor.dim() == 3 for tensor in neurons.inputs)
    return parts, neurons.size, neurons.outputs[0].shape[2]


def factor_sizes(model: SourceModel, compression: Compression) -> FactorSizes:
    """Sizes of the factors of all experts.

    Raises:
        PlanError: If the rank exceeds a side of a matrix, or the parts are not smaller than the matrix.
    """
    _, neurons, hidden = matrix_sides(model, model.blocks[0])
    smaller = min(neurons, hidden)
    sizes = FactorSizes(
        rank=compression.rank_of(smaller),
        incoming_rows=compression.rows_of(neurons),
        outgoing_rows=compression.rows_of(hidden),
    )
    label = model.source.label
    if sizes.rank > smaller:
        raise PlanError(
            f"`compress='{compression}'` asks for factors of rank {sizes.rank}, but the expert matrices of {label} are "
            f"{neurons} x {hidden}.",
            hint=f"use a rank of at most {(neurons * hidden - 1) // (neurons + hidden)}",
            option="compress",
        )
    for outputs, inputs, rows in ((neurons, hidden, sizes.incoming_rows), (hidden, neurons, sizes.outgoing_rows)):
        stored = sizes.rank * (outputs + inputs) + rows * (inputs + 1)
        if stored >= outputs * inputs:
            raise PlanError(
                f"`compress='{compression}'` makes {stored:,} numbers of an expert matrix of {label}, which has "
                f"{outputs} x {inputs} = {outputs * inputs:,}.",
                hint="use a lower rank or a higher sparsity",
                option="compress",
            )
    return sizes


def factored_config(raw_config: Mapping[str, Any], model: SourceModel, sizes: FactorSizes) -> dict[str, Any]:
    """Returns a copy of a raw config that describes the factored layout.

    ``hcsmoe`` goes where the expert count is: into ``text_config`` if there is one. ``auto_map`` of the source is
    replaced as a whole: agreeing to run our file must not run others with it.

    Args:
        raw_config: Config of a stock model with the experts of the result.
        model: The source.
        sizes: Of the factors.
    """
    config = copy.deepcopy(dict(raw_config))
    config["architectures"] = [CODE.class_name(model)]
    config["auto_map"] = CODE.auto_map(model)
    text_config = config.get("thinker_config", config).get("text_config")
    section = text_config if isinstance(text_config, dict) else config
    section[SECTION] = {"layout": LAYOUT, **asdict(sizes)}
    return config


def with_factors(config: Mapping[str, Any], model: SourceModel, factored: Skeleton) -> dict[str, Any]:
    """Another config of the same result, described as ``factored_config`` does.

    Args:
        config: Config of a stock model with the experts of the result.
        model: The source.
        factored: The result.
    """
    assert factored.factors is not None, "built from a config with sizes"
    return factored_config(config, model, factored.factors)


def build_factored(config: Mapping[str, Any], model: SourceModel) -> Skeleton:
    """The result as a model without weights, and a check that its tensors find their places when it is loaded.

    Args:
        config: Config of the result, from ``factored_config``.
        model: The source.

    Raises:
        PlanError: If a stored factor would be loaded into another parameter, or into none.
    """
    factored = Skeleton(config, model.skeleton.dtype)
    for block in model.blocks:
        names = [tensor.name for tensor in factor_tensors(block, factored.state)]
        stored = model.skeleton.to_stored({name: factored.state[name] for name in names}, model.groups[block.layer])
        found = factored.parameters_of(stored)
        wrong = [name for name in stored if found[name] not in names]
        if wrong or len(set(found.values())) != len(names):
            raise PlanError(
                f"the factored layout cannot hold {model.source.label}: transformers would not load "
                f"{(wrong or list(stored))[0]!r} as what it is.",
                hint="use `layout='reduced'` without `compress`",
            )
    return factored


def factor_tensors(block: MoEBlock, names: Iterable[str]) -> list[ExpertTensor]:
    """The factors and rows of the experts of one block, among the names of a state."""
    prefixes = tuple(f"{block.experts_path}.{place}_" for place in (INCOMING, OUTGOING))
    return [
        ExpertTensor(name=name, dim=0, rows_per_expert=1, extra_rows=0) for name in names if name.startswith(prefixes)
    ]


def expert_flops(model: SourceModel, factored: Mapping[str, Tensor], per_token: int) -> Change:
    """Floating-point operations of the routed experts for one token, in the source and in the result.

    Two for every number of a matrix, a factor or a kept row that the token meets; activation functions and biases are
    left out. The experts of an MTP head do not count.

    Args:
        model: The source.
        factored: Parameters and buffers of the result.
        per_token: Active experts of the result.
    """
    before = after = 0
    for block in model.decoder_blocks:
        parts, neurons, hidden = matrix_sides(model, block)
        before += 2 * model.settings.experts_per_token * (parts + 1) * neurons * hidden
        tensors = (factored[tensor.name] for tensor in factor_tensors(block, factored))
        after += 2 * per_token * sum(tensor[0].numel() for tensor in tensors if tensor.dtype != torch.int32)
    return {"before": before, "after": after}
