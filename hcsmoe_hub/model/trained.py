"""What of a reduced model its source's logits may change: routers, experts and norms."""

from hcsmoe_hub.model.source_model import SourceModel


def trained_parameters(
    model: SourceModel, *, routers: bool = True, experts: bool = True, norms: bool = True
) -> list[str]:
    """Names of the parameters that a training of the whole model changes, in the order of the model.

    Routers, experts and norms of the layers of all stacks, and the norms after them. Attention, shared experts,
    embeddings and head stay the source's, as does everything that text does not run through and an MTP head.

    Args:
        model: A source or a result.
        routers: Whether routers are among them.
        experts: Whether routed experts are.
        norms: Whether norms are.
    """
    skeleton, named = model.skeleton, set[str]()
    for block in model.decoder_blocks:
        named |= {tensor.name for tensor in block.router} if routers else set()
        named |= {tensor.name for tensor in block.experts} if experts else set()
    for stack in skeleton.stacks if norms else ():
        for path, module in skeleton.module.get_submodule(stack.runner_name).named_modules(prefix=stack.runner_name):
            if "norm" in type(module).__name__.lower():
                named |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    stored = {target for group in model.groups.values() for target in group.targets.values()}
    return [
        name
        for name, parameter in skeleton.module.named_parameters()
        if name in named & stored and parameter.is_floating_point() and (skeleton.layer_of(name) or 0) < skeleton.depth
    ]


def trained_keys(model: SourceModel, *, routers: bool = True, experts: bool = True, norms: bool = True) -> list[str]:
    """Names of the stored tensors, quantised or not, that these parameters are made of.

    Args:
        model: A source or a result.
        routers: Whether routers are among them.
        experts: Whether routed experts are.
        norms: Whether norms are.
    """
    trained = set(trained_parameters(model, routers=routers, experts=experts, norms=norms))
    return [
        part
        for group in model.groups.values()
        for part in model.parts_of(name for name, target in group.targets.items() if target in trained)
    ]


def layer_keys(model: SourceModel) -> list[str]:
    """Names of all stored tensors of the decoder layers: LoRA changes most of them."""
    return [
        part
        for layer, group in model.groups.items()
        if layer is not None and layer < model.skeleton.depth
        for part in model.parts_of(group.targets)
    ]
