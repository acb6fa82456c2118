"""What of a reduced model its source's logits may change: routers, experts and norms of the decoder."""

from hcsmoe_hub.model.source_model import SourceModel


def trained_parameters(model: SourceModel) -> list[str]:
    """Names of the parameters that a training of the whole model changes, in the order of the model.

    Routers, experts and norms of the decoder layers, and the norm after them. Attention, shared experts, embeddings and
    head stay the source's, as does everything that text does not run through and an MTP head.

    Args:
        model: A source or a result.
    """
    skeleton = model.skeleton
    named = {tensor.name for block in model.decoder_blocks for tensor in (*block.router, *block.experts)}
    for path, module in skeleton.decoder.named_modules(prefix=skeleton.decoder_name):
        if "norm" in type(module).__name__.lower():
            named |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    stored = {target for group in model.groups.values() for target in group.targets.values()}
    return [
        name
        for name, parameter in skeleton.module.named_parameters()
        if name in named & stored and parameter.is_floating_point() and (skeleton.layer_of(name) or 0) < skeleton.depth
    ]


def trained_keys(model: SourceModel) -> list[str]:
    """Names of the stored tensors, quantised or not, that these parameters are made of."""
    trained = set(trained_parameters(model))
    return [
        part
        for group in model.groups.values()
        for part in model.parts_of(name for name, target in group.targets.items() if target in trained)
    ]
